"""The part `tuning`, which finds the fastest configuration of every launch and convolution."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from .checks import moved, small_cases
from .networks import tiny
from .run import Failure, Run
from .timing import microseconds


def launches(run: Run) -> list[Any]:
    """Return a launch for each operation and shape that fastdiff ships, except operations whose check failed."""
    from fastdiff.kernels.launch import Launch
    from tests.support.kernel_cases import SHIPPED

    ops = run.finished.get("kernels", {}).get("result", {}).get("ops", {})
    made = [case().launch() for case in small_cases(run).values()] if run.dry else [make() for make in SHIPPED.values()]
    # `conv_layers` tunes convolutions as layers of one or several launches.
    made = [launch for launch in made if isinstance(launch, Launch) and launch.op not in ("conv.conv", "conv.partial")]
    if not any("failed" not in op for op in ops.values()):
        raise Failure("no kernel's check is green: the part `kernels` comes first", {})
    distinct = {
        (launch.op, launch.key): launch for launch in made if not ops.get(launch.op, {"failed": True}).get("failed")
    }
    # Heuristics give the starting point, except for the cases of a dry run, whose shapes they do not expect.
    return [launch.remake(None) if launch.remake and not run.dry else launch for launch in distinct.values()]


def conv_layers(run: Run) -> Iterator[tuple[str, Any, tuple[Any, ...], Callable[[Any], Callable[[], None]]]]:
    """Yield the distinct convolutions of the published networks in bfloat16, as the backend `triton` runs them.

    Each is a tuple of the key, the heuristic's configuration, all configurations, and a function that builds the layer
    in one of them.
    """
    import torch

    from fastdiff import UNet
    from fastdiff.bench.networks import PUBLISHED
    from fastdiff.core.lower import lower
    from fastdiff.kernels import conv
    from tests.support.cases_conv import harvest, layer_case

    cifar, celebahq = PUBLISHED["ddpm-cifar10-32"], PUBLISHED["ddpm-celebahq-256"]
    for config, rows in [(tiny(), 1)] if run.dry else [(cifar, 1), (cifar, 256), (celebahq, 1)]:
        with torch.device("meta"):
            program = lower(UNet(config), (config.sample_size, config.sample_size))
        for shape, words in harvest(program, rows).items():
            case = layer_case(shape, torch.bfloat16, " ".join(sorted(words)))
            arguments = {name: moved(value, run.device) for name, value in case.arguments.items()}

            def layer(config: Any, shape: Any = shape, arguments: Any = arguments) -> Callable[[], None]:
                operands = shape.laid_out(arguments, config)
                src, weight = operands["src"], operands["weight"]
                emitted = arguments.get("statistics") is not None
                need = conv.workspace(src, weight, shape.out, stride=shape.stride, statistics=emitted, config=config)
                given = operands | {"workspace": torch.empty(need, device=run.device) if need else None}
                made = conv.layer(**given, config=config)
                return lambda: [launch() for launch in made] and None

            problem = shape.problem(arguments)
            yield f"conv.layer {problem.key}", problem.choose_layer(), problem.layer_candidates, layer


def tuning(run: Run) -> dict[str, Any]:
    """Measure all configurations of all launches and convolutions, and write the fastest ones to a file."""
    import torch

    from fastdiff.kernels.launch import config_file, save_tuned

    rows: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    unfinished: list[str] = []
    refused: list[str] = []
    gpu = "dry run" if run.dry else torch.cuda.get_device_properties(0).name
    for launch in launches(run):
        key = f"{launch.op} {launch.key}"
        if run.late:
            unfinished.append(key)
            continue
        arguments = {name: moved(value, run.device) for name, value in launch.arguments.items()}
        tensors = [v for value in arguments.values() for v in (value if isinstance(value, tuple) else (value,))]
        moves = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        times: dict[Any, float] = {}
        for config in launch.candidates[: 2 if run.dry else None]:
            other = launch.remake(config)
            own = {
                k: arguments[k] if torch.is_tensor(v) or isinstance(v, tuple) else v for k, v in other.arguments.items()
            }
            try:
                times[config] = microseconds(run, dataclasses.replace(other, arguments=own))
            except Exception as e:
                if "CUDA error" in str(e):  # the context is lost
                    raise
                refused.append(f"{key} {config}: {e}")  # it needs more memory than this GPU has
        if not times:
            continue
        best[key] = min(times, key=times.__getitem__)
        rows.append(
            {
                "launch": key,
                "us": round(times[best[key]], 2),
                "heuristic_us": round(times[launch.config], 2) if launch.config in times else None,
                "config": dataclasses.asdict(best[key]),
                "GB_per_s_of_all_operands": round(moves / times[best[key]] / 1e3, 2),
            }
        )
        save_tuned(config_file(gpu, run.out), gpu, best)
    for key, chosen, configs, layer in conv_layers(run):
        if run.late:
            unfinished.append(key)
            continue
        times = {}
        for config in configs[: 2 if run.dry else None]:
            try:
                times[config] = microseconds(run, layer(config))
            except Exception as e:
                if "CUDA error" in str(e):  # the context is lost
                    raise
                refused.append(f"{key} {config}: {e}")
        if times:
            best[key] = min(times, key=times.__getitem__)
            row = {"launch": key, "us": round(times[best[key]], 2)}
            row |= {"heuristic_us": round(times[chosen], 2) if chosen in times else None}
            rows.append(row | {"config": dataclasses.asdict(best[key])})
    save_tuned(config_file(gpu, run.out), gpu, best)
    return {"launches": rows, "refused": refused, "unfinished": unfinished}
