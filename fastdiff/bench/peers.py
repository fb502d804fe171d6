"""Ways to run a U-Net: fastdiff's backends, and the peers that are installed.

An engine is timed by its steps: one network evaluation for every image (two where it is guided, in one batch), and
DDIM's update of all. fastdiff's do both in `Runner.step`; a peer evaluates the network, and the update around it is the
least that PyTorch can do (`PeerSteps`), less than any scheduler of diffusers does. Whatever an engine needs only once,
it does when it is made or first called.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.backends import Spec, prepare
from fastdiff.checkpoints.loading import Pretrained
from fastdiff.core.state import State, TableBank
from fastdiff.errors import BackendError, InvalidArgument
from fastdiff.sampler.options import NetworkInfo
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import StepTable, ddim
from fastdiff.unet import UNet
from fastdiff.unet.config import OWN_FIELDS
from fastdiff.unet.model import ResnetBlock

Network = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
ROWS = 50


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What every engine starts from: x [B, C, H, W] float32, label int64 [B] or None, and the table that it walks.

    guidance: w of out = u + w (c - u), or None; null_label: the label of u, where there is guidance.
    """

    x: Tensor
    label: Tensor | None
    table: StepTable
    guidance: float | None = None
    null_label: int | None = None

    @classmethod
    def of(cls, model: Pretrained, batch: int, device: str = "cpu", guidance: float | None = None) -> Inputs:
        """The same for every engine: standard normal x, the classes in turn, DDIM's rows from half of the run on.

        Raises `InvalidArgument` for guidance of a network without a null label.
        """
        info = NetworkInfo.of(model.unet, None)
        if guidance is not None and info.null_label is None:
            raise InvalidArgument(
                f"guidance {guidance:g} needs a network trained with label dropout (config null_label); leave it out"
            )
        size = info.size or (info.stride,) * 2
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, info.channels, *size, generator=generator).to(device)
        label = None if info.classes is None else (torch.arange(batch) % info.classes).to(device)
        if isinstance(model.schedule, NoiseSchedule):
            T = model.schedule.timesteps
            rows = min(ROWS, T // 2)
            spacing: Any = [float(T * (rows - i) // (2 * rows)) for i in range(rows)]
            table = ddim(model.schedule, spacing=spacing, prediction=model.prediction)
        else:
            table = ddim(model.schedule, ROWS, prediction=model.prediction)
        return cls(x, label, table, guidance, None if guidance is None else info.null_label)

    def rows(self, x: Tensor) -> Tensor:
        """What the network is given for x [B, ...]: x, or [2B, ...] where c and u of an image are asked for."""
        return x if self.guidance is None else torch.cat([x, x])

    @property
    def labels(self) -> Tensor | None:
        """The labels of those rows: all of c's, then all of u's."""
        if self.guidance is None or self.label is None:
            return self.label
        return torch.cat([self.label, torch.full_like(self.label, self.null_label or 0)])


class Steps(Protocol):
    """An engine that is ready. ``forward`` gives the network's output [B, C or 2C, H, W] at the first row, ``step`` x
    after the next row, from the first row on again after the last.
    """

    def forward(self) -> Tensor: ...
    def step(self) -> Tensor: ...


Make = Callable[[Pretrained, Inputs], Steps]


@dataclasses.dataclass(frozen=True)
class Engine:
    """A way to run a network: what it computes in, how it is made, the modules that it needs besides torch.

    own: fastdiff's, whose speed a comparison is about; the others are what it is measured by. slow_start: it compiles
    for tens of seconds, so ``--quick`` leaves it out. where: the kinds of device that it is for.
    """

    dtype: str
    make: Make
    needs: tuple[str, ...] = ()
    own: bool = False
    slow_start: bool = False
    where: tuple[str, ...] = ("cpu",)


# fastdiff's -----------------------------------------------------------------------------------------------------------


class RunnerSteps:
    """A backend's runner: `Runner.step`."""

    def __init__(self, runner: Any, inputs: Inputs):
        self.runner, self.start = runner, inputs.x
        self.state = State.create(
            inputs.x.clone(),
            TableBank([inputs.table], inputs.x.device),
            label=inputs.label,
            guidance=1.0 if inputs.guidance is None else inputs.guidance,
        )

    def _rewind(self) -> None:
        self.state.x = self.start.clone()
        self.state.row.zero_()
        self.state.row_host[:] = 0

    def forward(self) -> Tensor:
        if self.state.row_host.any():
            self._rewind()
        self.runner.forward(self.state)
        assert self.state.out is not None
        return self.state.out

    def step(self) -> Tensor:
        if self.state.done:
            self._rewind()
        self.runner.step(self.state)
        return self.state.x


def backend(name: str, dtype: torch.dtype, fast: bool, model: Pretrained, inputs: Inputs) -> Steps:
    device = inputs.x.device
    unet = model.unet.to(memory_format=torch.channels_last).to(device)  # type: ignore[call-overload]  # missing in torch's annotations
    if name != "native":
        unet = unet.to(dtype)
    shape: Any = tuple(inputs.x.shape[1:])
    spec = Spec(len(inputs.x), shape, dtype, device, inputs.null_label, fast=fast)
    return RunnerSteps(prepare(name, unet, spec), inputs)


# Peers ----------------------------------------------------------------------------------------------------------------


class PeerSteps:
    """A network with the update of `fastdiff.core.update.update`, as far as DDIM needs it, in as few calls as possible.

    A guided step is that of diffusers' pipelines: a batch of 2B through the network, then u + w (c - u). Where the
    class is an image, ``network`` is the one behind it (`without_class_image`), and hears no label.
    """

    def __init__(self, network: Network, model: Pretrained, inputs: Inputs):
        self.inputs, self.join = inputs, joining(model.unet, inputs)
        self.label = None if model.unet.class_encoder is not None else inputs.labels
        self.behind = network
        self.rows = inputs.table.rows
        self.t = [inputs.rows(torch.full((len(inputs.x),), row.t, device=inputs.x.device)) for row in self.rows]
        self.x, self.row = inputs.x.clone(), 0

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        """out [B, C or 2C, H, W] of x [B, C, H, W]; t is of the network's rows."""
        out = self.behind(self.join(self.inputs.rows(x)), t, self.label)
        if self.inputs.guidance is None:
            return out
        c, u = out.float().chunk(2)
        C = x.shape[1]
        guided = torch.lerp(u[:, :C], c[:, :C], self.inputs.guidance)
        return guided if c.shape[1] == C else torch.cat([guided, c[:, C:]], dim=1)

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.network(self.inputs.x, self.t[0])

    @torch.no_grad()
    def step(self) -> Tensor:
        if self.row == len(self.rows):
            self.x, self.row = self.inputs.x.clone(), 0
        row = self.rows[self.row]
        out = self.network(self.x, self.t[self.row])[:, : self.x.shape[1]].float()
        x0 = (self.x * row.kx).add_(out, alpha=row.ko).clamp_(-row.c, row.c)
        self.x = (self.x * row.ax).add_(x0, alpha=row.a0)
        if row.ao:
            self.x.add_(out, alpha=row.ao)
        self.row += 1
        return self.x


def plain(unet: UNet, dtype: torch.dtype, inputs: Inputs) -> Network:
    """fastdiff's module in channels_last, which is what compilers of PyTorch's code are given."""
    unet = unet.to(dtype).to(memory_format=torch.channels_last).to(inputs.x.device)  # type: ignore[call-overload]  # missing in torch's annotations

    def network(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        return unet(x, t) if label is None else unet(x, t, class_labels=label)

    return network


def compiled(compiler: str, dtype: torch.dtype, model: Pretrained, inputs: Inputs) -> Steps:
    """torch.compile with frozen weights, by Inductor or by another compiler's name."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    network = torch.compile(
        plain(without_class_image(model.unet), dtype, inputs), backend=compiler, fullgraph=True, dynamic=False
    )
    return PeerSteps(network, model, inputs)


def diffusers(dtype: torch.dtype, channels_last: bool, model: Pretrained, inputs: Inputs) -> Steps:
    """diffusers' own UNet2DModel with the same weights."""
    twin = diffusers_twin(without_class_image(model.unet)).to(dtype).to(inputs.x.device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    twin = twin.to(memory_format=memory_format)

    def network(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        x = x.to(dtype).contiguous(memory_format=memory_format)
        return twin(x, t, class_labels=label, return_dict=False)[0]

    return PeerSteps(network, model, inputs)


def diffusers_twin(unet: UNet) -> Any:
    """diffusers' network with the configuration and the very weights (shared memory) of ``unet``.

    Raises `BackendError` for what diffusers does not have.
    """
    from diffusers import UNet2DModel

    config = unet.config.to_dict()
    config.pop("null_label", None)  # a class like any other, to the network
    foreign = sorted(config.keys() & OWN_FIELDS.keys())
    if foreign:
        raise BackendError(f"diffusers' UNet2DModel has no {', '.join(foreign)}")
    with torch.device("meta"):
        twin: Any = UNet2DModel(**config)
    twin.load_state_dict(unet.state_dict(), assign=True)
    return twin.eval()


def without_class_image(unet: UNet) -> UNet:
    """The network behind the class image: of images that it was joined to already, and of no class.

    This is what diffusers and exporters know. The weights are shared; a network without class images is given back.
    """
    config = unet.config
    if unet.class_encoder is None:
        return unet
    channels = config.in_channels * (2 if config.class_image == "concat" else 1)
    plain = dataclasses.replace(config, in_channels=channels, num_class_embeds=None, null_label=None, class_image=None)
    with torch.device("meta"):
        behind = UNet(plain)
    weights = {k: v for k, v in unet.state_dict().items() if not k.startswith("class_encoder.")}
    behind.load_state_dict(weights, assign=True)
    return behind.eval()


@torch.no_grad()
def joining(unet: UNet, inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """What joins the class image to the rows of x; made once, as the labels of a run do not change."""
    if unet.class_encoder is None or inputs.labels is None:
        return lambda x: x
    image = unet.class_encoder(inputs.labels.cpu(), tuple(inputs.x.shape[2:])).to(inputs.x.device)
    if unet.config.class_image == "add":
        return lambda x: x + image
    if unet.config.class_image == "multiply":
        return lambda x: x * (1 + image)
    return lambda x: torch.cat([x, image], dim=1)


class _OneInBias(ResnetBlock):
    """norm2(h) scale + shift, where the projection's bias has made the scale one larger."""

    def second_norm(self, h: Tensor, emb: Tensor) -> Tensor:
        scale, shift = emb.chunk(2, dim=1)
        return self.norm2(h) * scale + shift


@torch.no_grad()
def one_in_bias(unet: UNet) -> UNet:
    """The same network with an operation less: scale-shift's 1 + scale = W silu(emb) + (b + 1).

    OpenVINO 2026.4 compiles no other: a product of a GroupNorm, which is a snippet of its CPU plugin that takes in no
    neighbours, and of an addition, which is one that does, has its tokenizer read a null pointer (`tokenize_node`
    looks for the copy that it makes of the second kind only). Weights but these biases are shared; a network without
    scale-shift is given back.
    """
    if unet.config.resnet_time_scale_shift != "scale_shift":
        return unet
    with torch.device("meta"):
        folded = UNet(unet.config)
    folded.load_state_dict(unet.state_dict(), assign=True)
    for block in folded.modules():
        if isinstance(block, ResnetBlock):
            block.__class__ = _OneInBias
            scale, shift = block.time_emb_proj.bias.chunk(2)
            block.time_emb_proj.bias = torch.nn.Parameter(torch.cat([1 + scale, shift]))
    return folded.eval()


def openvino(precision: str, model: Pretrained, inputs: Inputs) -> Steps:
    """OpenVINO, converted from PyTorch's trace, on as many threads as PyTorch has."""
    import openvino as ov

    example = _example(model, inputs)
    converted = ov.convert_model(
        _Positional(one_in_bias(without_class_image(model.unet))).eval(),
        example_input=example,
        input=[tuple(v.shape) for v in example],
    )
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = ov.Core().compile_model(converted, "CPU", options).create_infer_request()

    def network(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        given = [x.contiguous(), t] if label is None else [x.contiguous(), t, label]
        feed = {i: ov.Tensor(v.numpy(), shared_memory=True) for i, v in enumerate(given)}
        return torch.from_numpy(request.infer(feed, share_outputs=True)[0])

    return PeerSteps(network, model, inputs)


def onnxruntime(model: Pretrained, inputs: Inputs) -> Steps:
    """onnxruntime, from torch.onnx's export."""
    import tempfile
    from pathlib import Path

    import onnxruntime as ort

    example = _example(model, inputs)
    names = ["x", "t", "label"][: len(example)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unet.onnx"  # weights beside it: protobuf stops at 2 GB
        torch.onnx.export(
            _Positional(without_class_image(model.unet)).eval(), example, path, input_names=names, dynamo=True,
            external_data=True, verbose=False,
        )  # fmt: skip
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def network(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        given = [x.contiguous(), t] if label is None else [x.contiguous(), t, label]
        return torch.from_numpy(session.run(None, {n: v.numpy() for n, v in zip(names, given, strict=True)})[0])

    return PeerSteps(network, model, inputs)


class _Positional(torch.nn.Module):
    """The network with positional inputs and nothing else, for exporters."""

    def __init__(self, unet: UNet):
        super().__init__()
        self.unet = unet.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # missing in torch's annotations

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.unet(x, t) if label is None else self.unet(x, t, class_labels=label)


def _example(model: Pretrained, inputs: Inputs) -> tuple[Tensor, ...]:
    x = joining(model.unet, inputs)(inputs.rows(inputs.x))
    t = torch.full((len(x),), inputs.table.rows[0].t)
    return (x, t) if inputs.labels is None or model.unet.class_encoder is not None else (x, t, inputs.labels)


# On CUDA --------------------------------------------------------------------------------------------------------------


class GraphSteps(PeerSteps):
    """A network and its update captured in one CUDA graph, which a row index on the device keeps going.

    Not run by this project yet: no GPU was at hand. `device_step`, what is captured, is tested on a CPU.
    """

    def __init__(self, network: Network, model: Pretrained, inputs: Inputs):
        super().__init__(network, model, inputs)
        device = inputs.x.device
        self.bank = torch.tensor([[r.t, r.kx, r.ko, r.c, r.ax, r.ao, r.a0] for r in self.rows], device=device)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.graph: Any = None

    @torch.no_grad()
    def device_step(self) -> None:
        """`step` without a number that the host knows: x and the row change in place."""
        t, kx, ko, c, ax, ao, a0 = self.bank[self.index][0].unbind()
        out = self.network(self.x, t.expand(len(self.t[0])))[:, : self.x.shape[1]].float()
        x0 = torch.minimum(torch.maximum(kx * self.x + ko * out, -c), c)
        self.x.copy_(ax * self.x + ao * out + a0 * x0)
        self.index.add_(1).remainder_(len(self.rows))

    def step(self) -> Tensor:
        if self.graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # warm-up: compilation, and the libraries' workspaces
                for _ in range(3):
                    self.device_step()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.device_step()
            self.index.zero_()
            self.x.copy_(self.inputs.x)
            self.row = 0
        if self.row == len(self.rows):
            self.x.copy_(self.inputs.x)
            self.row = 0
        self.graph.replay()
        self.row += 1
        return self.x


def cuda_graph(dtype: torch.dtype, model: Pretrained, inputs: Inputs) -> Steps:
    """torch.compile(max-autotune) + channels_last, the whole step in one CUDA graph."""
    network = torch.compile(
        plain(without_class_image(model.unet), dtype, inputs),
        mode="max-autotune-no-cudagraphs",
        fullgraph=True,
        dynamic=False,
    )
    return GraphSteps(network, model, inputs)


# The list -------------------------------------------------------------------------------------------------------------


def _own(name: str, dtype: torch.dtype, fast: bool = False, **options: Any) -> Engine:
    make = functools.partial(backend, name, dtype, fast)
    return Engine(str(dtype).removeprefix("torch."), make, own=True, **options)


def _peer(make: Callable[..., Steps], *arguments: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Engine:
    return Engine(str(dtype).removeprefix("torch."), functools.partial(make, *arguments), **options)


F32, BF16 = torch.float32, torch.bfloat16
ANYWHERE = ("cpu", "cuda")

# In the order of the table. The anchor of a batch is the first of ANCHORS that runs.
ENGINES: dict[str, Engine] = {
    "native": _own("native", F32),
    "native-bf16": _own("native", BF16),
    "native-bf16-fast": _own("native", BF16, fast=True),
    "eager": _own("eager", F32, where=ANYWHERE),
    "eager-bf16": _own("eager", BF16, where=ANYWHERE),
    "compiled": _own("compiled", F32, slow_start=True, where=ANYWHERE),
    "compiled-bf16": _own("compiled", BF16, slow_start=True, where=ANYWHERE),
    "diffusers": _peer(diffusers, F32, False, needs=("diffusers",), where=ANYWHERE),
    "diffusers-last": _peer(diffusers, F32, True, needs=("diffusers",), where=ANYWHERE),
    "diffusers-last-bf16": _peer(diffusers, BF16, True, dtype=BF16, needs=("diffusers",), where=ANYWHERE),
    "compile": _peer(compiled, "inductor", F32, slow_start=True),
    "compile-bf16": _peer(compiled, "inductor", BF16, dtype=BF16, slow_start=True),
    "zentorch": _peer(compiled, "zentorch", F32, needs=("zentorch",), slow_start=True),
    "zentorch-bf16": _peer(compiled, "zentorch", BF16, dtype=BF16, needs=("zentorch",), slow_start=True),
    "openvino": _peer(openvino, "f32", needs=("openvino",)),
    "openvino-bf16": _peer(openvino, "bf16", dtype=BF16, needs=("openvino",)),
    "onnxruntime": _peer(onnxruntime, needs=("onnxruntime", "onnxscript")),
    "cuda-graph-bf16": _peer(cuda_graph, BF16, dtype=BF16, slow_start=True, where=("cuda",)),
}
ANCHORS = ("diffusers-last", "diffusers", "openvino", "onnxruntime", "compile", "eager")


def import_all(names: tuple[str, ...]) -> None:
    """The modules that an engine needs. Raises `BackendError` naming the first that cannot be imported, and why."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as e:  # some fail in their own ways, for another version of torch or processor
            reason = str(e).strip().splitlines()
            raise BackendError(f"{name} cannot be imported ({reason[0] if reason else type(e).__name__})") from e
