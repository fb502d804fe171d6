"""Other libraries as contenders: diffusers, torch.compile, zentorch, OpenVINO, onnxruntime and CUDA graphs.

A peer evaluates the network. The update around it (`PeerStepper`) takes the fewest PyTorch calls possible, fewer than
any scheduler of diffusers, so that no peer is slowed down by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.bench.inputs import Stepper, Workload
from fastdiff.bench.networks import Model
from fastdiff.errors import BackendError
from fastdiff.unet import UNet, UNetCondition
from fastdiff.unet.config import OWN_FIELDS
from fastdiff.unet.model import ResnetBlock

Unet = UNet | UNetCondition
Given = dict[str, Tensor]  # what a network is given besides x and t, by name
Network = Callable[[Tensor, Tensor, Given], Tensor]


class PeerStepper:
    """A peer's network followed by DDIM's part of `fastdiff.core.update.update`.

    A guided step works as in diffusers' pipelines: a batch of 2B goes through the network, then out = u + w (c - u). If
    the class is given as an image, ``network`` is what `without_class_image` returns, and it is given no label.
    """

    def __init__(self, network: Network, model: Model, workload: Workload):
        self.workload, self.join = workload, joining(model.unet, workload)
        self.given = given_by_name(model, workload)
        self.behind = network
        self.rows = workload.table.rows
        self.t = [
            workload.network_rows(torch.full((len(workload.x),), row.t, dtype=torch.float32, device=workload.x.device))
            for row in self.rows
        ]
        self.x, self.row = workload.x.clone(), 0

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        """Evaluate the network on x [B, C, H, W], with guidance; t holds a timestep for each row of its batch."""
        out = self.behind(self.join(self.workload.network_rows(x)), t, self.given)
        if self.workload.guidance is None:
            return out
        c, u = out.float().chunk(2)
        C = x.shape[1]
        guided = torch.lerp(u[:, :C], c[:, :C], self.workload.guidance)
        return guided if c.shape[1] == C else torch.cat([guided, c[:, C:]], dim=1)

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.network(self.workload.x, self.t[0])

    @torch.no_grad()
    def step(self) -> Tensor:
        if self.row == len(self.rows):
            self.x, self.row = self.workload.x.clone(), 0
        row = self.rows[self.row]
        out = self.network(self.x, self.t[self.row])[:, : self.x.shape[1]].float()
        x0 = (self.x * row.kx).add_(out, alpha=row.ko).clamp_(-row.c, row.c)
        self.x = (self.x * row.ax).add_(x0, alpha=row.a0)
        if row.ao:
            self.x.add_(out, alpha=row.ao)
        self.row += 1
        return self.x


def given_by_name(model: Model, workload: Workload) -> Given:
    """Return what a network's batch is given besides x and t."""
    drawn = isinstance(model.unet, UNet) and model.unet.class_encoder is not None
    return {} if drawn else workload.inputs(workload.network_labels)


def _in(dtype: torch.dtype, given: Given) -> Given:
    return {name: v.to(dtype) if v.is_floating_point() else v for name, v in given.items()}


def plain(unet: Unet, dtype: torch.dtype, workload: Workload) -> Network:
    """Return fastdiff's module in channels_last, the input of compilers of PyTorch code."""
    unet = unet.to(dtype).to(memory_format=torch.channels_last).to(workload.x.device)  # type: ignore[call-overload]  # missing in torch's annotations

    def network(x: Tensor, t: Tensor, given: Given) -> Tensor:
        return unet(x.to(dtype).contiguous(memory_format=torch.channels_last), t, **_in(dtype, given))

    return network


def compiled(compiler: str, dtype: torch.dtype, model: Model, workload: Workload) -> Stepper:
    """Compile fastdiff's module by torch.compile with frozen weights; ``compiler`` is "inductor" or another backend."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    network = plain(without_class_image(model.unet), dtype, workload)
    return PeerStepper(torch.compile(network, backend=compiler, fullgraph=True, dynamic=False), model, workload)


def diffusers(dtype: torch.dtype, channels_last: bool, model: Model, workload: Workload) -> Stepper:
    """Run diffusers' own module with the same weights."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    twin = diffusers_twin(without_class_image(model.unet)).to(dtype).to(workload.x.device, memory_format=memory_format)

    def network(x: Tensor, t: Tensor, given: Given) -> Tensor:
        x = x.to(dtype).contiguous(memory_format=memory_format)
        return twin(x, t, **_in(dtype, given), return_dict=False)[0]

    return PeerStepper(network, model, workload)


def diffusers_twin(unet: Unet) -> Any:
    """Build diffusers' module with the configuration of ``unet`` and its weights, which share memory."""
    from diffusers import UNet2DConditionModel, UNet2DModel

    config = unet.config.to_dict()
    config.pop("null_label", None)  # to the network it is a class like any other
    foreign = sorted(config.keys() & OWN_FIELDS.keys()) if isinstance(unet, UNet) else []
    if foreign:
        raise BackendError(f"diffusers' UNet2DModel has no {', '.join(foreign)}")
    with torch.device("meta"):
        twin: Any = (UNet2DModel if isinstance(unet, UNet) else UNet2DConditionModel)(**config)
    twin.load_state_dict(unet.state_dict(), assign=True)
    return twin.eval()


def without_class_image(unet: Unet) -> Unet:
    """Return the network without its class encoder; its input are images already joined to the class image.

    This is the part that diffusers and exporters support; `joining` supplies the rest. The weights are shared. A
    network without class images is returned as it is.
    """
    if not isinstance(unet, UNet) or unet.class_encoder is None:
        return unet
    config = unet.config
    channels = config.in_channels * (2 if config.class_image == "concat" else 1)
    plain = dataclasses.replace(config, in_channels=channels, num_class_embeds=None, null_label=None, class_image=None)
    with torch.device("meta"):
        behind = UNet(plain)
    weights = {k: v for k, v in unet.state_dict().items() if not k.startswith("class_encoder.")}
    behind.load_state_dict(weights, assign=True)
    return behind.eval()


@torch.no_grad()
def joining(unet: Unet, workload: Workload) -> Callable[[Tensor], Tensor]:
    """Return the function that joins the class image to the network's batch.

    The class image is computed here, once, as the labels of a run do not change.
    """
    if not isinstance(unet, UNet) or unet.class_encoder is None or workload.network_labels is None:
        return lambda x: x
    image = unet.class_encoder(workload.network_labels.cpu(), tuple(workload.x.shape[2:])).to(workload.x.device)
    if unet.config.class_image == "add":
        return lambda x: x + image
    if unet.config.class_image == "multiply":
        return lambda x: x * (1 + image)
    return lambda x: torch.cat([x, image], dim=1)


class _OneInBias(ResnetBlock):
    """A block that computes norm2(h) scale + shift, as its projection's bias already contains the 1 of 1 + scale."""

    def second_norm(self, h: Tensor, emb: Tensor) -> Tensor:
        scale, shift = emb.chunk(2, dim=1)
        return self.norm2(h) * scale + shift


@torch.no_grad()
def one_in_bias(unet: Unet) -> Unet:
    """Fold the 1 of scale-shift blocks into the bias of their projection: 1 + scale = W silu(emb) + (b + 1).

    OpenVINO 2026.4 crashes while compiling the network otherwise: in its CPU plugin a GroupNorm is a snippet that does
    not absorb its neighbours and an addition is one that does, and for the product of the two the tokenizer reads a
    null pointer (`tokenize_node` looks only for the copy that it makes of the second kind). All weights but these
    biases are shared. A network without scale-shift is returned as it is.
    """
    if unet.config.resnet_time_scale_shift != "scale_shift":
        return unet
    with torch.device("meta"):
        folded = type(unet)(unet.config)  # type: ignore[arg-type]  # each has the configuration of its kind
    folded.load_state_dict(unet.state_dict(), assign=True)
    for block in folded.modules():
        if isinstance(block, ResnetBlock):
            block.__class__ = _OneInBias
            assert block.time_emb_proj is not None
            scale, shift = block.time_emb_proj.bias.chunk(2)
            block.time_emb_proj.bias = torch.nn.Parameter(torch.cat([1 + scale, shift]))
    return folded.eval()


def openvino(precision: str, model: Model, workload: Workload) -> Stepper:
    """Convert the network from PyTorch's trace and run it by OpenVINO on as many threads as PyTorch has."""
    import openvino as ov

    example, names = _example(model, workload)
    converted = ov.convert_model(
        _Positional(one_in_bias(without_class_image(model.unet)), names).eval(),
        example_input=example,
        input=[tuple(v.shape) for v in example],
    )
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = ov.Core().compile_model(converted, "CPU", options).create_infer_request()

    def network(x: Tensor, t: Tensor, given: Given) -> Tensor:
        feed = {i: ov.Tensor(v.numpy(), shared_memory=True) for i, v in enumerate([x.contiguous(), t, *given.values()])}
        return torch.from_numpy(request.infer(feed, share_outputs=True)[0])

    return PeerStepper(network, model, workload)


def onnxruntime(model: Model, workload: Workload) -> Stepper:
    """Export the network by torch.onnx and run it by onnxruntime."""
    import tempfile
    from pathlib import Path

    import onnxruntime as ort

    example, given_names = _example(model, workload)
    names = ["x", "t", *given_names]
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unet.onnx"  # the weights lie beside it, as protobuf stops at 2 GB
        torch.onnx.export(
            _Positional(without_class_image(model.unet), given_names).eval(), example, path, input_names=names,
            dynamo=True, external_data=True, verbose=False,
        )  # fmt: skip
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def network(x: Tensor, t: Tensor, given: Given) -> Tensor:
        feed = {"x": x.contiguous(), "t": t, **given}
        return torch.from_numpy(session.run(None, {name: v.numpy() for name, v in feed.items()})[0])

    return PeerStepper(network, model, workload)


class _Positional(torch.nn.Module):
    """The network with positional inputs only, as exporters need it: x, t, and what is named in ``names``."""

    def __init__(self, unet: Unet, names: tuple[str, ...]):
        super().__init__()
        self.unet = unet.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # missing in torch's annotations
        self.names = names

    def forward(self, x: Tensor, t: Tensor, *given: Tensor) -> Tensor:
        return self.unet(x, t, **dict(zip(self.names, given, strict=True)))


def _example(model: Model, workload: Workload) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """Return inputs of the network by position, and the names of those behind x and t."""
    x = joining(model.unet, workload)(workload.network_rows(workload.x))
    t = torch.full((len(x),), workload.table.rows[0].t, dtype=torch.float32, device=x.device)
    given = given_by_name(model, workload)
    return (x, t, *given.values()), tuple(given)


# On CUDA --------------------------------------------------------------------------------------------------------------


class GraphStepper(PeerStepper):
    """A network and its update in one CUDA graph, whose row index is kept on the device.

    It has not been run on a GPU yet. `device_step`, the part that is captured, is tested on a CPU.
    """

    def __init__(self, network: Network, model: Model, workload: Workload):
        super().__init__(network, model, workload)
        device = workload.x.device
        self.bank = torch.tensor(
            [[r.t, r.kx, r.ko, r.c, r.ax, r.ao, r.a0] for r in self.rows], dtype=torch.float32, device=device
        )
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.graph: Any = None

    @torch.no_grad()
    def device_step(self) -> None:
        """Take a step whose coefficients are read on the device; x and the row index change in place."""
        t, kx, ko, c, ax, ao, a0 = self.bank[self.index][0].unbind()
        out = self.network(self.x, t.expand(len(self.t[0])))[:, : self.x.shape[1]].float()
        x0 = torch.minimum(torch.maximum(kx * self.x + ko * out, -c), c)
        self.x.copy_(ax * self.x + ao * out + a0 * x0)
        self.index.add_(1).remainder_(len(self.rows))

    def step(self) -> Tensor:
        if self.graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # warm-up compiles, and allocates the libraries' workspaces
                for _ in range(3):
                    self.device_step()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.device_step()
            self.index.zero_()
            self.x.copy_(self.workload.x)
            self.row = 0
        if self.row == len(self.rows):
            self.x.copy_(self.workload.x)
            self.row = 0
        self.graph.replay()
        self.row += 1
        return self.x


def cuda_graph(dtype: torch.dtype, model: Model, workload: Workload) -> Stepper:
    """Compile by torch.compile(max-autotune) in channels_last, and capture the whole step in one CUDA graph."""
    network = plain(without_class_image(model.unet), dtype, workload)
    network = torch.compile(network, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
    return GraphStepper(network, model, workload)
