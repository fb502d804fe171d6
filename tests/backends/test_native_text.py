"""Text-conditioned networks on the native engine: each operation, and whole steps, against float64 and diffusers."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import NoiseSchedule, checkpoints, solvers
from fastdiff.backends import Spec, choose, native, prepare
from fastdiff.backends.native import cost, packing
from fastdiff.backends.network import TextTables, condition_reasons
from fastdiff.core.lower import lower, vector_kind
from fastdiff.core.program import Attention
from fastdiff.core.state import State, TableBank, Texts
from fastdiff.core.update import guide
from fastdiff.errors import BackendError
from fastdiff.unet import UNetCondition, UNetConditionConfig
from tests.cli.test_cli import call  # noqa: F401 - a fixture
from tests.core.test_condition_program import REFUSED
from tests.support.captioned import network_and_encoder
from tests.support.cases import TEXTS, Replay, one_level
from tests.support.conditions import (
    VARIANTS,
    config,
    diffusers_condition,
    diffusers_output,
    random_condition,
    random_inputs,
    text_states,
    vector_of,
)
from tests.support.unets import relative_error
from tests.unet.test_condition import SD15, SD21, configs

extension = native.extension()
if extension is None:
    pytest.skip("fastdiff._native is not built", allow_module_level=True)

ISAS = extension.isas()
CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule("linear", 100, beta_end=0.1)
# The layout of the built-in text model, with half its channels.
SCENES = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "block_out_channels": (16, 32, 64), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (1, 2, 4),
    "norm_num_groups": 8, "cross_attention_dim": 128, "use_linear_projection": True,
    "class_embed_type": "projection", "projection_class_embeddings_input_dim": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def replays():
    known: dict[tuple[str, int], Replay] = {}

    def replay(name: str, rows: int) -> Replay:
        if (name, rows) not in known:
            known[name, rows] = Replay(TEXTS[name][0], rows, TEXTS[name][1])
        return known[name, rows]

    return replay


# Operations -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("rows", "threads"), [(3, 2), *(pytest.param(*c, marks=pytest.mark.slow) for c in [(1, 1), (1, 3)])]
)
@pytest.mark.parametrize("name", TEXTS)
def test_operations(replays, name, rows, threads, isa):
    replay = replays(name, rows)
    compiled = replay.compiled(isa, threads)
    for i in range(len(replay.program.ops)):
        replay.check(compiled, i, 4e-6)


BF16_ISAS = [*extension.bf16_isas(), *extension.emulated_isas()]


@pytest.mark.parametrize("isa", BF16_ISAS)
@pytest.mark.parametrize("name", TEXTS)
def test_operations_in_bfloat16(replays, name, isa):
    replay = replays(name, 3)
    compiled = replay.compiled(isa, 2, torch.bfloat16)
    for i in range(len(replay.program.ops)):
        replay.check(compiled, i, 2e-2)


@pytest.mark.parametrize("isa", ISAS)
def test_layer_norm_at_a_large_mean(replays, isa):
    """The variance is that of the deviations: E[x^2] - E[x]^2 would lose every digit at a mean of 10^4 deviations."""
    replay = Replay(TEXTS["text, 2 heads of 40, 5x7"][0], 2, 77)
    layers = [i for i, op in enumerate(replay.program.ops) if replay.program.norm(op) and not op.norm.groups]
    for i in layers[:3]:
        op = replay.program.ops[i]
        (source,) = op.src
        replay.put(source, torch.randn_like(replay.held[source]) + 1e4)
        replay.exact[op.dst] = replay.compute(op)
        replay.check(replay.compiled(isa), i, 4e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_blocks_of_keys_behind_a_norm(isa):
    """An attention with one head normalises its keys and values while it packs them; here they are 527."""
    replay = Replay(one_level(24, 3, (17, 31)), 2)
    compiled = replay.compiled(isa, 2)
    attentions = [i for i, op in enumerate(replay.program.ops) if isinstance(op, Attention)]
    assert {len(replay.program.ops[i].src) for i in attentions} == {2}
    for i in attentions:
        replay.check(compiled, i, 4e-6)


def test_gated_layers_are_packed_as_values_and_gates():
    layer = torch.arange(2 * 35).float()[:, None] + 1.0
    packed = packing.gated(layer, 32)[:, 0]
    assert packed.tolist() == [
        *range(1, 33), *range(36, 68), 33.0, 34.0, 35.0, *[0.0] * 29, 68.0, 69.0, 70.0, *[0.0] * 29,
    ]  # fmt: skip


def test_working_space_does_not_grow_with_the_number_of_keys():
    """It is at most a megabyte for 64 x 64 latents of Stable Diffusion 1.5."""
    spaces = []
    for size in (32, 64, 128):
        x, out, index = (1, 4, size, size), (1, size, size, 16), (1,)
        engine = extension.Engine("", 1, x=x, out=out, out_channels=4, timestep=index, label=index)
        maps = {"src": [(1, size, size, 960)], "dst": (1, size, size, 320)}
        engine.attention(**maps, heads=8, head_dim=40, text=None, norm=None, bf16=False)
        spaces.append(engine.space)
    assert spaces[0] == spaces[1] == spaces[2] <= 1 << 20


# Networks -------------------------------------------------------------------------------------------------------------


def texts_of(inputs: dict, vector: torch.Tensor | None = None) -> Texts:
    return Texts(inputs["encoder_hidden_states"], inputs.get("class_labels") if vector is None else vector)


def state_of(inputs: dict, t: float = 40, texts: Texts | None = None, **options) -> State:
    state = State.create(
        inputs["x"].clone(), TableBank([solvers.ddim(SCHEDULE, spacing=[t])], CPU),
        guidance=options.pop("guidance", 1.0),
    )  # fmt: skip
    state.texts = texts or texts_of(inputs)
    state.label = torch.arange(len(state.x))
    for name, value in options.items():
        setattr(state, name, value)
    return state


def runner_of(unet: UNetCondition, inputs: dict, **changes) -> native.NativeRunner:
    return prepare("native", unet, Spec(len(inputs["x"]), tuple(inputs["x"].shape[1:]), torch.float32, CPU, **changes))


@torch.no_grad()
def assert_equals_diffusers(described: UNetConditionConfig, size=(8, 8), tokens=7, seed=0, tolerance=1e-5) -> None:
    unet = random_condition(described, seed)
    inputs = random_inputs(described, 2, size, tokens, seed)
    if vector_kind(unet) != "condition":
        inputs.pop("timestep_cond", None)
    inputs["t"] = torch.tensor([40.0, 40.0])
    state = state_of(inputs, texts=texts_of(inputs, vector_of(unet, inputs)))
    runner_of(unet, inputs).forward(state)
    assert relative_error(state.out, unet(**inputs)) <= tolerance
    assert relative_error(state.out, diffusers_output(diffusers_condition(unet), inputs)) <= tolerance


# The others are compared in float64 by tests/core/test_condition_program.py.
FEW = (
    "tiny", "heads that leave channels over", "depth of each layer", "only cross-attention", "resnet blocks",
    "simple_projection class", "text_proj", "activations", "text_time", "timestep_cond",
)  # fmt: skip
SUPPORTED = [name for name in VARIANTS if name not in REFUSED]


@pytest.mark.parametrize(
    "variant", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in SUPPORTED]
)
def test_variant(variant):
    assert_equals_diffusers(config(**VARIANTS[variant]))


@torch.no_grad()
def test_no_timestep_cond_is_zero():
    unet = random_condition(config(**VARIANTS["timestep_cond"]))
    inputs = random_inputs(unet.config)
    del inputs["timestep_cond"]
    inputs["t"] = torch.tensor([40.0, 40.0])
    state = state_of(inputs)
    runner_of(unet, inputs).forward(state)
    assert relative_error(state.out, unet(**inputs)) <= 1e-5


def test_the_layout_of_the_built_in_text_model():
    assert_equals_diffusers(UNetConditionConfig(**SCENES), (32, 32), 16)


@settings(max_examples=2)
@given(described=configs(), seed=st.integers(0, 1000))
def test_generated_configurations(described, seed):
    if not condition_reasons(random_condition(described)):
        assert_equals_diffusers(described, seed=seed)


@pytest.mark.slow
@settings(max_examples=60)
@given(described=configs(), seed=st.integers(0, 1000), tokens=st.integers(1, 90))
def test_many_generated_configurations(described, seed, tokens):
    if not condition_reasons(random_condition(described)):
        assert_equals_diffusers(described, seed=seed, tokens=tokens)


SMALL = {"block_out_channels": [32, 64, 64, 64], "norm_num_groups": 8, "cross_attention_dim": 24}


@pytest.mark.slow
@pytest.mark.parametrize("published", [{**SD15, **SMALL}, {**SD21, **SMALL, "attention_head_dim": [1, 2, 4, 4]}])
def test_the_layouts_of_stable_diffusion(published):
    assert_equals_diffusers(UNetConditionConfig.from_dict(published), (64, 64), 77)


# A prompt is a label --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes():
    return random_condition(UNetConditionConfig(**SCENES))


def drawn(images: int, texts: int, tokens: int = 5) -> tuple[torch.Tensor, Texts]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(images, 3, 16, 16, generator=generator)
    states = text_states((texts, tokens, 128), generator)
    return x, Texts(states, torch.randn(texts, 128, generator=generator))


@torch.no_grad()
def test_prompts_and_negative_prompts_of_each_image(scenes):
    x, texts = drawn(4, 3)
    prompts, nulls, guidance = torch.tensor([2, 0, 0, 1]), torch.tensor([1, 1, 2, 0]), [3.0, 1.0, 2.0, 0.0]
    state = state_of({"x": x}, texts=texts, label=prompts, null=nulls, guidance=guidance)
    runner_of(scenes, {"x": x}).forward(state)
    t = torch.tensor([40.0] * 4)
    both = [scenes(x, t, texts.states[i], texts.pooled[i]) for i in (prompts, nulls)]
    expected = guide(*both, torch.tensor(guidance), 3, 0.0)
    assert relative_error(state.out, expected) <= 1e-5


@torch.no_grad()
def test_bits_do_not_depend_on_the_batch_its_order_or_other_texts(scenes):
    x, texts = drawn(5, 4)
    prompts, nulls, guidance = torch.tensor([2, 0, 3, 1, 2]), torch.tensor([1, 1, 0, 0, 3]), [3.0, 1.0, 2.0, 0.0, 1.5]

    def sampled(images: list[int], texts: Texts, rename: list[int]) -> torch.Tensor:
        renamed = torch.tensor(rename)
        state = State.create(
            x[images].clone(), TableBank([solvers.ddim(SCHEDULE, 3)], CPU), guidance=[guidance[i] for i in images]
        )
        state.texts, state.label = texts, renamed[prompts[images]]
        state.null = renamed[nulls[images]]
        runner = runner_of(scenes, {"x": x[images]}, determinism="bitwise")
        while not state.done:
            runner.step(state)
        return state.x

    whole = sampled([0, 1, 2, 3, 4], texts, [0, 1, 2, 3])
    order = [3, 1, 0, 2]
    turned = Texts(texts.states[order], texts.pooled[order])
    assert torch.equal(sampled([4, 2, 0], turned, [2, 1, 3, 0]), whole[[4, 2, 0]])
    for i in range(5):
        own = [int(prompts[i]), int(nulls[i])]
        alone = Texts(texts.states[own], texts.pooled[own])
        rename = [own.index(k) if k in own else 0 for k in range(4)]
        assert torch.equal(sampled([i], alone, rename), whole[[i]])


@torch.no_grad()
def test_texts_are_computed_once(scenes, monkeypatch):
    x, texts = drawn(2, 2)
    computed = []
    compute = TextTables._compute
    monkeypatch.setattr(TextTables, "_compute", lambda self, *args: computed.append(args[1]) or compute(self, *args))
    runner = runner_of(scenes, {"x": x})
    outs = []
    for again in (texts, Texts(texts.states.clone(), texts.pooled.clone())):
        state = state_of({"x": x}, texts=again)
        for _ in range(2):
            runner.forward(state)
        outs.append(state.out)
    assert computed == [0, 1]
    assert torch.equal(*outs)
    _, more = drawn(2, 7)
    state = state_of({"x": x}, texts=more, label=torch.tensor([5, 6]))
    runner.forward(state)  # the tables grow
    fresh = state_of({"x": x}, texts=more, label=torch.tensor([5, 6]))
    runner_of(scenes, {"x": x}).forward(fresh)
    assert torch.equal(state.out, fresh.out)


@torch.no_grad()
@pytest.mark.parametrize("room", [1, pytest.param(3 * 5 * 4 * 2 * 128, marks=pytest.mark.slow)])
def test_runs_that_take_turns_with_more_texts_than_are_kept(scenes, room, monkeypatch):
    monkeypatch.setattr("fastdiff.backends.native.runner.TEXT_BYTES", room)
    x, texts = drawn(2, 6)
    runner = runner_of(scenes, {"x": x})
    parts = [Texts(texts.states[i : i + 2], texts.pooled[i : i + 2]) for i in (0, 2, 4)]
    parts.append(Texts(texts.states[:2, :3].contiguous(), texts.pooled[:2]))  # of other lengths
    states = [state_of({"x": x}, texts=part) for part in parts]
    expected = []
    for part in parts:
        alone = state_of({"x": x}, texts=part)
        runner_of(scenes, {"x": x}).forward(alone)
        expected.append(alone.out)
    for _ in range(2):
        for state, out in zip(states, expected, strict=True):
            runner.forward(state)
            assert torch.equal(state.out, out)


@torch.no_grad()
def test_changed_weights_are_noticed(scenes):
    x, texts = drawn(2, 2)
    unet = random_condition(UNetConditionConfig(**SCENES))
    runner = runner_of(unet, {"x": x})
    runner.forward(state_of({"x": x}, texts=texts))
    changed = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2.to_v.weight
    changed.data *= 2.0
    state = state_of({"x": x}, texts=texts)
    runner.forward(state)
    assert relative_error(state.out, unet(x, torch.tensor([40.0] * 2), texts.states, texts.pooled)) <= 1e-5


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"texts": None}, r"needs texts, states of the shape \[texts, tokens, 128\], not None"),
        ({"texts": Texts(torch.zeros(2, 5, 127), torch.zeros(2, 128))}, r"not \[2, 5, 127\]"),
        ({"texts": Texts(torch.zeros(2, 0, 128), torch.zeros(2, 128))}, r"not \[2, 0, 128\]"),
        ({"texts": Texts(torch.zeros(2, 5, 128))}, r"pooled vectors of texts of the shape \[2, 128\], not None"),
        ({"texts": Texts(torch.zeros(2, 5, 128), torch.zeros(3, 128))}, r"not \[3, 128\]"),
        ({"label": None}, r"the number of a text for each image \(label\)"),
        ({"label": torch.tensor([0, 2])}, r"\(label\)"),
        ({"label": torch.tensor([-1, 0])}, r"\(label\)"),
        ({"label": torch.tensor([0])}, r"label is \[1\], \[2\] is needed"),
        ({"null": None}, r"\(null\)"),
        ({"null": torch.tensor([0, 9])}, r"\(null\)"),
    ],
)
def test_a_state_is_refused_by_name(scenes, changes, words):
    x, texts = drawn(2, 2)
    options = {"texts": texts, "null": torch.tensor([1, 1]), "guidance": 2.0, **changes}
    given = options.pop("texts")
    state = state_of({"x": x}, texts=texts, **options)
    state.texts = given
    with pytest.raises(BackendError, match=words):
        runner_of(scenes, {"x": x}).forward(state)


def test_a_network_or_size_is_refused_by_name_and_left_to_eager(caplog):
    unet = random_condition(config())
    spec = Spec(1, (4, 8, 8), torch.float32, CPU)
    assert choose(unet, spec) == "native"
    for refused, changed, words in (
        (unet, {"shape": (4, 9, 8)}, "multiples of 2, not 9x8"),
        (random_condition(config(in_channels=9)), {}, "4 channels of an image, which reads 9"),
        (random_condition(config(**VARIANTS["class labels"])), {}, "no labels beside a text"),
        (unet, {"dtype": torch.float64}, "not in float64"),
    ):
        other = dataclasses.replace(spec, **changed)
        with pytest.raises(BackendError, match=words):
            prepare("native", refused, other)
        assert choose(refused, other) == "eager"


# Cost -----------------------------------------------------------------------------------------------------------------


MACHINE = cost.Ceilings("avx512bf16", 2, {"float32": 500.0, "bfloat16": 1000.0}, 50.0, 200.0, 50.0, 32 << 20)


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_memory_and_algorithms_are_those_of_the_engine(rows):
    scenes = random_condition(UNetConditionConfig(**SCENES))
    x, texts = drawn(rows, 1, 77)
    state = state_of({"x": x}, texts=texts, label=torch.zeros(rows, dtype=torch.int64))
    runner = runner_of(scenes, {"x": x})
    runner.forward(state)
    (compiled,) = runner.programs.values()
    said = cost.estimate(scenes, (16, 16), rows, 1, rows, machine=MACHINE)
    held = runner.memory()
    assert held.pop("texts") > 0
    assert {"weights": said.memory["packed"], "arena": said.memory["arena"], "space": said.memory["space"]} == held
    described = native.dry_program(scenes, runner.spec, rows)
    assert described.methods == compiled.methods
    for op, done in cost.work(described, MACHINE):
        assert done.seconds(MACHINE) > 0, op
    assert said.flops == rows * sum(described.program.flops(op) for op in described.program.ops)


def test_info_describes_a_text_conditioned_model(tmp_path, call):  # noqa: F811 - the fixture
    unet, encoder = network_and_encoder()
    folder = tmp_path / "model"
    checkpoints.save_folder(folder, unet, SCHEDULE, text_encoder=encoder)
    code, out, _ = call("info", str(folder), "--program", "--n", "2", "--steps", "3", "--guidance", "2", "--json")
    said = json.loads(out)
    assert code == 0
    program = lower(unet, (8, 8), len(encoder.tokenize("")))
    assert said["program"]["flops"] == sum(program.flops(op) for op in program.ops)
    kinds = [(op["op"], op["with"], op["src"]) for op in said["program"]["ops"]]
    assert ("conv 1x1/1", ["layer norm", "geglu"], [[4, 4, 16]]) in kinds
    assert ("attention", [], [[4, 4, 16], [1, 8, 32]]) in kinds
    assert said["cost"]["seconds"] > 0
    assert said["cost"]["flops"] == 2 * 3 * 2 * said["program"]["flops"]
    code, out, _ = call("info", str(folder), "--program")
    assert "(layer norm, geglu)" in out
