"""The parts `kernels`, `graphs` and `parity`, which check kernels, CUDA graphs, and whole networks and runs."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any
from unittest import mock

from .networks import CLASSES, no_tf32, on_gpu, relative, runner_of, start, tiny, unet_of
from .run import Failure, Run


def small_cases(run: Run) -> dict[str, Any]:
    """Return the kernels' cases by name that the GPU can run; in a dry run the first of every kind."""
    import torch

    from tests.support.kernel_cases import CASES

    first = {name.split()[0].rstrip(","): name for name in reversed(CASES)}
    if run.dry:
        return {name: CASES[name] for name in CASES if name in first.values()}
    hopper = torch.cuda.get_device_capability() == (9, 0)
    return {name: CASES[name] for name in CASES if hopper or not name.startswith("hopper ")}


def moved(value: Any, device: Any) -> Any:
    """Copy tensors, and tuples of them, to the device with their strides; those on "meta" get arbitrary numbers."""
    import torch

    if isinstance(value, tuple):
        return tuple(moved(v, device) for v in value)
    if not isinstance(value, torch.Tensor):
        return value
    there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    if not value.is_meta:
        return there.copy_(value)
    return there.normal_() if value.is_floating_point() else there.zero_()


def kernels(run: Run) -> dict[str, Any]:
    """Compare every kernel with its reference in float64 in the small cases of the tests."""
    from tests.support.kernel_harness import check, mend_interpreter

    no_tf32()
    if run.dry:
        mend_interpreter()
    ops: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    unfinished = []
    for name, build in small_cases(run).items():
        if run.late:
            unfinished.append(name)
            continue
        case = build()
        op = case.launch().op

        def share(case: Any = case) -> float:
            arguments = {k: moved(v, run.device) for k, v in case.arguments.items()}
            return max(check(dataclasses.replace(case, arguments=arguments)).values())

        outcome = run.item(name, share)
        entry = ops.setdefault(op, {"cases": 0, "error_as_share_of_allowed": 0.0})
        if "error" in outcome:
            failed[name] = f"{op}: {outcome['error'][:500]}"
            entry["failed"] = True
        else:
            entry["cases"] += 1
            entry["error_as_share_of_allowed"] = max(entry["error_as_share_of_allowed"], round(outcome["result"], 3))
    result = {"ops": ops, "failed": failed, "unfinished": unfinished}
    if failed:
        raise Failure(f"{len(failed)} cases failed: {', '.join(failed)}", result)
    return result


def graphs(run: Run) -> dict[str, Any]:
    """Check that replays of captured steps have the bits of eager steps, while batch sizes share one memory pool.

    Also check that with determinism "bitwise" an image has the same bits in batches of 1 and 5, with the backend
    `triton`, or `native` in a dry run, and where kernels start before those in front of them have ended.
    """
    import torch

    from fastdiff import NoiseSchedule, solvers
    from fastdiff.backends import Spec, graph, native
    from fastdiff.backends.eager import EagerRunner
    from fastdiff.kernels import launch

    no_tf32()
    schedule, shape = NoiseSchedule(), (3, 8, 8)
    cuda = run.cuda
    plain = unet_of(tiny(), torch.float32, run.device)
    classes = unet_of(tiny(**CLASSES), torch.float32, run.device)
    learned = unet_of(tiny(out_channels=6), torch.float32, run.device)
    guided = {"label": [1, 2, 3], "guidance": [3.0, 1.0, 0.5]}
    cases: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "ddim": (plain, solvers.ddim(schedule, 6), {}),
        "ddpm": (plain, solvers.ddpm(schedule, 6), {}),
        "history": (plain, solvers.dpmpp_3m(schedule, 6), {}),
        "saved input": (plain, solvers.heun(schedule, 4), {}),
        "learned range": (learned, solvers.ddpm(schedule, 6, variance="learned_range"), {}),
        "guided": (classes, solvers.ddim(schedule, 6).with_guidance_interval(0.3, 0.7), guided),
        "rescaled": (classes, solvers.ddim(schedule, 6), {**guided, "guidance_rescale": 0.7}),
    }
    same: dict[str, bool] = {}

    def compare(name: str, a: Any, b: Any) -> None:
        pairs = [(getattr(a, field), getattr(b, field)) for field in ("x", "row", "m1", "m2", "m3", "xs")]
        same[name] = same.get(name, True) and all(one is other or torch.equal(one, other) for one, other in pairs)

    def replays(name: str) -> bool:
        unet, table, options = cases[name]
        spec = Spec(3, shape, torch.float32, run.device, null_label=10)
        eager = EagerRunner(unet, spec)
        runner = graph.GraphRunner(eager, unet, spec, cuda=cuda)
        a, b = (start(3, shape, table, run.device, torch.float32, **options) for _ in range(2))
        while not a.done:
            eager.step(a)
            runner.step(b)
            compare(name, a, b)
        return same[name]

    for name in cases:
        same[name] = run.item(name, functools.partial(replays, name)).get("result", False)
    runners: dict[Any, Any] = {}
    before = 0 if run.dry else torch.cuda.memory_reserved()
    for n in (1, 16, 4):
        spec = Spec(n, shape, torch.float32, run.device)
        runner = graph.GraphRunner(EagerRunner(plain, spec), plain, spec, cuda=cuda)
        runners[runner] = start(n, shape, cases["ddim"][1], run.device, torch.float32)
    graph.capture(runners)
    pooled = 0 if run.dry else torch.cuda.memory_reserved() - before
    for _ in range(6):  # the batch sizes take turns
        for runner, state in runners.items():
            runner.step(state)
    for state in runners.values():
        twin = start(len(state.x), shape, cases["ddim"][1], run.device, torch.float32)
        eager = EagerRunner(plain, Spec(len(state.x), shape, torch.float32, run.device))
        while not twin.done:
            eager.step(twin)
        compare("batch sizes in turns", twin, state)

    def bitwise(n: int, first: int) -> Any:
        who = slice(first, first + n)
        labels, w = [1, 2, 3, 0, 9][who], [3.0, 1.0, 1.0, 0.5, 2.0][who]
        table = solvers.ddpm(schedule, 6).with_guidance_interval(0.3, 0.7)
        state = start(n, shape, table, run.device, torch.float32, first, label=labels, guidance=w)
        runner = runner_of(
            run, "native" if run.dry else "triton", classes,
            Spec(n, shape, torch.float32, run.device, null_label=10, determinism="bitwise"),
        )  # fmt: skip
        while not state.done:
            runner.step(state)
        return state.x

    if not run.dry or native.extension() is not None:
        same["bitwise"] = torch.equal(bitwise(5, 0), torch.cat([bitwise(1, i) for i in range(5)]))
    if not run.dry:
        with mock.patch.object(launch, "OVERLAP", False):
            alone = bitwise(5, 0)
        same["kernels that overlap"] = torch.equal(bitwise(5, 0), alone)
    result = {"equal_bits": same, "pool_MiB": pooled >> 20, "stand_in": run.dry}
    if not all(same.values()):
        raise Failure(f"bits differ: {[name for name, equal in same.items() if not equal]}", result)
    return result


def parity(run: Run) -> dict[str, Any]:
    """Compare one evaluation and whole runs with float64; twice the error of `eager` in the same dtype is allowed."""
    import torch

    from fastdiff import NoiseSchedule, UNet, solvers
    from fastdiff.backends import Spec
    from fastdiff.backends.eager import EagerRunner
    from fastdiff.bench.networks import PUBLISHED

    no_tf32()
    schedule, steps = NoiseSchedule(), 2 if run.dry else 10
    tables = [solver(schedule, steps) for solver in (solvers.ddim, solvers.ddpm, solvers.dpmpp_2m)]
    guided = {"label": [3, 9], "guidance": [2.0, 1.0]}
    if run.dry:
        plain, classes = (unet_of(tiny(**more), torch.float32, run.device) for more in ({}, CLASSES))
    else:
        plain = unet_of(PUBLISHED["ddpm-cifar10-32"], torch.float32, run.device)
        classes = UNet.from_pretrained("fashion-mnist").to(run.device)
    rows: list[dict[str, Any]] = []
    unfinished: list[str] = []

    def outcomes(unet: Any, backend: str, dtype: Any, options: dict[str, Any]) -> list[tuple[Any, Any]]:
        """Return the output of the first evaluation and the final x for every table."""
        unet = copy.deepcopy(unet).to(dtype).to(memory_format=torch.channels_last)
        side = unet.config.sample_size
        shape = (unet.config.in_channels, side, side)
        spec = Spec(2, shape, dtype, run.device, null_label=unet.config.null_label)
        runner = EagerRunner(unet, spec) if backend == "eager" else runner_of(run, backend, unet, spec)
        wide, found = torch.float64 if dtype == torch.float64 else torch.float32, []
        for table in tables:
            state = start(2, shape, table, run.device, wide, **options)
            runner.forward(state)
            out = state.out.clone()
            while not state.done:
                runner.step(state)
            found.append((out, state.x.clone()))
        return found

    def errors_of(unet: Any, backend: str, dtype: torch.dtype, options: Any, exact: Any) -> list[list[float]]:
        got = outcomes(unet, backend, dtype, options)
        return [[relative(*pair) for pair in zip(*both, strict=True)] for both in zip(got, exact, strict=True)]

    for name, unet, options in (("cifar10", plain, {}), ("fashion-mnist, guided", classes, guided)):
        exact = outcomes(unet, "eager", torch.float64, options)
        for dtype in (torch.float32, torch.bfloat16):
            eager: list[list[float]] = []
            for backend in on_gpu(run):  # eager is the first
                if run.late:
                    unfinished.append(f"{name}, {dtype}, {backend}")
                    continue

                job = functools.partial(errors_of, unet, backend, dtype, options, exact)
                outcome = run.item(f"{name}, {dtype}, {backend}", job)
                if "error" in outcome:
                    rows.append({"network": name, "dtype": str(dtype), "backend": backend, "ok": False} | outcome)
                    continue
                errors = outcome["result"]
                eager = eager or errors
                for table, own, plain_own in zip(tables, errors, eager, strict=True):
                    row = {"network": name, "solver": table.solver, "dtype": str(dtype), "backend": backend}
                    row |= {"network_error": own[0], "run_error": own[1]}
                    row["ok"] = all(e <= 2 * other + 1e-6 for e, other in zip(own, plain_own, strict=True))
                    rows.append(row)
    result = {"rows": rows, "unfinished": unfinished}
    red = [row for row in rows if not row["ok"]]
    if red:
        raise Failure(f"{len(red)} of {len(rows)} comparisons are off by more than twice eager's error", result)
    return result
