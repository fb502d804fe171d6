"""The public object: images from a U-Net and a schedule."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastdiff import backends, checkpoint, images, noise, solvers, update
from fastdiff.errors import BackendError, CallbackError, Cancelled, ConfigError, InvalidArgument, NumericsError
from fastdiff.files import atomic_path
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import StepTable
from fastdiff.state import State, TableBank

log = logging.getLogger("fastdiff")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SOLVERS = ("ddim", "ddpm")
FROM_MODEL = "model"

# Images are run in chunks whose activations take about this much; more does not make a step faster.
CHUNK_BYTES = 2 << 30

NoiseSource = Callable[[int | None, range], Tensor]


@dataclasses.dataclass(frozen=True)
class Event:
    """One finished row of a run: ``x`` the state after it, ``x0`` the denoised image it saw, float32 [b, C, H, W], for the images
    (global indices) of this chunk. row counts from 0; rows is the table's length.
    """

    row: int
    rows: int
    indices: range
    x: Tensor
    x0: Tensor


@dataclasses.dataclass(frozen=True)
class SampleOutput:
    """What `Sampler.sample` returns. images: float32 [n, C, H, W], in [-1, 1] where x0 was clipped; nfe: network evaluations
    per image; labels: int64 [n] or None. The images are those of (seed, start_index .. start_index + n - 1).
    """

    images: Tensor
    seed: int
    start_index: int
    table: StepTable
    nfe: int
    labels: Tensor | None

    def to_pil(self) -> list[Image.Image]:
        """One PIL image each."""
        return images.to_pil(self.images)

    def grid(self, columns: int | None = None) -> Image.Image:
        """All images in one picture."""
        return images.grid(self.images, columns)

    def save(self, path: str | Path, columns: int | None = None) -> None:
        """Write, atomically: a picture suffix gives one image or the grid; ``.npz`` arrays ``images`` (uint8 [n, H, W, C]), ``seed``,
        ``indices`` and ``labels``; no suffix a folder of PNGs named by global index.
        """
        path = Path(path)
        if path.suffix.lower() in images.PICTURES:
            images.save_picture(self.to_pil()[0] if len(self.images) == 1 else self.grid(columns), path)
        elif path.suffix.lower() == ".npz":
            indices = np.arange(self.start_index, self.start_index + len(self.images))
            arrays = {"images": images.to_uint8(self.images), "seed": np.uint64(self.seed), "indices": indices}
            if self.labels is not None:
                arrays["labels"] = self.labels.cpu().numpy()
            with atomic_path(path) as temporary:
                np.savez_compressed(temporary, **arrays)
        elif not path.suffix:
            for i, picture in enumerate(self.to_pil(), start=self.start_index):
                images.save_picture(picture, path / f"{i:06d}.png")
        else:
            allowed = ", ".join((*images.PICTURES, ".npz"))
            raise InvalidArgument(f"{path}: unknown suffix; allowed: {allowed}, or none for a folder of PNGs")


class Sampler:
    """Samples from a diffusion U-Net.

    unet: a `fastdiff.UNet`, a diffusers ``UNet2DModel``, or any module called as ``unet(x, t)`` or ``unet(x, t, class_labels=labels)``
    (then give ``shape``). prediction: what it says, "epsilon", "sample" or "v_prediction". shape: (C, H, W), by default from the
    network's configuration. backend: "eager", "compiled" or "auto". dtype: the network's; None keeps its own.
    determinism: "seed" (a sample depends on (seed, index) up to rounding) or "bitwise" where the backend offers it.

    May be called from several threads. Neither the module nor any global state is changed. Raises `InvalidArgument` naming the value and what is allowed.
    """

    def __init__(
        self,
        unet: nn.Module,
        schedule: NoiseSchedule | None = None,
        *,
        prediction: str = "epsilon",
        backend: str = "auto",
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        determinism: str = "seed",
        shape: tuple[int, int, int] | None = None,
        scheduler_config: dict[str, Any] | None = None,
    ):
        solvers.prediction.check_prediction(prediction)
        if determinism not in ("seed", "bitwise"):
            raise InvalidArgument(f"determinism={determinism!r} is unknown; allowed: seed, bitwise")
        parameter = next(unet.parameters(), torch.zeros(()))
        self.unet = unet
        self.schedule = schedule or NoiseSchedule()
        self.prediction = prediction
        self.device = torch.device(device) if device is not None else parameter.device
        self.dtype = _dtype(dtype) if dtype is not None else parameter.dtype
        self.determinism = determinism
        self.backend = backend
        if backend == "auto":
            self.backend = "eager"
            log.info("backend auto: eager")
        elif backend not in backends.BACKENDS:
            raise InvalidArgument(f"backend={backend!r} is unknown; allowed: auto, {', '.join(backends.BACKENDS)}")
        self._scheduler_config = scheduler_config or {}
        self._config = getattr(unet, "config", None)
        self._shape = self._default_shape(shape)
        self._lock = threading.Lock()
        self._runners: dict[tuple[backends.Spec, tuple[int, ...]], backends.Runner] = {}
        self._cancelled = 0
        self._closed = False
        self._prepare(1)  # a backend that cannot run says so now

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        backend: str = "auto",
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        determinism: str = "seed",
    ) -> Sampler:
        """A sampler for a built-in model's name, a diffusers folder, or a checkpoint file (`fastdiff.checkpoint`).

        Schedule, prediction, clipping, spacing and variance come from the model's scheduler configuration. device None: CUDA
        where there is one.
        """
        loaded = checkpoint.load(model)
        config = loaded.scheduler_config
        if config.get("thresholding"):
            raise ConfigError(f"{loaded.path}: thresholding=true in its scheduler configuration is not supported")
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(
            loaded.unet.to(device),
            loaded.schedule,
            prediction=config.get("prediction_type", "epsilon"),
            backend=backend,
            device=device,
            dtype=dtype,
            determinism=determinism,
            scheduler_config=config,
        )

    # ---- sampling ----------------------------------------------------------------------------------------------------

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
            "ddim", "ddpm", or a ready `StepTable`.
        steps
            Network evaluations; default 50 for ddim, every timestep for ddpm.
        eta, variance
            Noise of ddim (0: none) and ddpm ("posterior", "beta", "none", "learned_range").
        spacing
            "trailing", "leading", "linspace", "quadratic" or a falling list of timesteps; None: the model's, else trailing.
        clip
            Bound of |x0|; None for no bound; "model" (default): the model's, else 1.
        seed, start_index
            Image i of the result is image start_index + i of the seed, whatever the batch. None draws a fresh seed.
        labels
            A class for all, or one for each image; None: the null class where the network has one.
        guidance
            Classifier-free guidance scale (1: off), for all or one for each image; guidance_interval: the share of the run
            that is guided (0: pure noise, 1: the image); guidance_rescale: 0 (off) to 1.
        size
            Height and width, multiples of the network's stride; default the network's own.
        noise
            The initial noise [n, C, H, W]; or a function (row, indices) -> [len(indices), C, H, W] for all noise, with row None for
            the initial noise. None: Philox noise of (seed, index).
        batch_size
            Images in flight; default by the network's size.
        callback
            Called after every row with an `Event`; what it raises ends the run as a `CallbackError` naming the row.

        Raises `InvalidArgument` before anything heavy runs, `Cancelled` after `cancel`, `NumericsError` when images became
        NaN or infinite; its ``output`` holds the others.
        """
        run = self._plan(
            n, solver, steps, eta, variance, spacing, clip, seed, start_index, labels, guidance, guidance_interval,
            guidance_rescale, size, noise, batch_size,
        )  # fmt: skip
        with _progress(progress, len(run.chunks) * len(run.table)) as tick:
            parts = [x for chunk in run.chunks for x in [self._run(run, chunk, callback, tick)]]
        output = SampleOutput(torch.cat(parts), run.seed, start_index, run.table, run.nfe, run.labels)
        finite = torch.isfinite(output.images).flatten(1).all(dim=1)
        if not finite.all():
            bad = tuple(start_index + int(i) for i in torch.nonzero(~finite)[:, 0])
            raise NumericsError(
                f"images {', '.join(map(str, bad[:20]))} became NaN or infinite in {self.dtype}; the other "
                f"{n - len(bad)} are in this error's .output. Try float32, or lower guidance",
                bad,
                output,
            )
        return output

    def stream(self, n: int, *, every: int = 1, progress: bool = False, **options: Any) -> Iterator[Event]:
        """The rows of `sample` as they finish: an `Event` after every ``every``-th row and after the last. Takes `sample`'s options.

        Arguments are checked at the call. Leaving the loop, or `cancel`, ends the run and frees everything.
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InvalidArgument(f"every={every!r}: a whole number of at least 1 is needed")
        keys = ("solver", "steps", "eta", "variance", "spacing", "clip", "seed", "start_index", "labels", "guidance",
                "guidance_interval", "guidance_rescale", "size", "noise", "batch_size")  # fmt: skip
        defaults: dict[str, Any] = dict.fromkeys(keys) | {
            "solver": "ddim", "eta": 0.0, "clip": FROM_MODEL, "seed": 0, "start_index": 0, "guidance": 1.0,
            "guidance_interval": (0.0, 1.0), "guidance_rescale": 0.0,
        }  # fmt: skip
        unknown = sorted(options.keys() - defaults.keys())
        if unknown:
            raise InvalidArgument(f"stream has no option {', '.join(unknown)}; allowed: {', '.join(keys)}")
        run = self._plan(n, **(defaults | options))

        def events() -> Iterator[Event]:
            with _progress(progress, len(run.chunks) * len(run.table)) as tick:
                for chunk in run.chunks:
                    state, runner = self._start(run, chunk)
                    for row in range(len(run.table)):
                        if self._cancelled != run.epoch:
                            return
                        wanted = row % every == every - 1 or row == len(run.table) - 1
                        x0 = self._advance(runner, state, keep=wanted)
                        tick()
                        if x0 is not None:
                            yield Event(row, len(run.table), run.indices(chunk), state.x[: len(chunk)].clone(), x0[: len(chunk)])

        return events()

    def cancel(self) -> None:
        """End all runs of this sampler between two steps: `sample` raises `Cancelled`, `stream` stops. Later calls run as usual."""
        self._cancelled += 1

    def close(self) -> None:
        """Free the prepared runners; the sampler cannot be used after."""
        self.cancel()
        with self._lock:
            self._runners.clear()
            self._closed = True

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # ---- one run -----------------------------------------------------------------------------------------------------

    def _run(self, run: _Run, chunk: range, callback: Callable[[Event], None] | None, tick: Callable[[], None]) -> Tensor:
        state, runner = self._start(run, chunk)
        for row in range(len(run.table)):
            if self._cancelled != run.epoch:
                raise Cancelled(f"cancelled before row {row} of {len(run.table)}, images {chunk.start} to {chunk.stop - 1} of {run.n}")
            x0 = self._advance(runner, state, keep=callback is not None)
            tick()
            if callback is not None and x0 is not None:
                event = Event(row, len(run.table), run.indices(chunk), state.x[: len(chunk)].clone(), x0[: len(chunk)])
                try:
                    callback(event)
                except Exception as e:
                    raise CallbackError(f"the callback raised {type(e).__name__} at row {row} of {len(run.table)}: {e}") from e
        return state.x[: len(chunk)].float().cpu()

    def _advance(self, runner: backends.Runner, state: State, keep: bool) -> Tensor | None:
        """One row; with ``keep``, the x0 it saw. The lock is held for a step, so that calls from several threads take turns."""
        with self._lock, _evaluating(self.unet):
            if not keep:
                runner.step(state)
                return None
            runner.forward(state)
            x0 = update.predict_x0(state)
            runner.update(state)
            return x0

    def _start(self, run: _Run, chunk: range) -> tuple[State, backends.Runner]:
        """The state of one chunk at row 0. A short last chunk is padded with images that idle, so that no new size is compiled."""
        indices = run.indices(chunk)
        B = run.batch_size
        pad = B - len(chunk)
        index = [*indices, *[0] * pad]
        with self._lock:
            runner = self._prepare(B, run.shape)
        bank = TableBank([run.table], self.device)
        label = None
        if run.labels is not None:
            label = torch.cat([run.labels[chunk.start : chunk.stop], run.labels[:1].expand(pad)])
        state = State.create(
            self._initial(run, chunk, index),
            bank,
            seed=run.seed,
            index=index,
            label=label,
            guidance=[*run.guidance[chunk.start : chunk.stop], *[1.0] * pad],
            guidance_rescale=run.guidance_rescale,
            noise=self._noise_source(run, indices, pad),
        )
        if pad:
            state.idle(range(len(chunk), B))
        return state, runner

    def _initial(self, run: _Run, chunk: range, index: list[int]) -> Tensor:
        pad = len(index) - len(chunk)
        if isinstance(run.noise, Tensor):
            z = run.noise[chunk.start : chunk.stop].to(device=self.device, dtype=torch.float32)
        elif run.noise is not None:
            z = self._checked(run.noise(None, run.indices(chunk)), len(chunk), run.shape)
        else:
            i = torch.tensor(index, dtype=torch.int64, device=self.device)
            seed = torch.full_like(i, noise.as_int64(run.seed))
            return noise.normal(seed, i, torch.zeros_like(i), noise.INITIAL, run.shape) * run.table.init_scale
        return torch.cat([z, z.new_zeros(pad, *run.shape)]) * run.table.init_scale

    def _noise_source(self, run: _Run, indices: range, pad: int) -> Callable[[int], Tensor] | None:
        source = run.noise
        if source is None or isinstance(source, Tensor):
            return None

        def draw(row: int) -> Tensor:
            z = self._checked(source(row, indices), len(indices), run.shape)
            return torch.cat([z, z.new_zeros(pad, *run.shape)])

        return draw

    def _checked(self, z: Tensor, n: int, shape: tuple[int, int, int]) -> Tensor:
        if not isinstance(z, Tensor) or tuple(z.shape) != (n, *shape):
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise InvalidArgument(f"noise must return a tensor {(n, *shape)}, got {got}")
        return z.to(device=self.device, dtype=torch.float32)

    def _prepare(self, batch: int, shape: tuple[int, int, int] | None = None) -> backends.Runner:
        """The runner for a batch size, made once; made again when the weights have changed since."""
        if self._closed:
            raise InvalidArgument("this sampler is closed")
        spec = backends.Spec(batch, shape or self._shape, self.dtype, self.device, self._null_label, self.determinism)
        version = tuple(x for p in self.unet.parameters() for x in (p.data_ptr(), p._version))
        own = all(p.device == self.device and p.dtype == self.dtype for p in self.unet.parameters())
        key = (spec, () if own else version)  # a module used as it is always has its present weights
        if key not in self._runners:
            for old in [k for k in self._runners if k[1] != key[1]]:
                del self._runners[old]
            network = self.unet if own else copy.deepcopy(self.unet).to(device=self.device, dtype=self.dtype).eval()
            self._runners[key] = backends.prepare(self.backend, network, spec)
        return self._runners[key]

    # ---- checking ----------------------------------------------------------------------------------------------------

    @property
    def _null_label(self) -> int | None:
        return getattr(self._config, "null_label", None)

    def _default_shape(self, shape: tuple[int, int, int] | None) -> tuple[int, int, int]:
        if shape is not None:
            ok = isinstance(shape, tuple) and len(shape) == 3 and all(_whole(v) and v >= 1 for v in shape)
            if not ok:
                raise InvalidArgument(f"shape={shape!r}: (channels, height, width), each at least 1, is needed")
            return shape
        size = getattr(self._config, "sample_size", None)
        channels = getattr(self._config, "in_channels", None)
        if channels is None:
            raise InvalidArgument("the network has no configuration that tells its input; give shape=(channels, height, width)")
        height, width = size if isinstance(size, (tuple, list)) else (size or 0, size or 0)
        return (channels, height, width)

    def _table(
        self, solver: str | StepTable, steps: int | None, eta: float, variance: str | None,
        spacing: str | Sequence[float] | None, clip: float | str | None,
    ) -> StepTable:  # fmt: skip
        config = self._scheduler_config
        if isinstance(solver, StepTable):
            return solver
        if solver not in SOLVERS:
            raise InvalidArgument(f"solver={solver!r} is unknown; allowed: {', '.join(SOLVERS)}, or a StepTable")
        options: dict[str, Any] = {"prediction": self.prediction}
        if isinstance(clip, str):
            if clip != FROM_MODEL:
                raise InvalidArgument(f"clip={clip!r}: a positive number, None or {FROM_MODEL!r} is needed")
            clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample", True) else None
        options["clip"] = clip
        options["spacing"] = spacing if spacing is not None else config.get("timestep_spacing", "trailing")
        if options["spacing"] == "leading":
            options["steps_offset"] = config.get("steps_offset", 0)
        if solver == "ddim":
            if variance is not None:
                raise InvalidArgument(f"variance={variance!r} belongs to solver 'ddpm'; ddim's noise is eta")
            if steps is None and isinstance(options["spacing"], str):
                steps = min(50, self.schedule.timesteps)
            options["set_alpha_to_one"] = config.get("set_alpha_to_one", True)
            return solvers.ddim(self.schedule, steps, eta=eta, **options)
        if eta != 0.0:
            raise InvalidArgument(f"eta={eta!r} belongs to solver 'ddim'; ddpm's noise is variance")
        names = {"fixed_small": "posterior", "fixed_large": "beta", "learned_range": "learned_range"}
        named = config.get("variance_type", "fixed_small")
        if variance is None and named not in names:
            raise InvalidArgument(f"the model's variance_type {named!r} is not supported; give variance=... yourself")
        return solvers.ddpm(self.schedule, steps, variance=variance or names[named], **options)

    def _plan(
        self, n: int, solver: str | StepTable, steps: int | None, eta: float, variance: str | None,
        spacing: str | Sequence[float] | None, clip: float | str | None, seed: int | None, start_index: int,
        labels: int | Sequence[int] | Tensor | None, guidance: float | Sequence[float], guidance_interval: tuple[float, float],
        guidance_rescale: float, size: int | tuple[int, int] | None, noise: Tensor | NoiseSource | None, batch_size: int | None,
    ) -> _Run:  # fmt: skip
        """Everything about a run that can be wrong is found here."""
        if self._closed:
            raise InvalidArgument("this sampler is closed")
        if not _whole(n) or n < 1:
            raise InvalidArgument(f"n={n!r}: a whole number of at least 1 is needed")
        if not _whole(start_index) or not 0 <= start_index <= (1 << 63) - n:
            raise InvalidArgument(f"start_index={start_index!r}: a whole number from 0 is needed")
        if batch_size is not None and (not _whole(batch_size) or batch_size < 1):
            raise InvalidArgument(f"batch_size={batch_size!r}: a whole number of at least 1, or None, is needed")
        shape = self._check_size(n, size)
        table = self._table(solver, steps, eta, variance, spacing, clip)
        out_channels = getattr(self._config, "out_channels", None)
        if table.learned_variance and out_channels is not None and out_channels != 2 * shape[0]:
            raise InvalidArgument(f"variance='learned_range' needs a network with {2 * shape[0]} output channels, this one has {out_channels}")
        scales = self._check_guidance(n, guidance, guidance_rescale, labels)
        guided = bool((scales != 1.0).any())
        if guided or tuple(guidance_interval) != (0.0, 1.0):
            table = table.with_guidance_interval(*guidance_interval)
        chosen = _fresh_seed() if seed is None else _check_seed(seed)
        if isinstance(noise, Tensor) and tuple(noise.shape) != (n, *shape):
            raise InvalidArgument(f"noise has shape {tuple(noise.shape)}, {(n, *shape)} is needed")
        B = min(n, batch_size or self._default_batch(shape))
        return _Run(
            n=n, seed=chosen, start_index=start_index, shape=shape, table=table, nfe=table.nfe(guided),
            labels=self._check_labels(n, labels), guidance=scales, guidance_rescale=float(guidance_rescale), noise=noise, batch_size=B,
            chunks=tuple(range(i, min(i + B, n)) for i in range(0, n, B)), epoch=self._cancelled,
        )  # fmt: skip

    def _check_size(self, n: int, size: int | tuple[int, int] | None) -> tuple[int, int, int]:
        C, height, width = self._shape
        if size is not None:
            pair = size if isinstance(size, tuple) else (size, size)
            if len(pair) != 2 or not all(_whole(v) and v >= 1 for v in pair):
                raise InvalidArgument(f"size={size!r}: one whole number or (height, width), each at least 1, is needed")
            height, width = pair
        if not height or not width:
            raise InvalidArgument("the network's configuration has no sample_size; give size=")
        stride = getattr(self._config, "stride", None) or 1 << (len(getattr(self._config, "block_out_channels", (1,))) - 1)
        if height % stride or width % stride:
            raise InvalidArgument(f"size={height}x{width}: both must be multiples of the network's stride, {stride}")
        memory = _memory()
        need = self._activation_bytes((C, height, width))
        if memory is not None and need > memory:
            raise InvalidArgument(f"size={height}x{width}: one image needs about {need / 2**30:.0f} GiB, this machine has {memory / 2**30:.0f}")
        if memory is not None and 4 * n * C * height * width > memory:
            raise InvalidArgument(f"n={n}: the result alone needs {4 * n * C * height * width / 2**30:.0f} GiB; draw fewer, with start_index for the next")
        return C, height, width

    def _activation_bytes(self, shape: tuple[int, int, int]) -> int:
        """A rough size of one image's activations: a dozen float32 maps of the first block's width."""
        width = getattr(self._config, "block_out_channels", (64,))[0]
        return 12 * 4 * width * shape[1] * shape[2]

    def _default_batch(self, shape: tuple[int, int, int]) -> int:
        return max(1, min(64, CHUNK_BYTES // self._activation_bytes(shape)))

    def _check_labels(self, n: int, labels: int | Sequence[int] | Tensor | None) -> Tensor | None:
        classes = getattr(self._config, "num_classes", None) or getattr(self._config, "num_class_embeds", None)
        if labels is None:
            if classes is None:
                return None
            if self._null_label is None:
                raise InvalidArgument(f"this network is class-conditional; give labels from 0 to {classes - 1}")
            return torch.full((n,), self._null_label, dtype=torch.int64)
        if classes is None and self._config is not None:
            raise InvalidArgument("labels were given, but this network has no classes")
        if _whole(labels):
            labels = [labels] * n  # type: ignore[list-item]  # a whole number, as just checked
        try:
            tensor = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as e:
            raise InvalidArgument(f"labels={labels!r}: whole numbers are needed") from e
        if tensor.is_floating_point() or tensor.dtype == torch.bool or tuple(tensor.shape) != (n,):
            raise InvalidArgument(f"labels of {tensor.dtype} {tuple(tensor.shape)}: one whole number, or {n} of them, are needed")
        bad = tensor[(tensor < 0) | (tensor >= (classes or 1 << 31))]
        if len(bad):
            raise InvalidArgument(f"label {int(bad[0])} is out of range; 0 to {(classes or 1 << 31) - 1} are allowed")
        return tensor.to(torch.int64).cpu()

    def _check_guidance(self, n: int, guidance: float | Sequence[float], rescale: float, labels: Any) -> np.ndarray:
        try:
            scales = np.broadcast_to(np.asarray(guidance, dtype=np.float64), (n,))
        except (TypeError, ValueError) as e:
            raise InvalidArgument(f"guidance={guidance!r}: one number, or {n} of them, are needed") from e
        if not np.isfinite(scales).all():
            raise InvalidArgument(f"guidance={guidance!r}: finite numbers are needed")
        if isinstance(rescale, bool) or not isinstance(rescale, (int, float)) or not 0.0 <= rescale <= 1.0:
            raise InvalidArgument(f"guidance_rescale={rescale!r}: a number from 0 to 1 is needed")
        if (scales != 1.0).any():
            if self._null_label is None:
                raise InvalidArgument(f"guidance={guidance!r} needs a network trained with label dropout (null_label in its configuration)")
            if labels is None:
                raise InvalidArgument(f"guidance={guidance!r} needs labels to guide towards")
        return scales


@dataclasses.dataclass(frozen=True)
class _Run:
    """A checked call of `sample`."""

    n: int
    seed: int
    start_index: int
    shape: tuple[int, int, int]
    table: StepTable
    nfe: int
    labels: Tensor | None
    guidance: np.ndarray
    guidance_rescale: float
    noise: Tensor | NoiseSource | None
    batch_size: int
    chunks: tuple[range, ...]
    epoch: int

    def indices(self, chunk: range) -> range:
        """Global image indices of a chunk."""
        return range(self.start_index + chunk.start, self.start_index + chunk.stop)


class _evaluating:
    """The module in evaluation mode for the length of a step, then as it was: a network in training can be sampled."""

    def __init__(self, unet: nn.Module):
        self.unet = unet
        self.modules = [m for m in unet.modules() if m.training] if unet.training else []

    def __enter__(self) -> None:
        for module in self.modules:
            module.training = False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for module in self.modules:
            module.training = True


class _progress:
    """A bar on standard error; entering gives the function that advances it by one row."""

    def __init__(self, show: bool, total: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

        columns = ("sampling", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not show)
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> Callable[[], None]:
        self.bar.start()
        return lambda: self.bar.advance(self.task)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.bar.stop()


_check_seed = noise.check_seed


def _fresh_seed() -> int:
    return secrets.randbits(63)


def _whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise InvalidArgument(f"dtype={dtype!r} is unknown; allowed: {', '.join(DTYPES)}")
    return found


def _memory() -> int | None:
    """Physical memory in bytes; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
