"""The files of deploy/ agree with the command line, the paths and the metrics of the server."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from typing import Any

import pytest
import typer

from fastdiff import cli
from fastdiff.serving import wire
from fastdiff.serving.http import App
from fastdiff.serving.metrics import Metrics
from fastdiff.serving.process import HUNG_S, Supervisor
from fastdiff.serving.requests import Limits
from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"


@pytest.fixture
def metrics() -> Metrics:
    """The metrics of a server with a model, which has no processes."""
    supervisor = Supervisor(wire.Setup({}, None, 1.0, 10, "auto", "bitwise", "text"))
    supervisor.models = {"m": wire.Model("m", 8, 8, 3, None, None, "native", "bitwise", "float32", ["ddim"])}
    stats = dict.fromkeys(
        ("waiting", "running", "queued_s", "images", "steps", "image_steps", "rows", "busy_s", "previews_dropped",
         "step_s", "longest_s"), 1.0,
    )  # fmt: skip
    supervisor._handle(wire.Beat({"m": stats}, 0))
    return Metrics(supervisor)


def parsed(arguments: list[str]) -> dict[str, Any]:
    """Parse the arguments of ``fastdiff serve`` by the real command line."""
    return typer.main.get_command(cli.app).commands["serve"].make_context("serve", arguments).params


def test_the_dashboard_names_metrics_that_exist(metrics: Metrics) -> None:
    dashboard = json.loads((DEPLOY / "dashboard.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for e in expressions for name in re.findall(r"fastdiff_\w+", e)}
    lines = metrics.text().decode().splitlines()
    there = {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}
    assert len(asked) > 10
    assert asked <= there, asked - there
    labels = {name for line in lines for name in re.findall(r'(\w+)="', line)}
    grouped = {name for e in expressions for by in re.findall(r"by \(([^)]*)\)", e) for name in by.split(", ")}
    assert grouped <= labels, grouped - labels


def test_the_container_runs_a_command_that_exists() -> None:
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    entry, command = (
        json.loads(re.findall(rf"^{word} (\[.*\])$", text, re.MULTILINE)[0]) for word in ("ENTRYPOINT", "CMD")
    )
    assert entry[1:] == ["serve"]
    assert parsed(command)["host"] == "0.0.0.0"
    assert "USER 10001" in text
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "'.[serve]'" in text
    assert "\nserve = [" in extras


def test_the_unit_waits_for_the_end_of_jobs() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "fastdiff.service", encoding="utf-8")
    words = shlex.split(unit["Service"]["ExecStart"])
    assert words[1] == "serve"
    options = parsed(words[2:])
    assert float(unit["Service"]["TimeoutStopSec"]) > options["drain_seconds"] + 10
    assert unit["Service"]["KillMode"] == "mixed"
    # The server says that it is ready, and while it takes steps; it replaces a process that hangs before systemd acts.
    assert unit["Service"]["Type"] == "notify"
    assert float(unit["Service"]["WatchdogSec"]) > 2 * HUNG_S
    assert "AF_UNIX" in unit["Service"]["RestrictAddressFamilies"].split()


def test_the_manifest_probes_paths_that_exist(metrics: Metrics) -> None:
    text = (DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")
    options = parsed(json.loads(re.findall(r"args: (\[.*\])", text)[0]))
    assert float(re.findall(r"terminationGracePeriodSeconds: (\d+)", text)[0]) > options["drain_seconds"] + 10
    app = App(metrics._supervisor, metrics, Limits(1, 1), [])
    paths = {route.path for route in app.asgi.routes}
    probed = re.findall(r"(\w+)Probe: \{httpGet: \{path: (\S+),", text)
    assert dict(probed) == {"startup": "/health/ready", "readiness": "/health/ready", "liveness": "/health/live"}
    assert {path for _, path in probed} <= paths
    assert re.findall(r"prometheus.io/path: (\S+)\}", text) == ["/metrics"]
    assert "/metrics" in paths
    assert options["port"] == int(re.findall(r"containerPort: (\d+)", text)[0])
