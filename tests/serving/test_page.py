"""The page at ``/`` in a real Chromium."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdiff.backends import native
from fastdiff.serving.requests import read_generation
from tests.support.browser import KEYS, Browser, missing
from tests.support.served import NAN_CLASS, Served, until

if native.extension() is None:
    pytest.skip("fastdiff._native is not built", allow_module_level=True)

pytestmark = [
    pytest.mark.xdist_group("server"),
    pytest.mark.skipif(sys.platform != "linux", reason="the server's tests read /proc"),
]
chromium = pytest.mark.skipif(missing(), reason="chromium and its driver are not installed")

MEASURED_BY_MODEL = "return fetch('v1/models').then(r => r.json()).then(r => r.data[0].fastdiff.measured)"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def browser(window: Browser, server: Served) -> Browser:
    """The page, loaded anew."""
    until(lambda: server.http.get("/health/ready").status_code == 200)
    window.size(1440, 900)
    window.open(f"{server.url}/?{np.random.default_rng().integers(1 << 60)}")
    until(lambda: window.run("return document.body.dataset.loaded"))
    window.problems()
    return window


def choose(browser: Browser, **values: Any) -> None:
    """Set controls, as a user does."""
    for name, value in values.items():
        browser.run(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', {bubbles: true}))",
            name,
            str(value),
        )


def finished(browser: Browser) -> bool:
    assert browser.run("return document.getElementById('message').hidden"), browser.text("#message")
    return browser.text("#status").startswith("Finished")


def pixels(browser: Browser, image: int) -> np.ndarray:
    """Return what a canvas shows."""
    values = browser.run(
        "const c = document.querySelectorAll('canvas')[arguments[0]];"
        "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]",
        image,
    )
    return np.array(values, np.uint8).reshape(8, 8, 4)[..., :3]


def test_files_of_the_page(server: Served) -> None:
    answer = server.http.get("/")
    assert answer.headers["content-security-policy"].startswith("default-src 'self';")
    for path in re.findall(r'(?:src|href)="(page/[^"]+)"', answer.text):
        assert server.http.get(f"/{path}").status_code == 200
    for path in ("/page/", "/page/__init__.py", "/page/..%2fserver.py", "/page/%2e%2e/server.py", "/page//etc/passwd"):
        assert server.http.get(path).status_code == 404
    everything = "".join(server.http.get(f"/page/{name}").text for name in ("app.js", "api.js", "grid.js", "style.css"))
    assert "http://" not in everything + answer.text
    assert "https://" not in everything + answer.text
    assert "innerHTML" not in everything


@chromium
def test_images_appear_live_and_a_link_draws_the_same_bits(browser: Browser, server: Served) -> None:
    choose(browser, label=1, n=2, steps=6, seed=11, guidance=1)
    browser.type("#steps", KEYS["enter"])
    until(lambda: finished(browser))
    fields = {"label": 1, "n": 2, "steps": 6, "seed": 11, "guidance": 1, "solver": "unipc"}
    for i, entry in enumerate(server.draw(**fields).json()["data"]):
        alone = Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))
        assert (pixels(browser, i) == np.asarray(alone)).all()
    last = pixels(browser, 0)
    browser.type("#row", KEYS["home"])  # the scrubber, by keyboard
    assert browser.run("return document.querySelector('canvas').dataset.row") == "1"
    assert (pixels(browser, 0) != last).any()
    assert browser.text("#row-value") == "1 of 6"
    assert "after step 1 of 6" in browser.run("return document.querySelector('canvas').getAttribute('aria-label')")
    link = browser.run("return document.getElementById('permalink').href")
    changes = {
        link: "Identical bits: all 2 images are those of the link.",
        re.sub(r"bits=.", "bits=x", link): "Different bits: image 1 of 2. Backend and version are the same",
        re.sub(r"version=[^&]*(.*)bits=.", r"version=0.0.0\1bits=x", link): "version was 0.0.0 and is",
    }
    for changed, words in changes.items():
        browser.open("about:blank")
        browser.open(changed)
        until(lambda: browser.run("return document.body.dataset.loaded") and finished(browser))
        assert words in browser.text("#verdict")
    assert (pixels(browser, 0) == last).all()
    assert browser.problems() == []


@chromium
def test_escape_cancels_and_errors_are_shown(browser: Browser, server: Served) -> None:
    choose(browser, label=1, n=16, steps=1000, solver="ddpm")
    browser.click("#draw")
    until(lambda: browser.text("#status") == "Drawing.")
    assert browser.run("return document.getElementById('draw').disabled")
    browser.type("body", KEYS["escape"])
    until(lambda: browser.text("#status").startswith("Cancelled"))
    until(lambda: server.running() == 0)
    choose(browser, label=NAN_CLASS, n=1, steps=2, solver="unipc")
    browser.click("#draw")
    until(lambda: not browser.run("return document.getElementById('message').hidden"))
    assert "NaN" in browser.text("#message")
    assert browser.run("return document.getElementById('message').getAttribute('role')") == "alert"


@chromium
def test_solvers_are_compared(browser: Browser, server: Served) -> None:
    choose(browser, label=1, n=2, steps=4, seed=3, guidance=1, solver="unipc", compare="heun")
    browser.click("#draw")
    until(lambda: finished(browser) and "evaluations" in browser.text("#heading-other"))
    assert browser.text("#heading").startswith("unipc: 4 network evaluations an image")
    assert browser.text("#heading-other").startswith("heun: 7 network evaluations an image")
    fields = {"label": 1, "n": 2, "steps": 4, "seed": 3, "solver": "heun"}
    alone = Image.open(io.BytesIO(base64.b64decode(server.draw(**fields).json()["data"][1]["b64_json"])))
    assert (pixels(browser, 3) == np.asarray(alone)).all()
    assert browser.text("#row-value") == "7 of 7"
    assert browser.problems() == []


@chromium
def test_a_slider_goes_through_the_measured_settings(browser: Browser) -> None:
    assert [(p["solver"], p["steps"], p["guidance"]) for p in browser.run(MEASURED_BY_MODEL)] == [
        ("ddim", 2, 1.0), ("unipc", 4, 1.0), ("ddim", 5, 2.0)
    ]  # fmt: skip
    setting = "return [document.getElementById('solver').value, document.getElementById('steps').value]"
    choose(browser, guidance=1)
    for at, expected in ((0, ["ddim", "2"]), (1, ["unipc", "4"])):
        choose(browser, trade=at)
        assert browser.run(setting) == expected
    assert browser.text("#trade-text").startswith("Distance 5.00 from real images, recall 0.50, 4 evaluations")
    choose(browser, steps=9)
    assert "was not measured" in browser.text("#trade-text")
    choose(browser, guidance=1.5)
    assert browser.text("#trade-text") == "Measured with guidance 1, 2 only."


@chromium
def test_code_that_is_copied_runs(browser: Browser) -> None:
    choose(browser, label="all", n=3, steps=2)
    namespace: dict[str, Any] = {}
    exec(browser.text("#python"), namespace)
    assert len(namespace["answer"].data) == 3
    assert namespace["answer"].fastdiff["labels"] == [0, 1, 2]
    curl = browser.text("#curl")
    assert curl.startswith("curl http://127.0.0.1:")
    found = re.search(r"-d '(.*)'$", curl)
    assert found is not None
    assert read_generation(found[1].encode()).label == [0, 1, 2]
    assert json.loads(found[1])["n"] == 3


@chromium
def test_a_text_is_drawn_and_copied(browser: Browser, server: Served) -> None:
    """The prompt takes the place of the class for a model that reads text; quotes survive the shell and Python."""
    browser.run(
        "const e = document.getElementById('model'); e.value = 'words';"
        "e.dispatchEvent(new Event('change', {bubbles: true}))"
    )
    shown = "return ['label', 'prompt', 'negative'].map(id => document.getElementById(id).offsetParent !== null)"
    assert browser.run(shown) == [False, True, True]
    choose(browser, prompt='dog\'s "car"', negative="snow", n=2, steps=4, seed=3, guidance=3)
    browser.click("#draw")
    until(lambda: finished(browser))
    fields = {"prompt": 'dog\'s "car"', "negative": "snow", "n": 2, "steps": 4, "seed": 3, "guidance": 3}
    drawn = server.draw(model="words", solver="unipc", **fields).json()
    for i, entry in enumerate(drawn["data"]):
        alone = Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))
        assert (pixels(browser, i) == np.asarray(alone)).all()
    namespace: dict[str, Any] = {}
    exec(browser.text("#python"), namespace)
    assert namespace["answer"].fastdiff["pixels_sha256"] == drawn["fastdiff"]["pixels_sha256"]
    words = shlex.split(browser.text("#curl").replace("\\\n", " "))
    assert read_generation(words[words.index("-d") + 1].encode()).prompt == fields["prompt"]
    link = browser.run("return document.getElementById('permalink').href")
    browser.open("about:blank")
    browser.open(link)
    until(lambda: browser.run("return document.body.dataset.loaded") and finished(browser))
    assert browser.text("#verdict") == "Identical bits: all 2 images are those of the link."
    assert browser.problems() == []


@chromium
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_layout(browser: Browser, width: int, scheme: str) -> None:
    browser.size(width, 900, scheme)
    choose(browser, label=1, n=16, steps=1)
    browser.click("#draw")
    until(lambda: finished(browser))
    browser.run("document.getElementById('code').open = true")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    unnamed = browser.run(
        "return [...document.querySelectorAll('input, select, button')].filter(e => "
        "!(e.labels && e.labels.length) && !e.textContent.trim() && !e.ariaLabel).map(e => e.id)"
    )
    assert unnamed == []
    small = browser.run(
        "return [...document.querySelectorAll('select, button, input:not([type=range])')]"
        ".filter(e => e.offsetParent && e.offsetHeight < 40).map(e => e.id)"
    )
    assert small == []
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)))
    assert (brightness > 384) == (scheme == "light")
    origins = browser.run("return performance.getEntriesByType('resource').map(e => new URL(e.name).origin)")
    assert set(origins) == {browser.run("return location.origin")}
    assert browser.problems() == []
