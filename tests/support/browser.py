"""A real Chromium, driven by the W3C's WebDriver protocol, which is JSON over HTTP."""

from __future__ import annotations

import base64
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx

from tests.support.served import LONG, until

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the standard's name of a reference
KEYS = {"enter": "\ue007", "escape": "\ue00c", "tab": "\ue004", "left": "\ue012", "home": "\ue011"}


def missing() -> bool:
    """Return whether chromium or its driver is not installed."""
    return shutil.which("chromedriver") is None or shutil.which("chromium") is None


class Browser:
    """A window without a screen."""

    def __init__(self, folder: Path):
        log = folder / "chromedriver.txt"
        with log.open("wb") as out:
            self.process = subprocess.Popen(["chromedriver", "--port=0"], stdout=out, stderr=subprocess.STDOUT)
        port = (
            until(lambda: "started successfully on port " in log.read_text()) and log.read_text().rpartition("port ")[2]
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port.strip().rstrip('.')}", timeout=LONG)
        arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"]
        options = {"goog:chromeOptions": {"args": arguments}, "goog:loggingPrefs": {"browser": "ALL"}}
        self.session = ""
        self.session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": options}})["sessionId"]

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a command, and return its value."""
        prefix = f"/session/{self.session}" if self.session else ""
        answer = self.http.request(method, prefix + path, json=body if method == "POST" else None).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def open(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of a function of JavaScript, and return what it returns."""
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def find(self, selector: str) -> str:
        return self.call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        self.call("POST", f"/element/{self.find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Press keys in an element."""
        self.call("POST", f"/element/{self.find(selector)}/value", {"text": text})

    def size(self, width: int, height: int, scheme: str = "light") -> None:
        """Set the size of the page, and its colours."""
        for command, parameters in (
            ("Emulation.setDeviceMetricsOverride",
             {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}),
            ("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}),
        ):  # fmt: skip
            self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))

    def problems(self) -> list[str]:
        """Return what the page has complained about since it was last asked."""
        entries = self.call("POST", "/se/log", {"type": "browser"})
        # Reading pixels, which only the tests do, is what "rendering" is about.
        return [e["message"] for e in entries if e["level"] in ("SEVERE", "WARNING") and e["source"] != "rendering"]

    def close(self) -> None:
        try:
            self.call("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait(LONG)
            self.http.close()
