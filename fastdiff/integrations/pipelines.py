"""`accelerate`: makes fastdiff run the network, or the whole loop, of a diffusers pipeline.

The pipeline stays the same object. Its class becomes a subclass of its own class, of the same name, that differs in
``__call__`` and, within a call, in ``unet`` and ``vae``:

- DDPMPipeline and DDIMPipeline, and subclasses that keep their ``__call__``, run a `PipelineLoop`: the table of the
  pipeline's scheduler, with the noise that diffusers would draw, in the same order.
- Any other pipeline runs its own ``__call__``, in which ``pipeline.unet`` is a front of the network, which a backend
  runs, and ``pipeline.vae`` (or ``vqvae``) a front of the autoencoder, whose decoder and encoder the native engine
  runs. Nothing is put into the modules themselves, so other pipelines, accelerated or not, may run them in other
  threads.

Every call looks at the network, its weights and the scheduler anew, so that all of them may change between calls. What
would differ from diffusers by more than rounding is refused, or left to diffusers' own code:
`BackendUNet.unsupported_changes`, `BackendUNet.reasons_against` and `PipelineLoop.prepare` find the reasons.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

from fastdiff import backends
from fastdiff.backends.base import refuse
from fastdiff.checks import one_of
from fastdiff.core.turns import Lock
from fastdiff.errors import BackendError, ConfigError, InvalidArgument, ModifiedError
from fastdiff.integrations import autoencoder
from fastdiff.integrations.autoencoder import BackendCoder
from fastdiff.integrations.condition import BackendCondition
from fastdiff.integrations.loop import PipelineLoop, check_scheduler
from fastdiff.integrations.network import BackendUNet
from fastdiff.unet.changes import in_words, replaced

log = logging.getLogger("fastdiff")

Pipeline = TypeVar("Pipeline")


def accelerate(pipeline: Pipeline, backend: str = "auto", strict: bool = True) -> Pipeline:
    """Make fastdiff run a diffusers pipeline.

    fastdiff runs the whole loop of DDPMPipeline and DDIMPipeline, for the schedulers DDPM, DDIM, PNDM (PLMS), LCM,
    DPMSolverMultistep, UniPC and DEIS; of other pipelines the network, and by `native` the decoder and encoder of the
    autoencoder and the text-conditioned network of Stable Diffusion's pipelines.
    The same arguments and generators give the images that diffusers gives, up to rounding, and leave the generators in
    the state in which diffusers leaves them.

    The pipeline remains an instance of its class, and saves, moves and shows its components as before;
    ``pipeline.unaccelerate()`` undoes the change. Weights are shared, not copied; `native` has packed ones besides.

    Args:
        pipeline: The pipeline; its ``unet`` must be a ``UNet2DModel`` or a ``UNet2DConditionModel``, or its ``vae`` or
            ``vqvae`` an ``AutoencoderKL``, ``VQModel`` or ``AutoencoderTiny``.
        backend: "native", "compiled" or "eager"; or "auto": `native` where it can run, which is in float32 on a CPU,
            while elsewhere diffusers' own code runs, and the log says why.
        strict: Whether a network or scheduler that is not supported is an error. If False, that part is left to
            diffusers, and the log says so once. A supported one that was modified, so that it is no longer what its
            configuration says (a patched method, a hook, an attribute), is left to diffusers in any case, unless
            ``strict`` is True and ``backend`` is named. A decoder or encoder that cannot be run is left to diffusers in
            any case, and so is a network beside a decoder that can; the log says so once, for an encoder when a
            pipeline calls it.

    Returns:
        The same object.

    Raises:
        ConfigError: If the network or the scheduler is not supported and ``strict`` is True (`ModifiedError`, if it
            was modified and ``backend`` is named). Later changes raise it from the call of the pipeline.
        BackendError: If ``backend`` is named and cannot run here, or diffusers is not installed.
        InvalidArgument: If ``pipeline`` is not a diffusers pipeline, or the backend is unknown.
    """
    one_of("backend", backend, ("auto", *backends.BACKENDS))
    try:
        import diffusers
    except ImportError as e:
        raise BackendError("accelerate needs diffusers, which is not installed: pip install diffusers") from e
    if not isinstance(pipeline, diffusers.DiffusionPipeline):
        raise InvalidArgument(f"pipeline is a {type(pipeline).__name__}; a diffusers pipeline is needed")
    former = pipeline._fastdiff if isinstance(pipeline, _Accelerated) else None
    base = type(pipeline) if former is None else former.base
    calls = PipelineCalls(base, backend, strict)
    if former is not None:
        calls.lock = former.lock  # a call that is running in another thread has it
    calls.check(pipeline)
    pipeline.__dict__["_fastdiff"] = calls
    pipeline.__class__ = _accelerated(base)
    return pipeline


@functools.cache
def _accelerated(base: Any) -> type:
    """Make the subclass of a pipeline's class; it has the same name, as a saved pipeline names the class to load."""
    same = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls = vars(self).get("_fastdiff")  # another thread may have undone `accelerate` just now
        return base.__call__(self, *args, **kwargs) if calls is None else calls.run(self, args, kwargs)

    parts = {name: _part(name) for name in AUTOENCODERS if not hasattr(base, name)}
    return type(base.__name__, (_Accelerated, base), {**same, **parts, "__call__": call})


AUTOENCODERS = ("vae", "vqvae")


def _part(name: str) -> property:
    """Make the property of a pipeline's part: in a thread that runs a call, its front, if the call has one."""

    def front(pipeline: Any) -> Any:
        calls = vars(pipeline).get("_fastdiff")  # another thread may have undone `accelerate` just now
        return None if calls is None else calls.fronts.get(name)

    def get(pipeline: Any) -> Any:
        if name not in vars(pipeline):
            raise AttributeError(f"{type(pipeline).__name__} has no {name}")
        part, shown = vars(pipeline)[name], front(pipeline)
        return shown if shown is not None and vars(shown) is vars(part) else part

    def put(pipeline: Any, part: Any) -> None:
        if part is None or part is not front(pipeline):
            vars(pipeline)[name] = part

    def drop(pipeline: Any) -> None:
        vars(pipeline).pop(name, None)

    return property(get, put, drop)


class _Accelerated:
    """The methods that an accelerated pipeline has beyond those of its own class."""

    _fastdiff: PipelineCalls
    unet = _part("unet")

    def unaccelerate(self) -> Any:
        """Undo `accelerate`.

        Returns:
            The same object.
        """
        self.__class__ = self._fastdiff.base  # a call that is running in another thread ends with diffusers' own code
        del self.__dict__["_fastdiff"]
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The subclass cannot be imported, so copies and pickles name the base class, and accelerate the new object.
        calls = self._fastdiff
        state = {k: v for k, v in self.__dict__.items() if k != "_fastdiff"}
        return _rebuild, (calls.base, calls.backend, calls.strict), state


def _rebuild(base: Any, backend: str, strict: bool) -> Any:
    """Make the object of a copy or a pickle, whose attributes are set afterwards."""
    pipeline = base.__new__(base)
    pipeline.__dict__["_fastdiff"] = PipelineCalls(base, backend, strict)
    pipeline.__class__ = _accelerated(base)
    return pipeline


class PipelineCalls:
    """The calls of one accelerated pipeline, whose own class is ``base``."""

    def __init__(self, base: Any, backend: str, strict: bool):
        self.base = base
        self.backend = backend
        self.strict = strict
        self.network: BackendUNet | None = None
        self.coders: dict[tuple[str, str], BackendCoder] = {}  # by the names of the autoencoder and of its part
        self.decoding = False  # whether the pipeline has had a decoder of a supported kind
        self.lock = Lock()
        self.warned: set[str] = set()
        self._running = threading.local()

    @property
    def fronts(self) -> dict[str, Any]:
        """The fronts of the pipeline's parts that the call which this thread is running uses; none outside of calls."""
        return getattr(self._running, "fronts", {})

    @property
    def whole_loop(self) -> bool:
        """Whether fastdiff runs the pipeline's loop, and not its network alone."""
        from diffusers import DDIMPipeline, DDPMPipeline

        return any(
            self.base.__call__ is cls.__call__ and not any(replaced(cls.__call__, cls.__qualname__, "__call__"))
            for cls in (DDPMPipeline, DDIMPipeline)
        )

    def check(self, pipeline: Any) -> None:
        """Raise the errors that a call would raise."""
        self.decoders_of(pipeline)
        self.network_of(pipeline)
        if self.whole_loop:
            with self.unsupported("scheduler"):
                check_scheduler(pipeline)

    def run(self, pipeline: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of the pipeline, as far as it is supported; diffusers runs the rest."""
        arguments = inspect.signature(self.base.__call__).bind(pipeline, *args, **kwargs)
        with self.lock.held:
            decoders = self.decoders_of(pipeline)
            network = self.network_of(pipeline)
            outer = self.fronts  # not empty if this call is made within another one
            try:
                if network is not None and self.whole_loop and network.accepts(None, pipeline.unet.config.sample_size):
                    arguments.apply_defaults()
                    loop = PipelineLoop(pipeline, network, dict(arguments.arguments))
                    with self.unsupported("scheduler"):
                        loop.prepare()
                    if loop.table is not None:
                        return loop.run()
                fronts = self._autoencoders(pipeline, decoders)
                if network is not None and self.backend != "eager":
                    fronts["unet"] = network.front(self.warn_once)
                self._running.fronts = fronts
                return self.base.__call__(*arguments.args, **arguments.kwargs)
            except BaseException:
                for part in (network, *self.coders.values()):
                    if part is not None:
                        part.forget_interrupted()
                raise
            finally:
                self._running.fronts = outer

    def _autoencoders(self, pipeline: Any, decoders: dict[str, BackendCoder]) -> dict[str, Any]:
        """Return the fronts of the pipeline's autoencoders, for those of their parts that the engine may run."""
        fronts = {}
        for name in self._names(pipeline):
            encoder = functools.partial(self._coder, pipeline, name, "encoder")
            shown = autoencoder.front(vars(pipeline)[name], decoders.get(name), encoder, self.warn_once)
            if shown is not None:
                fronts[name] = shown
        return fronts

    def _names(self, pipeline: Any) -> list[str]:
        """Return the names of the pipeline's autoencoders, if the backend is one that runs them."""
        runs = self.backend in ("auto", "native") and not self.whole_loop
        return [
            name
            for name in AUTOENCODERS
            if runs and vars(pipeline).get(name) is not None and not hasattr(self.base, name)
        ]

    def decoders_of(self, pipeline: Any) -> dict[str, BackendCoder]:
        """Return the decoders that the engine runs, by the names of the autoencoders; others are left to diffusers."""
        found = {name: self._coder(pipeline, name, "decoder") for name in self._names(pipeline)}
        return {name: coder for name, coder in found.items() if coder is not None}

    def _coder(self, pipeline: Any, name: str, part: str) -> BackendCoder | None:
        """Return the decoder or encoder of an autoencoder, ready to run; None if it is left to diffusers."""
        vae = vars(pipeline)[name]
        if getattr(vae, part, None) is None:
            return None
        left = f"the {part} of {self.base.__name__}.{name} is left to diffusers"
        try:
            known = self.coders.get((name, part))
            coder = known if known is not None and known.is_of(vae) else BackendCoder(vae, part)
        except ConfigError as e:
            self.warn_once(f"{left}: {e}")
            return None
        self.coders[name, part] = coder
        self.decoding |= part == "decoder"
        changed = coder.unsupported_changes()
        missing = [] if changed else coder.reasons_against()
        if changed:
            self.warn_once(f"{left}, as it is not what its configuration says: {in_words(changed)}")
        elif missing:
            self.warn_once(f"{left}; the native engine cannot run it: {'; '.join(missing)}")
        return None if changed or missing else coder

    def network_of(self, pipeline: Any) -> BackendUNet | None:
        """Return the pipeline's network, ready to run; None if it is left to diffusers.

        Beside a decoder that is supported, a network that is not supported is no error.
        """
        unet = vars(pipeline).get("unet", getattr(pipeline, "unet", None))  # the network itself, in nested calls too
        kinds = (BackendUNet,) if self.whole_loop else (BackendUNet, BackendCondition)
        kind = next((each for each in kinds if isinstance(unet, each.kind())), None)
        if self.decoding and unet is None:
            return None
        with self.unsupported("network", allowed=self.decoding and kind is not BackendUNet):
            if kind is None:
                what = "no unet" if unet is None else f"a {type(unet).__name__} as its unet"
                names = " or ".join(f"a {each.kind().__name__}" for each in kinds)
                raise ConfigError(f"{self.base.__name__} has {what}; {names} is supported")
            if hasattr(self.base, "unet"):
                raise ConfigError(f"{self.base.__name__} defines unet in its class, where accelerate has to")
            if type(self.network) is not kind or not self.network.is_of(unet):
                self.network = kind(unet, self.backend)
            changed = self.network.unsupported_changes()
            if changed:
                raise ModifiedError(
                    f"{self.base.__name__}.unet is not what its configuration says: {in_words(changed)}"
                )
            missing = self.network.reasons_against()
            if not missing:
                return self.network
            if self.backend != "auto":
                refuse(self.backend, missing)
            self.warn_once(f"{self.base.__name__} is run by diffusers; the native engine cannot: {'; '.join(missing)}")
        return None

    @contextlib.contextmanager
    def unsupported(self, part: str, allowed: bool = False) -> Iterator[None]:
        """Turn a `ConfigError` into a warning that this part is left to diffusers, where `accelerate` says so.

        That is so where a part may be unsupported (``allowed``), not strict, or was modified without a named backend.
        """
        try:
            yield
        except ConfigError as e:
            modified = isinstance(e, ModifiedError)
            if self.strict and not (self.backend == "auto" if modified else allowed):
                raise type(e)(f"{e} (strict=False leaves the {part} to diffusers)") from e
            self.warn_once(f"the {part} is left to diffusers: {e}")

    def warn_once(self, message: str) -> None:
        """Log a warning, unless this pipeline has logged it before."""
        if message not in self.warned:
            self.warned.add(message)
            log.warning(message)
