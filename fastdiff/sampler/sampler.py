"""`Sampler`, which draws images with a U-Net and the schedule that it was trained with."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import backends, checkpoints
from fastdiff.checkpoints.loading import check_options
from fastdiff.checks import boolean, one_of, shown, whole
from fastdiff.core import process
from fastdiff.core.state import Texts
from fastdiff.errors import ConfigError, InvalidArgument, NumericsError
from fastdiff.modes import plain_modes
from fastdiff.sampler import adaptive, choice, editing
from fastdiff.sampler.editing import Guide
from fastdiff.sampler.latents import Latents
from fastdiff.sampler.loop import Loop, Stream
from fastdiff.sampler.measured import NAME, Measured, read_for
from fastdiff.sampler.options import NetworkInfo, NoiseSource, Options
from fastdiff.sampler.output import Event, SampleOutput
from fastdiff.sampler.prompts import TextEncoder, check_texts, encode, with_sizes
from fastdiff.sampler.request import Request, check
from fastdiff.sampler.runners import FAST, Runners, usable_device
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import EDMSchedule, FlowSchedule, StepTable, VESchedule
from fastdiff.solvers.compat.run import FROM_MODEL
from fastdiff.solvers.keys import check_config, value_of
from fastdiff.solvers.prediction import check_prediction
from fastdiff.solvers.registry import SOLVERS
from fastdiff.solvers.spacing import check_spacing
from fastdiff.solvers.walk import Schedule, check_process, default_prediction
from fastdiff.unet import UNetCondition
from fastdiff.unet.latents import LatentDecoder

FIXED = (
    "unet", "info", "schedule", "prediction", "backend", "device", "dtype", "fast", "determinism", "scheduler_config",
    "measurements_file", "text_encoder", "autoencoder",
)  # fmt: skip


class Sampler:
    """Draws images with a diffusion U-Net.

    A sampler may be used from several threads, whose calls take turns row by row, and so may its network, by other
    samplers, by a training or by a pipeline. As a context manager it closes itself.

    Args:
        unet: A `fastdiff.UNet`, a diffusers ``UNet2DModel``, or any module called as ``unet(x, t)`` or ``unet(x, t,
            class_labels=labels)`` that returns a tensor or an object with ``.sample``. It is never changed, and its
            present weights are used, also while it is being trained.
        schedule: Noise schedule that the network was trained with: a `NoiseSchedule`, a `solvers.EDMSchedule` for
            networks that are the F of EDM's preconditioning (Karras et al. 2022, eq. 7), a `solvers.FlowSchedule` for
            those of flow matching, or a `solvers.VESchedule` for variance-exploding ones. None: ``NoiseSchedule()``.
        prediction: Target that the network was trained to predict: "epsilon", "sample", "v_prediction", "edm",
            "flow_prediction" or "score". None: "edm" with an `EDMSchedule`, "flow_prediction" with a `FlowSchedule`,
            "score" with a `VESchedule`, else "epsilon".
        backend: "native" (fastdiff's own U-Net for CPUs, in float32 or bfloat16), "triton" (the same for CUDA),
            "eager", "compiled", or "auto": native where it can run, else eager; the choice is logged.
        device: Device that the network runs on; None: the one of its parameters.
        dtype: dtype that the network runs in, or its name: "float32", "bfloat16", "float16" or "float64"; None: the one
            of its parameters. "bfloat16-fast", for the native backend, is faster than its "bfloat16" and has more than
            twice the error (that of "bfloat16" is as small as PyTorch's). The state between steps is always float32.
        determinism: "seed": image (seed, index) is the same in any batch up to rounding; "bitwise": it has the same
            bits in any batch, with the backends native and triton only.
        shape: (C, H, W) of the images, for modules without a ``config``.
        scheduler_config: Keys of a diffusers ``scheduler_config.json``: the clipping, spacing and variance of the
            model, for calls that do not give theirs.
        measurements_file: The model's ``trilemma.json``, written by ``fastdiff trilemma --install``, on which
            solver="auto", quality= and deadline_s= are based; it need not exist yet.
        class_names: The name of each class from 0 on, which `sample` takes as labels; None: the classes have no names.
        text_encoder: For a `fastdiff.UNetCondition`: the encoder of prompts, a `fastdiff.text.CaptionEncoder` or
            another object with its `tokenize` and `encode`; None for a network that reads no text.
        autoencoder: For a network whose images are the latents of an autoencoder: its decoder, which makes pixels of
            them. ``size`` and the images of a call are then in pixels, ``noise`` and the events in latents.

    Attributes cannot be changed; what differs needs another sampler.

    Attributes:
        unet: As given.
        info: Facts about the network: channels, size, classes and their names, null label.
        schedule: Noise schedule.
        prediction: Target that the network predicts.
        backend: Name of the backend, never "auto".
        device: Device that the network runs on.
        dtype: dtype that the network runs in.
        fast: Whether dtype was "bfloat16-fast".
        determinism: As given.
        scheduler_config: As given; empty if None was.
        measurements_file: As given, a `Path` or None.
        autoencoder: As given.

    Raises:
        InvalidArgument: If a value is not allowed; the message says what is.
        ConfigError: If the network has class embeddings whose input is not a label.
        BackendError: If the backend cannot run the network here, with every reason.
    """

    @process.work()
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
        measurements_file: str | Path | None = None,
        class_names: Sequence[str] | None = None,
        text_encoder: TextEncoder | None = None,
        autoencoder: LatentDecoder | None = None,
    ):
        if not isinstance(unet, nn.Module):
            raise InvalidArgument(f"unet={shown(unet)}: a torch module is needed; from_pretrained takes paths")
        if schedule is not None and not isinstance(schedule, (NoiseSchedule, EDMSchedule, FlowSchedule, VESchedule)):
            raise InvalidArgument(
                f"schedule={shown(schedule)}: a NoiseSchedule, EDMSchedule, FlowSchedule, VESchedule or None is needed"
            )
        schedule = NoiseSchedule() if schedule is None else schedule
        prediction = default_prediction(schedule) if prediction is None else prediction
        check_prediction(prediction)
        check_process(schedule, prediction)
        one_of("determinism", determinism, ("seed", "bitwise"))
        one_of("backend", backend, ("auto", *backends.BACKENDS))
        if measurements_file is not None and not isinstance(measurements_file, (str, os.PathLike)):
            raise InvalidArgument(f"measurements_file={shown(measurements_file)}: a path or None is needed")
        self.unet = unet
        self.info = dataclasses.replace(
            NetworkInfo.of(unet, shape, text_encoder is not None), class_names=_class_names(class_names)
        )
        self.text_encoder = None if text_encoder is None else _check_encoder(text_encoder)
        self.schedule: Schedule = schedule
        self.prediction = prediction
        self.determinism = determinism
        self.scheduler_config = {} if scheduler_config is None else check_config(scheduler_config)
        self.measurements_file = None if measurements_file is None else Path(measurements_file)
        self._runners = Runners(unet, self.info, backend, device, dtype, determinism)
        self.backend, self.device = self._runners.backend, self._runners.device
        self.dtype, self.fast = self._runners.dtype, self._runners.fast
        self.autoencoder = _check_autoencoder(autoencoder, self.info)
        self._latents = None if autoencoder is None else Latents(autoencoder, self.backend, self.device)
        self._loop = Loop(self._runners)
        self._measured: Measured | None = None
        self._has_read_measurements = False
        self._closed = False
        self._shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what makes the same sampler again: copies and pickles share no lock, runner or run with this one."""
        if self._closed:
            raise InvalidArgument("this sampler is closed, so it can be neither copied nor pickled; make another")
        options = {
            "prediction": self.prediction, "backend": self.backend, "device": self.device,
            "dtype": FAST if self.fast else self.dtype, "determinism": self.determinism, "shape": self._shape,
            "scheduler_config": self.scheduler_config, "measurements_file": self.measurements_file,
            "class_names": self.info.class_names, "text_encoder": self.text_encoder, "autoencoder": self.autoencoder,
        }  # fmt: skip
        return _made, (type(self), self.unet, self.schedule, options)

    def __setattr__(self, name: str, value: object) -> None:
        if name in FIXED and name in self.__dict__:
            raise InvalidArgument(
                f"sampler.{name} cannot be changed, as the network is prepared for it already: make another Sampler, "
                f"with {name} as you need it. The weights of sampler.unet may be changed at any time"
            )
        super().__setattr__(name, value)

    @classmethod
    @process.work()
    @plain_modes()
    def from_pretrained(
        cls,
        model: str | Path,
        backend: str = "auto",
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        determinism: str = "seed",
        schedule: Schedule | None = None,
        prediction: str | None = None,
        **source: Any,
    ) -> Sampler:
        """Make a sampler for a model on disk, or for one that fastdiff contains.

        Schedule, prediction, clipping, spacing and variance are those of the model's scheduler configuration. The
        ``trilemma.json`` of a folder, if there is one, is its ``measurements_file``.

        Args:
            model: Name of a built-in model ("fashion-mnist"), a diffusers folder, or a checkpoint file. The folder of
                a StableDiffusionPipeline or StableDiffusionXLPipeline has text encoders, for which the package
                transformers is needed, and an autoencoder; its safety checker is not run, which is logged.
            backend: As for `Sampler`.
            device: As for `Sampler`; None: CUDA where there is one, else the CPU.
            dtype: As for `Sampler`.
            determinism: As for `Sampler`.
            schedule: As for `Sampler`, in place of the one that the model's scheduler configuration describes; needed
                where the model has no such configuration.
            prediction: Likewise; None: the one of the scheduler configuration, else as for `Sampler`.
            **source: Options of `fastdiff.checkpoints.load`, which say where the weights are and what an original
                checkpoint contains; and torch_dtype, diffusers' name for dtype.

        Returns:
            The sampler.

        Raises:
            CheckpointError: If the model cannot be loaded.
            InvalidArgument: As for `Sampler`.
            ConfigError: As for `Sampler`, for configurations that fastdiff cannot use, and for a model without a
                scheduler configuration where ``schedule`` is not given.
            BackendError: As for `Sampler`.
        """
        if "torch_dtype" in source:
            named = source.pop("torch_dtype")
            if dtype is not None and named is not None and dtype != named:
                raise InvalidArgument(f"dtype={shown(dtype)} and torch_dtype={shown(named)}: give one of them")
            dtype = named if dtype is None else dtype
        check_options(source)
        device = usable_device(device)
        text = checkpoints.load_text(model, **source)
        loaded = checkpoints.load(model, **source) if text is None else text
        if loaded.schedule is None and schedule is None:
            raise ConfigError(
                f"{loaded.path}: no scheduler_config.json says with which schedule and prediction the network was "
                "trained; put one there (in scheduler/, as diffusers does), or give schedule= and prediction="
            )
        # Convolutions are faster in NHWC than in NCHW (benchmarks/test_layout.py measures by how much).
        loaded.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations
        return cls(
            loaded.unet.to(device),
            loaded.schedule if schedule is None else schedule,
            prediction=(loaded.prediction if schedule is None else None) if prediction is None else prediction,
            backend=backend,
            device=device,
            dtype=dtype,
            determinism=determinism,
            scheduler_config=loaded.scheduler_config,
            measurements_file=loaded.path / NAME if loaded.path.is_dir() else None,
            class_names=loaded.class_names if isinstance(loaded, checkpoints.Pretrained) else None,
            text_encoder=None if text is None else text.text_encoder.to(device),
            autoencoder=None if text is None else text.autoencoder,
        )

    @process.work()
    def sample(
        self,
        n: int,
        *,
        solver: str | StepTable = "ddim",
        steps: int | None = None,
        eta: float = 0.0,
        variance: str | None = None,
        order: int | None = None,
        churn: float | Sequence[float] | None = None,
        spacing: str | Sequence[float] | None = None,
        clip: float | str | None = FROM_MODEL,
        seed: int | Sequence[int] | None = 0,
        start_index: int | Sequence[int] = 0,
        index: Sequence[int] | None = None,
        indices: Sequence[int] | None = None,
        labels: int | str | Sequence[int | str] | Tensor | None = None,
        prompts: str | Sequence[str] | None = None,
        negative: str | Sequence[str] | Tensor | Texts | None = None,
        context: Tensor | Texts | None = None,
        guidance: float | Sequence[float] = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        size: int | tuple[int, int] | None = None,
        noise: Tensor | NoiseSource | None = None,
        batch_size: int | None = None,
        image: Any = None,
        strength: float | None = None,
        mask: Any = None,
        condition: Any = None,
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

        Args:
            n: Number of images, at least 1.
            solver: A name of `fastdiff.solvers.registry.SOLVERS` (docs/solvers.md lists them), "auto", or a
                `StepTable` made by a function of `fastdiff.solvers`. "auto" without ``steps`` chooses, for a model with
                measurements, the fewest network evaluations that were indistinguishable from the best setting
                (`fastdiff.sampler.measured.automatic`); otherwise a general rule chooses by steps and guidance
                (`fastdiff.sampler.choice.auto`).
            steps: Steps of the solver, at least 1, at most the timesteps of a `NoiseSchedule`. A step is one network
                evaluation, except for heun, dpm2, dpm2_ancestral, dpmpp_sde and dpmpp_2s_ancestral (two, and one in the
                last step) and plms (one more in all). None: 50; every timestep for ddpm, 20 for auto, 4 for lcm and
                tcd, 1 for consistency, 18 with an `EDMSchedule`.
            eta: Noise of ddim, from 0 (deterministic) to 1 (as much as ddpm); larger where the schedule allows it.
            variance: Noise of ddpm: "posterior", "beta", "none" or "learned_range"; None: the model's.
            order: Number of evaluations that a step of unipc or deis (1 to 3, 2 by default) or of lms (1 to 4, 4 by
                default) uses.
            churn: For euler and heun, EDM's stochastic sampler: S_churn, or (S_churn, S_tmin, S_tmax, S_noise). None
                is off.
            spacing: "trailing", "leading", "linspace", "quadratic", "karras", "exponential", or a decreasing list of
                timesteps (`fastdiff.solvers.sigma_timesteps` makes one from sigmas). None: the model's, else trailing.
            clip: Bound of abs(x0), a positive number; None for no bound; "model" for the model's, which may be dynamic
                thresholding, else 1.
            seed: Seed of the noise, from 0 to 2^64 - 1; None draws one, which the output names. A list has one for each
                image, and each is then image ``start_index`` of its own seed.
            start_index: Index of the first image. Image i of the result is image ``start_index + i`` of the seed, in
                whatever batch it is drawn. A list is ``index``.
            index: The index of each image, in place of ``start_index``: [3, 17] are these two images of the seed, or of
                their seeds.
            indices: Another name of ``index``.
            labels: Class of all images, or of each one: a number from 0 to the number of classes - 1, or the name of a
                class, where the model has names. None: the null class; networks without one need labels if they have
                classes.
            prompts: What to draw, for a network that reads text: a text for all images, or one for each. "" asks for
                nothing.
            negative: What guidance leads away from, likewise, or as ``context``; None: "", or zeros in the place of its
                states where the model was trained so (Stable Diffusion XL).
            context: In place of prompts, their states by an encoder of your own: [tokens, C] for all images, or
                [n, tokens, C]; or what `encode` returns.
            guidance: Scale of classifier-free guidance for all images, or for each one; 1 is off.
            guidance_interval: (start, end) of the part of the run that is guided, from 0 (noise) to 1 (image).
            guidance_rescale: Share, from 0 (off) to 1, by which guided outputs are rescaled to the standard deviation
                of unguided ones.
            size: Height and width, or one number for both, multiples of the network's stride, with an ``autoencoder``
                of its factor times the stride. None: the network's own.
            noise: Initial noise [n, C, H, W], or a function (row, indices) -> [len(indices), C, H, W] for all noise,
                called with row None for the initial one. None: Philox noise of (seed, index).
            batch_size: Images that are drawn at a time. None: as many as suit the network's size.
            image: Image to start from, floats [n, C, H, W], or [C, H, W] for all, in [-1, 1]; or a picture of PIL, a
                list of n, or a uint8 array [H, W], [H, W, C] or [n, H, W, C]. It is noised and goes through the last
                ``strength`` of the steps only (SDEdit).
            strength: Share of the steps that ``image`` goes through, above 0 (unchanged) up to 1 (all steps). None:
                0.8, and with ``mask`` a run from noise alone.
            mask: 1 where ``image`` is drawn anew, 0 where it is known and kept: [H, W], [1 or C, H, W] or [n, 1 or C,
                H, W]; or a picture of PIL or a uint8 array, light where it is drawn anew. After every row the known
                pixels, at the row's noise level, replace the drawn ones.
            condition: Images that the network goes by, for one with more channels of input than of output (a
                super-resolution network's small image, enlarged): as ``image``, with the channels that are left.
            repaint: (jump_length, resamples), as (10, 10): every so many steps are repeated so many times (RePaint), so
                that new pixels fit the known ones. Multi-step solvers cannot repeat steps.
            guide: Differentiable function (x0 [k, C, H, W], indices) -> log p [k]. Images are changed towards larger
                log p (classifier guidance); multiply it to make the effect stronger.
            guide_through: "x0": the gradient of log p is taken by x0, on every backend; "network": it is taken through
                the network too, on the backend eager only, for twice the work.
            quality: Replaces solver and steps. 1.1 means the fewest network evaluations whose measured Frechet distance
                is at most 1.1 times the smallest one measured with this guidance. At least 1; needs measurements.
            deadline_s: Replaces solver and steps. Seconds that the whole call may take: a few rows of the first batch
                are timed, and of the settings that are predicted to fit, the one with the smallest measured distance
                is run; without measurements as many steps of "auto" as fit. The time that callbacks and noise
                functions take is not foreseen.
            compat: None for the mathematics of the papers. "diffusers", "openai" or "ho" for the images that the
                sampling loop of that code base draws from the same noise, quirks included; ``spacing`` is then in its
                terms (see `fastdiff.solvers.compat`). Runs with ``strength`` need a one-step solver.
            callback: Function that is called with an `Event` after every row.
            progress: Whether to show a progress bar on standard error.

        Returns:
            The images, with their seed, labels and step table. Where "auto", quality or deadline_s chose the setting,
            giving its ``table`` as ``solver`` repeats the images.

        Raises:
            InvalidArgument: If an option is not allowed, before anything heavy runs; the message says what is.
            BackendError: If the backend cannot do what an option asks for.
            CheckpointError: If measurements are needed and their file is damaged.
            CallbackError: If the callback or the guide raised; the message names the row.
            Cancelled: If `cancel` or `close` ended the call.
            ReentrantCall: If a forward hook, or a signal handler that interrupted a step of this sampler, makes the
                call. Callbacks, guides and noise functions may.
            NumericsError: If images became NaN, infinite, or larger than 1e6; its ``output`` has the others.
        """
        given = Options.among(locals())
        _check_watchers(callback, progress)
        r = self.request(n, **given)
        return self._drawn(r, callback, progress)

    def _drawn(self, r: Request, callback: Callable[[Event], None] | None, progress: bool) -> SampleOutput:
        """Run a request, and decode latents, those beside broken ones too."""
        try:
            return self._in_pixels(self._loop.run(r, callback, progress))
        except NumericsError as e:
            if e.output is not None:
                e.output = self._in_pixels(e.output)
            raise

    def _in_pixels(self, output: SampleOutput) -> SampleOutput:
        if self._latents is None:
            return output
        return dataclasses.replace(output, images=self._latents.decode(output.images))

    @process.work()
    def encode(self, prompts: str | Sequence[str]) -> Texts:
        """Encode texts, for ``context`` or ``negative`` of `sample`.

        Args:
            prompts: A text, or a list of them.

        Returns:
            Their states [texts, tokens, C] and, for a network that takes them, pooled vectors [texts, D], float32 on
            the CPU.

        Raises:
            InvalidArgument: If the network reads no text, or a text cannot be encoded.
        """
        if self.text_encoder is None:
            raise InvalidArgument(f"prompts={shown(prompts)}: this network reads no text, so there is none to encode")
        checked = check_texts(prompts, self.info, self.text_encoder)
        found = encode(checked, self.text_encoder, self.info.pooled)  # each of them once
        return Texts(found.states[checked.label], None if found.pooled is None else found.pooled[checked.label])

    @process.work()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents, such as those of an `Event`, to images.

        Args:
            latents: Floats [n, C, h, w].

        Returns:
            The images [n, channels, H, W], float32 on the CPU, in [-1, 1].

        Raises:
            InvalidArgument: If the sampler has no ``autoencoder``, or these are no latents of it.
        """
        if self._latents is None:
            raise InvalidArgument("this sampler has no autoencoder: the network's images are no latents")
        return self._latents.decode(latents)

    @process.work()
    def invert(
        self,
        image: Any,
        *,
        steps: int | None = None,
        solver: str = "ddim",
        iterations: int = 1,
        spacing: str | Sequence[float] | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        prompts: str | Sequence[str] | None = None,
        negative: str | Sequence[str] | None = None,
        guidance: float | Sequence[float] = 1.0,
        guidance_rescale: float = 0.0,
        batch_size: int | None = None,
        callback: Callable[[Event], None] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Compute the noise from which a deterministic solver draws ``image``.

            noise = sampler.invert(image, steps=50, labels=9)
            sampler.sample(len(image), noise=noise, steps=50, labels=9, clip=None)      # image again, or edited

        It is an approximation, which improves with ``steps``, and with ``iterations`` and a spacing by sigma together:
        on the built-in model 50 steps reach 25 dB, and 3 iterations in "karras" or "exponential" spacing more than 40.
        In "trailing" spacing, whose steps near the image are too long, iterations help little. ``solver="dpmpp_2m"``
        is of order 2, without iterations.

        Args:
            image: Images [n, C, H, W], or one [C, H, W], floats in [-1, 1]; or pictures as for `sample`.
            steps: Steps of the solver, as for `sample`, where it must be the same; so must the options below.
            solver: "ddim", "dpmpp_1", "dpmpp_2m" or "dpmpp_3m".
            iterations: Network evaluations per step, at least 1: fixed-point iterations of the implicit inverse, of
                "ddim" only.
            spacing: As for `sample`.
            labels: As for `sample`.
            prompts: As for `sample`.
            negative: As for `sample`.
            guidance: As for `sample`.
            guidance_rescale: As for `sample`.
            batch_size: As for `sample`.
            callback: As for `sample`.
            progress: As for `sample`.

        Returns:
            The noise, float32 [n, C, H, W] on the CPU.

        Raises:
            InvalidArgument: As for `sample`, which lists the other errors too.
        """
        _check_watchers(callback, progress)
        if self._latents is not None:
            self._latents.options(Options(image=image), self.info)  # which refuses it
        config = self.scheduler_config
        spacing = None if spacing is None else check_spacing("spacing", spacing)
        if spacing is None and isinstance(self.schedule, NoiseSchedule):
            spacing = value_of(config, "timestep_spacing", "trailing")
        solver = one_of("solver", solver, [name for name, known in SOLVERS.items() if known.inverse is not None])
        inverse = SOLVERS[solver].inverse
        assert inverse is not None
        own: dict[str, Any] = {}
        if solver == "ddim":
            own = {"iterations": iterations, "set_alpha_to_one": value_of(config, "set_alpha_to_one", True)}
        elif whole("iterations", iterations, 1, 1000) != 1:
            raise InvalidArgument(f"iterations={iterations}: solver={solver!r} takes one evaluation a step; ddim more")
        table = inverse(
            self.schedule, steps, spacing=spacing, prediction=self.prediction,
            steps_offset=value_of(config, "steps_offset", 0) if spacing == "leading" else 0, **own,
        )  # fmt: skip
        image = editing.as_image(image, self.info.channels)
        n = len(image) if isinstance(image, Tensor) and image.ndim == 4 else 1
        r = self.request(
            max(n, 1), solver=table, image=image, strength=1.0, labels=labels, prompts=prompts,
            negative=negative, guidance=guidance, guidance_rescale=guidance_rescale, batch_size=batch_size,
        )  # fmt: skip
        images = self._loop.run(r, callback, progress).images
        with plain_modes():
            return images / table.init_scale

    @process.work()
    def interpolate(
        self,
        n: int,
        between: tuple[int | Tensor, int | Tensor],
        *,
        callback: Callable[[Event], None] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> SampleOutput:
        """Draw ``n`` images on the way from one image to another, by spherical interpolation of their initial noise.

        Args:
            n: Number of images, both ends included.
            between: Two ends, each a seed (for its image ``start_index``) or initial noise [C, H, W], as `invert`
                returns it.
            callback: As for `sample`.
            progress: As for `sample`.
            **options: Options of `sample`, except ``noise``. A solver that adds noise adds each image's own, of
                ``seed``.

        Returns:
            The images, as `sample` returns them.

        Raises:
            InvalidArgument: As for `sample`, which lists the other errors too.
        """
        _check_watchers(callback, progress)
        if not isinstance(between, (tuple, list)) or len(between) != 2:
            raise InvalidArgument(f"between={shown(between)}: two ends are needed, each a seed or noise [C, H, W]")
        Options.named("interpolate", options)
        if options.get("noise") is not None:
            raise InvalidArgument("noise cannot be given to interpolate: between says what it is")
        r = self.request(n, **options)
        first, last = (editing.end_noise(end, r.index[0], r.shape) for end in between)
        return self._drawn(dataclasses.replace(r, noise=editing.slerp(first, last, r.n)), callback, progress)

    @process.work()
    def adapt(
        self, n: int = 8, *, order: int = 3, rtol: float = 0.05, atol: float = 0.0078, **options: Any
    ) -> StepTable:
        """Find steps that suit the model: each is as long as its error on ``n`` images allows (dpm_adaptive).

            table = sampler.adapt(rtol=0.05, labels=9)
            sampler.sample(64, solver=table, labels=9)

        It is the adaptive DPM-Solver of k-diffusion (Lu et al. 2022, arXiv:2206.00927, section 3.3), whose accepted
        steps are kept as a table, with a last step to zero noise. Finding them takes the evaluations of the rejected
        steps besides.

        Args:
            n: Number of images on which the steps are tried, at least 1. Their errors count together.
            order: 2 or 3, the order of the solver and the evaluations of the network in a step.
            rtol: Error that a step may have relative to the values of the sample, above 0.
            atol: Error that a step may have at least, in units of the data, above 0.
            **options: Options of `sample` that say which images are tried and how: seed, start_index, labels, guidance,
                clip, size and the like.

        Returns:
            The table, for ``solver=`` of `sample`.

        Raises:
            InvalidArgument: If an option is not allowed, or the tolerances need more than 1000 trials.
            NumericsError: If images became NaN or infinite.
        """
        return adaptive.find(self, n, order, rtol, atol, options)

    def stream(self, n: int, *, every: int = 1, progress: bool = False, **options: Any) -> Iterator[Event]:
        """Run `sample` row by row; leaving the loop over the events, or `cancel`, ends the run and frees its memory.

        Args:
            n: Number of images.
            every: Number of rows from one event to the next, at least 1; the last row always has one.
            progress: As for `sample`.
            **options: Options of `sample`. They are checked when `stream` is called, not at the first event.

        Returns:
            An iterator over the events; the last one of each batch has the finished images. Its ``close()`` ends the
            call. Weights of the network that change between two events are used from the next row on.

        Raises:
            InvalidArgument: As for `sample`.
        """
        every = whole("every", every, 1)
        _check_watchers(None, progress)
        Options.named("stream", options)
        r = self.request(n, **options)
        last = len(r.table) - 1
        return Stream(self._loop.rows(r, lambda row: row % every == every - 1 or row == last, progress))

    @process.work()
    def request(self, n: int, **options: Any) -> Request:
        """Check a call of `sample` without running it.

        Args:
            n: Number of images.
            **options: Options of `sample`.

        Returns:
            The checked call: its step table, network evaluations, batch size, labels and so on. Nothing is drawn,
            except for the rows that ``deadline_s`` has timed.

        Raises:
            InvalidArgument: As for `sample`.
            BackendError: As for `sample`.
            CheckpointError: As for `sample`.
            Cancelled: If `cancel` ended the timing for ``deadline_s``.
        """
        o = Options.named("sample", options)
        if self._closed:
            raise InvalidArgument("this sampler is closed")
        if o.deadline_s is not None:
            started = time.perf_counter()
            trial = self.request(n, **vars(choice.trial(o, self.schedule, self.prediction)))
            seconds = self._loop.seconds_per_row(trial)
            o = choice.in_time(
                o, self.schedule, self.measurements(), n=trial.n, chunks=len(trial.chunks), seconds=seconds,
                elapsed=time.perf_counter() - started,
            )  # fmt: skip
            known = self.measurements()
            point = None if known is None else known.chosen(vars(o))
        else:
            known = self.measurements() if o.automatic or o.quality is not None else None
            point = None
        if point is None:
            o, point = choice.resolve(o, self.schedule, known)
        if self._latents is not None:
            o = self._latents.options(o, self.info)
        r = check(
            n, o, self.info, self.schedule, self.prediction, self.scheduler_config, self.backend, self.text_encoder
        )
        if r.prompts is not None and self.text_encoder is not None:
            texts = encode(r.prompts, self.text_encoder, self.info.pooled)
            if self.info.sized and isinstance(self.unet, UNetCondition):
                factor = 1 if self.autoencoder is None else self.autoencoder.factor
                size = (r.shape[1] * factor, r.shape[2] * factor)
                texts = with_sizes(texts, self.unet, self.info.pooled_channels, size)
            r = dataclasses.replace(r, texts=texts)
        if known is not None and point is not None:
            known.check_rows(point, len(r.table))
        return r

    def measurements(self) -> Measured | None:
        """Return the measurements of this model, from ``measurements_file``.

        Returns:
            The measurements; None where there is no file, or it was measured with other weights, which is logged.

        Raises:
            CheckpointError: If the file is damaged.
        """
        path = self.measurements_file
        if not self._has_read_measurements and path is not None and path.exists():
            self._measured = read_for(self.unet, path)
            self._has_read_measurements = True
        return self._measured

    def cancel(self) -> None:
        """End all running calls before their next row: `sample` raises `Cancelled`, `stream` stops. Later calls run."""
        self._loop.cancel()

    def close(self) -> None:
        """End all running calls and free the prepared runners; the sampler cannot be used afterwards.

        It may be called from anywhere, as may `cancel`: a running step is finished first.
        """
        self._closed = True
        self._loop.close()

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _made(kind: type[Sampler], unet: nn.Module, schedule: Schedule, options: dict[str, Any]) -> Sampler:
    """Make the sampler of a copy or a pickle."""
    return kind(unet, schedule, **options)


def _check_encoder(encoder: Any) -> TextEncoder:
    for name in ("tokenize", "encode"):
        if not callable(getattr(encoder, name, None)):
            raise InvalidArgument(
                f"text_encoder={shown(encoder)}: tokenize(text) and encode(text) are needed, as of a CaptionEncoder"
            )
    return encoder


def _check_autoencoder(autoencoder: Any, info: NetworkInfo) -> LatentDecoder | None:
    if autoencoder is None:
        return None
    if not isinstance(autoencoder, LatentDecoder):
        raise InvalidArgument(f"autoencoder={shown(autoencoder)}: a fastdiff.unet.latents.LatentDecoder is needed")
    if autoencoder.config.latent_channels != info.channels:
        raise InvalidArgument(
            f"the autoencoder has latents of {autoencoder.config.latent_channels} channels, the network's images have "
            f"{info.channels}"
        )
    return autoencoder


def _class_names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise InvalidArgument(f"class_names={str(names)[:80]!r}: a list of strings, a name for each class, is needed")
    return tuple(names)


def _check_watchers(callback: Any, progress: Any) -> None:
    """Check the arguments of a call that only watch it."""
    if callback is not None and not callable(callback):
        raise InvalidArgument(f"callback={shown(callback)}: a function (event) or None is needed")
    boolean("progress", progress)
