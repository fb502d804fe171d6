"""`accelerate`: a diffusers pipeline, the same object back, with its network or its whole loop run by fastdiff.

The object's class becomes a subclass of its own class, of the same name, that differs in ``__call__`` alone:

- DDPMPipeline and DDIMPipeline, and subclasses that keep their ``__call__``, run `_Loop`: the table of the pipeline's
  scheduler, from the noise that diffusers would draw, in the same order.
- Any other pipeline runs its own ``__call__``, and for its length ``pipeline.unet.forward`` is a backend's.

Network, scheduler and weights are looked at in each call, so that all may change in between. What differs from
diffusers by more than rounding is never run: `_Network.altered`, `_Network.against` and `_Loop.prepare` say why, and
then it is an error, or diffusers' own code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastdiff import backends
from fastdiff.backends import Runner, Spec
from fastdiff.core.state import State, TableBank
from fastdiff.errors import BackendError, ConfigError, InvalidArgument
from fastdiff.integrations.scheduler import configuration, draws, randn
from fastdiff.solvers import StepTable, from_config
from fastdiff.solvers.compat.diffusers import VARIANCE_PRESERVING, noise_schedule
from fastdiff.solvers.table import Row
from fastdiff.unet import UNet, UNetConfig

log = logging.getLogger("fastdiff")

Pipeline = TypeVar("Pipeline")


def accelerate(pipeline: Pipeline, backend: str = "auto", strict: bool = True) -> Pipeline:
    """Make a diffusers pipeline fast; returns the same object.

    pipeline
        With a ``UNet2DModel`` as its ``unet``. Of DDPMPipeline and DDIMPipeline the whole loop is fastdiff's, for the
        schedulers DDPM, DDIM, PNDM (PLMS), LCM, DPMSolverMultistep, UniPC and DEIS; of others the network is.
    backend
        "native", "compiled", "eager", or "auto": native where it can run (float32 on a CPU); elsewhere diffusers' own
        code runs, and the log says why.
    strict
        Whether a network or scheduler that is not supported is an error. False leaves that part to diffusers, and the
        log says so once.

    The same arguments and generators give the images that diffusers gives, up to rounding, and leave the generators
    where diffusers leaves them. The result is still an instance of its class, and saves, moves and shows its
    components as before; ``pipeline.unaccelerate()`` makes it what it was. Weights are shared, not copied (`native` has
    packed ones besides).

    Raises `ConfigError` naming the part that is not supported and what is; `BackendError` where an explicit backend
    cannot run, or diffusers is not installed; `InvalidArgument`.
    """
    if backend not in ("auto", *backends.BACKENDS):
        raise InvalidArgument(f"backend={backend!r} is unknown; allowed: auto, {', '.join(backends.BACKENDS)}")
    try:
        import diffusers
    except ImportError as e:
        raise BackendError("accelerate needs diffusers, which is not installed: pip install diffusers") from e
    if not isinstance(pipeline, diffusers.DiffusionPipeline):
        raise InvalidArgument(f"pipeline is a {type(pipeline).__name__}; a diffusers pipeline is needed")
    base = pipeline._fastdiff.base if isinstance(pipeline, _Accelerated) else type(pipeline)
    engine = _Engine(base, backend, strict)
    engine.check(pipeline)
    pipeline.__dict__["_fastdiff"] = engine
    pipeline.__class__ = _accelerated(base)
    return pipeline


@functools.cache
def _accelerated(base: Any) -> type:
    """The subclass of a pipeline's class, under its name: saved pipelines name the class that loads them."""
    same = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._fastdiff.run(self, args, kwargs)

    return type(base.__name__, (_Accelerated, base), {**same, "__call__": call})


class _Accelerated:
    """What an accelerated pipeline has beyond its own class."""

    _fastdiff: _Engine

    def unaccelerate(self) -> Any:
        """The pipeline as it was before `accelerate`; returns the same object."""
        self.__class__ = self.__dict__.pop("_fastdiff").base
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles name the class that can be imported, and are accelerated anew.
        engine = self._fastdiff
        state = {k: v for k, v in self.__dict__.items() if k != "_fastdiff"}
        return _revive, (engine.base, engine.backend, engine.strict), state


def _revive(base: Any, backend: str, strict: bool) -> Any:
    pipeline = base.__new__(base)
    pipeline.__dict__["_fastdiff"] = _Engine(base, backend, strict)
    pipeline.__class__ = _accelerated(base)
    return pipeline


class _Engine:
    """What runs the calls of one accelerated pipeline."""

    def __init__(self, base: Any, backend: str, strict: bool):
        self.base = base
        self.backend = backend
        self.strict = strict
        self.network: _Network | None = None
        self.lock = threading.RLock()
        self.told: set[str] = set()

    @property
    def whole(self) -> bool:
        """Whether the pipeline's loop is known, so that all of it is fastdiff's."""
        from diffusers import DDIMPipeline, DDPMPipeline

        return self.base.__call__ in (DDPMPipeline.__call__, DDIMPipeline.__call__)

    def check(self, pipeline: Any) -> None:
        """Raises what a call would raise."""
        self.usable(pipeline)
        if self.whole:
            with self.unsupported("scheduler"):
                _try(_scheduler_config(pipeline))

    def run(self, pipeline: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = inspect.signature(self.base.__call__).bind(pipeline, *args, **kwargs)
        with self.lock:
            network = self.usable(pipeline)
            if network is None:
                return self.base.__call__(*arguments.args, **arguments.kwargs)
            if self.whole and network.takes(None, pipeline.unet.config.sample_size):
                arguments.apply_defaults()
                loop = _Loop(pipeline, network, dict(arguments.arguments))
                with self.unsupported("scheduler"):
                    loop.prepare()
                if loop.table is not None:
                    return loop.run()
            with network.as_forward():
                return self.base.__call__(*arguments.args, **arguments.kwargs)

    def usable(self, pipeline: Any) -> _Network | None:
        """The pipeline's network, ready to run; None where it is left to diffusers."""
        from diffusers import UNet2DModel

        unet = getattr(pipeline, "unet", None)
        with self.unsupported("network"):
            if not isinstance(unet, UNet2DModel):
                what = "no unet" if unet is None else f"a {type(unet).__name__} as its unet"
                raise ConfigError(f"{self.base.__name__} has {what}; a UNet2DModel is supported")
            if self.network is None or self.network.unet is not unet:
                self.network = _Network(unet, self.backend)
            altered = self.network.altered()
            if altered:
                raise ConfigError(f"{self.base.__name__}.unet is not what its configuration says: {'; '.join(altered)}")
            missing = self.network.against()
            if not missing:
                return self.network
            if self.backend != "auto":
                raise BackendError(f"backend {self.backend!r} cannot run here: {'; '.join(missing)}")
            self.tell(f"{self.base.__name__} is run by diffusers; the native engine cannot: {'; '.join(missing)}")
        return None

    @contextlib.contextmanager
    def unsupported(self, part: str) -> Iterator[None]:
        """A part that is not supported is an error, or diffusers' where the caller allows it."""
        try:
            yield
        except ConfigError as e:
            if self.strict:
                raise ConfigError(f"{e} (strict=False leaves the {part} to diffusers)") from e
            self.tell(f"the {part} is left to diffusers: {e}")

    def tell(self, message: str) -> None:
        if message not in self.told:
            self.told.add(message)
            log.warning(message)


# The network ----------------------------------------------------------------------------------------------------------


class _Network:
    """A pipeline's ``UNet2DModel``, run by a backend.

    `native` and `compiled` run fastdiff's own U-Net, which has the very parameters of diffusers', not copies.
    """

    def __init__(self, unet: Any, backend: str):
        self.unet = unet
        self.backend = "native" if backend == "auto" else backend
        self.module: nn.Module = unet
        self.structure: list[tuple[str, type]] = []
        self.runners: dict[Spec, Runner] = {}
        self.conditional = unet.config.class_embed_type is not None or unet.config.num_class_embeds is not None
        if self.backend == "eager":
            return
        self.module, self.structure = _described(unet)

    def altered(self) -> list[str]:
        """What of the module its configuration does not say; then only its own code can run it."""
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

        if self.backend == "eager":
            return []
        reasons, modules = [], list(self.unet.modules())
        replaced = [vars(m)["forward"] for m in modules if "forward" in vars(m)]
        if any(type(f) is not _Forward for f in replaced) or type(self.unet).forward is not _forward_of_diffusers():
            reasons.append("a forward was replaced (by a subclass, by offloading, ...)")
        if any(m._forward_hooks or m._forward_pre_hooks for m in modules):
            reasons.append("modules have forward hooks, which would not be called")
        if any(m._compiled_call_impl is not None for m in modules):
            reasons.append("it was compiled")
        structure = [(name, type(m)) for name, m in self.unet.named_modules() if name]
        if structure != self.structure or not self._share():
            reasons.append("modules were replaced or added (LoRA, quantisation, ...)")
        plain = (AttnProcessor, AttnProcessor2_0)
        if any(type(m.processor) not in plain for m in modules if hasattr(m, "processor")):
            reasons.append("it has attention processors other than diffusers' own")
        if self.unet.config.dropout and any(m.training for m in modules):
            reasons.append("it is in training, with dropout (call unet.eval())")
        return reasons

    def _share(self) -> bool:
        """Give the module the parameters that the network has now; False where they do not fit."""
        theirs = dict(self.unet.named_parameters())
        own = dict(self.module.named_parameters())
        if theirs.keys() != own.keys() or any(p.shape != own[name].shape for name, p in theirs.items()):
            return False
        if any(p is not own[name] for name, p in theirs.items()):
            for name, p in theirs.items():
                path, _, leaf = name.rpartition(".")
                self.module.get_submodule(path)._parameters[leaf] = p
            self.runners.clear()
        return True

    def against(self) -> list[str]:
        """Why the backend cannot run it here and now, each reason; empty where it can."""
        p = next(self.unet.parameters())
        if self.backend == "native":
            from fastdiff.backends import native

            reasons = native.reasons_against(self.module, self._spec(1, 1, 1))
            if any(p.dtype != torch.float32 for p in self.unet.parameters()) and p.dtype == torch.bfloat16:
                reasons.append("weights in bfloat16 are not repacked; pipeline.to(torch.float32)")
            if torch.is_autocast_enabled("cpu"):
                reasons.append("autocast is on, which it would not follow")
            return reasons
        return [] if p.device.type != "meta" else ["its weights are on the meta device"]

    def _spec(self, batch: int, height: int, width: int) -> Spec:
        p = next(self.unet.parameters())
        return Spec(batch, (self.unet.config.in_channels, height, width), p.dtype, p.device)

    def takes(self, labels: Tensor | None, size: Any) -> bool:
        """Whether a backend can run images of this size (a number or two) with these labels."""
        config = self.unet.config
        height, width = (size, size) if isinstance(size, int) else size
        stride = 1 << (len(config.block_out_channels) - 1)
        if height % stride or width % stride or (labels is not None) != self.conditional:
            return False
        if labels is None:
            return True
        if config.class_embed_type is not None or labels.ndim != 1 or labels.is_floating_point():
            return False
        return bool(((labels >= 0) & (labels < config.num_class_embeds)).all())

    def runner(self, shape: torch.Size) -> Runner:
        """The runner for a batch, prepared once; those of other sizes are freed."""
        B, _, H, W = shape
        spec = self._spec(B, H, W)
        if spec not in self.runners:
            self.runners.clear()
            self.runners[spec] = backends.prepare(self.backend, self.module, spec)
        return self.runners[spec]

    @contextlib.contextmanager
    def as_forward(self) -> Iterator[None]:
        """For a while, ``unet.forward`` is the backend's."""
        if self.backend == "eager":
            yield
            return
        outer = vars(self.unet).get("forward")  # of a call that this one is within
        self.unet.forward = _Forward(self)
        try:
            yield
        finally:
            del self.unet.forward
            if outer is not None:
                self.unet.forward = outer


def _forward_of_diffusers() -> Callable[..., Any]:
    from diffusers import UNet2DModel

    return UNet2DModel.forward


def _described(unet: Any) -> tuple[UNet, list[tuple[str, type]]]:
    """What a network's configuration describes: fastdiff's U-Net, without weights yet, and diffusers' modules."""
    from diffusers import UNet2DModel

    config = UNetConfig.from_dict(unet.config)
    with torch.device("meta"):
        own, theirs = UNet(config), UNet2DModel.from_config(unet.config)
    return own.eval(), [(name, type(m)) for name, m in theirs.named_modules() if name]


class _Forward:
    """``UNet2DModel.forward`` by a backend, for the length of one call of the pipeline.

    What it cannot do as diffusers does (gradients, unusual labels or dtypes) goes to diffusers' own.
    """

    def __init__(self, network: _Network):
        self.network = network
        self.state: State | None = None

    def __call__(
        self, sample: Tensor, timestep: Any, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        from diffusers.models.unets.unet_2d import UNet2DOutput

        network, config = self.network, self.network.unet.config
        p = next(network.unet.parameters())
        learns = torch.is_grad_enabled()
        learns = learns and (sample.requires_grad or any(w.requires_grad for w in network.unet.parameters()))
        fits = sample.ndim == 4 and sample.shape[1] == config.in_channels and len(sample) > 0
        fits = fits and sample.dtype == p.dtype and sample.device == p.device
        if learns or not fits or not network.takes(class_labels, sample.shape[2:]):
            return _forward_of_diffusers()(network.unet, sample, timestep, class_labels, return_dict)
        # A number becomes a whole one, as in diffusers; a tensor keeps its fraction.
        t = timestep if isinstance(timestep, Tensor) else torch.tensor([timestep], dtype=torch.long)
        out = self._run(sample, t.flatten().expand(len(sample)).tolist(), class_labels).to(sample.dtype)
        return UNet2DOutput(sample=out) if return_dict else (out,)

    def _run(self, x: Tensor, t: list[float], labels: Tensor | None) -> Tensor:
        distinct = sorted(set(t))
        tables = [StepTable("forward", 1, (_level(float(v)),), continuous=True) for v in distinct]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        bank = TableBank(tables, x.device, dtype)
        table = [distinct.index(v) for v in t]
        state = self.state
        if state is None or state.x.shape != x.shape or not _equal(state.label, labels):
            state = self.state = State.create(x.to(dtype), bank, table=table, label=labels)
        state.x, state.bank = x.to(dtype), bank
        state.table = torch.tensor(table, dtype=torch.int64, device=x.device)
        state.table_host = state.table.cpu().numpy()
        self.network.runner(x.shape).forward(state)
        assert state.out is not None
        return state.out.clone()  # the next call may use its memory


def _level(t: float) -> Row:
    """A row that asks the network for t; what it would do with the answer is not used."""
    return Row(t=t, abar=0.5, abar_next=1.0, kx=0.0, ko=1.0, a0=1.0)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


# The loop of DDPMPipeline and DDIMPipeline ----------------------------------------------------------------------------


def _scheduler_config(pipeline: Any) -> dict[str, Any]:
    """The configuration of the pipeline's scheduler. Raises `ConfigError` where a table cannot be what it does."""
    import diffusers

    scheduler, name = pipeline.scheduler, type(pipeline.scheduler).__name__
    config = configuration(scheduler)
    if type(scheduler) is not getattr(diffusers, name) or "step" in vars(scheduler):
        raise ConfigError(f"scheduler {name} is not diffusers' own; supported: {', '.join(VARIANCE_PRESERVING)}")
    if name not in VARIANCE_PRESERVING:
        raise ConfigError(
            f"scheduler {name} needs its input scaled, which {type(pipeline).__name__} does not do; supported: "
            f"{', '.join(VARIANCE_PRESERVING)}"
        )
    if "variance_type" in vars(scheduler):  # what DDPM's step reads
        config["variance_type"] = scheduler.variance_type
    expected = torch.from_numpy(noise_schedule(config).alphas_cumprod.copy())
    actual = scheduler.alphas_cumprod.double().cpu()
    if actual.shape != expected.shape or float((actual - expected).abs().max()) > 1e-4:
        raise ConfigError(f"the alphas_cumprod of {name} are not those of its configuration")
    return config


def _try(config: dict[str, Any]) -> None:
    """Raises `ConfigError` where no number of steps has a table."""
    refused: ConfigError | None = None
    for steps in (1, 10):
        try:
            from_config(config, steps)
        except InvalidArgument:  # fewer timesteps than that
            continue
        except ConfigError as e:
            refused = e
        else:
            return
    if refused is not None:
        raise refused


@dataclasses.dataclass
class _Loop:
    """One call of DDPMPipeline or DDIMPipeline with these arguments, all of them."""

    pipeline: Any
    network: _Network
    arguments: dict[str, Any]
    table: StepTable | None = None

    def prepare(self) -> None:
        """Raises `ConfigError` where the scheduler is not supported, `InvalidArgument` for the caller's mistakes."""
        a, scheduler = self.arguments, self.pipeline.scheduler
        B, generator = a["batch_size"], a["generator"]
        if isinstance(B, bool) or not isinstance(B, int) or B < 1:
            raise InvalidArgument(f"batch_size={B!r}: a whole number of at least 1 is needed")
        if isinstance(generator, list):
            if len(generator) < B and (len(generator) != 1 or "eta" in a):
                raise InvalidArgument(f"{len(generator)} generators for batch_size={B}: one for each image is needed")
            a["generator"] = generator[:B]
        self.eta = a.get("eta", 0.0)
        self.config = _scheduler_config(self.pipeline)
        clipped = bool(a.get("use_clipped_model_output"))
        table = from_config(self.config, a["num_inference_steps"], eta=self.eta, use_clipped_model_output=clipped)
        scheduler.set_timesteps(a["num_inference_steps"])
        if [row.t for row in table.rows] != scheduler.timesteps.tolist():
            raise ConfigError(f"{type(scheduler).__name__} has timesteps that its configuration does not describe")
        self.table = table

    def run(self) -> Any:
        """What the pipeline's own ``__call__`` returns."""
        a, pipeline, unet = self.arguments, self.pipeline, self.pipeline.unet
        images: Any = self._sample()
        images = (images / 2 + 0.5).clamp(0, 1).to(unet.dtype)
        if a["output_type"] != "pt":
            images = images.cpu().permute(0, 2, 3, 1)
            # numpy has no bfloat16, at which diffusers itself fails.
            images = (images.float() if images.dtype == torch.bfloat16 else images).numpy()
            if a["output_type"] == "pil":
                images = pipeline.numpy_to_pil(images)
        pipeline.maybe_free_model_hooks()
        if not a["return_dict"]:
            return (images,)
        from diffusers import ImagePipelineOutput

        return ImagePipelineOutput(images=images)

    @torch.no_grad()
    def _sample(self) -> Tensor:
        """The rows of the table, from the initial noise on; every draw where diffusers has it."""
        assert self.table is not None
        unet, size = self.network.unet, self.network.unet.config.sample_size
        H, W = (size, size) if isinstance(size, int) else size
        B, generator = self.arguments["batch_size"], self.arguments["generator"]
        device, dtype = self.pipeline._execution_device, unet.dtype

        def draw() -> Tensor:
            return randn((B, unet.config.in_channels, H, W), generator, device, dtype)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x = draw().to(wide)
        state = State.create(x * self.table.init_scale, TableBank([self.table], device, wide))
        runner = self.network.runner(x.shape)
        for row, _ in enumerate(self.pipeline.progress_bar(self.pipeline.scheduler.timesteps)):
            state.noise = None
            if draws(self.config, self.table, row, self.eta):
                state.noise = _given(draw().to(wide))
            runner.step(state)
        return state.x


def _given(z: Tensor) -> Callable[[int], Tensor]:
    return lambda row: z
