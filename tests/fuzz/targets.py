"""List the fuzzed functions and classes of the public interface, and the keys of configuration files."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import tempfile
from pathlib import Path
from typing import Any

import torch

import fastdiff
from fastdiff import solvers
from fastdiff.checkpoints import convert, load, save_folder, save_unet, schedule_of
from fastdiff.sampler.options import Options
from fastdiff.solvers import EDMSchedule, from_config
from fastdiff.solvers.compat.diffusers import ALL
from fastdiff.solvers.walk import Walk
from fastdiff.training import TrainConfig, Trainer
from tests.fuzz.corpus import JSON, VALUES
from tests.fuzz.harness import Target
from tests.support.conditions import TINY as CONDITION
from tests.support.unets import TINY, TINY_CLASSES, random_unet
from tests.training.toys import Toys, toy_unet

SCHEDULE = fastdiff.NoiseSchedule("linear", 40, beta_end=0.2)
SOLVERS = (
    "ddim", "ddpm", "dpmpp_1", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc", "euler", "euler_ancestral", "heun",
    "deis", "lms", "plms", "lcm", "consistency", "ddim_inversion",
)  # fmt: skip
COMMON = [name for name in inspect.signature(Walk.of).parameters if name not in ("schedule", "steps")]
SCHEDULER_KEYS = (
    "_class_name", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "variance_type",
    "clip_sample", "clip_sample_range", "prediction_type", "thresholding", "dynamic_thresholding_ratio",
    "sample_max_value", "timestep_spacing", "steps_offset", "rescale_betas_zero_snr", "set_alpha_to_one",
    "skip_prk_steps", "original_inference_steps", "timestep_scaling", "solver_order", "algorithm_type", "solver_type",
    "lower_order_final", "euler_at_final", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
    "use_lu_lambdas", "use_flow_sigmas", "flow_shift", "final_sigmas_type", "lambda_min_clipped",
    "use_dynamic_shifting", "time_shift_type", "predict_x0", "disable_corrector", "solver_p", "interpolation_type",
    "timestep_type", "sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho", "s_noise", "clip_denoised",
    "shift_terminal", "unknown_key",
)  # fmt: skip


def parameters(function: Any) -> list[str]:
    """Return the names of a function's parameters, those that all solvers share included."""
    names = []
    for name, parameter in inspect.signature(function).parameters.items():
        names += COMMON if parameter.kind is inspect.Parameter.VAR_KEYWORD else [name]
    return names


def solver_targets() -> list[Target]:
    targets = []
    edm = EDMSchedule()
    for name in SOLVERS:
        function = getattr(solvers, name)
        schedule = edm if name == "consistency" else SCHEDULE
        targets.append(
            Target(f"solvers.{name}", function, parameters(function), VALUES, {"schedule": schedule, "steps": 4})
        )
        if name not in ("consistency", "lcm"):
            targets.append(
                Target(f"solvers.{name} of EDM", function, parameters(function), VALUES, {"schedule": edm, "steps": 4})
            )
    table = solvers.ddpm(SCHEDULE, 5)
    functions = (
        (solvers.repaint, {"table": table}),
        (solvers.starting_at, {"table": table, "start": 1}),
        (solvers.timesteps, {"schedule": SCHEDULE, "steps": 4}),
        (solvers.sigma_timesteps, {"schedule": SCHEDULE, "sigmas": [1.0, 0.5]}),
        (table.with_guidance_interval, {"start": 0.0, "end": 1.0}),
        (table.nfe, {}),
        (solvers.StepTable.from_json, {"text": "{}"}),
        (solvers.StepTable, {"solver": "x", "steps": 1, "rows": table.rows}),
        (SCHEDULE.abar, {"t": 1}),
        (SCHEDULE.posterior, {"t": 3, "t_prev": 1}),
        (edm.times, {"steps": 3, "spacing": "karras"}),
        (edm.time, {"sigma": 1.0}),
        (edm.sigma, {"time": 1.0}),
        (edm.abar, {"time": 1.0}),
    )
    for function, base in functions:
        targets.append(Target(f"solvers.{function.__qualname__}", function, parameters(function), VALUES, base))
    return targets


def add_noise(x0: Any, noise: Any, t: Any) -> Any:
    """Compute x_t; where an element of the image or of the noise is not finite, that of x_t may be so too."""
    x_t = SCHEDULE.add_noise(x0, noise, t)
    return x_t[torch.isfinite(x0 + noise).expand(x_t.shape)]


def schedule_targets() -> list[Target]:
    names = [f.name for f in dataclasses.fields(fastdiff.NoiseSchedule)]
    x = torch.zeros(1, 3, 8, 8)
    return [
        *(
            Target(f"NoiseSchedule({kind})", fastdiff.NoiseSchedule, names, VALUES, {"kind": kind, "timesteps": 20})
            for kind in ("linear", "scaled_linear", "cosine", "sigmoid")
        ),
        Target("NoiseSchedule(custom)", fastdiff.NoiseSchedule, names, VALUES, {"kind": "custom", "betas": [0.1, 0.2]}),
        Target("from_alphas_cumprod", fastdiff.NoiseSchedule.from_alphas_cumprod, ["alphas_cumprod"], VALUES),
        Target("from_scheduler_config", fastdiff.NoiseSchedule.from_scheduler_config, ["config"], VALUES),
        Target("EDMSchedule", EDMSchedule, [f.name for f in dataclasses.fields(EDMSchedule)], VALUES),
        Target("add_noise", add_noise, ["x0", "noise", "t"], VALUES, {"x0": x, "noise": x, "t": torch.tensor([1])}),
    ]


def schedules_and_tables(**options: Any) -> Any:
    """Use a configuration in every way in which it is read; one that is accepted must give tables."""
    config = dict(options)
    schedule, prediction = schedule_of(config)
    return schedule, prediction


def of_sampler(**options: Any) -> Any:
    """Draw an image with a sampler of this scheduler configuration."""
    config = dict(options)
    solver, compat = config.pop("solver_"), config.pop("compat_")
    schedule, prediction = schedule_of(config)
    sampler = fastdiff.Sampler(network(), schedule, prediction=prediction, scheduler_config=config, backend="eager")
    return sampler.request(1, solver=solver, steps=3, compat=compat).table


def of_scheduler(**options: Any) -> Any:
    """Run the steps of `fastdiff.Scheduler`."""
    scheduler = fastdiff.Scheduler.from_config(dict(options))
    scheduler.set_timesteps(3)
    x = torch.full((1, 3, 2, 2), 0.5) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = torch.full((1, 3, 2, 2), 0.25)
        x = scheduler.step(out, t, scheduler.scale_model_input(x, t) * 0 + x, generator=torch.Generator()).prev_sample
    return x


@functools.cache
def network(config: Any = TINY) -> Any:
    return random_unet(config)


def config_targets() -> list[Target]:
    targets = []
    for name in ALL:
        base = {"_class_name": name, "num_train_timesteps": 40, "skip_prk_steps": True}
        targets += [
            Target(f"schedule_of({name})", schedules_and_tables, SCHEDULER_KEYS, JSON, base),
            Target(f"Scheduler({name})", of_scheduler, SCHEDULER_KEYS, JSON, base),
        ]
    for name, solver, compat in (
        ("DDIMScheduler", "ddim", None), ("DDPMScheduler", "ddpm", None), ("LCMScheduler", "lcm", None),
        ("DDIMScheduler", "ddim", "diffusers"), ("DDPMScheduler", "ddpm", "openai"), ("DDPMScheduler", "ddpm", "ho"),
        ("EulerDiscreteScheduler", "dpmpp_2m", "diffusers"), ("EDMEulerScheduler", "heun", None),
        ("UniPCMultistepScheduler", "unipc", "diffusers"),
    ):  # fmt: skip
        base = {"_class_name": name, "num_train_timesteps": 40, "solver_": solver, "compat_": compat}
        targets.append(Target(f"Sampler({name}, {solver}, {compat})", of_sampler, SCHEDULER_KEYS, JSON, base))
    steps = {"config": {"_class_name": "DDIMScheduler"}, "steps": 3}
    targets.append(Target("from_config", from_config, parameters(from_config), VALUES, steps))
    unet = [f.name for f in dataclasses.fields(fastdiff.UNetConfig)]
    small = {k: v for k, v in TINY.to_dict().items()}
    condition = [f.name for f in dataclasses.fields(fastdiff.UNetConditionConfig)]
    targets += [
        Target("UNetConfig", fastdiff.UNetConfig, unet, VALUES, small),
        Target("UNetConfig.from_dict", lambda **config: fastdiff.UNetConfig.from_dict(config), unet, JSON, small),
        Target("UNetConfig.from_dict itself", fastdiff.UNetConfig.from_dict, ["config"], VALUES),
        Target("UNetConfig.like", fastdiff.UNetConfig.like, ["codebase", *unet], VALUES, {**small, "codebase": "ho"}),
        Target("UNetConditionConfig", fastdiff.UNetConditionConfig, condition, VALUES, CONDITION),
        Target(
            "UNetConditionConfig.from_dict", lambda **config: fastdiff.UNetConditionConfig.from_dict(config), condition,
            JSON, CONDITION,
        ),
        Target("UNetConditionConfig.from_dict itself", fastdiff.UNetConditionConfig.from_dict, ["config"], VALUES),
        Target("TrainConfig", TrainConfig, [f.name for f in dataclasses.fields(TrainConfig)], VALUES),
    ]  # fmt: skip
    return targets


@functools.cache
def sampler(config: Any) -> fastdiff.Sampler:
    return fastdiff.Sampler(network(config), SCHEDULE, backend="eager")


def sampler_targets() -> list[Target]:
    options = [f.name for f in dataclasses.fields(Options)]
    targets = []
    for solver in ("ddim", "ddpm", "unipc", "auto", "lms", "euler_ancestral"):
        base = {"n": 1, "solver": solver, "steps": 3}
        request = sampler(TINY).request
        targets.append(Target(f"request({solver})", request, ["n", *options], VALUES, base))
    labelled = sampler(TINY_CLASSES)
    base = {"n": 2, "steps": 3, "labels": [0, 1], "guidance": 2.0}
    targets.append(Target("request(labels)", labelled.request, ["n", *options], VALUES, base))
    base = {"n": 1, "steps": 3, "compat": "diffusers"}
    targets.append(Target("request(compat)", sampler(TINY).request, ["n", *options], VALUES, base))
    base = {"n": 1, "steps": 4, "image": torch.zeros(1, 3, 8, 8), "mask": torch.ones(8, 8)}
    targets.append(Target("request(mask)", sampler(TINY).request, ["n", *options], VALUES, base))

    def sample(**given: Any) -> Any:
        return sampler(TINY).sample(**given).images

    targets.append(Target("sample", sample, ["n", *options, "callback", "progress"], VALUES, {"n": 1, "steps": 2}))

    def stream(**given: Any) -> Any:
        return [event.x for event in sampler(TINY).stream(**given)][-1]

    targets.append(Target("stream", stream, ["n", "every", "progress"], VALUES, {"n": 1, "steps": 2}))
    invert = sampler(TINY).invert
    names = ["image", *(name for name in parameters(invert)[1:] if name != "iterations")]
    base = {"image": torch.zeros(1, 3, 8, 8), "steps": 2}
    targets.append(Target("invert", invert, names, VALUES, base))
    few = [value for value in VALUES if not (type(value) is int and value == 999)]  # allowed, but half a minute
    targets.append(Target("invert", invert, ["iterations"], few, base))

    def interpolate(**given: Any) -> Any:
        return sampler(TINY).interpolate(**given).images

    targets.append(
        Target("interpolate", interpolate, ["n", "between"], VALUES, {"n": 2, "between": (1, 2), "steps": 2})
    )
    names = [name for name in parameters(fastdiff.Sampler.__init__)[1:]]
    base = {"unet": network(), "schedule": SCHEDULE, "backend": "eager"}
    targets.append(Target("Sampler", fastdiff.Sampler, names, VALUES, base))
    return targets


@functools.cache
def folder() -> Path:
    """Return a small model's folder, which lives as long as the process."""
    kept = tempfile.TemporaryDirectory()
    folder.kept = kept  # type: ignore[attr-defined]
    path = Path(kept.name)
    save_folder(path / "model", network(), SCHEDULE)
    return path


def file_targets() -> list[Target]:
    model, out = folder() / "model", folder()
    names = ["model", "preset", "flags", "variant", "weights"]

    def pretrained(**given: Any) -> Any:
        return fastdiff.Sampler.from_pretrained(**given)

    unet = network()
    return [
        Target("load", load, names, VALUES, {"model": model}),
        Target(
            "from_pretrained", pretrained, [*names, "backend", "device", "dtype", "determinism"], VALUES,
            {"model": model, "device": "cpu", "backend": "eager"},
        ),
        Target("UNet.from_pretrained", lambda path: fastdiff.UNet.from_pretrained(path), ["path"], VALUES),
        Target(
            "UNetCondition.from_pretrained", fastdiff.UNetCondition.from_pretrained,
            ["path", "torch_dtype", "variant", "weights", "subfolder"], VALUES, {"path": model},
        ),
        Target("convert", convert, ["src", "to", "preset", "flags", "variant", "weights"], VALUES,
            {"src": model, "dst": out / "converted"}),
        Target("save_folder", save_folder, ["schedule", "prediction"], VALUES,
            {"path": out / "saved", "unet": unet, "schedule": SCHEDULE}),
        Target("save_unet", save_unet, ["unet"], VALUES, {"path": out / "unet"}),
    ]  # fmt: skip


def trained(**given: Any) -> Any:
    """Train a small network for one step in a folder that is deleted."""
    with tempfile.TemporaryDirectory() as out:
        names = [f.name for f in dataclasses.fields(TrainConfig)]
        config = {name: given.pop(name) for name in names if name in given}
        if "config" not in given:
            given["config"] = TrainConfig(**config)
        trainer = Trainer(**{"unet": toy_unet(), "out": Path(out) / "run", **given})
        trainer.stop()  # at once: it makes the folder, the log and the checkpoint
        trainer.fit()
        return trainer.seconds_per_update() if trainer.config.batch_size < 1000 else None


def trainer_targets() -> list[Target]:
    names = [f.name for f in dataclasses.fields(TrainConfig) if f.name != "compile"]
    base = {"data": Toys(), "device": "cpu", "batch_size": 2, "steps": 2}
    return [
        Target("Trainer", trained, parameters(Trainer), VALUES, base),
        Target("Trainer of settings", trained, names, VALUES, base),
    ]


def all_targets() -> list[Target]:
    return [
        *trainer_targets(),
        *solver_targets(),
        *schedule_targets(),
        *config_targets(),
        *sampler_targets(),
        *file_targets(),
    ]
