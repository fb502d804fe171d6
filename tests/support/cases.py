"""The one list of cases: the distinct operations of lowered networks, over which tests and micro-benchmarks iterate.

`Replay` checks a case: it runs the operation alone and compares it with float64.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastdiff.backends import Spec, native
from fastdiff.backends.native import packing
from fastdiff.core.lower import TOKENS, lower
from fastdiff.core.plan import STATISTICS, plan
from fastdiff.core.program import Attention, Conv, Op, Program
from fastdiff.unet import UNet, UNetCondition, UNetConditionConfig, UNetConfig
from tests.support import conditions
from tests.support.interpreter import Interpreter, strip_statistics
from tests.support.unets import (
    OWN_VARIANTS,
    PUBLISHED,
    RESNET_BLOCKS,
    TINY_CLASSES,
    VARIANTS,
    change,
    random_images,
    random_labels,
    random_unet,
    relative_error,
)

extension = native.extension()
CPU = torch.device("cpu")

# The largest relative error of an operation alone, by its algorithm. bfloat16 has 8 bits: 2^-9 is 2e-3, from each side
# of a product; Winograd's transforms multiply both.
TOLERANCE = {
    "float32": {"direct": 2e-6, "winograd2": 2e-6, "winograd4": 4e-6},
    "bfloat16": {"direct": 4e-3, "winograd2": 7e-3, "winograd4": 2e-2},
}


def one_level(channels: int, groups: int, size: tuple[int, int], head_dim: int | None = None):
    """Return a network of one level, for odd image sizes and channel counts that are no multiples of a vector."""
    return change(
        block_out_channels=(channels,), norm_num_groups=groups, sample_size=size, attention_head_dim=head_dim,
        down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",), num_class_embeds=3,
    )  # fmt: skip


# Networks whose operations, together, are every operation at many shapes.
NETWORKS = {name: change(**changes) for name, changes in VARIANTS.items() if "class_embed_type" not in changes}
NETWORKS |= {f"class image, {kind}": change(TINY_CLASSES, class_image=kind) for kind in ("add", "multiply", "concat")}
NETWORKS |= {name: change(**changes) for name, changes in OWN_VARIANTS.items()}
NETWORKS |= {
    "96 channels, 5x7": one_level(96, 8, (5, 7)),
    "160 channels, 12x12": one_level(160, 5, (12, 12), 32),
    "200 channels, 7x5": one_level(200, 8, (7, 5), 25),
    "1x1": one_level(24, 3, (1, 1)),
    "2x3": one_level(24, 3, (2, 3)),
    "circular, 7x5": change(one_level(96, 8, (7, 5)), padding_mode="circular"),
    "circular, 1x1": change(one_level(24, 3, (1, 1)), padding_mode="circular"),
    "circular, 24x40": change(**RESNET_BLOCKS, sample_size=(24, 40), padding_mode="circular", downsample_padding=0),
    "resnet blocks, 24x40": change(**RESNET_BLOCKS, sample_size=(24, 40), block_out_channels=(20, 36)),
}


def one_transformer(channels: int, heads: int, size: tuple[int, int], **changes) -> UNetConditionConfig:
    """Return a text-conditioned network of one level."""
    return conditions.config(
        block_out_channels=(channels,), attention_head_dim=heads, sample_size=size, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
        **changes,
    )  # fmt: skip


# Networks that read texts, and the number of tokens of these. The heads have the widths of published models.
TEXTS: dict[str, tuple[UNetConditionConfig, int]] = {
    "text": (conditions.config(), 7),
    "text, class vectors": (conditions.config(**conditions.VARIANTS["projection class"]), 9),
    "text, heads that leave channels over": (conditions.config(attention_head_dim=3, use_linear_projection=True), 2),
    "text, only cross-attention": (conditions.config(only_cross_attention=True), 13),
    "text, 2 heads of 40, 5x7": (one_transformer(80, 2, (5, 7)), 77),
    "text, 1 head of 64, 1x1": (one_transformer(64, 1, (1, 1), use_linear_projection=True), 1),
    "text, 2 heads of 80, 7x3": (one_transformer(160, 2, (7, 3)), 64),
    "text, 1 head of 160, 6x6": (one_transformer(160, 1, (6, 6)), 65),
    "text, 527 pixels": (one_transformer(20, 2, (17, 31)), 130),
}


class Replay(Interpreter):
    """Interpreter in float64 that rounds each buffer to float32 when it is written.

    An operation of the engine can therefore be given exactly the inputs of the reference.
    """

    def __init__(self, config, rows: int, tokens: int = TOKENS):
        self.config = config
        size = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,) * 2
        t, texts = torch.linspace(0, 999, rows), None
        if isinstance(config, UNetConditionConfig):
            single, double = conditions.random_condition(config), conditions.random_condition(config).double()
            inputs = conditions.random_inputs(config, rows, size, tokens)
            x, texts = inputs["x"], inputs["encoder_hidden_states"].double()
            labels = inputs["class_labels"].double() if "class_labels" in inputs else None
        else:
            single, double = random_unet(config), random_unet(config).double()
            x, labels = random_images(config, rows, size), random_labels(config, rows)
        program = lower(single, size, tokens)
        super().__init__(program, double, rows)
        self.single, self.x = single, x
        self.spec = Spec(rows, tuple(x.shape[1:]), torch.float32, CPU)
        self.held: dict[str, Tensor] = {}
        self.measured: dict[str, Tensor] = {}
        with torch.no_grad():
            self.set_inputs(x.double(), t.double(), labels, texts)
            self.exact = {}
            for op in program.ops:
                self.exact[op.dst] = self.compute(op)
                self.put(op.dst, self.exact[op.dst])
        layout = plan(program, rows, group=extension.GROUP)
        self.inputs = native.ProgramInputs(
            x=x,
            timestep=torch.arange(rows),
            label=torch.arange(rows),
            times=self.external["projections" if single.class_embedding is None else "time"].flatten(1).float(),
            classes=None if "class" not in self.external else self.external["class"].flatten(1).float(),
            class_images=None
            if "class_image" not in self.external
            else self.external["class_image"].float().contiguous(),
        )
        if texts is not None:  # the last row has the first text
            self.inputs.label = torch.arange(rows).flip(0)
            self.inputs.text = {
                name: value[:, 0].flip(0).float().contiguous()
                for name, value in self.external.items()
                if name.endswith(".text")
            }
            if self.inputs.classes is not None:
                self.inputs.classes = self.inputs.classes.flip(0).contiguous()
        self.layout = layout

    def put(self, name: str, value: Tensor) -> None:
        self.held[name] = value.float().double()
        self.measured[name] = strip_statistics(self.held[name]).float().double()

    def buffer(self, name: str) -> Tensor:
        return self.held[name] if name in self.held else self.external[name].float().double()

    def statistics(self, name: str) -> Tensor:
        return self.measured[name]

    def compiled(self, isa: str, threads: int = 1, dtype: torch.dtype = torch.float32) -> native.NativeProgram:
        arena = native.aligned(self.layout.size)
        weights = packing.Weights.of(self.single, extension)
        return native.NativeProgram(
            extension,
            self.program,
            self.layout,
            arena,
            weights,
            self.inputs,
            isa,
            threads,
            dataclasses.replace(self.spec, dtype=dtype, fast=dtype == torch.bfloat16),
        )

    @torch.no_grad()
    def check(self, compiled: native.NativeProgram, i: int, tolerance: float) -> None:
        """Run operation i alone in an arena of NaN; check result, statistics, padding, and the rest untouched."""
        op = self.program.ops[i]
        compiled.arena.fill_(0xFF)
        compiled.out.fill_(math.nan)
        for name in self.program.reads(op):
            if not self.program.buffers[name].external:
                self.fill(compiled.buffer(name), self.held[name])
                if self.program.buffers[name].statistics:
                    self.fill(compiled.statistics(name), self.measured[name])
        before = compiled.arena.clone()
        compiled.engine.run(i, i + 1)

        got, exact = compiled.buffer(op.dst), self.exact[op.dst]
        C = exact.shape[3]
        assert relative_error(got[..., :C], exact) <= tolerance, op
        assert got[..., C:].eq(0).all(), "channels of padding are zeros"
        if self.program.buffers[op.dst].statistics:
            measured, expected = compiled.statistics(op.dst), strip_statistics(exact)
            for kind in (0, 1):  # mean and squares; the squares of a single pixel are zero
                distance = (measured[:, :, kind, :C] - expected[:, :, kind]).norm()
                assert distance <= 10 * tolerance * expected[:, :, kind].norm()
            assert measured[..., C:].eq(0).all()
        written = torch.zeros_like(compiled.arena, dtype=torch.bool)
        for name in (op.dst, op.dst + STATISTICS):
            if name in self.layout.offsets:
                offset = self.layout.offsets[name]
                view = compiled.buffer(name) if name == op.dst else compiled.statistics(op.dst)
                written[offset : offset + view.numel() * 4] = True
        assert torch.equal(compiled.arena[~written], before[~written]), "wrote elsewhere"

    @staticmethod
    def fill(view: Tensor, value: Tensor) -> None:
        view.zero_()
        view[..., : value.shape[-1]] = value


@dataclasses.dataclass(frozen=True)
class Case:
    """Operation ``index`` of a network's program, the first one with its shapes and options."""

    network: str
    index: int
    name: str


def config_of(network: str) -> UNetConfig | UNetConditionConfig:
    if network in TEXTS:
        return TEXTS[network][0]
    return PUBLISHED[network] if network in PUBLISHED else NETWORKS[network]


def signature(op: Op, program: Program) -> str:
    """Describe an operation by its kind, options and shapes, without the names of buffers or weights."""

    def shape(name: str) -> str:
        return "x".join(map(str, program.buffers[name].shape))

    parts = [type(op).__name__.lower()]
    if isinstance(op, Conv):
        parts = [f"conv{op.kernel}"] + [f"stride{op.stride}"] * (op.stride > 1) + ["up"] * op.upsample
        parts += [f"pad{op.padding[0]}{op.padding[1]}"] * (op.padding not in ((0, 0), (1, 1)))
        parts += (
            ["geglu"] * op.geglu
            + ["unbiased"] * (not op.bias)
            + ["emb"] * (op.emb is not None)
            + ["merged"] * (op.merged is not None)
            + ["div"] * (op.divide != 1)
        )
        if op.residual is not None:
            parts.append(
                "res" if program.buffers[op.residual].shape[0] == program.buffers[op.dst].shape[0] else "resup"
            )
    elif isinstance(op, Attention):
        parts += [f"heads{op.heads}"] + ["text"] * op.text
    norm = program.norm(op)
    if norm is not None:
        parts += [f"norm{norm.groups}"] + ["silu"] * norm.silu + ["film"] * (norm.modulation is not None)
    statistics = ["stat"] * program.buffers[op.dst].statistics
    return "-".join([*parts, "+".join(map(shape, op.src)), "to", shape(op.dst), *statistics])


def cases(network: str) -> list[Case]:
    """List the distinct operations of a network, in order."""
    config = config_of(network)
    size = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,) * 2
    text = isinstance(config, UNetConditionConfig)
    with torch.device("meta"):
        program = lower(UNetCondition(config) if text else UNet(config), size)
    found: dict[str, int] = {}
    for i, op in enumerate(program.ops):
        found.setdefault(signature(op, program), i)
    return [Case(network, i, name) for name, i in found.items()]
