"""Backend `triton` with text-conditioned networks: the references of its launches, in the buffers of the kernels.

The networks' attentions have logits of a spread of about 3. Some runs are interpreted as well; tests/kernels compares
the kernels with their references.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which is installed on Linux x86-64 only")

from fastdiff import solvers
from fastdiff.backends import Spec, graph
from fastdiff.backends.network import TextTables
from fastdiff.backends.triton import TritonRunner, TritonStep
from fastdiff.backends.triton import runner as triton
from fastdiff.core.lower import vector_kind
from fastdiff.core.program import Attention, Conv
from fastdiff.core.state import State, TableBank, Texts
from fastdiff.core.update import guide
from fastdiff.errors import BackendError
from fastdiff.kernels.launch import Launch
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNetCondition, UNetConditionConfig
from tests.backends.test_triton import compute, compute_on_device
from tests.backends.test_triton_bitwise import META, deciding
from tests.core.test_condition_program import REFUSED
from tests.support.captioned import network_and_encoder
from tests.support.conditions import VARIANTS, config, random_condition, random_inputs, text_states, vector_of
from tests.support.fake_cuda import FakeCuda
from tests.support.paths import ROOT
from tests.support.unets import relative_error

CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule("linear", 100, beta_end=0.1)
# One level, with a pooled vector: a captured step of it is replayed in a fraction of a second.
SMALL = UNetConditionConfig(
    sample_size=4, in_channels=3, out_channels=3, block_out_channels=(8,), layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
    attention_head_dim=2, norm_num_groups=4, cross_attention_dim=12, use_linear_projection=True,
    class_embed_type="projection", projection_class_embeddings_input_dim=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def small() -> UNetCondition:
    return random_condition(SMALL)


def drawn(images: int, texts: int, tokens: int = 5, seed: int = 3) -> tuple[torch.Tensor, Texts]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 3, 4, 4, generator=generator)
    return x, Texts(text_states((texts, tokens, 12), generator), torch.randn(texts, 10, generator=generator))


def state_of(
    x: torch.Tensor, texts: Texts | None, label: Any = None, null: Any = None, guidance: Any = 1.0, steps: Any = None
) -> State:
    bank = TableBank([solvers.ddim(SCHEDULE, steps) if steps else solvers.ddim(SCHEDULE, spacing=[40.0])], CPU)
    state = State.create(x.clone(), bank, label=range(len(x)) if label is None else label, guidance=guidance)
    state.texts, state.null = texts, None if null is None else torch.tensor(null)
    return state


def spec_of(x: torch.Tensor, dtype: torch.dtype = torch.float32, **more: Any) -> Spec:
    return Spec(len(x), (x.shape[1], x.shape[2], x.shape[3]), dtype, CPU, **more)


class Plain:
    """Runner without graphs."""

    def __init__(self, unet: UNetCondition, spec: Spec):
        self.steps = TritonStep(unet, spec, compute)

    @torch.no_grad()
    def step(self, state: State, whole: bool = True) -> None:
        assert isinstance(self.steps.unet, UNetCondition)
        self.steps.follow(state.bank, fresh=True)
        self.steps.follow_texts(self.steps.unet, state)
        self.steps.take_labels(state)
        guided = bool(state.guided_host.any())
        if whole:
            self.steps.whole(state, guided, noisy=True)
            state.advance_host()
        else:
            self.steps.evaluate(state, guided)


@torch.no_grad()
def evaluated(unet: UNetCondition, state: State, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Evaluate the network by way of launches; every buffer holds NaN before."""
    steps, guided = TritonStep(unet, spec_of(state.x, dtype), compute), bool(state.guided_host.any())
    steps.follow(state.bank, fresh=False)
    steps.follow_texts(unet, state)
    steps.network(state, guided)  # makes the buffers
    for b in steps.buffers.values():
        b.arena.fill_(0xFF)
        for tensor in (*b.embedding.values(), *b.space.values(), *b.parts.values(), b.net):
            tensor.fill_(torch.nan)
    steps.evaluate(state, guided)
    assert state.out is not None
    return state.out


@torch.no_grad()
def assert_equals_module(
    described: UNetConditionConfig, size: tuple[int, int] = (8, 8), tokens: int = 7, bound: float = 2e-5,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    unet = random_condition(described)
    inputs = random_inputs(described, 2, size, tokens)
    if vector_kind(unet) != "condition":
        inputs.pop("timestep_cond", None)
    inputs["t"] = torch.tensor([40.0, 40.0])
    texts = Texts(inputs["encoder_hidden_states"], vector_of(unet, inputs))
    got = evaluated(unet, state_of(inputs["x"], texts), dtype)
    added = {k: v.double() for k, v in inputs.pop("added_cond_kwargs", {}).items()}
    inputs = {k: v.double() for k, v in inputs.items()} | ({"added_cond_kwargs": added} if added else {})
    assert relative_error(got, random_condition(described).double()(**inputs)) <= bound


# The launches are the network -----------------------------------------------------------------------------------------

# The others' operations are those of these; tests/core/test_condition_program.py compares all their programs.
FEW = (
    "heads that leave channels over, linear", "only cross-attention", "resnet blocks", "self-attention at the ends",
    "text_time", "timestep_cond",
)  # fmt: skip
SUPPORTED = [name for name in VARIANTS if name not in REFUSED]


@pytest.mark.parametrize(
    "variant", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in SUPPORTED]
)
def test_variant(variant: str) -> None:
    assert_equals_module(config(**VARIANTS[variant]))


@pytest.mark.parametrize(("size", "tokens"), [((12, 4), 1), ((2, 2), 77)])
def test_sizes_and_tokens(size: tuple[int, int], tokens: int) -> None:
    assert_equals_module(config(), size, tokens)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)], ids=str)
def test_half_precision(dtype: torch.dtype, bound: float) -> None:
    assert_equals_module(SMALL, tokens=77, bound=bound, dtype=dtype)


def test_every_operation_is_one_launch_and_texts_are_none(small: UNetCondition) -> None:
    x, texts = drawn(2, 2)
    steps = TritonStep(small, spec_of(x), compute)
    with torch.no_grad():
        steps.follow_texts(small, state_of(x, texts))
        listed = steps.network(state_of(x, texts), guided=False)
    counts = collections.Counter(launch.op for launch in listed)
    ops = steps.program.ops
    gated = sum(isinstance(op, Conv) and op.geglu for op in ops)
    norms = [norm for norm in map(steps.program.norm, ops) if norm is not None]
    assert counts["geglu"] == gated == 3
    assert counts["layer_norm"] == sum(norm.groups == 0 for norm in norms) == 3 * gated
    assert counts["attention.attention"] == sum(isinstance(op, Attention) for op in ops) == 2 * gated
    products = sum(isinstance(op, Conv) for op in ops) - gated
    assert counts["conv.conv"] + counts["conv.partial"] == products
    of_texts = [launch for launch in listed if launch.arguments.get("keys") == 5]
    assert len(of_texts) == gated
    assert steps.texts is not None
    held = {bank.data_ptr() for bank in steps.texts.banks.values()}
    assert {launch.arguments["k"].data_ptr() for launch in of_texts} == held


# A prompt is a label --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_prompts_and_negative_prompts_of_each_image(small: UNetCondition, rescale: float) -> None:
    x, texts = drawn(4, 3)
    prompts, nulls, guidance = [2, 0, 0, 1], [1, 1, 2, 0], [3.0, 1.0, 2.0, 0.0]
    state = state_of(x, texts, prompts, nulls, guidance)
    state.guidance_rescale = rescale
    t = torch.tensor([40.0] * 4)
    both = [small(x, t, texts.states[i], texts.pooled[i]) for i in (prompts, nulls)]  # type: ignore[index]
    expected = guide(*both, torch.tensor(guidance), 3, rescale)
    assert relative_error(evaluated(small, state), expected) <= 2e-5


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners are made without a GPU, and compile nothing; one run before a capture suffices here."""
    monkeypatch.setattr(graph, "WARM_UPS", 1)
    monkeypatch.setattr(Launch, "compile", lambda launch: None)
    monkeypatch.setattr(triton, "reasons_against", lambda unet, spec: [])


def captured(unet: UNetCondition, x: torch.Tensor, **more: Any) -> TritonRunner:
    return TritonRunner(unet, spec_of(x, **more), FakeCuda(), compute_on_device)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    "room",
    [
        pytest.param(triton.TEXT_BYTES, id="all texts are kept"),
        pytest.param(1, id="no more than needed", marks=pytest.mark.slow),
    ],
)
def test_graphs_serve_states_of_other_texts_in_turns(
    small: UNetCondition, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables grow, or their rows are overwritten, while graphs hold their addresses; the last texts are longer."""
    monkeypatch.setattr(triton, "TEXT_BYTES", room)
    x, texts = drawn(2, 3)
    _, longer = drawn(2, 2, tokens=9, seed=4)

    def states() -> list[State]:
        return [
            state_of(x, texts, [2, 0], [1, 1], [3.0, 1.0], steps=3),
            state_of(x, drawn(2, 4, seed=5)[1], [3, 1], [0, 2], [2.0, -0.5], steps=3),
            state_of(x, texts, [1, 1], [0, 2], 1.5, steps=3),
            state_of(x, longer, [0, 1], [1, 0], [4.0, 2.0], steps=3),
        ]

    runner, in_turns, alone = captured(small, x), states(), states()
    for state in alone:
        plain = Plain(small, runner.spec)
        for _ in range(2):
            plain.step(state)
    for _ in range(2):
        for state in in_turns:
            runner.step(state)
    for a, b in zip(in_turns, alone, strict=True):
        assert torch.equal(a.x, b.x)


@pytest.mark.usefixtures("anywhere")
def test_texts_are_computed_once_and_by_themselves(small: UNetCondition, monkeypatch: pytest.MonkeyPatch) -> None:
    x, texts = drawn(2, 2)
    computed = []
    compute_text = TextTables._compute
    monkeypatch.setattr(
        TextTables, "_compute", lambda self, *args: computed.append(args[1]) or compute_text(self, *args)
    )
    runner = captured(small, x)
    assert texts.pooled is not None
    results = []
    for again in (texts, Texts(texts.states.clone(), texts.pooled.clone())):
        state = state_of(x, again, [0, 1], steps=4)
        for _ in range(3):
            runner.step(state)
        results.append(state.x)
    assert computed == [0, 1]
    assert torch.equal(*results)


@pytest.mark.usefixtures("anywhere")
def test_texts_labels_and_nulls_that_a_caller_replaces(small: UNetCondition) -> None:
    x, texts = drawn(2, 3)
    runner = captured(small, x)
    state = state_of(x, texts, [0, 1], [2, 2], 2.0)
    changes: list[dict[str, Any]] = [
        {}, {}, {"null": torch.tensor([1, 0])}, {"label": torch.tensor([2, 0])}, {"texts": drawn(2, 3, seed=9)[1]},
        {"texts": texts}, {},
    ]  # fmt: skip
    for change in changes:
        for name, value in change.items():
            setattr(state, name, value)
        runner.forward(state)
        assert state.out is not None
        assert state.label is not None
        assert state.null is not None
        expected = state_of(x, state.texts, state.label.tolist(), state.null.tolist(), 2.0)
        Plain(small, runner.spec).step(expected, whole=False)
        assert torch.equal(state.out, expected.out)  # type: ignore[arg-type]


@pytest.mark.usefixtures("anywhere")
def test_weights_that_change_are_followed() -> None:
    x, texts = drawn(2, 2)
    unet = random_condition(SMALL)
    runner = captured(unet, x)
    runner.forward(state_of(x, texts))
    banks = runner.device_step.texts and dict(runner.device_step.texts.banks)
    for m in unet.modules():
        if isinstance(m, torch.nn.Linear):
            m.weight.data *= 1.1
    state = state_of(x, texts)
    runner.forward(state)
    assert runner.device_step.texts is not None
    assert all(runner.device_step.texts.banks[name] is bank for name, bank in (banks or {}).items())
    with torch.no_grad():
        expected = unet(x, torch.tensor([40.0] * 2), texts.states, texts.pooled)
    assert relative_error(state.out, expected) <= 2e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
def test_nothing_that_decides_bits_depends_on_the_batch(guided: bool) -> None:
    with META:
        unet = UNetCondition(SMALL)
    found = []
    for batch in (1, 3, 64):
        listed: list[Launch] = []
        with META, torch.no_grad():
            steps = TritonStep(unet, Spec(batch, (3, 4, 4), torch.bfloat16, META, None, "bitwise"), listed.append)
            bank = TableBank([solvers.ddim(SCHEDULE, 2)], META)
            state = State.create(torch.empty(batch, 3, 4, 4), bank, label=[0] * batch, guidance=1.0 + guided)
            state.texts = Texts(torch.empty(2, 77, 12), torch.empty(2, 10), names=("a", "b"))
            state.null = state.label
            steps.follow_texts(unet, state)
            steps.whole(state, guided, noisy=True)
        found.append([deciding(launch) for launch in listed])
    assert {op for op, *_ in found[0]} >= {"geglu", "layer_norm", "attention.attention"}
    assert found[0] == found[1] == found[2]


# Through the sampler --------------------------------------------------------------------------------------------------

ONE_LEVEL: dict[str, Any] = {
    name: getattr(SMALL, name)
    for name in ("sample_size", "block_out_channels", "down_block_types", "up_block_types", "mid_block_type")
}
CALL: dict[str, Any] = {
    "prompts": ["a dog", "a red car", "a dog"], "negative": ["", "snow", "a red car"], "guidance": 3.0, "seed": 4,
}  # fmt: skip


@pytest.mark.usefixtures("anywhere")
def test_prompts_of_a_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, the last of which is padded, and in a second call with other prompts."""
    monkeypatch.setattr(
        "fastdiff.backends.triton.prepare",
        lambda unet, spec: TritonRunner(unet, spec, FakeCuda(), compute_on_device),
    )
    unet, encoder = network_and_encoder(**ONE_LEVEL)
    for backend in ("eager", "triton"):
        sampler = Sampler(unet, SCHEDULE, text_encoder=encoder, backend=backend, device="cpu")
        images = [
            sampler.sample(3, **CALL, steps=2, batch_size=2).images,
            sampler.sample(2, prompts="snow", guidance=2.0, steps=2).images,
        ]
        if backend == "eager":
            expected = images
    for got, exact in zip(images, expected, strict=True):
        assert relative_error(got, exact) <= 1e-4


CHILD = """
import json, sys
import torch
sys.path[:0] = [sys.argv[1]]
from tests.support.kernel_harness import mend_interpreter
from tests.support.captioned import network_and_encoder
from tests.backends.test_triton_text import CALL, SCHEDULE, Plain
from fastdiff.backends import triton
from fastdiff.sampler import Sampler
mend_interpreter()

class Interpreted(Plain):
    def __init__(self, unet, spec):
        super().__init__(unet, spec)
        self.steps.run = self.steps.weights.run = lambda launch: ops.append(launch.op) or launch()

ops = []
triton.prepare = Interpreted
unet, encoder = network_and_encoder(sample_size=4)
images = [
    Sampler(unet, SCHEDULE, text_encoder=encoder, backend=backend, device="cpu").sample(3, **CALL, steps=1).images
    for backend in ("eager", "triton")
]
print(json.dumps({
    "off": float((images[1] - images[0]).abs().max()), "scale": float(images[0].abs().max()), "ops": sorted(set(ops)),
}))
"""


@pytest.mark.slow
def test_interpreted_prompts_of_a_sampler() -> None:
    """The kernels themselves: a guided step of three images with prompts and negative prompts of their own."""
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(ROOT)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["off"] <= 1e-4 * found["scale"]
    assert {"attention.attention", "geglu", "layer_norm", "update"} <= set(found["ops"])


# Where it cannot run --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("anywhere")
def test_a_state_is_refused_by_name_at_every_step(small: UNetCondition) -> None:
    x, texts = drawn(2, 2)
    runner = captured(small, x)
    state = state_of(x, texts, [0, 1], [1, 1], 2.0, steps=3)
    runner.step(state)
    changes: list[tuple[str, Any, str]] = [
        ("texts", None, r"needs texts, states of the shape \[texts, tokens, 12\], not None"),
        ("texts", Texts(torch.zeros(2, 5, 11), torch.zeros(2, 10)), r"not \[2, 5, 11\]"),
        ("texts", Texts(torch.zeros(2, 5, 12)), r"pooled vectors of texts of the shape \[2, 10\], not None"),
        ("label", None, r"the number of a text for each image \(label\)"),
        ("label", torch.tensor([0, 2]), r"\(label\)"),
        ("label", torch.tensor([-1, 0]), r"\(label\)"),
        ("label", torch.tensor([0]), r"\(label\)"),
        ("null", None, r"\(null\)"),
        ("null", torch.tensor([0, 9]), r"\(null\)"),
    ]
    for name, value, words in changes:
        before = getattr(state, name)
        setattr(state, name, value)
        for _ in range(2):
            with pytest.raises(BackendError, match=words):
                runner.step(state)
        setattr(state, name, before)
    runner.step(state)
    expected = state_of(x, texts, [0, 1], [1, 1], 2.0, steps=3)
    plain = Plain(small, runner.spec)
    for _ in range(2):
        plain.step(expected)
    assert torch.equal(state.x, expected.x)


def test_a_network_is_refused_by_name() -> None:
    spec = Spec(1, (4, 8, 8), torch.float32, CPU)
    here = set(triton.reasons_against(random_condition(config()), spec))
    assert all("CUDA" in reason for reason in here), "about this machine alone"
    for changes, shape, words in (
        ({}, (4, 9, 8), "multiples of 2, not 9x8"),
        ({"in_channels": 9}, (4, 8, 8), "4 channels of an image, which reads 9"),
        (VARIANTS["class labels"], (4, 8, 8), "no labels beside a text"),
        (VARIANTS["no depth"], (4, 8, 8), "no attention of the network reads a text"),
    ):
        found = triton.reasons_against(random_condition(config(**changes)), dataclasses.replace(spec, shape=shape))
        assert [reason for reason in found if reason not in here and words in reason], found


def test_kernels_that_cannot_be_compiled_leave_the_network_to_pytorch(
    small: UNetCondition, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And each state keeps its own texts."""

    def fail(launch: Launch) -> None:
        raise BackendError(f"kernel {launch.op} cannot be compiled: [Errno 30] Read-only file system")

    monkeypatch.setattr(Launch, "compile", fail)
    monkeypatch.setattr(triton, "reasons_against", lambda unet, spec: [])
    x, texts = drawn(2, 2)
    runner = captured(small, x, dtype=torch.bfloat16)
    for seed in (3, 8):
        texts = drawn(2, 3, seed=seed)[1]
        state, other = (state_of(x, texts, [2, 0], [1, 1], 2.0, steps=3) for _ in range(2))
        plain = Plain(small, spec_of(x))
        with caplog.at_level(logging.WARNING, "fastdiff"):
            for _ in range(2):
                runner.step(state)
                plain.step(other)
        assert relative_error(state.x, other.x) <= 1e-5
    assert sum("Read-only file system" in record.message for record in caplog.records) == 1
