"""The declaration of the options: signature, documentation, command line and errors agree with it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from fastdiff import cli, solvers
from fastdiff.errors import InvalidArgument
from fastdiff.sampler import Sampler, choice, options
from fastdiff.sampler.measured import Measured, Point
from fastdiff.sampler.options import Options
from fastdiff.sampler.tables import step_table
from tests.sampler.by_hand import SCHEDULE, SHAPE

FIELDS = {field.name: field for field in dataclasses.fields(Options)}
# A value other than the default for every option.
VALUES: dict[str, Any] = {
    "solver": "unipc", "steps": 7, "eta": 0.5, "variance": "beta", "order": 2, "churn": [40.0],
    "spacing": [90, 50], "clip": None, "seed": 5,
    "start_index": 3, "index": [3, 17], "indices": [3, 17], "labels": 1, "prompts": "a dog",
    "negative": "snow", "context": torch.zeros(4, 16), "guidance": 2.0,
    "guidance_interval": (0.2, 0.8), "guidance_rescale": 0.7, "size": 16, "noise": torch.zeros(1, *SHAPE),
    "batch_size": 2, "image": torch.zeros(1, *SHAPE), "strength": 0.5, "mask": torch.ones(8, 8),
    "condition": torch.zeros(1, *SHAPE), "repaint": (2, 2),
    "guide": lambda x0, _: x0.sum((1, 2, 3)), "guide_through": "network", "quality": 1.1, "deadline_s": 3.0,
    "compat": "diffusers",
}  # fmt: skip
SAMPLE = inspect.signature(Sampler.sample).parameters
COMMAND = typer.main.get_command(cli.app).commands["sample"]  # type: ignore[attr-defined]  # it is a group


def test_the_signature_is_the_declaration() -> None:
    assert list(SAMPLE) == ["self", "n", *FIELDS, "callback", "progress"]
    for name, field in FIELDS.items():
        assert SAMPLE[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert SAMPLE[name].default == field.default
        assert SAMPLE[name].annotation == field.type


def test_the_documentation_names_every_option_in_order() -> None:
    text = inspect.getdoc(Sampler.sample) or ""
    arguments = text[text.index("Args:") : text.index("Returns:")]
    assert re.findall(r"^    (\w+): ", arguments, re.MULTILINE) == [*SAMPLE][1:]


def test_sample_passes_every_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def request(self: Sampler, n: int, **options: Any) -> None:
        given.update(options, n=n)
        raise InterruptedError

    monkeypatch.setattr(Sampler, "request", request)
    assert VALUES.keys() == FIELDS.keys()
    with pytest.raises(InterruptedError):
        Sampler.sample(object.__new__(Sampler), 9, **VALUES, progress=True)
    assert given.keys() == {"n", *VALUES}
    assert all(given[name] is value for name, value in VALUES.items())


def test_the_command_line_has_the_flags_and_defaults() -> None:
    by_flag = {flag: parameter for parameter in COMMAND.params for flag in parameter.opts if flag.startswith("--")}
    for name, flag in Options.flags().items():
        assert by_flag[flag].default == FIELDS[name].default, flag
    others = {"--n", "--out", "--per-class", "--backend", "--device", "--dtype", "--animate", "--json"}
    assert by_flag.keys() - {"--help"} == {*Options.flags().values()} | others


def test_the_command_line_passes_every_option_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}

    def sample(self: Sampler, n: int, **options: Any) -> None:
        given.update(options)
        raise InvalidArgument("not today")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Sampler, "sample", sample)
    read = {
        "index": "3,17",
        "labels": "1",
        "churn": "40",
        "size": "16",
        "spacing": "karras",
    }  # flags whose text is not that of the value
    files = {"image", "mask", "condition"}  # which tests/cli reads
    flags = {name: flag for name, flag in Options.flags().items() if name not in files}
    arguments = [a for name, flag in flags.items() for a in (flag, read.get(name, str(VALUES[name])))]
    monkeypatch.setattr(sys, "argv", ["fastdiff", "sample", "--n", "2", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "error: not today\n"
    expected = {name: VALUES[name] for name in flags} | {"labels": [1, 1], "spacing": "karras"}
    expected["prompts"] = ["a dog", "a dog"]
    assert {name: given[name] for name in flags} == expected
    assert {given[name] for name in files} == {None}


# What excludes an option ----------------------------------------------------------------------------------------------


def excluded(name: str, other: str) -> bool:
    return other in FIELDS[name].metadata["excluded_by"]


def message(call: Any, *arguments: Any) -> str:
    """Return the text of the `InvalidArgument`, or nothing."""
    try:
        call(*arguments)
    except InvalidArgument as e:
        return str(e)
    return ""


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - {"solver"}))
def test_options_beside_a_table(name: str) -> None:
    o = Options(**{"solver": solvers.ddim(SCHEDULE, 4), name: VALUES[name]})
    refused = f"{name}={VALUES[name]!r} cannot change a StepTable; leave it out"
    assert message(step_table, o, SCHEDULE, "epsilon", {}) == (refused if excluded(name, options.TABLE) else "")


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - {"solver", "quality"}))
def test_options_beside_auto(name: str) -> None:
    o = Options(**{"solver": "auto", name: VALUES[name]})
    refused = f"{name}={VALUES[name]!r} needs a solver by name; 'auto' chooses all"
    assert message(choice.resolve, o, SCHEDULE, None) == (refused if excluded(name, options.AUTO) else "")


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - {"quality"}))
def test_options_beside_a_quality(name: str) -> None:
    o = Options(**{"quality": 1.1, name: VALUES[name]})
    said = message(choice.resolve, o, SCHEDULE, None)
    if excluded(name, options.QUALITY):
        assert said == f"quality= chooses the solver and its steps; leave out {name}="
    else:
        assert "no measurements" in said


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - {"deadline_s"}))
def test_options_beside_a_deadline(name: str) -> None:
    o = Options(**{"deadline_s": 3.0, name: VALUES[name]})
    refused = f"deadline_s= chooses the solver and its steps; leave out {name}="
    assert message(choice.trial, o, SCHEDULE, "epsilon") == (refused if excluded(name, options.DEADLINE) else "")


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - {"guidance"}))
def test_options_beside_measurements(name: str) -> None:
    known = Measured(Path("trilemma.json"), "", 100, (Point("ddim", 4, 4, 1.0, 0.9, 1.1, 0.5),))
    points, why = choice.comparable(Options(**{name: VALUES[name]}), known)
    if excluded(name, options.MEASURED):
        assert (points, why) == ([], f"the measurements were made without {name}=")
    else:
        assert (points, why) == ([*known.points], "")


def test_a_default_that_is_given_excludes_nothing() -> None:
    o = Options(eta=0, clip="model", guidance_interval=np.array([0.0, 1.0]), guidance_rescale=np.float32(0.0))
    for other in (options.TABLE, options.AUTO, options.QUALITY, options.DEADLINE, options.MEASURED):
        assert o.excluded_by(other) is None
    # "auto" asks for the same as a quality and a deadline, and spacings by name suit any number of steps.
    assert "no measurements" in message(choice.resolve, Options(quality=1.1, solver="auto"), SCHEDULE, None)
    o = Options(deadline_s=3.0, solver="auto", spacing="karras")
    assert message(choice.trial, o, SCHEDULE, "epsilon") == ""
