"""One step as a CUDA graph, without a GPU: the calls in their order, what a replay computes, what the device is asked.

`fake_cuda` stands in for `torch.cuda`; what a card does with all this remains to be seen there (``make gpu``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff import backends, solvers
from fastdiff.backends import Spec, compiled, graph
from fastdiff.backends.eager import EagerRunner
from fastdiff.backends.graph import WARM_UPS, GraphRunner
from fastdiff.core import noise, update
from fastdiff.core.state import State, TableBank
from fastdiff.errors import BackendError, InvalidArgument
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import StepTable
from fastdiff.unet import UNet
from tests.backends.test_backends import CASES, MICRO, NULL, SHAPE, Case, multistep, spec_of, start
from tests.support.fake_cuda import Counter, FakeCuda, waits
from tests.support.unets import TINY, TINY_CLASSES, random_unet

CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule("linear", 100, beta_end=0.1)
HELD = ("x", "out", "xs", "m1", "m2", "m3", "row")


class Still(nn.Module):
    """A network whose rounding does not depend on its batch, and that takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        out = self.scale * x + 0.01 * t.view(-1, 1, 1, 1).to(x.dtype)
        return out if class_labels is None else out + 0.1 * class_labels.view(-1, 1, 1, 1)


def a_state(n: int, table: StepTable, **options: Any) -> State:
    index = torch.arange(n)
    x = noise.normal(torch.full_like(index, 5), index, torch.zeros_like(index), noise.INITIAL, SHAPE)
    return State.create(x, TableBank([table], CPU), **options)


def a_spec(n: int, **options: Any) -> Spec:
    return Spec(n, SHAPE, torch.float32, CPU, null_label=NULL, **options)


def graphed(unet: nn.Module, spec: Spec, cuda: FakeCuda | None = None) -> tuple[GraphRunner, FakeCuda]:
    cuda = cuda or FakeCuda()
    return GraphRunner(EagerRunner(unet, spec), unet, spec, cuda=cuda), cuda


def same(a: State, b: State) -> None:
    """Compare all fields that a step changes bit for bit, NaN included."""
    for name in HELD:
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None), name
        if one is not None:
            bits = torch.int32 if one.is_floating_point() else one.dtype
            assert torch.equal(one.contiguous().view(bits), other.contiguous().view(bits)), name
    assert (a.row_host == b.row_host).all()
    assert (a.row.numpy() == a.row_host).all()


# What a replay computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_replays_are_eager_steps(case: Case) -> None:
    """Rows and tables that differ, guidance, learned variance, histories, NaN in all that is not read, past the end."""
    unet = random_unet(case.config)
    a, b = start(case), start(case)
    eager = EagerRunner(unet, spec_of(a, torch.float32, case))
    runner, cuda = graphed(unet, eager.spec)
    for _ in range(case.steps + 2):
        eager.step(a)
        runner.step(b)
        same(a, b)
    assert cuda.kinds().count("replay") == case.steps + 2


def test_forward_and_update_are_graphs_too() -> None:
    case = CASES["everything"]
    unet = random_unet(case.config)
    a, b = start(case), start(case)
    eager = EagerRunner(unet, spec_of(a, torch.float32, case))
    runner, cuda = graphed(unet, eager.spec)
    for i in range(4):
        for state, it in ((a, eager), (b, runner)):
            it.forward(state)
            if i % 2:  # as editing does between the two
                state.out = state.out + 0.25
                state.x = torch.where(state.x > 0.0, state.x, 0.5 * state.x)
            it.update(state)
        same(a, b)
    assert cuda.kinds().count("replay") == 8


@pytest.mark.parametrize("kind", ["noise of the caller", "dynamic threshold"])
def test_what_the_host_must_do_runs_between_graphs(kind: str) -> None:
    table = solvers.ddpm(SCHEDULE, 5, threshold=(0.9, 2.0) if kind == "dynamic threshold" else None)
    z = torch.randn(5, 3, *SHAPE, generator=torch.Generator().manual_seed(1))
    options = {"noise": lambda row: z[row]} if kind == "noise of the caller" else {}
    a, b = (a_state(3, table, **options) for _ in range(2))
    unet = Still()
    eager, (runner, cuda) = EagerRunner(unet, a_spec(3)), graphed(unet, a_spec(3))
    while not a.done:
        eager.step(a)
        runner.step(b)
        same(a, b)
    assert cuda.kinds().count("replay") == 5, "the network's part is replayed"


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guided_and_unguided_rows_are_two_graphs(rescale: float) -> None:
    table = solvers.ddim(SCHEDULE, 8).with_guidance_interval(0.25, 0.75)
    unet = random_unet(TINY_CLASSES)
    a, b = (a_state(2, table, label=[1, 2], guidance=[3.0, 1.0], guidance_rescale=rescale) for _ in range(2))
    eager, (runner, cuda) = EagerRunner(unet, a_spec(2)), graphed(unet, a_spec(2))
    while not a.done:
        eager.step(a)
        runner.step(b)
        same(a, b)
    assert [entry[1] for entry in cuda.log if entry[0] == "replay"] == [0, 0, 1, 1, 1, 1, 0, 0]


def test_rescaling_is_data() -> None:
    unet = random_unet(TINY_CLASSES)
    runner, cuda = graphed(unet, a_spec(2))
    for phi in (0.3, 0.9):
        a, b = (
            a_state(2, solvers.ddim(SCHEDULE, 2), label=[1, 2], guidance=4.0, guidance_rescale=phi) for _ in range(2)
        )
        EagerRunner(unet, a_spec(2)).step(a)
        runner.step(b)
        same(a, b)
    assert cuda.captures == 1


def test_a_network_with_too_few_channels_is_refused() -> None:
    state = a_state(2, solvers.ddpm(SCHEDULE, 4, variance="learned_range"))
    runner, _ = graphed(Still(), a_spec(2))
    with pytest.raises(InvalidArgument, match="gave 3 channels; 3 are needed, or 6 where the variance is learned"):
        runner.step(state)


# The calls, in their order --------------------------------------------------------------------------------------------


def test_a_thousand_steps_are_a_thousand_replays() -> None:
    """There is one capture, after warm-ups on a side stream; then only replays are issued."""
    runner, cuda = graphed(Still(), a_spec(2))
    state = a_state(2, solvers.ddim(NoiseSchedule(), 1000))
    evaluations = []
    evaluate = runner.device_step.evaluate
    runner.device_step.evaluate = lambda *a: (evaluations.append(cuda.current_stream().name), evaluate(*a))  # type: ignore[method-assign]
    runner.step(state)
    assert cuda.log == [
        ("wait", "side", "main"),
        ("wait", "main", "side"),
        ("capture", 0, (0, 1), "side"),
        ("replay", 0),
    ]
    assert evaluations == ["side"] * (WARM_UPS + 1)
    with Counter() as between:
        for _ in range(999):
            runner.step(state)
    assert not between.seen, "something but replays reached the device"
    assert cuda.kinds()[4:] == ["replay"] * 999
    assert len(evaluations) == WARM_UPS + 1
    assert state.done
    assert state.row.tolist() == [1000, 1000]


def test_a_state_moves_in_once_and_its_buffers_stay() -> None:
    runner, _ = graphed(Still(), a_spec(2))
    state = a_state(2, multistep(solvers.ddim(SCHEDULE, 9)))
    runner.step(state)
    held = [name for name in graph.BUFFERS if getattr(state, name) is not None]
    assert {"x", "out", "xs", "m1", "m2", "row", "table", "seed", "index", "guidance"} <= set(held)
    places = {name: getattr(state, name).data_ptr() for name in held}
    other = a_state(2, solvers.ddim(SCHEDULE, 9))
    for _ in range(3):
        runner.step(state)
    assert places == {name: getattr(state, name).data_ptr() for name in places}
    runner.step(other)
    assert other.x.data_ptr() == places["x"], "the buffers are used again"
    assert state.x.data_ptr() != places["x"], "and the former state has tensors of its own"


def test_states_may_take_turns() -> None:
    """Two states that take turns, as threads on one sampler do, each continue from their own row."""
    table = multistep(solvers.ddim(SCHEDULE, 6, eta=1.0))
    unet = Still()
    eager, (runner, cuda) = EagerRunner(unet, a_spec(2)), graphed(unet, a_spec(2))
    alone = [a_state(2, table, seed=s) for s in (1, 2)]
    turns = [a_state(2, table, seed=s) for s in (1, 2)]
    for _ in range(6):
        for a, b in zip(alone, turns, strict=True):
            eager.step(a)
            runner.step(b)
            same(a, b)
    for a, b in zip(alone, turns, strict=True):
        same(a, b)
    assert cuda.captures == 1


def test_tables_are_data() -> None:
    """Tables of any length can take turns in the bank; only one that does not fit causes another capture."""
    unet = Still()
    runner, cuda = graphed(unet, a_spec(2, tables=2, rows=20))
    tables = [solvers.ddim(SCHEDULE, 5), solvers.ddim(SCHEDULE, 20, spacing="leading"), solvers.ddim(SCHEDULE, 3)]
    for table in tables:
        a, b = a_state(2, table), a_state(2, table)
        while not a.done:
            EagerRunner(unet, runner.spec).step(a)
            runner.step(b)
            same(a, b)
    assert cuda.captures == 1
    a, b = a_state(2, solvers.ddim(SCHEDULE, 21)), a_state(2, solvers.ddim(SCHEDULE, 21))
    while not a.done:
        EagerRunner(unet, runner.spec).step(a)
        runner.step(b)
        same(a, b)
    assert cuda.captures == 2
    c, d = a_state(2, tables[1]), a_state(2, tables[1])
    EagerRunner(unet, runner.spec).step(c)
    runner.step(d)
    same(c, d)
    assert cuda.captures == 2


def test_a_bank_may_change_under_a_state() -> None:
    unet = Still()
    eager, (runner, cuda) = EagerRunner(unet, a_spec(2)), graphed(unet, a_spec(2))
    a, b = (a_state(2, solvers.ddim(SCHEDULE, 5)) for _ in range(2))
    bank = TableBank([solvers.ddim(SCHEDULE, 7, spacing="leading")], CPU)
    for i in range(7):
        if i == 2:
            a.bank = b.bank = bank
        eager.step(a)
        runner.step(b)
        same(a, b)
    assert cuda.captures == 1


def test_weights_are_followed() -> None:
    """A graph reads weights changed in place; weights at another address cause another capture for the next state."""
    unet = Still()
    runner, cuda = graphed(unet, a_spec(2))

    def check(captures: int) -> None:
        a, b = (a_state(2, solvers.ddim(SCHEDULE, 5)) for _ in range(2))
        EagerRunner(unet, runner.spec).step(a)
        runner.step(b)
        same(a, b)
        assert cuda.captures == captures

    check(1)
    with torch.no_grad():
        unet.scale.mul_(1.5)
    check(1)
    unet.scale = nn.Parameter(torch.tensor(-0.3))
    check(2)
    unet.scale.data = torch.tensor(0.4)
    check(3)


def test_batch_sizes_share_a_pool_the_largest_first() -> None:
    unet, cuda = random_unet(TINY), FakeCuda()
    runners = {n: graphed(unet, a_spec(n), cuda)[0] for n in (1, 4, 2)}
    table = solvers.ddim(SCHEDULE, 3)
    captured = []
    for n, runner in runners.items():
        run = runner._capture
        runner._capture = lambda *a, n=n, run=run: (captured.append(n), run(*a))  # type: ignore[method-assign]
    states = {runner: a_state(n, table) for n, runner in runners.items()}
    before = {runner: state.x.clone() for runner, state in states.items()}
    graph.capture(states)
    assert captured == [4, 2, 1]
    assert {entry[2] for entry in cuda.log if entry[0] == "capture"} == {(0, 1)}
    for runner, state in states.items():
        assert torch.equal(state.x, before[runner]), "a capture is no step"
        twin = a_state(len(state.x), table)
        EagerRunner(unet, runner.spec).step(twin)
        runner.step(state)
        same(twin, state)
    assert cuda.captures == 3
    assert graphed(random_unet(TINY), a_spec(1), cuda)[0].pool.handle() == (0, 2), "another network has another pool"


def test_streams_wait_for_each_other() -> None:
    """Graphs of one pool use the same memory, so a replay waits for one on another stream."""
    unet, cuda = Still(), FakeCuda()
    one, other = graphed(unet, a_spec(1), cuda)[0], graphed(unet, a_spec(2), cuda)[0]
    a, b = a_state(1, solvers.ddim(SCHEDULE, 5)), a_state(2, solvers.ddim(SCHEDULE, 5))
    one.step(a)
    other.step(b)
    cuda.log.clear()
    one.step(a)
    with cuda.stream(cuda.Stream()):
        other.step(b)
        other.step(b)
    one.step(a)
    assert cuda.log == [
        ("replay", 0), ("wait", "side 2", "main"), ("replay", 1), ("replay", 1), ("wait", "main", "side 2"),
        ("replay", 0),
    ]  # fmt: skip


class Touches(TorchDispatchMode):
    """Adds ("touch", stream) to the log for each operation on memory of ``tensors``, the static buffers for example."""

    def __init__(self, cuda: FakeCuda, tensors: list[Tensor]):
        super().__init__()
        self.cuda = cuda
        self.places = {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(leaf.untyped_storage()._cdata in self.places for leaf in leaves):
            self.cuda.log.append(("touch", self.cuda.current_stream().name))
        return operation(*args, **(kwargs or {}))


def static(runner: GraphRunner) -> list[Tensor]:
    assert runner.buffers is not None
    held = [getattr(runner.buffers, name) for name in graph.BUFFERS]
    return [t for t in (*held, runner.buffers.bank.values, runner.buffers.bank.lengths) if t is not None]


def without_repeats(log: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [entry for i, entry in enumerate(log) if i == 0 or entry != log[i - 1]]


def test_static_buffers_are_touched_after_the_wait() -> None:
    """A state that moves in on another stream waits before it is copied; the one that it drives out has its own stream.

    Its copies are made where its owner reads them, in order with the owner's work.
    """
    runner, cuda = graphed(Still(), a_spec(2))
    a, b = (a_state(2, solvers.ddim(SCHEDULE, 5), seed=s) for s in (1, 2))
    twins = [a_state(2, solvers.ddim(SCHEDULE, 5), seed=s) for s in (1, 2)]
    runner.step(a)
    cuda.log.clear()
    other = cuda.Stream()
    with Touches(cuda, static(runner)):
        with cuda.stream(other):
            runner.step(b)
        runner.step(a)
    assert without_repeats(cuda.log) == [
        ("wait", "side 2", "main"), ("touch", "main"), ("wait", "side 2", "main"), ("touch", "side 2"), ("replay", 0),
        ("wait", "main", "side 2"), ("touch", "side 2"), ("wait", "main", "side 2"), ("touch", "main"), ("replay", 0),
    ]  # fmt: skip
    eager = EagerRunner(Still(), a_spec(2))
    for twin, state, steps in zip(twins, (a, b), (2, 1), strict=True):
        for _ in range(steps):
            eager.step(twin)
        same(twin, state)


@pytest.mark.parametrize("part", ["step", "capture", "update"])
def test_all_work_of_a_runner_waits_for_other_streams(part: str) -> None:
    """So do captures ahead, and the part of a step that the host computes."""
    unet, cuda = Still(), FakeCuda()
    runner = graphed(unet, a_spec(2), cuda)[0]
    noise_of = {"noise": lambda row: torch.zeros(2, *SHAPE)} if part == "update" else {}
    a = a_state(2, solvers.ddpm(SCHEDULE, 5), **noise_of)
    b = a_state(2, multistep(solvers.ddim(SCHEDULE, 5)))
    runner.step(a)
    cuda.log.clear()
    with Touches(cuda, static(runner)), cuda.stream(cuda.Stream()):
        if part == "update":
            runner.update(a)
        elif part == "capture":
            graph.capture({runner: b})
        else:
            runner.step(b)
    assert cuda.log[0] == ("wait", "side 2", "main"), "before anything else"
    assert len(cuda.log) > 1


def test_captures_of_a_pool_are_on_one_stream() -> None:
    """Memory of a pool belongs to the stream of its capture; on another stream it would be allocated anew."""
    unet, cuda = Still(), FakeCuda()
    runners = [graphed(unet, a_spec(n), cuda)[0] for n in (1, 2)]
    for runner in runners:
        for table in (solvers.ddim(SCHEDULE, 5), solvers.ddpm(SCHEDULE, 5)):
            with cuda.stream(cuda.Stream()):  # the caller's own
                runner.step(a_state(runner.spec.batch, table))
    captured = [entry[2:] for entry in cuda.log if entry[0] == "capture"]
    assert len(captured) == 4
    assert len(set(captured)) == 1, "one pool, one stream"
    graphed(Still(), a_spec(1), cuda)[0].step(a_state(1, solvers.ddim(SCHEDULE, 5)))
    assert {entry[2:] for entry in cuda.log if entry[0] == "capture"} - set(captured), "another network has others"


def test_devices_have_pools_of_their_own() -> None:
    unet, cuda = Still(), FakeCuda()
    meta = dataclasses.replace(a_spec(1), device=torch.device("meta"))
    assert graphed(unet, meta, cuda)[0].pool is not graphed(unet, a_spec(1), cuda)[0].pool
    assert graphed(unet, a_spec(2), cuda)[0].pool is graphed(unet, a_spec(1), cuda)[0].pool


def test_a_pool_without_graphs_is_not_captured_into() -> None:
    """PyTorch asserts that a pool's handle is in use or new. Here the substitute does."""
    unet, cuda = Still(), FakeCuda()
    runner, other = graphed(unet, a_spec(2), cuda)[0], graphed(unet, a_spec(1), cuda)[0]
    for expected in ((0, 1), (0, 2)):  # all graphs are gone: weights have moved
        unet.scale = nn.Parameter(torch.tensor(-0.3))
        runner.step(a_state(2, solvers.ddim(SCHEDULE, 5)))
        assert cuda.log[-2][:3] == ("capture", cuda.captures - 1, expected)
    other.step(a_state(1, solvers.ddim(SCHEDULE, 5)))
    runner.graphs.clear()
    runner.step(a_state(2, solvers.ddim(SCHEDULE, 5)))
    assert cuda.log[-2][2] == (0, 2), "a graph of the other batch size keeps the pool"


def test_a_failed_capture_leaves_the_pool_usable() -> None:
    unet, cuda = Asking(), FakeCuda()
    runner = graphed(unet, a_spec(2), cuda)[0]
    for _ in range(2):
        with pytest.raises(BackendError, match="cannot be captured"):
            runner.step(a_state(2, solvers.ddim(SCHEDULE, 3)))
    runner.device_step = EagerRunner(Still(), a_spec(2))
    runner.step(a_state(2, solvers.ddim(SCHEDULE, 3)))
    assert cuda.kinds()[-1] == "replay"


def test_graphs_of_a_runner_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MOST_GRAPHS", 2)
    runner, _ = graphed(Still(), a_spec(2))
    for table in (solvers.ddim(SCHEDULE, 3), solvers.ddpm(SCHEDULE, 3), multistep(solvers.ddim(SCHEDULE, 3))):
        runner.step(a_state(2, table))
        assert len(runner.graphs) <= 2


class Asking(Still):
    """A network that waits for the device."""

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return super().forward(x, t) * float(x.detach().abs().max())


def test_a_network_that_waits_for_the_device_is_refused() -> None:
    runner, _ = graphed(Asking(), a_spec(2))
    state = a_state(2, solvers.ddim(SCHEDULE, 3))
    before = state.x.clone()
    with pytest.raises(BackendError, match=r"cannot be captured in a CUDA graph: .*not permitted.*backend='eager'"):
        runner.step(state)
    assert torch.equal(state.x, before)
    assert state.row_host.tolist() == [0, 0]


def test_inference_mode_and_gradients_outside_change_nothing() -> None:
    unet = Still()
    runner, _ = graphed(unet, a_spec(2))
    reference = a_state(2, solvers.ddim(SCHEDULE, 3))
    EagerRunner(unet, runner.spec).step(reference)
    with torch.inference_mode():
        state = a_state(2, solvers.ddim(SCHEDULE, 3))
        runner.step(state)
        same(reference, state)
    state = a_state(2, solvers.ddim(SCHEDULE, 3))
    runner.step(state)
    same(reference, state)
    assert not state.x.requires_grad


# The sampler ----------------------------------------------------------------------------------------------------------


class Forgetful(EagerRunner):
    """Eager steps that do not set ``out`` in a whole step."""

    def whole(self, state: State, guided: bool, noisy: bool) -> None:
        super().whole(state, guided, noisy)
        assert state.out is not None
        state.out.fill_(torch.nan)


@pytest.fixture
def on_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Backend `compiled` is graphs of eager steps, behind which nothing can read ``out``."""
    cuda = FakeCuda()

    def prepare(unet: nn.Module, spec: Spec) -> GraphRunner:
        return GraphRunner(Forgetful(unet, spec), unet, spec, cuda)

    monkeypatch.setattr(compiled, "prepare", prepare)
    yield cuda
    assert "replay" in cuda.kinds()


MASK = torch.zeros(8, 8)
MASK[:, :4] = 1.0
JOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"batch_size": 2, "solver": "ddpm"},
    "guided": {"labels": [0, 1, 2, 3, 0], "guidance": 3.0, "guidance_interval": (0.2, 0.8)},
    "history": {"solver": "dpmpp_3m"},
    "two rows a step": {"solver": "heun"},
    "inpainting": {"image": torch.full((3, 8, 8), 0.3), "mask": MASK, "solver": "ddpm"},
    "a guide": {"guide": lambda x0, _: x0.flatten(1).sum(1)},
    "noise of the caller": {"noise": lambda row, i: torch.full((len(i), 3, 8, 8), 0.5), "solver": "ddpm"},
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())
def test_the_sampler_on_graphs(job: dict[str, Any], on_graphs: FakeCuda) -> None:
    unet = random_unet(TINY_CLASSES).train()
    options = {"labels": 1, "steps": 5, **job}
    eager, graphs = (Sampler(unet, SCHEDULE, backend=name) for name in ("eager", "compiled"))
    assert torch.equal(eager.sample(5, **options).images, graphs.sample(5, **options).images)
    assert all(module.training for module in unet.modules())


def test_previews_and_samples_in_between(on_graphs: FakeCuda) -> None:
    unet = random_unet(TINY_CLASSES)
    eager, graphs = (Sampler(unet, SCHEDULE, backend=name) for name in ("eager", "compiled"))
    for a, b in zip(
        eager.stream(2, steps=6, labels=1, every=2), graphs.stream(2, steps=6, labels=1, every=2), strict=True
    ):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.x0, b.x0)
        other = [sampler.sample(2, steps=2, labels=3, seed=9).images for sampler in (eager, graphs)]
        assert torch.equal(*other)


# What the device is asked ---------------------------------------------------------------------------------------------


class OnlyTheDevice(TorchDispatchMode):
    """Asserts that every tensor of every operation is on CUDA, and that none waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not waits(operation, args), f"{operation} waits for the device"
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not isinstance(leaf, Tensor) or leaf.device.type == "cuda", f"{operation} has a tensor on the host"
        self.operations += 1
        return result


class Dispatched(TorchFunctionMode):
    """Indexing and copying as the operations that they are: their Python bindings look for a real device first."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.Tensor.copy_, torch.Tensor.contiguous):
            return getattr(torch.ops.aten, function.__name__)(*args, **(kwargs or {}))
        if function is not torch.Tensor.__getitem__:
            return function(*args, **(kwargs or {}))
        x, key = args
        dim, indices = 0, []
        for k in key if isinstance(key, tuple) else (key,):
            if isinstance(k, Tensor):
                indices += [*[None] * (dim - len(indices)), k]
            elif isinstance(k, int):
                x, dim = torch.ops.aten.select(x, dim, k), dim - 1
            elif isinstance(k, slice):
                x = torch.ops.aten.slice(x, dim, k.start, k.stop, k.step or 1)
            else:
                assert k is None
                x = torch.ops.aten.unsqueeze(x, dim)
            dim += 1
        return torch.ops.aten.index(x, indices) if indices else x


def on_cuda(state: State) -> State:
    """The state, and its bank, as if they were on a card. Within a `FakeTensorMode`."""
    bank = TableBank.__new__(TableBank)
    bank.__dict__ = {k: _moved(v) for k, v in vars(state.bank).items()}
    fields = {f.name: _moved(getattr(state, f.name)) for f in dataclasses.fields(state)}
    return State(**{**fields, "bank": bank})


def _moved(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device="cuda") if isinstance(value, Tensor) else value


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_step_asks_the_device_nothing(case: Case) -> None:
    """The operations of a step on tensors that claim to be on CUDA: no transfer, no waiting, no tensor of the host."""
    real = start(case)
    spec = spec_of(real, torch.float32, case)
    with torch.device("meta"):
        unet = UNet(case.config).eval()
    with FakeTensorMode():
        for module in unet.modules():
            module._parameters = {name: _moved(p) for name, p in module._parameters.items()}
        steps = EagerRunner(unet, dataclasses.replace(spec, device=torch.device("cuda")))
        state = on_cuda(real)
        if case.rescale:
            state.guidance_rescale = torch.empty(2, device="cuda")
        with torch.no_grad(), Dispatched(), OnlyTheDevice() as only:
            steps.evaluate(state, bool(state.guided_host.any()))
            steps.advance(state, noisy=True)
    assert only.operations > 100


ASKING: dict[str, Callable[[Tensor], Any]] = {
    "a value": lambda x: x * float(x.sum().item()),
    "a mask": lambda x: torch.ops.aten.index(x, [x[:, 0, 0, 0] > 0]),
    "a truth": lambda x: x if (x > 0).any() else -x,
    "the host": lambda x: x.cpu(),
    "from the host": lambda x: x + torch.tensor([1.0], device="cpu").to(x.device),
    "a number of the host": lambda x: x + torch.zeros((), device="cpu"),
}


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING.keys())
def test_questions_are_found(ask: Callable[[Tensor], Any]) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 4, device="cuda")
        with pytest.raises(AssertionError, match=r"waits for the device|on the host"), Dispatched(), OnlyTheDevice():
            ask(x)


# Compiled -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without its code generator: what it traces, as one graph, runs as it is."""
    compile_ = torch.compile

    def traced(function: Any, *, fullgraph: bool, dynamic: bool, mode: str | None = None) -> Any:
        assert fullgraph
        return compile_(function, fullgraph=True, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


SMALL = dataclasses.replace(MICRO, tables=(multistep(MICRO.tables[0]), MICRO.tables[1]), rescale=0.4)


@pytest.mark.parametrize("case", [MICRO, SMALL], ids=["plain", "history, rescaled"])
def test_the_whole_step_can_be_traced(case: Case, traced: None) -> None:
    """Network with guidance, and the update with its noise: each is one graph, and they compute what eager steps do."""
    unet = random_unet(case.config)
    a, b = start(case), start(case)
    eager = EagerRunner(unet, spec_of(a, torch.float32, case))
    cuda = FakeCuda()
    runner = GraphRunner(compiled.CompiledStep(eager), unet, eager.spec, cuda=cuda)
    for _ in range(case.steps):
        eager.step(a)
        runner.step(b)
        same(a, b)


@pytest.mark.slow
def test_the_whole_step_compiled() -> None:
    """By Inductor for this CPU, without the graph: the Philox of the compiled update included."""
    case = MICRO
    unet = random_unet(case.config)
    a, b = start(case), start(case)
    eager = EagerRunner(unet, spec_of(a, torch.float32, case))
    steps = compiled.CompiledStep(eager)
    with torch.no_grad():
        for _ in range(case.steps):
            eager.step(a)
            steps.whole(b, bool(b.guided_host.any()), b.bank.noisy)
            b.advance_host()
            assert (a.x - b.x)[case.active].abs().max() < 1e-4
            assert torch.equal(a.row, b.row)


def test_on_cuda_compiled_is_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(a_spec(2), device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    runner = backends.prepare("compiled", Still(), spec)
    assert isinstance(runner, GraphRunner)
    assert isinstance(runner.device_step, compiled.CompiledStep)
    assert isinstance(backends.prepare("eager", Still(), spec), EagerRunner)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"torch.compile on CUDA needs triton"):
        backends.prepare("compiled", Still(), spec)


def test_predictions_do_not_disturb_a_run() -> None:
    """Previews between the two halves read the buffers and leave them."""
    unet = Still()
    runner, _ = graphed(unet, a_spec(2))
    a, b = (a_state(2, solvers.ddim(SCHEDULE, 4)) for _ in range(2))
    while not a.done:
        EagerRunner(unet, runner.spec).step(a)
        runner.forward(b)
        update.predict_x0(b)
        runner.update(b)
        same(a, b)
