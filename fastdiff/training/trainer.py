"""The training loop of DDPM (Ho et al. 2020, algorithm 1).

Training, like sampling, is a pure function: of the data, the initial weights and the seed. Which images a step sees,
their timesteps, noise, flips and dropped labels are functions of (seed, position in the stream of images), so a resumed
run continues bit for bit (on CUDA as far as its kernels are deterministic), and the number of processes changes results
by rounding only (and, in networks with dropout, by which units are dropped).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import logging
import math
import os
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdiff import solvers
from fastdiff.checkpoints import save_folder
from fastdiff.core import noise as fd_noise
from fastdiff.data.datasets import ImageData
from fastdiff.data.pictures import save_picture
from fastdiff.errors import CheckpointError, InvalidArgument, TrainingError
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.training import resume as state
from fastdiff.training.config import TrainConfig
from fastdiff.training.log import TrainingLog
from fastdiff.training.loss import loss_weights, target
from fastdiff.unet import UNet

log = logging.getLogger("fastdiff")

GRID_STEPS = 25  # of the sample grids
MAY_CHANGE = ("steps", "log_every", "save_every", "sample_every", "compile")  # between the parts of a run

Part = tuple[range, Tensor, Tensor | None]  # positions in the stream of images, their images (uint8) and labels


class Trainer:
    """Train a U-Net; `fit` runs until ``config.steps`` and resumes what an earlier, interrupted run left in ``out``.

    ``unet`` itself is trained (in float32); ``ema`` holds its averaged weights, which are sampled and exported. ``out``
    receives ``checkpoint.safetensors`` (everything; `fastdiff.Sampler.from_pretrained` samples its EMA weights),
    ``log.jsonl``, ``samples/step-*.png`` and, at the end, ``model/``, the EMA weights as a diffusers folder. A run may
    be interrupted at any moment, by Ctrl-C, a kill or a power cut; it loses the steps since its last checkpoint.

    Under torchrun every process builds the same Trainer; rank 0 writes. Raises `InvalidArgument` where data, network
    and config do not fit together, `TrainingError` when the loss stops being finite or a file cannot be written.
    """

    def __init__(
        self,
        unet: UNet,
        data: ImageData,
        out: str | Path,
        config: TrainConfig | None = None,
        schedule: NoiseSchedule | None = None,
        device: str | torch.device | None = None,
    ):
        self.config = config or TrainConfig()
        self.schedule = schedule or NoiseSchedule()
        self.data = data
        self.out = Path(out)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._check(unet)
        if self.config.sample_every:  # a grid that cannot be is refused now, not at its first step
            self._table = solvers.ddim(
                self.schedule, min(GRID_STEPS, self.schedule.timesteps), prediction=self.config.prediction
            )
        self.device = _device(device)
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations
        self.unet = unet.to(self.device, torch.float32).train()
        self.ema = copy.deepcopy(self.unet).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(),
            lr=self.config.lr,
            betas=(self.config.beta1, self.config.beta2),
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        self.step = 0
        self._epoch, self._order = -1, torch.empty(0)
        self._losses: list[float] = []  # since the last line of log.jsonl
        self._weights = loss_weights(self.schedule, self.config.prediction, self.config.min_snr_gamma).to(self.device)

    def _check(self, unet: UNet) -> None:
        config, data, batch = unet.config, self.data, self.config.batch_size
        if data.channels != config.in_channels:
            raise InvalidArgument(f"the images have {data.channels} channels, the U-Net takes {config.in_channels}")
        if config.out_channels != config.in_channels:
            raise InvalidArgument(
                f"out_channels={config.out_channels}: training needs out_channels={config.in_channels}, as many as "
                "in_channels (learned variances are not trained here)"
            )
        if any(side % config.stride for side in data.size):
            raise InvalidArgument(
                f"images of {data.size[0]}x{data.size[1]}: both must be multiples of the U-Net's stride {config.stride}"
            )
        if config.conditional and config.num_classes is None:
            raise InvalidArgument(
                f"class_embed_type={config.class_embed_type!r} cannot be trained from labels; use num_class_embeds"
            )
        if config.num_classes is not None and (data.num_classes is None or data.num_classes > config.num_classes):
            raise InvalidArgument(
                f"the U-Net takes {config.num_classes} classes, the data has {data.num_classes or 'no labels'}"
            )
        if len(data) == 0:
            raise InvalidArgument("the data holds no images")
        if batch % (self.world * self.config.accumulate):
            raise InvalidArgument(
                f"batch_size={batch} must be a multiple of processes x accumulate = "
                f"{self.world} x {self.config.accumulate}"
            )
        if self.config.sample_every and data.channels not in (1, 3):
            raise InvalidArgument(
                f"sample_every={self.config.sample_every}: images of {data.channels} channels are not pictures; 0 is "
                "needed"
            )

    # ---- what a step sees: functions of (seed, position) -------------------------------------------------------------

    def _positions(self, step: int) -> Iterator[range]:
        """This process's parts of batch ``step``, as positions in the stream of images: one range per accumulation."""
        c = self.config
        part = c.batch_size // (c.accumulate * self.world)
        for micro in range(c.accumulate):
            start = step * c.batch_size + (micro * self.world + self.rank) * part
            yield range(start, start + part)

    def _indices(self, positions: range) -> list[int]:
        """Epoch e shows the images in the order of a permutation drawn from (seed, e)."""
        n = len(self.data)
        return [int(self._permutation(p // n)[p % n]) for p in positions]

    def _permutation(self, epoch: int) -> Tensor:
        if self._epoch != epoch:
            self._order = torch.randperm(
                len(self.data), generator=torch.Generator().manual_seed(self._hash("epoch", epoch))
            )
            self._epoch = epoch
        return self._order

    def _hash(self, *what: object) -> int:
        text = "/".join(map(str, (self.config.seed, *what)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def _batch(
        self, images: Tensor, labels: Tensor | None, positions: range
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x_0 in [-1, 1], noise ~ N(0, I), t ~ Uniform{0..T-1} and labels of some positions (algorithm 1, lines 2-4).

        One Philox block per image decides: t = floor(w0 T / 2^32), flipped if w1 is odd, label dropped if w2 < p 2^32.
        """
        c = self.config
        x0 = images.to(self.device).float() / 127.5 - 1.0
        index = torch.arange(positions.start, positions.stop, dtype=torch.int64, device=self.device)
        seed = torch.full_like(index, fd_noise.as_int64(c.seed))
        row = torch.zeros_like(index)
        w0, w1, w2, _ = (w[:, 0] for w in fd_noise.words(seed, index, row, fd_noise.TRAIN_CHOICE, 1))
        t = w0 * self.schedule.timesteps >> 32
        if c.hflip:
            x0 = torch.where((w1 & 1).bool()[:, None, None, None], x0.flip(-1), x0)
        if self.unet.config.num_classes is None:
            labels = None
        if labels is not None:
            labels = labels.to(self.device)
            if self.unet.config.null_label is not None:
                labels = torch.where(w2 < int(c.label_dropout * 2**32), self.unet.config.null_label, labels)
        noise = fd_noise.normal(seed, index, row, fd_noise.TRAIN_NOISE, tuple(x0.shape[1:]))
        return x0, noise, t, labels

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def _loss(self, network: nn.Module, x0: Tensor, noise: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """w_t ||target - network(x_t, t)||^2, the mean over images and elements (algorithm 1, line 5)."""
        a, s = self.schedule.signal_and_noise(t, x0.ndim, torch.float32)
        x_t = (a * x0 + s * noise).to(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
            out = network(x_t, t, labels)
        error = (out.float() - target(self.config.prediction, x0, noise, a, s)) ** 2
        return (self._weights[t] * error.mean(dim=(1, 2, 3))).mean()

    @torch.no_grad()
    def _average(self) -> None:
        """ema <- d ema + (1 - d) w, with d warmed up (`TrainConfig.ema_at`); the first update takes the weights."""
        d = self.config.ema_at(self.step) if self.step else 0.0
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.unet.parameters()), 1.0 - d)

    def _update(self, network: nn.Module, parts: list[Part]) -> float:
        """One step of AdamW on a batch; its loss."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step)
        self._seed_dropout()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for i, (positions, images, labels) in enumerate(parts):
            hold = isinstance(network, nn.parallel.DistributedDataParallel) and i < len(parts) - 1
            with network.no_sync() if hold else contextlib.nullcontext():  # type: ignore[operator]  # a DDP module
                loss = self._loss(network, *self._batch(images, labels, positions)) / config.accumulate
                loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.unet.parameters(), config.grad_clip)
        if self.world > 1:
            dist.all_reduce(total)
            total /= self.world
        # The one synchronisation of a step: a network must not be updated, averaged or saved once it is broken.
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
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed devices that are not ours
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seed)

    def fit(self) -> None:
        """Train to ``config.steps``, resuming from ``out`` where a checkpoint lies there."""
        ours = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(ours), self._processes():
            self._resume()
            network: nn.Module = torch.compile(self.unet) if self.config.compile else self.unet  # type: ignore[assignment]  # a module in, a module out
            if self.world > 1:
                ids = [self.device.index] if self.device.type == "cuda" else None
                network = nn.parallel.DistributedDataParallel(network, device_ids=ids)
            with TrainingLog(self.out, self.config, self.step, self._losses, enabled=self.rank == 0) as logger:
                self._loop(network, logger)
            if self.rank == 0:
                self.export(self.out / "model")

    def _loop(self, network: nn.Module, logger: TrainingLog) -> None:
        config = self.config
        with contextlib.closing(self._stream()) as stream:
            while self.step < config.steps:
                started = time.perf_counter()
                loss = self._update(network, [next(stream) for _ in range(config.accumulate)])
                lr = config.lr_at(self.step)
                self.step += 1
                logger.step(self.step, loss=loss, lr=lr, seconds=time.perf_counter() - started)
                last = self.step == config.steps
                if self.rank == 0 and config.sample_every and (last or self.step % config.sample_every == 0):
                    self._sample_grid(logger)
                if self.rank == 0 and (last or self.step % config.save_every == 0):
                    self.save()

    def _stream(self) -> Generator[Part, None, None]:
        """This process's parts of batches from the current step on; a thread reads one ahead."""

        def read(positions: range) -> Part:
            return positions, *self.data.__getitems__(self._indices(positions))

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
        return self.out / "checkpoint.safetensors"

    def _info(self) -> dict[str, Any]:
        return {
            "kind": "training",
            "step": self.step,
            "train": dataclasses.asdict(self.config),
            "unet": self.unet.config.to_dict(),
            "scheduler": self.schedule.to_scheduler_config() | {"prediction_type": self.config.prediction},
            "data": {"images": len(self.data), "size": list(self.data.size), "channels": self.data.channels},
            "world_size": self.world,
            "losses": self._losses,
        }

    def save(self) -> None:
        """Write ``checkpoint.safetensors`` now, atomically."""
        state.save(self.checkpoint_path, self.unet, self.ema, self.optimizer, self._info())

    def _resume(self) -> None:
        """Take up the checkpoint, where there is one. One that does not fit is refused, and then nothing is changed."""
        if self.rank == 0:
            state.sweep(self.out)
        if not self.checkpoint_path.exists():
            return
        tensors, info = state.load(self.checkpoint_path)
        mine = self._info()
        try:
            kept = mine["train"].keys() - set(MAY_CHANGE)
            changed = {f"train.{key}" for key in kept if info["train"].get(key) != mine["train"][key]}
            changed |= {key for key in ("unet", "scheduler", "data") if info[key] != mine[key]}
            step, losses, world = (
                int(info["step"]),
                [float(loss) for loss in info.get("losses", [])],
                info["world_size"],
            )
        except (TypeError, ValueError, AttributeError) as e:
            raise CheckpointError(f"{self.checkpoint_path}: its fastdiff metadata cannot be read ({e})") from e
        if changed:
            raise TrainingError(
                f"{self.checkpoint_path} was written with other settings ({', '.join(sorted(changed))}); use those, or "
                "another folder"
            )
        state.restore(self.checkpoint_path, tensors, self.unet, self.ema, self.optimizer)
        self.step, self._losses = step, losses
        if self.rank == 0:
            log.info("resuming %s at step %d", self.checkpoint_path, step)
            if world != self.world:
                log.warning("resuming with %d processes instead of %s: same batches, other rounding", self.world, world)

    def _sample_grid(self, logger: TrainingLog) -> None:
        """Eight images of each of the first ten classes (or sixty-four), of the EMA weights: ``samples/step-*.png``."""
        sampler = Sampler(self.ema, self.schedule, prediction=self.config.prediction)
        classes = sampler.info.classes
        labels = None if classes is None else [label for label in range(min(classes, 10)) for _ in range(8)]
        n = 64 if labels is None else len(labels)
        output = sampler.sample(n, solver=self._table, seed=self.config.seed, labels=labels, size=self.data.size)
        picture = output.grid(columns=8)
        path = self.out / "samples" / f"step-{self.step:07d}.png"
        with state.writing(path):
            save_picture(picture, path)
        logger.image(self.step, picture)

    def export(self, path: str | Path) -> None:
        """Write the EMA weights, network and schedule as a diffusers folder."""
        save_folder(path, self.ema, self.schedule, prediction=self.config.prediction)


def _device(device: str | torch.device | None) -> torch.device:
    """The device to train on; under torchrun each process has the CUDA device of its local rank."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as e:  # torch without CUDA asserts
        raise InvalidArgument(f"device={device!r} cannot be used: {str(e).splitlines()[0]}") from e
    return found
