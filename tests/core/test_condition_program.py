"""The program of a text-conditioned network, interpreted in its planned arena, against the module."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastdiff.backends.network import condition_reasons
from fastdiff.core.lower import CHUNK, embed_timesteps, lower, text_attentions, vector_kind
from fastdiff.core.plan import plan
from fastdiff.core.program import Attention, Conv
from fastdiff.errors import InvalidArgument
from fastdiff.unet import UNetCondition, UNetConditionConfig
from tests.support.conditions import VARIANTS, config, random_condition, random_inputs, vector_of
from tests.support.interpreter import Interpreter
from tests.support.unets import relative_error
from tests.unet.test_condition import SD15, SD21, configs

# Those whose embedding needs more than a table of timesteps and one of texts.
REFUSED = {
    "class labels": "no labels beside a text",
    "timestep class": "no class_embed_type 'timestep'",
    "no depth": "no attention of the network reads a text",
}
LOWERED = [name for name in VARIANTS if name not in REFUSED]


@torch.no_grad()
def assert_equals_module(described, size=(8, 8), seed=0, tokens=7):
    """Compare in float64, where only a wrong program can make a difference."""
    unet = random_condition(described, seed).double()
    inputs = random_inputs(described, 3, size, tokens, seed)
    if vector_kind(unet) != "condition":
        inputs.pop("timestep_cond", None)
    added = {k: v.double() for k, v in inputs.pop("added_cond_kwargs", {}).items()}
    inputs = {k: v.double() for k, v in inputs.items()} | ({"added_cond_kwargs": added} if added else {})
    program = lower(unet, size, tokens)
    vector, texts = vector_of(unet, inputs), inputs["encoder_hidden_states"]
    got = Interpreter(program, unet, 3)(inputs["x"], inputs["t"], vector, texts)
    assert relative_error(got, unet(**inputs)) <= 1e-11
    return program


# Those whose operations others have too.
ALIKE = (
    "no effect", "norm_eps", "sinusoid", "widths of each level's text", "layers of each level",
    "reverse depth", "mid_block_scale_factor", "text_proj by its size alone", "depth of each level",
    "heads that leave channels over", "only cross-attention", "identity class",
)  # fmt: skip


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in LOWERED]
)
def test_variant(variant):
    assert_equals_module(config(**VARIANTS[variant]))


@pytest.mark.parametrize(("size", "tokens"), [((12, 4), 1), ((2, 2), 77)])
def test_sizes_and_tokens(size, tokens):
    assert_equals_module(config(), size, tokens=tokens)


@settings(max_examples=3)
@given(described=configs(), seed=st.integers(0, 1000))
def test_generated_configurations(described, seed):
    if not condition_reasons(random_condition(described)):
        assert_equals_module(described, seed=seed)


@pytest.mark.slow
@settings(max_examples=100)
@given(described=configs(), seed=st.integers(0, 1000))
def test_many_generated_configurations(described, seed):
    if not condition_reasons(random_condition(described)):
        assert_equals_module(described, seed=seed)


def test_every_operation_is_met():
    with torch.device("meta"):
        ops = [op for name in LOWERED for op in lower(UNetCondition(config(**VARIANTS[name])), (8, 8), 3).ops]
    convs = [op for op in ops if isinstance(op, Conv)]
    assert {(op.norm is not None and not op.norm.groups, op.bias, op.geglu) for op in convs if op.kernel == 1} == {
        (False, True, False), (True, False, False), (True, True, True),
    }  # fmt: skip
    assert {(op.text, len(op.src)) for op in ops if isinstance(op, Attention)} == {(True, 2), (False, 1)}


@pytest.mark.parametrize("variant", REFUSED)
def test_what_is_not_lowered_is_refused_by_name(variant):
    (reason,) = condition_reasons(random_condition(config(**VARIANTS[variant])))
    assert REFUSED[variant] in reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({**VARIANTS["projection class"], "time_embedding_act_fn": "gelu"}, "time_embedding_act_fn 'gelu'"),
        ({**VARIANTS["text_time"], "time_embedding_act_fn": "silu"}, "time_embedding_act_fn 'silu'"),
        ({**VARIANTS["text_time"], "class_embed_type": "identity"}, "'text_time' beside a class embedding"),
    ],
)
def test_what_joins_the_embedding_in_another_way_is_refused_by_name(changes, words):
    assert words in condition_reasons(random_condition(config(**changes)))[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({**VARIANTS["text_time"], "num_class_embeds": 5}, "addition_embed_type='text_time'"),
        ({**VARIANTS["text_time"], "time_embedding_act_fn": "mish"}, "time_embedding_act_fn='mish'"),
        ({**VARIANTS["identity class"], "time_embedding_act_fn": "silu"}, "time_embedding_act_fn='silu'"),
        ({**VARIANTS["class labels"], "time_embedding_act_fn": "gelu"}, "time_embedding_act_fn='gelu'"),
    ],
)
def test_what_a_program_cannot_say_is_not_lowered(changes, words):
    with pytest.raises(InvalidArgument, match=words):
        lower(random_condition(config(**changes)), (8, 8))


def test_a_changed_network_is_refused_by_name():
    unet = random_condition(config())
    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.heads = 4
    assert "attn2.heads = 4 (not 2)" in condition_reasons(unet)[0]


@pytest.mark.parametrize("size", [(9, 8), (8, 0)])
def test_sizes_that_the_program_cannot_take(size):
    with pytest.raises(InvalidArgument, match=r"multiples of 2"):
        lower(random_condition(config()), size)


# Figures --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", ["tiny", "projection class", "only cross-attention", "self-attention blocks"])
def test_flops_are_those_that_torch_counts(variant):
    """But for the keys and values of the text and for its class, which are computed once and not for every row."""
    unet = random_condition(config(**VARIANTS[variant]))
    inputs = random_inputs(unet.config, 1, tokens=5)
    program = lower(unet, (8, 8), 5)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it does not count the fused one
        unet(**inputs)
    with FlopCounterMode(display=False) as hoisted:
        embed_timesteps(unet, torch.zeros(CHUNK))
    with FlopCounterMode(display=False) as of_text:
        for m in text_attentions(unet).values():
            m.to_k(inputs["encoder_hidden_states"])
            m.to_v(inputs["encoder_hidden_states"])
        if unet.class_embedding is not None:
            unet.class_embedding(inputs["class_labels"])
    ours = sum(program.flops(op) for op in program.ops)
    ours += hoisted.get_total_flops() // CHUNK + of_text.get_total_flops()
    assert ours == counter.get_total_flops()


@pytest.mark.parametrize(("published", "gflop"), [(SD15, 803), (SD21, 803)], ids=["SD 1.5", "SD 2.1"])
def test_published_networks(published, gflop):
    """All but 3 GFLOP of the text's keys and values; every weight but these is read once."""
    with torch.device("meta"):
        unet = UNetCondition(UNetConditionConfig.from_dict(published))
    program = lower(unet, (64, 64))
    assert sum(program.flops(op) for op in program.ops) == pytest.approx((gflop - 3) * 1e9, rel=0.05)
    hoisted = [unet.time_embedding, *(m.to_k for m in text_attentions(unet).values())]
    hoisted += [m.to_v for m in text_attentions(unet).values()]
    hoisted += [m.time_emb_proj for m in unet.modules() if hasattr(m, "time_emb_proj")]
    read = sum(program.parameters(op) for op in program.ops)
    assert read == sum(p.numel() for p in unet.parameters()) - sum(p.numel() for m in hoisted for p in m.parameters())
    layout = plan(program, 1, group=16)
    assert layout.size <= 1.15 * layout.bound
    assert "layer norm" in str(layout)
    assert "geglu" in str(layout)
