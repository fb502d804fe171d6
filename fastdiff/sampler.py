"""The public object: images from a U-Net and a schedule."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import backends, checkpoint, noise, request, update
from fastdiff.errors import CallbackError, Cancelled, InvalidArgument, NumericsError
from fastdiff.output import Event, SampleOutput
from fastdiff.request import FROM_MODEL, NetworkInfo, NoiseSource, Options, Request
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import EDMSchedule, StepTable
from fastdiff.solvers.prediction import check_prediction
from fastdiff.solvers.walk import Schedule
from fastdiff.state import State, TableBank

__all__ = ["Event", "SampleOutput", "Sampler"]

log = logging.getLogger("fastdiff")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
FAST = "bfloat16-fast"


class Sampler:
    """Samples from a diffusion U-Net.

    unet
        A `fastdiff.UNet`, a diffusers ``UNet2DModel``, or any module called as ``unet(x, t)`` or
        ``unet(x, t, class_labels=labels)`` (then give ``shape``, its (C, H, W)). It is never changed, and its present
        weights are used, also while it trains.
    schedule, prediction
        What it was trained with: a `NoiseSchedule` and "epsilon" (the default), "sample" or "v_prediction"; or a
        `solvers.EDMSchedule` and "edm", for networks that are the F of EDM's preconditioning.
    backend
        "native" (fastdiff's own U-Net on the CPU, in float32 or bfloat16), "eager", "compiled", or "auto": native where
        it can run, else eager; its choice is logged.
    device, dtype
        Where and in what the network runs; None keeps its own. The state is float32 always. "bfloat16-fast" is the
        native backend's: faster, with more than twice the error of its bfloat16 (which is as exact as PyTorch's).
    determinism
        "seed": image (seed, index) is the same in any batch up to rounding; "bitwise": bit for bit, where a backend
        offers it.

    It may be called from several threads, which take turns step by step. Raises `InvalidArgument` naming the value
    and what is allowed, `BackendError` with every reason why a backend cannot run.
    """

    def __init__(
        self,
        unet: nn.Module,
        schedule: Schedule | None = None,
        *,
        prediction: str | None = None,
        backend: str = "auto",
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        determinism: str = "seed",
        shape: tuple[int, int, int] | None = None,
        scheduler_config: dict[str, Any] | None = None,
    ):
        if not isinstance(unet, nn.Module):
            raise InvalidArgument(f"unet={unet!r}: a torch module is needed; from_pretrained takes names and paths")
        if schedule is not None and not isinstance(schedule, (NoiseSchedule, EDMSchedule)):
            raise InvalidArgument(f"schedule={schedule!r}: a NoiseSchedule, an EDMSchedule or None is needed")
        if prediction is None:
            prediction = "edm" if isinstance(schedule, EDMSchedule) else "epsilon"
        check_prediction(prediction)
        if determinism not in ("seed", "bitwise"):
            raise InvalidArgument(f"determinism={determinism!r} is unknown; allowed: seed, bitwise")
        if backend not in ("auto", *backends.BACKENDS):
            raise InvalidArgument(f"backend={backend!r} is unknown; allowed: auto, {', '.join(backends.BACKENDS)}")
        parameter = next(unet.parameters(), torch.zeros(()))
        self.unet = unet
        self.info = NetworkInfo.of(unet, shape)
        self.schedule: Schedule = schedule or NoiseSchedule()
        self.prediction = prediction
        self.device = _device(device) if device is not None else parameter.device
        self.fast = dtype == FAST
        self.dtype = _dtype("bfloat16" if self.fast else dtype) if dtype is not None else parameter.dtype
        self.determinism = determinism
        self._scheduler_config = scheduler_config or {}
        self._lock = threading.Lock()
        self._runners: dict[backends.Spec, backends.Runner] = {}
        self._copy: nn.Module | None = None
        self._cancellations = 0
        self._closed = False
        first = self._spec(1, (self.info.channels, *(self.info.size or (self.info.stride,) * 2)))
        self.backend = backend
        if backend == "auto":
            self.backend = backends.choose(unet, first)
            log.info("backend auto: %s", self.backend)
        self._runner(first.batch, first.shape)  # what cannot run says so now

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        backend: str = "auto",
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        determinism: str = "seed",
        **source: Any,
    ) -> Sampler:
        """A sampler for a built-in model's name, a diffusers folder, or a checkpoint file (see `fastdiff.checkpoint`).

        Schedule, prediction, clipping, spacing and variance are those of its scheduler configuration. device None:
        CUDA where there is one. source: the options of `checkpoint.load`, which tell what an original file is.
        """
        loaded = checkpoint.load(model, **source)
        config = loaded.scheduler_config
        device = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        # Convolutions like NHWC better than NCHW (benchmarks/test_layout.py measures by how much).
        loaded.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations
        return cls(
            loaded.unet.to(device),
            loaded.schedule,
            prediction=loaded.prediction,
            backend=backend,
            device=device,
            dtype=dtype,
            determinism=determinism,
            scheduler_config=config,
        )

    def sample(
        self,
        n: int,
        *,
        solver: str | StepTable = "ddim",
        steps: int | None = None,
        eta: float = 0.0,
        variance: str | None = None,
        spacing: str | Sequence[float] | None = None,
        clip: float | str | None = FROM_MODEL,
        seed: int | None = 0,
        start_index: int = 0,
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | Sequence[float] = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        size: int | tuple[int, int] | None = None,
        noise: Tensor | NoiseSource | None = None,
        batch_size: int | None = None,
        callback: Callable[[Event], None] | None = None,
        progress: bool = False,
    ) -> SampleOutput:
        """Draw ``n`` images.

        solver
            "ddim", "ddpm", "dpmpp_1", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc", "euler", "euler_ancestral",
            "heun", "lms", "deis", "plms", "lcm", "consistency", "auto" (a rule by steps and guidance, see
            `fastdiff.request.auto`), or a `StepTable` that a function of `fastdiff.solvers` made.
        steps
            Steps of the solver, each a network evaluation but with heun (two each, the last one) and plms (one more in
            all). By default 50, every timestep for ddpm, 20 for auto, 4 for lcm, 1 for consistency, 18 with EDM.
        eta, variance
            The noise of ddim (0: none) and of ddpm ("posterior", "beta", "none", "learned_range"; None: the model's).
        spacing
            "trailing", "leading", "linspace", "quadratic", "karras", "exponential" or a falling list of timesteps
            (`fastdiff.solvers.sigma_timesteps` makes one of sigmas); None: the model's, else trailing.
        clip
            The bound of |x0|, None for no bound; by default the model's (which may be dynamic thresholding), else 1.
        seed, start_index
            Image i of the result is image start_index + i of the seed, whatever the batch. seed None draws a fresh one.
        labels
            A class for all images or one for each; None: the null class, where the network has one.
        guidance
            Classifier-free guidance scale for all images or one for each; 1 is off. guidance_interval is the share of
            the run that is guided (0 is pure noise, 1 the image), guidance_rescale goes from 0 (off) to 1.
        size
            Height and width, multiples of the network's stride; by default the network's own.
        noise
            The initial noise [n, C, H, W], or a function (row, indices) -> [len(indices), C, H, W] for all noise,
            called with row None for the initial one. None: Philox noise of (seed, index).
        batch_size
            Images in flight; by default what suits the network's size.
        callback
            Called with an `Event` after every row; what it raises ends the run as a `CallbackError` naming the row.
        progress
            A bar on standard error.

        Raises `InvalidArgument` before anything heavy runs; `Cancelled` after `cancel`; `NumericsError` when images
        became NaN or infinite, with the others in its ``output``.
        """
        options = Options(
            solver=solver, steps=steps, eta=eta, variance=variance, spacing=spacing, clip=clip, seed=seed,
            start_index=start_index, labels=labels, guidance=guidance, guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale, size=size, noise=noise, batch_size=batch_size,
        )  # fmt: skip
        r = self._request(n, options)
        parts: list[Tensor] = []
        rows = self._rows(r, self._cancellations, preview=lambda _: callback is not None, progress=progress)
        with contextlib.closing(rows):  # else an error's traceback would keep the run alive
            for event, x in rows:
                if callback is not None and event is not None:
                    try:
                        callback(event)
                    except Exception as e:
                        raise CallbackError(
                            f"the callback raised {type(e).__name__} at row {event.row} of {event.rows}: {e}"
                        ) from e
                if x is not None:
                    parts.append(x.float().cpu())
        if sum(map(len, parts)) < n:
            raise Cancelled(f"cancelled with {sum(map(len, parts))} of {n} images finished")
        output = SampleOutput(torch.cat(parts), r.seed, r.start_index, r.table, r.nfe, r.labels)
        finite = torch.isfinite(output.images).flatten(1).all(dim=1)
        if not finite.all():
            bad = tuple(r.start_index + int(i) for i in torch.nonzero(~finite)[:, 0])
            raise NumericsError(
                f"{len(bad)} of {n} images became NaN or infinite in {self.dtype} (index "
                f"{', '.join(map(str, bad[:20]))}); the others are in this error's .output. "
                "Try float32, or less guidance",
                bad,
                output,
            )
        return output

    def stream(self, n: int, *, every: int = 1, progress: bool = False, **options: Any) -> Iterator[Event]:
        """The rows of `sample` as they finish: an `Event` for every ``every``-th row and for the last.

        Takes the options of `sample`, checked at the call. Leaving the loop, or `cancel`, ends the run and frees all.
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InvalidArgument(f"every={every!r}: a whole number of at least 1 is needed")
        names = {f.name for f in dataclasses.fields(Options)}
        if not options.keys() <= names:
            unknown = ", ".join(sorted(options.keys() - names))
            raise InvalidArgument(f"stream has no option {unknown}; allowed: {', '.join(sorted(names))}")
        r = self._request(n, Options(**options))
        last = len(r.table) - 1

        def preview(row: int) -> bool:
            return row % every == every - 1 or row == last

        rows = self._rows(r, self._cancellations, preview, progress)
        return (event for event, _ in rows if event is not None)

    def cancel(self) -> None:
        """End all running calls between two steps: `sample` raises `Cancelled`, `stream` stops. Later calls run."""
        self._cancellations += 1

    def close(self) -> None:
        """End all running calls and free what was prepared; the sampler cannot be used after."""
        self._closed = True
        self.cancel()
        with self._lock:
            self._runners.clear()
            self._copy = None

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _request(self, n: int, options: Options) -> Request:
        if self._closed:
            raise InvalidArgument("this sampler is closed")
        return request.check(n, options, self.info, self.schedule, self.prediction, self._scheduler_config)

    def _rows(
        self, r: Request, started: int, preview: Callable[[int], bool], progress: bool
    ) -> Generator[tuple[Event | None, Tensor | None], None, None]:
        """The loop. Yields after every row: an event where ``preview(row)`` asks for it, the images where a chunk ends.

        started: the number of cancellations before the call. A short last chunk is padded with images that idle, so
        that no new batch size has to be prepared.
        """
        with _bar(progress, len(r.chunks) * len(r.table)) as tick:
            for chunk in r.chunks:
                n = len(chunk)
                state = self._start(r, chunk)
                with self._lock:
                    if self._cancellations != started:  # a closed sampler prepares nothing
                        return
                    runner = self._runner(r.batch_size, r.shape)
                for row in range(len(r.table)):
                    if self._cancellations != started:
                        return
                    event = None
                    with self._lock, _evaluating(self.unet):
                        if preview(row):
                            runner.forward(state)
                            x0 = update.predict_x0(state)[:n] * r.table.data_scale
                            runner.update(state)
                            event = Event(row, len(r.table), r.indices(chunk), state.x[:n].clone(), x0)
                        else:
                            runner.step(state)
                    tick()
                    yield event, state.x[:n] if row == len(r.table) - 1 else None

    def _start(self, r: Request, chunk: range) -> State:
        """One chunk at row 0, with its initial noise."""
        indices, pad = r.indices(chunk), r.batch_size - len(chunk)
        index = [*indices, *[0] * pad]

        def padded(z: Tensor) -> Tensor:
            if not isinstance(z, Tensor) or tuple(z.shape) != (len(chunk), *r.shape):
                got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
                raise InvalidArgument(f"noise must give a tensor {(len(chunk), *r.shape)}, got {got}")
            z = z.detach().to(device=self.device, dtype=torch.float32)
            return torch.cat([z, z.new_zeros(pad, *r.shape)])

        source = r.noise
        if isinstance(source, Tensor):
            x = padded(source[chunk.start : chunk.stop])
        elif source is not None:
            x = padded(source(None, indices))
        else:
            i = torch.tensor(index, dtype=torch.int64, device=self.device)
            x = noise.normal(torch.full_like(i, noise.as_int64(r.seed)), i, torch.zeros_like(i), noise.INITIAL, r.shape)
        label = None
        if r.labels is not None:
            label = torch.cat([r.labels[chunk.start : chunk.stop], r.labels[:1].expand(pad)])
        state = State.create(
            x * r.table.init_scale,
            TableBank([r.table], self.device),
            seed=r.seed,
            index=index,
            label=label,
            guidance=[*r.guidance[chunk.start : chunk.stop], *[1.0] * pad],
            guidance_rescale=r.guidance_rescale,
            noise=None if source is None or isinstance(source, Tensor) else lambda row: padded(source(row, indices)),
        )
        if pad:
            state.idle(range(len(chunk), r.batch_size))
        return state

    def _spec(self, batch: int, shape: tuple[int, int, int]) -> backends.Spec:
        return backends.Spec(batch, shape, self.dtype, self.device, self.info.null_label, self.determinism, self.fast)

    def _runner(self, batch: int, shape: tuple[int, int, int]) -> backends.Runner:
        """The runner for a batch size, prepared once."""
        spec = self._spec(batch, shape)
        network = self._network()
        if spec not in self._runners:
            self._runners[spec] = backends.prepare(self.backend, network, spec)
        return self._runners[spec]

    def _network(self) -> nn.Module:
        """The module itself, or the one converted copy of it, with the present weights.

        They are copied anew for every chunk: fused optimizers and edits of ``.data`` leave no trace of a change.
        """
        # The native engine rounds for itself, and better so: what it rounds are transformed weights.
        dtype = torch.float32 if self.backend == "native" else self.dtype
        if all(p.device == self.device and p.dtype == dtype for p in self.unet.parameters()):
            if self._copy is not None:  # the module was converted meanwhile
                self._copy = None
                self._runners.clear()
            return self.unet
        present = [*self.unet.parameters(), *self.unet.buffers()]
        with torch.inference_mode(False), torch.no_grad():  # weights that can be written again in any mode
            mine = [] if self._copy is None else [*self._copy.parameters(), *self._copy.buffers()]
            if self._copy is None or [t.shape for t in mine] != [t.shape for t in present]:
                self._copy = copy.deepcopy(self.unet).to(device=self.device, dtype=dtype).eval()
                self._runners.clear()
            else:
                for into, now in zip(mine, present, strict=True):
                    into.copy_(now)
        return self._copy


@contextlib.contextmanager
def _evaluating(unet: nn.Module) -> Iterator[None]:
    """Dropout off for the length of a step, then every module as it was: a network in training can be sampled."""
    training = [module for module in unet.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _bar(show: bool, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error; gives the function that advances it by one row."""
    if not show:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = ("sampling", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def _device(device: str | torch.device) -> torch.device:
    try:
        # A device that is not there says so, and "cuda" becomes "cuda:0", as parameters call it.
        return torch.empty(0, device=torch.device(device)).device
    except (RuntimeError, AssertionError, TypeError) as e:
        raise InvalidArgument(f"device={str(device)!r} cannot be used here: {str(e).splitlines()[0]}") from e


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise InvalidArgument(f"dtype={dtype!r} is unknown; allowed: {', '.join(DTYPES)}, {FAST}")
    return found  # type: ignore[return-value]  # one of DTYPES, as just checked
