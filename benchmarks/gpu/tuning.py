"""The part `tuning`, which finds the fastest configuration of every launch that the published networks ask for.

Truth comes before speed: a configuration is measured at a shape only after its results there were compared with the
reference in float64, in memory that held NaN.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from . import lists, model
from .run import Failure, Run
from .timing import in_graph

DRY_JOBS = [("", 1, False)]
WRITTEN = (
    "dst",
    "out",
    "norm",
    "x",
    "xs",
    "m1",
    "m2",
    "m3",
)  # arguments that operations write, as far as they are floats
APART = ("conv.conv", "conv.partial", "library.products")  # tuned as layers of one or several launches


@dataclasses.dataclass
class Candidate:
    """Something to tune: ``build`` makes its launches in a configuration, on operands that a function replaces."""

    key: str
    chosen: Any
    configs: tuple[Any, ...]
    build: Callable[[Any, Callable[[Any], Any]], tuple[Any, ...]]
    microseconds: float  # predicted, of all occurrences in the networks
    band: float  # error allowed beside the reference's, in roundings of float32 (see tests/support/kernel_harness.py)
    dtype: Any  # of its operands


def replaced(value: Any, change: Callable[[Any], Any]) -> Any:
    """Replace the tensors in an operand, which may be a tuple or a dataclass of them."""
    import torch

    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(replaced(v, change) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: replaced(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def candidates(run: Run) -> list[Candidate]:
    """Return what networks ask for, except operations whose check failed.

    The longest of it comes first, and what only guided batches ask for last.
    """
    import torch

    from fastdiff.kernels.launch import Device
    from tests.support.kernel_harness import PER_ACCUMULATION, accumulations

    ops = run.finished.get("kernels", {}).get("result", {}).get("ops", {})
    if not any("failed" not in op for op in ops.values()):
        raise Failure("no kernel's check is green: the part `kernels` comes first", {})
    processors = 132 if run.dry else torch.cuda.get_device_properties(0).multi_processor_count
    device, rates = Device("", processors), model.Rates(processors=processors)
    found: dict[str, Candidate] = {}
    share: collections.Counter[str] = collections.Counter()
    unguided: set[str] = set()
    for network, images, guided in DRY_JOBS if run.dry else lists.JOBS:
        config = lists.network(network, guided)
        for launch in lists.step(config, images, torch.bfloat16, guided, device):
            if launch.op in APART or ops.get(launch.op, {"failed": True}).get("failed"):
                continue
            key = f"{launch.op} {launch.key}"
            share[key] += model.microseconds(launch, rates)

            def one(config: Any, change: Any, launch: Any = launch) -> tuple[Any, ...]:
                return (launch.remake(config, lambda operand: replaced(operand, change)),)

            found.setdefault(
                key, Candidate(key, launch.config, launch.candidates, one, 0.0, band_of(launch), torch.bfloat16)
            )
        for layer in lists.layers(config, images, torch.bfloat16, guided, device):
            problem = layer.problem
            plain = bool(layer.arguments["nchw"])
            chosen = problem.choose_layer(plain)

            def several(config: Any, change: Any, layer: Any = layer) -> tuple[Any, ...]:
                return tuple(layer.replaced(lambda operand: replaced(operand, change)).launches(config))

            share[layer.key] += sum(model.microseconds(launch, rates) for launch in layer.launches(chosen))
            configs = (*(problem.columns() if plain else ()), *problem.layer_candidates)
            count = accumulations(problem.dtype, problem.kernel**2 * sum(problem.channels))
            band = 4.0 + PER_ACCUMULATION * count
            found.setdefault(layer.key, Candidate(layer.key, chosen, configs, several, 0.0, band, problem.dtype))
        unguided |= set() if guided else found.keys()
    for key, candidate in found.items():
        candidate.microseconds = share[key]
    return sorted(found.values(), key=lambda candidate: (candidate.key not in unguided, -candidate.microseconds))


def band_of(launch: Any) -> float:
    """Return the error that is allowed for a launch beside its reference's, as in the tests of the kernels."""
    from tests.support.cases_attention import BANDS
    from tests.support.kernel_harness import PER_ACCUMULATION, accumulations

    if launch.op != "attention.attention":
        return 8.0
    a, dtype = launch.arguments, launch.arguments["q"].dtype
    count = accumulations(dtype, a["head_dim"]) + accumulations(dtype, a["keys"])
    return float(BANDS[dtype] + PER_ACCUMULATION * count)


class Checked:
    """Operands of a candidate on a device, with the results of its reference in float64 and in float32."""

    def __init__(self, candidate: Candidate, device: Any):
        import torch

        self.candidate = candidate
        self.operands: dict[int, Any] = {}
        self.device = device
        self.exact, self.plain = (self.reference(dtype) for dtype in (torch.float64, torch.float32))

    def on_device(self, t: Any) -> Any:
        """Return the values of an operand: the same ones at every call, in memory of their own."""
        import torch

        if id(t) not in self.operands:
            made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=self.device)
            rng = torch.Generator(self.device).manual_seed(len(self.operands))
            if t.is_floating_point():
                made.normal_(generator=rng)
                if t.ndim == 4 and t.shape[0] in (1, 4) and t.shape[1] in (1, 4, 9):  # packed weights
                    made.div_((t.shape[1] * t.shape[2]) ** 0.5)
            else:
                made.zero_()
            self.operands[id(t)] = t, made  # keeps t alive, so that its id is not given to another
        return self.operands[id(t)][1].clone(memory_format=torch.preserve_format)

    def reference(self, dtype: Any) -> dict[str, Any]:
        launches = self.candidate.build(
            self.candidate.chosen, lambda t: self.on_device(t).to(dtype if t.is_floating_point() else t.dtype)
        )
        for launch in launches:
            launch.reference()
        return results(launches)

    def launches(self, config: Any) -> tuple[Any, ...]:
        return self.candidate.build(config, self.on_device)

    def compare(self, launches: tuple[Any, ...], config: Any) -> None:
        """Run the launches, and raise AssertionError if results differ from the reference's."""
        import torch

        from fastdiff.kernels.library import LIBRARY
        from tests.support.kernel_harness import compare, rounding

        for name, t in results(launches).items():
            if name in ("dst", "out") or launches[-1].op == "norm.finalise":
                t.fill_(torch.nan)
        for launch in launches:
            launch()
        for name, got in results(launches).items():
            band = self.candidate.band
            if config == LIBRARY:  # its sums are rounded once more
                band += rounding(self.candidate.dtype) * 2.0**24
            compare(name, got, self.exact[name].double(), self.plain[name], None, band)


def results(launches: tuple[Any, ...]) -> dict[str, Any]:
    """Return what the last launch writes."""
    import torch

    written = {name: launches[-1].arguments.get(name) for name in WRITTEN}
    if launches[-1].op == "update":
        del written["out"]  # it reads this one
    return {k: t for k, t in written.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}


def tune(run: Run, candidate: Candidate) -> dict[str, Any]:
    """Compare every configuration with the reference, and measure those that are right."""
    checked = Checked(candidate, run.device)
    times: dict[Any, float] = {}
    red: dict[str, str] = {}
    for config in candidate.configs[: 2 if run.dry else None]:
        try:
            launches = checked.launches(config)
            checked.compare(launches, config)
        except Exception as e:
            if "CUDA error" in str(e):  # the context is lost
                raise
            red[str(config)] = f"{type(e).__name__}: {str(e)[:300]}"
            continue
        times[config] = in_graph(run, launches)
    if not times:
        raise Failure(f"no configuration is right: {red}", {})
    best = min(times, key=times.__getitem__)
    return {
        "us": round(times[best], 2), "predicted_us": round(candidate.microseconds, 2),
        "heuristic_us": round(times[candidate.chosen], 2) if candidate.chosen in times else None,
        "config": dataclasses.asdict(best), "red": red,
    }  # fmt: skip


def tuning(run: Run) -> dict[str, Any]:
    """Tune what the networks spend most of their predicted time on first, and write the file after each of it."""
    import torch

    from fastdiff.kernels.launch import config_file, save_tuned

    rows: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    unfinished: list[str] = []
    failed: dict[str, str] = {}
    red: list[str] = []
    gpu = "dry run" if run.dry else torch.cuda.get_device_properties(0).name
    for candidate in candidates(run):
        if run.late:
            unfinished.append(candidate.key)
            continue
        outcome = run.item(candidate.key, functools.partial(tune, run, candidate))
        if "error" in outcome:
            failed[candidate.key] = outcome["error"]
            continue
        found = outcome["result"]
        best[candidate.key] = found["config"]
        red += [f"{candidate.key} {config}: {why}" for config, why in found["red"].items()]
        rows.append({"launch": candidate.key, **{name: found[name] for name in found if name != "red"}})
        save_tuned(config_file(gpu, run.out), gpu, best)
    return {"launches": rows, "red": red, "failed": failed, "unfinished": unfinished}
