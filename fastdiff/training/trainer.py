"""The training loop of DDPM (Ho et al. 2020, algorithm 1), and of flow matching (Liu et al. 2023, eq. 1).

Training, like sampling, is a pure function: of the data, the initial weights and the seed. The images of a step, their
timesteps, noise, flips and dropped labels are functions of the seed and the position in the stream of images. So a
resumed run continues bit for bit (on CUDA as far as its kernels are deterministic), and the number of processes changes
results by rounding only (and, in networks with dropout, by the units that are dropped).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastdiff import solvers
from fastdiff.checkpoints import save_folder
from fastdiff.checkpoints.loading import check_new_path
from fastdiff.checkpoints.saving import scheduler_of
from fastdiff.checks import boolean, from_environment, instance, shown
from fastdiff.core.noise import TRAIN_CHOICE, TRAIN_NOISE, as_int64, normal, words
from fastdiff.data import ImageData, save_picture
from fastdiff.errors import CheckpointError, DataError, InvalidArgument, TrainingError
from fastdiff.modes import plain_modes
from fastdiff.sampler import Sampler
from fastdiff.sampler.runners import usable_device
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import FlowSchedule
from fastdiff.text import CaptionEncoder
from fastdiff.training import captions, resume
from fastdiff.training.captions import Captioned
from fastdiff.training.config import TrainConfig
from fastdiff.training.lock import locked
from fastdiff.training.log import TrainingLog
from fastdiff.training.loss import Diffusion, Flow, target
from fastdiff.unet import UNet, UNetCondition

log = logging.getLogger("fastdiff")

GRID_STEPS = 25  # DDIM steps of the sample grids
GRID_GUIDANCE = 3.0  # of grids from captions, without which images follow their prompts less
# Settings that a resumed run may change.
MAY_CHANGE = ("steps", "log_every", "save_every", "sample_every", "compile", "gradient_checkpointing")

# Settings that a resumed run may change where the caller accepts it: the checkpoint still fits.
HARMLESS = (
    "batch_size", "accumulate", "lr", "lr_warmup", "lr_decay", "weight_decay", "grad_clip", "ema_decay", "precision",
    "label_dropout", "min_snr_gamma", "flow_sigmas", "hflip",
)  # fmt: skip

# Positions in the stream of images, the images there (uint8), and their labels or the tokens of their captions.
Part = tuple[range, Tensor, Tensor | None]


class Trainer:
    """Training of a U-Net: `fit` trains it, and resumes the run that an earlier, interrupted `fit` left in ``out``.

    The folder ``out`` receives ``checkpoint.safetensors`` (the whole state of the run;
    `fastdiff.Sampler.from_pretrained` samples from its EMA weights), ``log.jsonl``, ``samples/step-*.png`` and, at the
    end, ``model/``, a diffusers folder with the EMA weights. A run may be interrupted at any moment, by Ctrl-C, a kill
    or a power cut; it loses the steps since its last checkpoint (`stop` loses none). Under torchrun every process makes
    the same Trainer, and the first one writes the files.

    Args:
        unet: The network, which is itself trained, in float32.
        data: The images, with labels, or with captions for a `fastdiff.UNetCondition`.
        out: The folder of the run.
        config: The settings; None means ``TrainConfig()``.
        schedule: The noise schedule: a `NoiseSchedule`, or a `FlowSchedule` for ``prediction="flow_prediction"``. None
            means ``NoiseSchedule()``, or ``FlowSchedule()`` for that prediction.
        device: The device to train on; None means CUDA where it is available, else the CPU.
        text_encoder: The encoder of captions, which is trained with a `fastdiff.UNetCondition`; None for a
            `fastdiff.UNet`, which reads none.

    Attributes:
        class_names: The names of the classes, as the data has them; they are saved with the model. None without names.
        unet: The network in training.
        text_encoder: The encoder of captions in training, or None.
        ema: A copy of the network with the exponential moving average of the weights, which is sampled and exported.
        ema_text_encoder: Likewise of the encoder of captions, or None.
        step: The number of updates so far.

    Raises:
        InvalidArgument: If data, network, settings and device do not fit together.
    """

    @plain_modes(gradients=True)
    def __init__(
        self,
        unet: UNet | UNetCondition,
        data: ImageData,
        out: str | Path,
        config: TrainConfig | None = None,
        schedule: NoiseSchedule | FlowSchedule | None = None,
        device: str | torch.device | None = None,
        text_encoder: CaptionEncoder | None = None,
    ):
        self.config = TrainConfig() if config is None else instance("config", config, TrainConfig)
        self.schedule = _schedule(schedule, self.config.prediction)
        self.data = instance("data", data, ImageData, "fastdiff.load_data makes one")
        if text_encoder is None:
            instance("unet", unet, UNet, "fastdiff.UNet.from_pretrained reads one, diffusers' too")
        else:
            instance("text_encoder", text_encoder, CaptionEncoder)
            instance("unet", unet, UNetCondition, "a network that reads the states of a text_encoder")
        classes = unet.config.num_classes if isinstance(unet, UNet) else None
        self.class_names: tuple[str, ...] | None = None if classes is None else data.class_names
        self.out = Path(check_new_path("out", out))
        self.rank, self.world = from_environment("RANK", 0), from_environment("WORLD_SIZE", 1)
        self._check(unet)
        if isinstance(unet, UNet):
            self._check_classes(unet)
        elif text_encoder is not None:
            captions.check(unet, text_encoder, data)
        if self.config.sample_every:  # now rather than at the first grid, as it may raise
            self._table = solvers.ddim(
                self.schedule, min(GRID_STEPS, self.schedule.timesteps), prediction=self.config.prediction
            )
        self.device = _device(device)
        # The size of samples is that of the images, also in a network made or trained for another.
        side = data.size[0] if data.size[0] == data.size[1] else data.size
        unet.config = dataclasses.replace(unet.config, sample_size=side)
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations
        self.unet, self.text_encoder = unet, text_encoder
        network: nn.Module = unet
        if isinstance(unet, UNetCondition) and text_encoder is not None:
            network = Captioned(unet, text_encoder)
        self._network = network.to(self.device, torch.float32).train()
        self._average_network = copy.deepcopy(self._network).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self._network.parameters(),
            lr=self.config.lr,
            betas=(self.config.beta1, self.config.beta2),
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        self.step = 0
        self._stopped = False
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64, device="cpu")
        self._losses: list[float] = []  # of the steps since the last line of log.jsonl
        self._process = (
            Flow(self.schedule, self.config.flow_sigmas)
            if isinstance(self.schedule, FlowSchedule)
            else Diffusion(self.schedule, self.config.prediction, self.config.min_snr_gamma, self.device)
        )
        self._null: Tensor | None = None  # what a dropped label or caption becomes
        if text_encoder is not None:
            self._null = torch.tensor(text_encoder.tokenize(""), dtype=torch.int64, device=self.device)
        elif isinstance(unet, UNet) and unet.config.null_label is not None:
            self._null = torch.tensor(unet.config.null_label, dtype=torch.int64, device=self.device)

    @property
    def ema(self) -> UNet | UNetCondition:
        """The network with the average of the weights."""
        average: Any = self._average_network
        return average if self.text_encoder is None else average.unet

    @property
    def ema_text_encoder(self) -> CaptionEncoder | None:
        """The encoder of captions with the average of the weights; None without one."""
        average: Any = self._average_network
        return None if self.text_encoder is None else average.encoder

    def _check(self, unet: UNet | UNetCondition) -> None:
        config, data, batch = unet.config, self.data, self.config.batch_size
        if self.config.gradient_checkpointing and not isinstance(unet, UNet):
            raise InvalidArgument("gradient_checkpointing=True is for a fastdiff.UNet; False is needed here")
        if isinstance(unet, UNet) and unet.config.time_embedding_type == "fourier":
            raise InvalidArgument(
                "time_embedding_type='fourier': networks of noise levels (NCSN++) are sampled, not trained; "
                "'positional' is needed"
            )
        if data.channels != config.in_channels:
            raise InvalidArgument(f"the images have {data.channels} channels, the U-Net takes {config.in_channels}")
        if config.out_channels > config.in_channels:
            raise InvalidArgument(
                f"out_channels={config.out_channels}: training needs out_channels={config.in_channels}, as many as "
                "in_channels, or fewer with a condition image (learned variances are not trained here)"
            )
        if any(side % config.stride for side in data.size):
            near = "x".join(str(max(side // config.stride, 1) * config.stride) for side in data.size)
            raise InvalidArgument(
                f"images of {data.size[0]}x{data.size[1]}: both must be multiples of the U-Net's stride "
                f"{config.stride}, as size={near}"
            )
        if any(p.is_inference() for p in unet.parameters()):
            raise InvalidArgument(
                "the U-Net's weights were made or moved in torch.inference_mode(), so they can never be trained; make "
                "it outside of that mode"
            )
        if len(data) == 0:
            raise InvalidArgument("the data holds no images")
        if batch % (self.world * self.config.accumulate):
            raise InvalidArgument(
                f"batch_size={batch} must be a multiple of processes x accumulate = "
                f"{self.world} x {self.config.accumulate}"
            )
        if self.config.sample_every and config.out_channels not in (1, 3):
            raise InvalidArgument(
                f"sample_every={self.config.sample_every}: images of {config.out_channels} channels are not pictures; "
                "0 is needed"
            )

    def _check_classes(self, unet: UNet) -> None:
        config, data = unet.config, self.data
        if config.conditional and config.num_classes is None:
            raise InvalidArgument(
                f"class_embed_type={config.class_embed_type!r} cannot be trained from labels; use num_class_embeds"
            )
        if config.num_classes is not None and (data.num_classes is None or data.num_classes > config.num_classes):
            raise InvalidArgument(
                f"the U-Net takes {config.num_classes} classes, the data has {data.num_classes or 'no labels'}"
            )

    # ---- the draws of a step: functions of the seed and the position in the stream of images -------------------------

    def _positions(self, step: int) -> Iterator[range]:
        """Yield this process's parts of the batch of a step, as positions in the stream of images."""
        c = self.config
        part = c.batch_size // (c.accumulate * self.world)
        for micro in range(c.accumulate):
            start = step * c.batch_size + (micro * self.world + self.rank) * part
            yield range(start, start + part)

    def _indices(self, positions: range) -> list[int]:
        """Return the images at these positions; epoch e goes through a permutation drawn from (seed, e)."""
        n = len(self.data)
        return [int(self._permutation(p // n)[p % n]) for p in positions]

    def _permutation(self, epoch: int) -> Tensor:
        if self._epoch != epoch:
            generator = torch.Generator("cpu").manual_seed(self._hash("epoch", epoch))
            self._order = torch.randperm(len(self.data), generator=generator, dtype=torch.int64, device="cpu")
            self._epoch = epoch
        return self._order

    def _hash(self, *what: object) -> int:
        text = "/".join(map(str, (self.config.seed, *what)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def _read(self, positions: range) -> tuple[Tensor, Tensor | None]:
        """Read images and labels or captions, and check what a caller's own data set may get wrong."""
        data, indices = self.data, self._indices(positions)
        images, labels = data.__getitems__(indices)
        shape = (len(positions), data.channels, *data.size)
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or tuple(images.shape) != shape:
            kind = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise DataError(f"the data gave images {kind}; uint8 {list(shape)}, from 0 to 255, are needed")
        if self.text_encoder is not None:
            assert data.captions is not None
            return images, captions.tokens_of(self.text_encoder, data.captions, indices)
        classes = self.unet.config.num_classes if isinstance(self.unet, UNet) else None
        if classes is None:
            return images, labels  # which are not used
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or tuple(labels.shape) != shape[:1]:
            kind = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise DataError(f"the data gave labels {kind}; int64 [{shape[0]}] are needed")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise DataError(f"the data gave labels from {low} to {high}; the U-Net takes 0 to {classes - 1}")
        return images, labels

    def _batch(
        self, images: Tensor, labels: Tensor | None, positions: range
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Draw x_0 in [-1, 1], noise ~ N(0, I), t ~ Uniform{0..T-1} and labels (algorithm 1, lines 2 to 4).

        The words w0, w1, w2 of one Philox block for each image decide: w0 the timestep, t = floor(w0 T / 2^32), or a
        flow's as `Flow` says; the image is flipped if w1 is odd; the label or caption is dropped if w2 < p 2^32, p
        being ``label_dropout``.
        """
        c = self.config
        x0 = images.to(self.device).float() / 127.5 - 1.0
        index = torch.arange(positions.start, positions.stop, dtype=torch.int64, device=self.device)
        seed = torch.full_like(index, as_int64(c.seed))
        row = torch.zeros_like(index)
        w0, w1, w2, _ = (w[:, 0] for w in words(seed, index, row, TRAIN_CHOICE, 1))
        t = self._process.times(w0)
        if c.hflip:
            x0 = torch.where((w1 & 1).bool()[:, None, None, None], x0.flip(-1), x0)
        if isinstance(self.unet, UNet) and self.unet.config.num_classes is None:
            labels = None
        if labels is not None:
            labels = labels.to(self.device)
            if self._null is not None:
                dropped = w2 < int(c.label_dropout * 2**32)
                labels = torch.where(dropped if labels.ndim == 1 else dropped[:, None], self._null, labels)
        noise = normal(seed, index, row, TRAIN_NOISE, (self.unet.config.out_channels, *x0.shape[2:]))
        return x0, noise, t, labels

    def seconds_per_update(self) -> float:
        """Time an update: its images, loss and gradient, without a change of weights.

        Returns:
            The seconds of an update of all processes, if each has a device of its own.

        Raises:
            DataError: If images cannot be read.
        """
        seconds = []
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for _ in range(2):  # the first one allocates memory and chooses algorithms
                started = time.perf_counter()
                positions = next(self._positions(0))
                images, labels = self._read(positions)
                self._loss(self._network, *self._batch(images, labels, positions)).backward()
                float(next(self._network.parameters()).grad.sum())  # type: ignore[union-attr]  # waits for the device
                seconds.append(time.perf_counter() - started)
        self.optimizer.zero_grad(set_to_none=True)
        return min(seconds) * self.config.accumulate

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def _loss(self, network: nn.Module, x0: Tensor, noise: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Compute w_t ||target - network(x_t, t)||^2, the mean over images and elements (algorithm 1, line 5).

        Channels of ``x0`` after those of the noise are a condition image, which the network reads as it is.
        """
        x0, condition = x0[:, : noise.shape[1]], x0[:, noise.shape[1] :]
        a, s = self._process.levels(t, x0.ndim)
        x_t = torch.cat([a * x0 + s * noise, condition], dim=1) if condition.shape[1] else a * x0 + s * noise
        x_t = x_t.to(memory_format=torch.channels_last)
        bf16 = self.config.precision == "bf16"
        # Within a caller's own autocast the cache would outlive the step, and hold the weights from before it.
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
            out = network(x_t, t, labels)
        error = (out.float() - target(self.config.prediction, x0, noise, a, s)) ** 2
        return (self._process.weights(t) * error.mean(dim=(1, 2, 3))).mean()

    def _average(self) -> None:
        """Update the average, ema <- d ema + (1 - d) w with d = `TrainConfig.ema_at`; the first update copies w.

        torch's AveragedModel keeps a count of updates of its own, on the device, from which it would have to compute d,
        and which checkpoints do not have. So its function for one update is used alone.
        """
        d = self.config.ema_at(self.step) if self.step else 0.0
        average, present = list(self._average_network.parameters()), list(self._network.parameters())
        get_ema_multi_avg_fn(d)(average, present, self.step)

    def _update(self, network: nn.Module, parts: list[Part]) -> float:
        """Take one step of AdamW on a batch, and return the batch's loss."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step)
        self._seed_dropout()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for i, (positions, images, labels) in enumerate(parts):
            more = isinstance(network, nn.parallel.DistributedDataParallel) and i < len(parts) - 1
            with network.no_sync() if more else contextlib.nullcontext():  # type: ignore[operator]  # a DDP module
                loss = self._loss(network, *self._batch(images, labels, positions)) / config.accumulate
                loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self._network.parameters(), config.grad_clip)
        if self.world > 1:
            dist.all_reduce(total)
            total /= self.world
        # This is the only synchronisation of a step. It comes before the update, so that a loss that is not finite
        # cannot reach the weights, the average or a checkpoint.
        value, size = torch.stack((total, norm)).tolist()
        if not (math.isfinite(value) and math.isfinite(size)):
            what = f"the loss became {value}" if not math.isfinite(value) else f"the gradient's norm became {size}"
            raise TrainingError(
                f"{what} at step {self.step + 1}; {self.checkpoint_path} stays as it was: the last good checkpoint. "
                "Try a lower lr or grad_clip, in another folder"
            )
        self.optimizer.step()
        self._average()
        return value

    def _seed_dropout(self) -> None:
        seed = self._hash("dropout", self.step, self.rank)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every CUDA device
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seed)

    def stop(self) -> None:
        """End `fit` after the present update with a checkpoint; it may be called from anywhere, as by a signal handler.

        `fit` then returns with ``step`` less than ``config.steps`` and exports no model; another `fit` continues.
        """
        self._stopped = True

    @plain_modes(gradients=True)
    def fit(self, on_start: Callable[[], None] | None = None, accept_changes: bool = False) -> None:
        """Train to ``config.steps``, from the checkpoint in ``out`` if there is one, and export the EMA weights.

        The caller's random state is left as it is, and does not matter.

        Args:
            on_start: Called in the first process before the first update, when the folder is locked and ``step`` is
                that of the checkpoint.
            accept_changes: Whether a run is resumed with another learning rate, batch size, accumulation, decay,
                clipping, precision or augmentation than it began with. Those of the network, its schedule and the data
                never change.

        Raises:
            TrainingError: If the loss or the gradient is not finite, a file cannot be written, another process is
                training in ``out``, or the checkpoint was written with other settings, or for another network,
                schedule or data.
            CheckpointError: If the checkpoint is damaged or is not one of training, or the model cannot be exported.
            DataError: If images cannot be read.
        """
        ours = [self.device] if self.device.type == "cuda" else []
        # The old checkpoint stays until the new one, of weights, average and two moments, is complete.
        need = 4 * 4 * sum(p.numel() for p in self._network.parameters())
        lock = locked(self.out, need) if self.rank == 0 else contextlib.nullcontext()
        with torch.random.fork_rng(ours), lock, self._processes():
            self._resume(boolean("accept_changes", accept_changes))
            if on_start is not None and self.rank == 0:
                on_start()
            network: nn.Module = torch.compile(self._network) if self.config.compile else self._network  # type: ignore[assignment]  # it returns a module
            if self.world > 1:
                ids = [self.device.index] if self.device.type == "cuda" else None
                network = nn.parallel.DistributedDataParallel(network, device_ids=ids)
            recomputed = None
            if self.config.gradient_checkpointing:
                assert isinstance(self.unet, UNet), "checked when the trainer was made"
                recomputed = self.unet.gradient_checkpointing()
            with (
                recomputed or contextlib.nullcontext(),
                TrainingLog(self.out, self.config, self.step, self._losses, enabled=self.rank == 0) as logger,
            ):
                self._loop(network, logger)
            if self.rank == 0 and self.step == self.config.steps:
                self.export(self.out / "model")

    def _loop(self, network: nn.Module, logger: TrainingLog) -> None:
        config, saved = self.config, True
        with contextlib.closing(self._stream()) as stream:
            while self.step < config.steps and not self._stops():
                started = time.perf_counter()
                loss = self._update(network, [next(stream) for _ in range(config.accumulate)])
                lr = config.lr_at(self.step)
                self.step += 1
                logger.step(self.step, loss=loss, lr=lr, seconds=time.perf_counter() - started)
                last = self.step == config.steps
                if self.rank == 0 and config.sample_every and (last or self.step % config.sample_every == 0):
                    self._sample_grid(logger)
                saved = last or self.step % config.save_every == 0
                if self.rank == 0 and saved:
                    self.save()
            if self.rank == 0 and not saved:
                self.save()

    def _stops(self) -> bool:
        """Return whether `stop` was called, in any of the processes: all of them end after the same update."""
        if self.world == 1:
            return self._stopped
        stopped = torch.tensor(float(self._stopped), dtype=torch.float32, device=self.device)
        dist.all_reduce(stopped, dist.ReduceOp.MAX)
        return bool(stopped)

    def _stream(self) -> Generator[Part, None, None]:
        """Yield this process's parts of the batches from the current step on; a thread reads one part ahead."""

        def read(positions: range) -> Part:
            return positions, *self._read(positions)

        ahead: Future[Part] | None = None
        with ThreadPoolExecutor(1, "fastdiff-data") as reader:
            for step in range(self.step, self.config.steps):
                for positions in self._positions(step):
                    ready, ahead = ahead, reader.submit(read, positions)
                    if ready is not None:
                        yield ready.result()
            if ahead is not None:
                yield ahead.result()

    @contextlib.contextmanager
    def _processes(self) -> Iterator[None]:
        if self.world == 1 or dist.is_initialized():
            yield
            return
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        try:
            yield
        finally:
            dist.destroy_process_group()

    # ---- files -------------------------------------------------------------------------------------------------------

    @property
    def checkpoint_path(self) -> Path:
        """The file of the run's checkpoint, ``checkpoint.safetensors`` in ``out``."""
        return self.out / "checkpoint.safetensors"

    def _info(self) -> dict[str, Any]:
        text = {} if self.text_encoder is None else {"text_encoder": self.text_encoder.config.to_dict()}
        return text | {
            "kind": "training",
            "step": self.step,
            "train": dataclasses.asdict(self.config),
            "unet": self.unet.config.to_dict(),
            "scheduler": (
                scheduler_of(self.schedule, self.config.prediction)
                if isinstance(self.schedule, FlowSchedule)
                else self.schedule.to_scheduler_config() | {"prediction_type": self.config.prediction}
            ),
            "data": {
                "images": len(self.data),
                "size": list(self.data.size),
                "channels": self.data.channels,
                "options": dict(self.data.options),
                "digest": self.data.digest,
            },
            "class_names": self.class_names and list(self.class_names),
            "world_size": self.world,
            "losses": self._losses,
        }

    @plain_modes(gradients=True)
    def save(self) -> None:
        """Write ``checkpoint.safetensors`` now, atomically.

        Raises:
            TrainingError: If a weight, an average or a moment is not finite, or the file cannot be written; the old
                file is left as it is.
        """
        resume.save(self.checkpoint_path, self._network, self._average_network, self.optimizer, self._info())

    def _resume(self, accept_changes: bool) -> None:
        """Continue from the checkpoint, if there is one; one that does not fit raises, and nothing is changed."""
        if self.rank == 0:
            resume.sweep(self.out)
        if not self.checkpoint_path.exists():
            return
        tensors, info = resume.load(self.checkpoint_path)
        mine = self._info()
        try:
            kept = mine["train"].keys() - set(MAY_CHANGE)
            old = info["train"]
            train = {f"train.{key}": f"{shown(old.get(key))} then, {shown(mine['train'][key])} now"
                     for key in sorted(kept) if old.get(key) != mine["train"][key]}  # fmt: skip
            # Checkpoints of earlier versions have fewer of these keys, and the network's own sample_size.
            info["unet"]["sample_size"] = mine["unet"]["sample_size"]
            mine["data"] = {key: value for key, value in mine["data"].items() if key in info["data"]}
            others = {key: _difference(info[key], mine[key]) for key in ("unet", "scheduler", "data")}
            others["text_encoder"] = _difference(info.get("text_encoder"), mine.get("text_encoder"))
            others["class_names"] = _difference(info.get("class_names", mine["class_names"]), mine["class_names"])
            step, world = int(info["step"]), info["world_size"]
            losses = [float(loss) for loss in info.get("losses", [])]
        except (TypeError, ValueError, AttributeError) as e:
            raise CheckpointError(f"{self.checkpoint_path}: its fastdiff metadata cannot be read ({e})") from e
        changed = train | {key: text for key, text in others.items() if text}
        harmless = changed.keys() <= {f"train.{key}" for key in HARMLESS}
        if changed and not (harmless and accept_changes):
            raise TrainingError(
                f"{self.checkpoint_path} was written with other settings ({', '.join(sorted(changed))}): "
                + "; ".join(f"{key}: {text}" for key, text in sorted(changed.items()))
                + ". Use those, or another folder"
                + (", or go on with the new ones by accept_changes=True (--accept-changes)" if harmless else "")
            )
        resume.restore(self.checkpoint_path, tensors, self._network, self._average_network, self.optimizer)
        self.step, self._losses = step, losses
        if self.rank == 0:
            log.info("resuming %s at step %d", self.checkpoint_path, step)
            if changed:
                log.warning("resuming with changes: %s", "; ".join(f"{k}: {v}" for k, v in sorted(changed.items())))
            if world != self.world:
                log.warning("resuming with %d processes instead of %s: same batches, other rounding", self.world, world)

    def _sample_grid(self, logger: TrainingLog) -> None:
        """Sample the EMA weights to ``samples/step-*.png``: 8 images of each of the first 10 classes, or 64 without.

        The prompts of a network that reads captions are those of the first 64 images.
        """
        sampler = Sampler(
            self.ema, self.schedule, prediction=self.config.prediction, text_encoder=self.ema_text_encoder
        )
        classes, prompts = sampler.info.classes, None
        labels = None if classes is None else [label for label in range(min(classes, 10)) for _ in range(8)]
        n = 64 if labels is None else len(labels)
        if self.data.captions is not None and self.text_encoder is not None:
            prompts = [self.data.captions[i % len(self.data)] for i in range(n)]
        condition = None
        if sampler.info.condition:
            given, _ = self.data.__getitems__([i % len(self.data) for i in range(n)])
            condition = given[:, sampler.info.channels :].float() / 127.5 - 1.0
        output = sampler.sample(
            n, solver=self._table, seed=self.config.seed, labels=labels, size=self.data.size, condition=condition,
            prompts=prompts, guidance=1.0 if prompts is None else GRID_GUIDANCE,
            callback=lambda event: logger.drawing(event.row, event.rows),
        )  # fmt: skip
        picture = output.grid(columns=8)
        path = self.out / "samples" / f"step-{self.step:07d}.png"
        with resume.writing(path):
            save_picture(picture, path)
        logger.image(self.step, picture)

    @plain_modes(gradients=True)
    def export(self, path: str | Path) -> None:
        """Write the EMA weights, the network's configuration and the schedule as a diffusers folder.

        Args:
            path: The folder; `fastdiff.Sampler.from_pretrained` and diffusers' pipelines load it.

        Raises:
            CheckpointError: If the folder cannot be written.
        """
        save_folder(
            path, self.ema, self.schedule, prediction=self.config.prediction, class_names=self.class_names,
            text_encoder=self.ema_text_encoder,
        )  # fmt: skip


def _schedule(schedule: Any, prediction: str) -> NoiseSchedule | FlowSchedule:
    """Return the schedule of a training, which must be one of the prediction."""
    flow = prediction == "flow_prediction"
    if schedule is None:
        return FlowSchedule() if flow else NoiseSchedule()
    if isinstance(schedule, FlowSchedule) != flow:
        raise InvalidArgument(
            f"schedule={shown(schedule)} with prediction={prediction!r}: 'flow_prediction' is trained with a "
            "FlowSchedule, the others are trained with a NoiseSchedule"
        )
    return schedule if isinstance(schedule, FlowSchedule) else instance("schedule", schedule, NoiseSchedule)


def _difference(old: Any, new: Any) -> str:
    """Say what was and what is, for the keys in which two values differ; "" where they are equal."""
    if old == new:
        return ""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"{shown(old)} then, {shown(new)} now"
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    parts = [f"{key} {shown(old.get(key))} then, {shown(new.get(key))} now" for key in keys[:4]]
    return ", ".join(parts) + (", ..." if len(keys) > 4 else "")


def _device(device: str | torch.device | None) -> torch.device:
    """Choose the device to train on; under torchrun each process has the CUDA device of its local rank."""
    if torch.cuda.is_available() and (device is None or str(device) == "cuda"):
        device = torch.device("cuda", from_environment("LOCAL_RANK", 0))
    return usable_device(device)
