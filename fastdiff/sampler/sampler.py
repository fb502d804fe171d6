"""The public object: images from a U-Net and a schedule."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import backends, solvers
from fastdiff.backends.eager import EagerRunner
from fastdiff.checkpoints import load, weights_digest
from fastdiff.core import noise, update
from fastdiff.core.state import State, TableBank
from fastdiff.errors import CallbackError, Cancelled, CheckpointError, InvalidArgument, NumericsError
from fastdiff.sampler import choice, editing, measured, request
from fastdiff.sampler.editing import Guide, Inpainting
from fastdiff.sampler.options import NetworkInfo, NoiseSource, Options
from fastdiff.sampler.output import Event, SampleOutput
from fastdiff.sampler.request import Request
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import EDMSchedule, StepTable
from fastdiff.solvers.compat.run import FROM_MODEL
from fastdiff.solvers.prediction import check_prediction
from fastdiff.solvers.walk import Schedule

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
        "seed": image (seed, index) is the same in any batch up to rounding; "bitwise": bit for bit, with the backends
        native and triton.
    scheduler_config
        Keys of a diffusers ``scheduler_config.json``: the model's own clipping, spacing and variance, where a call does
        not give them.

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
        self.device = usable_device(device) if device is not None else parameter.device
        self.fast = dtype == FAST
        self.dtype = _dtype("bfloat16" if self.fast else dtype) if dtype is not None else parameter.dtype
        self.determinism = determinism
        self.scheduler_config = scheduler_config or {}
        self._lock = threading.Lock()
        self._runners: dict[backends.Spec, backends.Runner] = {}
        self._copy: nn.Module | None = None
        self._cancellations = 0
        self._closed = False
        # What `fastdiff trilemma --install` writes and `measurements` reads; None where the model is no folder.
        self.measurements_file: Path | None = None
        self._measured: measured.Measured | None = None
        self._left_aside = False
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
        """A sampler for a built-in model's name, a diffusers folder, or a checkpoint file (see
        `fastdiff.checkpoints.loading`).

        Schedule, prediction, clipping, spacing and variance are those of its scheduler configuration. device None:
        CUDA where there is one. source: the options of `checkpoint.load`, which tell what an original file is.
        A folder's ``trilemma.json``, written by `fastdiff trilemma`, is what "auto", quality= and deadline_s= go by.
        """
        loaded = load(model, **source)
        config = loaded.scheduler_config
        device = usable_device(device)
        # Convolutions like NHWC better than NCHW (benchmarks/test_layout.py measures by how much).
        loaded.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations
        sampler = cls(
            loaded.unet.to(device),
            loaded.schedule,
            prediction=loaded.prediction,
            backend=backend,
            device=device,
            dtype=dtype,
            determinism=determinism,
            scheduler_config=config,
        )
        sampler.measurements_file = loaded.path / measured.NAME if loaded.path.is_dir() else None
        return sampler

    def sample(
        self,
        n: int,
        *,
        solver: str | StepTable = "ddim",
        steps: int | None = None,
        eta: float = 0.0,
        variance: str | None = None,
        order: int | None = None,
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
        image: Tensor | None = None,
        strength: float | None = None,
        mask: Tensor | None = None,
        repaint: tuple[int, int] | None = None,
        guide: Guide | None = None,
        guide_through: str = "x0",
        quality: float | None = None,
        deadline_s: float | None = None,
        compat: str | None = None,
        callback: Callable[[Event], None] | None = None,
        progress: bool = False,
    ) -> SampleOutput:
        """Draw ``n`` images, from noise or from an ``image``.

        solver
            "ddim", "ddpm", "dpmpp_1", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc", "euler", "euler_ancestral",
            "heun", "lms", "deis", "plms", "lcm", "consistency", "auto", or a `StepTable` that a function of
            `fastdiff.solvers` made. "auto" without steps: what was measured to be indistinguishable from the best, in
            the fewest network evaluations (`fastdiff.sampler.measured.automatic`); with steps, and for a model without
            measurements, a general rule by steps and guidance (`fastdiff.sampler.choice.auto`).
        steps
            Steps of the solver, each a network evaluation but with heun (two each, the last one) and plms (one more in
            all). By default 50, every timestep for ddpm, 20 for auto, 4 for lcm, 1 for consistency, 18 with EDM.
        eta, variance
            The noise of ddim (0: none) and of ddpm ("posterior", "beta", "none", "learned_range"; None: the model's).
        order
            Of unipc and deis (1 to 3, by default 2) and lms (1 to 4, by default 4): how many evaluations a step uses.
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
        image, strength
            An image to start from, floats [n, C, H, W] or [C, H, W] in [-1, 1]: noised, it goes through the last
            ``strength`` of the steps only (SDEdit), from more than 0 (kept) to 1 (all steps); 0.8 by default.
        mask
            1 where ``image`` is drawn anew, 0 where it is known and stays: [H, W], [1, H, W] or [n, 1, H, W]. After
            every row, what is known replaces what was drawn, at its noise level. Runs start at noise alone, unless
            ``strength`` is given.
        repaint
            (jump_length, resamples), as (10, 10): every so many steps are gone so many times (RePaint), so that new
            pixels suit the known ones. Multi-step solvers cannot.
        guide, guide_through
            A function (x0 [k, C, H, W], indices) -> log p [k], differentiable: images are led towards what it finds
            likely (classifier guidance; multiply it by a scale). "x0": by its gradient there, on every backend;
            "network": by that through the network too, eager only, twice the work.
        quality
            In place of solver and steps: 1.1 means the fewest network evaluations whose measured Frechet distance is at
            most 1.1 times the smallest one measured with this guidance. Needs a model with measurements.
        deadline_s
            In place of solver and steps: seconds that the whole call may take. Of the settings that are predicted to
            fit, by a row or two of this batch timed first, the one with the smallest measured distance; without
            measurements as many steps of "auto" as fit. What callbacks and noise functions take is not foreseen.
            ``SampleOutput.table`` is the setting that was chosen, here and above: given as ``solver`` it repeats the
            images.
        compat
            None: the right mathematics. "diffusers", "openai", "ho": what that code base's own loop draws with the same
            noise, quirks included; ``spacing`` then is in its terms (`fastdiff.solvers.compat.run` has both). Runs with
            ``strength`` need a solver of one step.
        callback
            Called with an `Event` after every row; what it raises ends the run as a `CallbackError` naming the row.
        progress
            A bar on standard error.

        Raises `InvalidArgument` before anything heavy runs; `Cancelled` after `cancel`; `NumericsError` when images
        became NaN or infinite, with the others in its ``output``.
        """
        options = Options(
            solver=solver, steps=steps, eta=eta, variance=variance, order=order, spacing=spacing, clip=clip, seed=seed,
            start_index=start_index, labels=labels, guidance=guidance, guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale, size=size, noise=noise, batch_size=batch_size, image=image,
            strength=strength, mask=mask, repaint=repaint, guide=guide, guide_through=guide_through,
            quality=quality, deadline_s=deadline_s, compat=compat,
        )  # fmt: skip
        return self._collect(self._request(n, options), callback, progress)

    def invert(
        self,
        image: Tensor,
        *,
        steps: int | None = None,
        iterations: int = 1,
        spacing: str | Sequence[float] | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | Sequence[float] = 1.0,
        guidance_rescale: float = 0.0,
        batch_size: int | None = None,
        callback: Callable[[Event], None] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """The noise that deterministic DDIM turns into ``image``: float32 [n, C, H, W] on the CPU.

            noise = sampler.invert(image, steps=50, labels=9)
            sampler.sample(len(image), noise=noise, steps=50, labels=9, clip=None)      # image again, or edited

        It is an approximation, which improves with ``steps``, and with ``iterations`` (network evaluations a step) and
        a spacing by sigma together: on the built-in model, 50 steps give 25 dB, with 3 iterations 40 and more in
        "karras" and "exponential" spacing. Trailing steps, too long near the image, gain little by them. The other
        options are those of `sample`, and must be the same in both calls. Errors as of `sample`.
        """
        config = self.scheduler_config
        if spacing is None and isinstance(self.schedule, NoiseSchedule):
            spacing = config.get("timestep_spacing", "trailing")
        table = solvers.ddim_inversion(
            self.schedule, steps, iterations=iterations, spacing=spacing, prediction=self.prediction,
            steps_offset=config.get("steps_offset", 0) if spacing == "leading" else 0,
            set_alpha_to_one=config.get("set_alpha_to_one", True),
        )  # fmt: skip
        options = Options(
            solver=table, image=image, strength=1.0, labels=labels, guidance=guidance,
            guidance_rescale=guidance_rescale, batch_size=batch_size,
        )  # fmt: skip
        n = len(image) if isinstance(image, Tensor) and image.ndim == 4 else 1
        return self._collect(self._request(max(n, 1), options), callback, progress).images / table.init_scale

    def interpolate(
        self,
        n: int,
        between: tuple[int | Tensor, int | Tensor],
        *,
        callback: Callable[[Event], None] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> SampleOutput:
        """``n`` images on the way from one image to another, both among them, by `fastdiff.sampler.editing.slerp`.

        between: two ends, each a seed (for its image ``start_index``) or initial noise [C, H, W], as `invert` gives it.
        Takes the options of `sample` but ``noise``. A solver that adds noise adds every image's own, of ``seed``.
        """
        if not isinstance(between, (tuple, list)) or len(between) != 2:
            raise InvalidArgument(f"between={between!r}: two ends are needed, each a seed or noise [C, H, W]")
        if options.get("noise") is not None:
            raise InvalidArgument("noise cannot be given to interpolate: between says what it is")
        r = self._request(n, self._options("interpolate", options))
        first, last = (self._end(end, r) for end in between)
        return self._collect(dataclasses.replace(r, noise=editing.slerp(first, last, r.n)), callback, progress)

    def _end(self, end: int | Tensor, r: Request) -> Tensor:
        if not isinstance(end, Tensor):
            seed, i = noise.as_int64(noise.check_seed(end)), torch.tensor([r.start_index])
            return noise.normal(torch.full_like(i, seed), i, torch.zeros_like(i), noise.INITIAL, r.shape)[0]
        if tuple(end.shape) != r.shape or not end.is_floating_point() or not torch.isfinite(end).all():
            raise InvalidArgument(
                f"between: noise of {end.dtype} {tuple(end.shape)}; finite floats {r.shape} are needed"
            )
        return end.detach().cpu()

    def _collect(self, r: Request, callback: Callable[[Event], None] | None, progress: bool) -> SampleOutput:
        n = r.n
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
        r = self._request(n, self._options("stream", options))
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

    @staticmethod
    def _options(method: str, options: dict[str, Any]) -> Options:
        names = {f.name for f in dataclasses.fields(Options)}
        if not options.keys() <= names:
            unknown = ", ".join(sorted(options.keys() - names))
            raise InvalidArgument(f"{method} has no option {unknown}; allowed: {', '.join(sorted(names))}")
        return Options(**options)

    def request(self, n: int, **options: Any) -> Request:
        """The checked call that ``sample(n, **options)`` runs: its step table, network evaluations, batch, labels, ...

        Nothing is drawn, but for the rows that ``deadline_s`` has timed. Raises the `InvalidArgument` of `sample`.
        """
        return self._request(n, self._options("sample", options))

    def _request(self, n: int, options: Options) -> Request:
        if self._closed:
            raise InvalidArgument("this sampler is closed")
        if options.deadline_s is not None:
            options = self._in_time(n, options)
        asked = options.quality is not None or (isinstance(options.solver, str) and options.solver == "auto")
        known = self.measurements() if asked else None
        options, point = choice.resolve(options, self.schedule, known)
        r = request.check(n, options, self.info, self.schedule, self.prediction, self.scheduler_config, self.backend)
        if known is not None and point is not None and len(r.table) != point.rows:
            raise CheckpointError(
                f"{known.path}: {point} is said to take {point.nfe} network evaluations, but has {len(r.table)} rows "
                "here"
            )
        return r

    def measurements(self) -> measured.Measured | None:
        """What was measured of this model, from the ``trilemma.json`` of its folder; None where there is none, or where
        it is of other weights (which is logged). `CheckpointError` says what is wrong with the file.
        """
        path = self.measurements_file
        if self._measured is None and not self._left_aside and path is not None and path.exists():
            found = measured.read(path)
            if found.model != weights_digest(self.unet.state_dict()):
                log.warning("%s was measured with other weights, and is left aside", path)
                self._left_aside = True
            else:
                self._measured = found
        return self._measured

    def _in_time(self, n: int, o: Options) -> Options:
        """The options with what a deadline leaves time for: two rows of the first chunk are timed, after one more."""
        started = time.perf_counter()
        choice.check_deadline(o)
        short = dataclasses.replace(o, solver=solvers.ddim(self.schedule, 3, prediction=self.prediction), spacing=None)
        strength = None if o.image is None else 1.0
        r = self._request(n, dataclasses.replace(short, deadline_s=None, clip=FROM_MODEL, strength=strength))
        k = min(r.n, r.batch_size)
        labels, image, mask = (None if whole is None else whole[:k] for whole in (r.labels, r.image, r.mask))
        first = dataclasses.replace(r, n=k, guidance=r.guidance[:k], noise=None, labels=labels, image=image, mask=mask)
        ends = []
        for _ in self._rows(first, self._cancellations, preview=lambda _: False, progress=False):
            ends.append(time.perf_counter())
        if len(ends) < 3:
            raise Cancelled("cancelled before the first image")
        seconds = max(after - before for before, after in itertools.pairwise(ends))
        elapsed = time.perf_counter() - started
        return choice.in_time(o, r, self.schedule, self.measurements(), seconds, elapsed)

    def _rows(
        self, r: Request, started: int, preview: Callable[[int], bool], progress: bool
    ) -> Generator[tuple[Event | None, Tensor | None], None, None]:
        """The loop. Yields after every row: an event where ``preview(row)`` asks for it, the images where a chunk ends.

        started: the number of cancellations before the call. A short last chunk is padded with images that idle, so
        that no new batch size has to be prepared.
        """
        modules = list(self.unet.modules())  # counted here, not in every step
        with _bar(progress, len(r.chunks) * len(r.table)) as tick:
            for chunk in r.chunks:
                n = len(chunk)
                state, inpainting = self._start(r, chunk)
                with self._lock:
                    if self._cancellations != started:  # a closed sampler prepares nothing
                        return
                    runner = self._runner(r.batch_size, r.shape)
                for row in range(len(r.table)):
                    if self._cancellations != started:
                        return
                    event, images, x0, known, guided = None, None, None, None, r.guide is not None
                    if guided:
                        self._guided_forward(runner, state, r, chunk, row, modules)
                    with self._lock, _evaluating(modules):
                        if inpainting is not None:
                            known = inpainting.known(state)
                        shown = preview(row)
                        if guided or shown:
                            if not guided:
                                runner.forward(state)
                            if shown:
                                x0 = update.predict_x0(state)[:n] * r.table.data_scale
                            runner.update(state)
                        else:
                            runner.step(state)
                        if inpainting is not None and known is not None:
                            inpainting.put(state, known)
                        # Copies, before another call's batch takes the runner's buffers.
                        if x0 is not None:
                            event = Event(row, len(r.table), r.indices(chunk), state.x[:n].clone(), x0)
                        if row == len(r.table) - 1:
                            images = state.x[:n].clone()
                    tick()
                    yield event, images

    def _guided_forward(
        self, runner: backends.Runner, state: State, r: Request, chunk: range, row: int, modules: Sequence[nn.Module]
    ) -> None:
        """`forward`, and the user's function, which runs without the lock: it may use the sampler."""
        assert r.guide is not None
        leaf = None
        with self._lock, _evaluating(modules):
            if r.guide_through == "network":
                assert isinstance(runner, EagerRunner), "checked with the request"
                leaf = editing.forward_with_gradient(runner, state)
            else:
                runner.forward(state)
        editing.guide(state, r.guide, r.indices(chunk), leaf, row, len(r.table))

    def _start(self, r: Request, chunk: range) -> tuple[State, Inpainting | None]:
        """One chunk at row 0, with its initial noise; and what is known of its images."""
        indices, pad = r.indices(chunk), r.batch_size - len(chunk)
        index = [*indices, *[0] * pad]

        def padded(z: Tensor) -> Tensor:
            if not isinstance(z, Tensor) or tuple(z.shape) != (len(chunk), *r.shape):
                got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
                raise InvalidArgument(f"noise must give a tensor {(len(chunk), *r.shape)}, got {got}")
            z = z.detach().to(device=self.device, dtype=torch.float32)
            return torch.cat([z, z.new_zeros(pad, *r.shape)])

        image = None if r.image is None else padded(r.image[chunk.start : chunk.stop])
        inpainting = None
        if image is not None and r.mask is not None:
            anew = r.mask[chunk.start : chunk.stop].to(self.device)
            inpainting = Inpainting(image, torch.cat([anew, anew.new_zeros(pad, *anew.shape[1:])]))
        source = r.noise
        if isinstance(source, Tensor):
            x = padded(source[chunk.start : chunk.stop])
        elif source is not None:
            x = padded(source(None, indices))
        else:
            i = torch.tensor(index, dtype=torch.int64, device=self.device)
            x = noise.normal(torch.full_like(i, noise.as_int64(r.seed)), i, torch.zeros_like(i), noise.INITIAL, r.shape)
        first = r.table.rows[0].abar
        if image is not None and r.from_image:
            x = editing.noised(image, first, r.table.data_scale, x if first < 1.0 else None)
        else:
            x = x * r.table.init_scale
        label = None
        if r.labels is not None:
            label = torch.cat([r.labels[chunk.start : chunk.stop], r.labels[:1].expand(pad)])
        state = State.create(
            x,
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
        return state, inpainting

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
        # These round for themselves, and better so: what they round are transformed weights.
        dtype = torch.float32 if self.backend in ("native", "triton") else self.dtype
        last = torch.channels_last if self.device.type == "cuda" else None  # there it takes kernels of its own

        def fits(p: Tensor) -> bool:
            laid_out = last is None or p.ndim != 4 or p.is_contiguous(memory_format=last)
            return p.device == self.device and p.dtype == dtype and laid_out

        if all(map(fits, self.unet.parameters())):
            if self._copy is not None:  # the module was converted meanwhile
                self._copy = None
                self._runners.clear()
            return self.unet
        present = [*self.unet.parameters(), *self.unet.buffers()]
        with torch.inference_mode(False), torch.no_grad():  # weights that can be written again in any mode
            mine = [] if self._copy is None else [*self._copy.parameters(), *self._copy.buffers()]
            if self._copy is None or [t.shape for t in mine] != [t.shape for t in present]:
                self._copy = copy.deepcopy(self.unet).to(device=self.device, dtype=dtype).eval()
                if last is not None:
                    self._copy.to(memory_format=last)  # type: ignore[call-overload]  # missing in torch's annotations
                self._runners.clear()
            else:
                for into, now in zip(mine, present, strict=True):
                    into.copy_(now)
        return self._copy


@contextlib.contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Dropout off for the length of a step, then every module as it was: a network in training can be sampled."""
    training = [module for module in modules if module.training]
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


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device, as the parameters that lie there call it ("cuda" is "cuda:0"); None: CUDA where there is one.

    `InvalidArgument` says why it cannot be used.
    """
    try:
        return torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError, TypeError) as e:
        raise InvalidArgument(f"device={str(device)!r} cannot be used here: {str(e).splitlines()[0]}") from e


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise InvalidArgument(f"dtype={dtype!r} is unknown; allowed: {', '.join(DTYPES)}, {FAST}")
    return found  # type: ignore[return-value]  # one of DTYPES, as just checked
