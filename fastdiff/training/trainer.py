"""The training loop of DDPM (Ho et al. 2020, algorithm 1).

Training, like sampling, is a pure function: of the data, the initial weights and the seed. Which images a step sees, their
timesteps, noise, flips and dropped labels are functions of (seed, position in the stream of images), so a resumed run
continues bit for bit, and the number of processes changes results by rounding only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from fastdiff import checkpoint
from fastdiff import noise as fd_noise
from fastdiff.errors import InvalidArgument, TrainingError
from fastdiff.images import save_picture
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.training import state
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import ImageData
from fastdiff.training.log import TrainingLog
from fastdiff.training.loss import loss_weights, target
from fastdiff.unet import UNet

log = logging.getLogger("fastdiff")


class Trainer:
    """Train a U-Net; `fit` runs until ``config.steps`` and resumes what an earlier, interrupted run left in ``out``.

    ``out`` receives ``checkpoint.safetensors`` (everything; `fastdiff.Sampler.from_pretrained` samples its EMA weights),
    ``log.jsonl``, ``samples/step-*.png`` and, at the end, ``model/``, the EMA weights as a diffusers folder.

    Under torchrun every process builds the same Trainer; rank 0 writes. Raises `InvalidArgument` where data, network and
    config do not fit together, `TrainingError` when the loss stops being finite or a checkpoint cannot be written.
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
        if device is None:
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.unet = unet.to(self.device, memory_format=torch.channels_last).train()
        self.ema: AveragedModel = AveragedModel(self.unet, multi_avg_fn=self._ema_update).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(),
            lr=self.config.lr,
            betas=(self.config.beta1, self.config.beta2),
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        self.step = 0
        self._weights = loss_weights(self.schedule, self.config.prediction, self.config.min_snr_gamma).to(self.device)

    def _check(self, unet: UNet) -> None:
        config, data = unet.config, self.data
        if data.channels != config.in_channels:
            raise InvalidArgument(f"the images have {data.channels} channels, the U-Net takes {config.in_channels}")
        if config.out_channels != config.in_channels:
            raise InvalidArgument(
                f"training needs out_channels={config.in_channels} (learned variances are not trained here)"
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
            raise InvalidArgument(f"the U-Net takes {config.num_classes} classes, the data has {data.num_classes}")
        if len(data) == 0:
            raise InvalidArgument("the data holds no images")
        if self.config.batch_size % (self.world * self.config.accumulate):
            raise InvalidArgument(
                f"batch_size={self.config.batch_size} must be a multiple of processes x accumulate = {self.world} x {self.config.accumulate}"
            )

    # ---- what a step sees: functions of (seed, position) -------------------------------------------------------------

    def _positions(self, step: int) -> Iterator[range]:
        """The positions in the stream of images of this process's parts of batch ``step``: one range per accumulation."""
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
        if getattr(self, "_epoch", None) != epoch:
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

        One Philox block per image decides: t = floor(w0 T / 2^32), flipped if w1 is odd, label dropped if w2 / 2^32 < p.
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

    def _ema_update(self, averaged: list[Tensor], current: list[Tensor], i: Tensor) -> None:
        """ema <- d ema + (1 - d) w, with d warmed up (`TrainConfig.ema_at`)."""
        torch._foreach_lerp_(averaged, current, 1.0 - self.config.ema_at(int(i)))

    def _update(self, network: nn.Module, batches: list[tuple[range, Tensor, Tensor | None]]) -> float:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step)
        torch.manual_seed(self._hash("dropout", self.step, self.rank))
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for i, (positions, images, labels) in enumerate(batches):
            hold = isinstance(network, nn.parallel.DistributedDataParallel) and i < len(batches) - 1
            with network.no_sync() if hold else contextlib.nullcontext():  # type: ignore[operator]  # a DDP module
                loss = self._loss(network, *self._batch(images, labels, positions)) / config.accumulate
                loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.unet.parameters(), config.grad_clip)
        if self.world > 1:
            dist.all_reduce(total)
            total /= self.world
        value = float(total)
        if value != value or value in (float("inf"), float("-inf")):
            raise TrainingError(
                f"the loss became {value} at step {self.step}; {self.checkpoint_path} keeps the last good checkpoint. Try a lower lr or grad_clip"
            )
        self.optimizer.step()
        self.ema.update_parameters(self.unet)
        return value

    def fit(self) -> None:
        """Train to ``config.steps``, resuming from ``out`` where a checkpoint lies there."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), self._processes():
            self._resume()
            network: nn.Module = torch.compile(self.unet) if self.config.compile else self.unet  # type: ignore[assignment]
            if self.world > 1:
                ids = [self.device.index] if self.device.type == "cuda" else None
                network = nn.parallel.DistributedDataParallel(network, device_ids=ids)
            with TrainingLog(self.out, self.config, self.step, enabled=self.rank == 0) as logger:
                self._loop(network, logger)
            if self.rank == 0:
                self.export(self.out / "model")

    def _loop(self, network: nn.Module, logger: TrainingLog) -> None:
        config = self.config
        batches: list[tuple[range, Tensor, Tensor | None]] = []
        started = time.perf_counter()
        for positions, (images, labels) in self._stream():
            batches.append((positions, images, labels))
            if len(batches) < config.accumulate:
                continue
            loss = self._update(network, batches)
            batches = []
            self.step += 1
            now = time.perf_counter()
            logger.step(
                self.step, loss=loss, lr=config.lr_at(self.step - 1), images_per_s=config.batch_size / (now - started)
            )
            started = now
            last = self.step == config.steps
            if self.rank == 0 and (last or self.step % config.save_every == 0):
                self.save()
            if self.rank == 0 and config.sample_every and (last or self.step % config.sample_every == 0):
                self._sample_grid(logger)

    def _stream(self) -> Iterator[tuple[range, tuple[Tensor, Tensor | None]]]:
        """This process's batches from the current step on, read ahead by a DataLoader."""
        positions = [p for step in range(self.step, self.config.steps) for p in self._positions(step)]
        # The loader draws a number from a generator when it starts; its own one keeps the run's draws untouched.
        loader = DataLoader(
            self.data, batch_sampler=map(self._indices, positions), collate_fn=lambda x: x, generator=torch.Generator()
        )
        yield from zip(positions, loader, strict=True)

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
        }

    def save(self) -> None:
        """Write ``checkpoint.safetensors`` now, atomically."""
        state.save(self.checkpoint_path, self.unet, self.ema.module, self.optimizer, self._info())

    def _resume(self) -> None:
        if not self.checkpoint_path.exists():
            return
        info = state.load(self.checkpoint_path, self.unet, self.ema.module, self.optimizer)
        mine = self._info()
        free = {"steps", "log_every", "save_every", "sample_every", "compile"}  # may change between the parts of a run
        changed = {f"train.{k}" for k in mine["train"] if k not in free and info["train"].get(k) != mine["train"][k]}
        changed |= {key for key in ("unet", "scheduler", "data") if info[key] != mine[key]}
        if changed:
            raise TrainingError(
                f"{self.checkpoint_path} was written with other settings ({', '.join(sorted(changed))}); use those, or another folder"
            )
        self.step = info["step"]
        self.ema.n_averaged.fill_(self.step)
        if info["world_size"] != self.world and self.rank == 0:
            log.warning(
                "resuming with %d processes instead of %d: same batches, other rounding", self.world, info["world_size"]
            )
        if self.rank == 0:
            log.info("resuming %s at step %d", self.checkpoint_path, self.step)

    def _sample_grid(self, logger: TrainingLog) -> None:
        """Eight images of each of the first ten classes (or sixty-four) from the EMA weights, as ``samples/step-*.png``."""
        sampler = Sampler(self.ema.module, self.schedule, prediction=self.config.prediction)
        classes = sampler.info.classes
        labels = None if classes is None else [label for label in range(min(classes, 10)) for _ in range(8)]
        output = sampler.sample(
            64 if labels is None else len(labels), steps=25, seed=self.config.seed, labels=labels, size=self.data.size
        )
        picture = output.grid(columns=8)
        save_picture(picture, self.out / "samples" / f"step-{self.step:07d}.png")
        logger.image(self.step, picture)

    def export(self, path: str | Path) -> None:
        """Write the EMA weights, network and schedule as a diffusers folder."""
        checkpoint.save_folder(path, self.ema.module, self.schedule, prediction=self.config.prediction)
