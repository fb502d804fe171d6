"""The registry of solvers: every solver is in it, and one that is added there works everywhere."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from fastdiff import Sampler, solvers
from fastdiff.cli import app
from fastdiff.cli.options import SOLVER_HELP, SPACING_HELP
from fastdiff.errors import InvalidArgument
from fastdiff.sampler.options import Options
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import EDMSchedule, StepTable
from fastdiff.solvers.compat.diffusers import SCHEDULERS
from fastdiff.solvers.registry import OPTIONS, SOLVERS, Solver
from fastdiff.solvers.walk import Schedule, Walk
from tests.support.unets import TINY, random_unet

SHORT = NoiseSchedule(timesteps=60)


def test_every_public_solver_is_in_the_registry():
    functions = [getattr(solvers, name) for name in solvers.__all__]
    signatures = {f.__name__: inspect.signature(f) for f in functions if inspect.isfunction(f)}
    found = {
        name
        for name, signature in signatures.items()
        if signature.return_annotation == "StepTable" and next(iter(signature.parameters)) == "schedule"
    }
    # Inversions run from an image to noise, and belong to the solver that leads back.
    inverse = {"ddim_inversion", "dpmpp_inversion"}
    assert found - inverse == set(SOLVERS)
    entries = [solver.inverse for solver in SOLVERS.values() if solver.inverse is not None]
    assert {getattr(f, "func", f).__name__ for f in entries} == inverse
    for name, solver in SOLVERS.items():
        assert solver.function is getattr(solvers, name)


@pytest.mark.parametrize("name", SOLVERS)
def test_entries_describe_their_functions(name):
    solver = SOLVERS[name]
    if name != "consistency":
        assert solver.function(SHORT).steps == solver.default_steps(SHORT)
        assert solver.function(NoiseSchedule(timesteps=7)).steps == solver.default_steps(NoiseSchedule(timesteps=7))
    if name not in ("lcm", "tcd"):
        assert solver.function(EDMSchedule()).steps == solver.default_steps(EDMSchedule())
    assert set(solver.options) <= set(OPTIONS) <= {*Options.__dataclass_fields__}
    parameters = inspect.signature(solver.function).parameters
    common = "common" in parameters
    assert {*solver.options, *solver.from_model} <= set(parameters)
    assert common or set(solver.shared) <= set(parameters)
    if solver.diffusers is not None:
        assert {solver.diffusers.name, solver.diffusers.edm} - {None} <= set(SCHEDULERS)
    assert solver.help.endswith(".")


def listed(text: str) -> tuple[str, ...]:
    return tuple(text.partition(" (")[0].rstrip(".").replace(" or ", ", ").split(", "))


def test_the_command_line_names_them_all():
    assert listed(SOLVER_HELP) == ("auto", *SOLVERS)
    assert listed(SPACING_HELP) == (*solvers.SPACINGS, *solvers.SIGMA_SPACINGS)


def test_the_help_of_sample_is_light():
    code = """
import sys
from fastdiff.cli import main
sys.argv = ["fastdiff", "sample", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
assert not {"torch", "numpy"} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "euler_ancestral" in result.stdout


# A solver that is added -----------------------------------------------------------------------------------------------


def toy(schedule: Schedule, steps: int | None = None, *, order: int = 1, **common) -> StepTable:
    """Euler's method, x_p = a_p x_0 + s_p eps, with an option that it ignores."""
    walk = Walk.of(schedule, steps, **common)
    return walk.table(f"toy_{order}", [walk.row(i, x0=v.a_next, eps=v.s_next) for i, v in enumerate(walk.levels)])


@pytest.fixture
def with_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOLVERS, "toy", Solver(toy, "A toy.", options=("order",)))


@pytest.fixture
def sampler() -> Sampler:
    return Sampler(random_unet(TINY), SHORT, backend="eager", device="cpu")


def test_a_new_solver_samples(with_toy: None, sampler: Sampler):
    out = sampler.sample(2, solver="toy", steps=4, order=2)
    assert (out.table.solver, out.nfe) == ("toy_2", 4)
    expected = sampler.sample(2, solver="euler", steps=4)
    assert (out.images - expected.images).abs().max() < 1e-5
    assert sampler.sample(1, solver="toy").table.steps == 50
    late = sampler.sample(1, solver="toy", steps=4, image=torch.zeros(1, 3, 8, 8), strength=0.5)
    assert late.table.steps == 2
    with pytest.raises(InvalidArgument, match=r"eta=1\.0 belongs to solver 'ddim', not 'toy'"):
        sampler.sample(1, solver="toy", eta=1.0)
    with pytest.raises(InvalidArgument, match=r"allowed: auto, .*, toy, or a StepTable"):
        sampler.sample(1, solver="toys")


def test_a_new_solver_on_the_command_line(with_toy: None, tmp_path):
    arguments = ["--solver", "toy", "--order", "3", "--steps", "2", "--n", "1", "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, ["sample", "fashion-mnist", *arguments, "--out", str(tmp_path / "out.png")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["solver"] == "toy_3"


@pytest.mark.parametrize("code_base", ["diffusers", "openai", "ho"])
def test_other_code_bases_refuse_a_new_solver(with_toy: None, sampler: Sampler, code_base: str):
    with pytest.raises(InvalidArgument, match=f"compat='{code_base}' has no solver='toy'; it has ddim, ddpm"):
        sampler.sample(1, solver="toy", compat=code_base)
