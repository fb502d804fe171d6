"""`PipelineLoop`: the loop of diffusers' DDPMPipeline and DDIMPipeline, run by a `StepTable`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import whole
from fastdiff.core.state import State, TableBank
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.integrations.configuration import configuration
from fastdiff.integrations.network import BackendUNet
from fastdiff.integrations.noise import draws_noise, randn
from fastdiff.solvers import StepTable, from_config
from fastdiff.solvers.compat.diffusers import FLOW_SCHEDULERS, UNSCALED


def check_scheduler(pipeline: Any) -> None:
    """Raise `ConfigError` if the pipeline's scheduler has no table for any number of steps."""
    config = _scheduler_config(pipeline)
    refused: ConfigError | None = None
    for steps in (1, 10):
        try:
            from_config(config, steps)
        except InvalidArgument:  # the schedule has fewer timesteps
            continue
        except ConfigError as e:
            refused = e
        else:
            return
    if refused is not None:
        raise refused


def _scheduler_config(pipeline: Any) -> dict[str, Any]:
    """Return the configuration of the pipeline's scheduler; raise `ConfigError` if it does not say all that it does."""
    alphas_cumprod = getattr(pipeline.scheduler, "alphas_cumprod", None)
    if isinstance(alphas_cumprod, Tensor) and alphas_cumprod.is_meta:
        raise ConfigError(
            f"the alphas_cumprod of {type(pipeline.scheduler).__name__} are on the meta device; make it without "
            "torch.device('meta')"
        )
    config = configuration(pipeline.scheduler)
    name = config["_class_name"]
    if name not in UNSCALED:
        raise ConfigError(
            f"scheduler {name} needs its input scaled, which {type(pipeline).__name__} does not do; supported: "
            f"{', '.join(UNSCALED)}"
        )
    return config


def _check_channels(pipeline: Any) -> None:
    """Raise an error if the network's output is no prediction for its input, as where a condition is concatenated."""
    config = pipeline.unet.config
    C, given = config.in_channels, config.out_channels
    if given in (C, 2 * C):
        return
    # PyTorch broadcasts one channel, so diffusers' loop runs; it fails for other numbers.
    error = ConfigError if given == 1 else InvalidArgument
    raise error(
        f"{type(pipeline).__name__}.unet gives {given} channels for images of {C} channels; {C} are needed, or {2 * C} "
        "where the variance is learned"
    )


@dataclasses.dataclass
class PipelineLoop:
    """One call of a DDPMPipeline or DDIMPipeline."""

    pipeline: Any
    network: BackendUNet
    arguments: dict[str, Any]  # of the call, with defaults for those that were not given
    table: StepTable | None = None  # None until `prepare` has succeeded
    timesteps: Tensor | None = None  # those of diffusers, which `prepare` compares with the table's

    def prepare(self) -> None:
        """Make the table; raise `ConfigError` or, for the caller's mistakes, `InvalidArgument` if there is none."""
        a, scheduler = self.arguments, self.pipeline.scheduler
        _check_channels(self.pipeline)
        B = a["batch_size"] = whole("batch_size", a["batch_size"], 1)
        generator = a["generator"]
        if isinstance(generator, list):
            if len(generator) < B and (len(generator) != 1 or "eta" in a):
                raise InvalidArgument(f"{len(generator)} generators for batch_size={B}: one for each image is needed")
            a["generator"] = generator[:B]
        self.eta = a.get("eta")
        self.config = _scheduler_config(self.pipeline)
        clipped = bool(a.get("use_clipped_model_output"))
        table = from_config(self.config, a["num_inference_steps"], eta=self.eta, use_clipped_model_output=clipped)
        scheduler.set_timesteps(a["num_inference_steps"])  # for the caller, who may read them after the call
        own = copy.deepcopy(scheduler)  # as another pipeline, in another thread, may share the scheduler
        own.set_timesteps(a["num_inference_steps"])
        self.timesteps = own.timesteps
        if [row.t for row in table.rows] != self.timesteps.tolist():
            raise ConfigError(f"{type(scheduler).__name__} has timesteps that its configuration does not describe")
        self.table = table

    def run(self) -> Any:
        """Sample, and return what the pipeline's own ``__call__`` would return."""
        a, pipeline, unet = self.arguments, self.pipeline, self.pipeline.unet
        images: Any = self._sample()
        images = (images / 2 + 0.5).clamp(0, 1).to(unet.dtype)
        if a["output_type"] != "pt":
            images = images.cpu().permute(0, 2, 3, 1)
            # NumPy has no bfloat16, for which diffusers itself fails.
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
        """Run the table's rows from initial noise; noise is drawn in the order in which diffusers draws it."""
        assert self.table is not None
        unet, size = self.network.unet, self.network.unet.config.sample_size
        H, W = (size, size) if isinstance(size, int) else size
        B, generator = self.arguments["batch_size"], self.arguments["generator"]
        device, dtype = self.pipeline._execution_device, unet.dtype

        def draw(of: torch.dtype = dtype) -> Tensor:
            return randn((B, unet.config.in_channels, H, W), generator, device, of)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x = draw().to(wide)
        state = State.create(x * self.table.init_scale, TableBank([self.table], device, wide))
        runner = self.network.runner(x.shape)
        for row, t in enumerate(self.pipeline.progress_bar(self.timesteps)):
            if row == len(self.table) or float(t) != self.table.rows[row].t:
                raise ConfigError("the pipeline's progress_bar gives other timesteps than it was given; unaccelerate()")
            state.noise = None
            if draws_noise(self.config, self.table, row, self.eta):
                flow = self.config["_class_name"] in FLOW_SCHEDULERS
                state.noise = _constant(draw(torch.float32 if flow else dtype).to(wide))
            runner.step(state)
        return state.x


def _constant(z: Tensor) -> Callable[[int], Tensor]:
    """Make a source of noise that gives z in every row."""
    return lambda row: z
