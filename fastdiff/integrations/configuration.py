"""The configuration of a scheduler: taken from diffusers' schedulers, completed, changed, shown and saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastdiff.checks import items, shown
from fastdiff.errors import ConfigError, InvalidArgument, ModifiedError
from fastdiff.files import write_text
from fastdiff.solvers.compat.defaults import DEFAULTS
from fastdiff.solvers.compat.diffusers import scheduler_name
from fastdiff.solvers.keys import KEYS, OTHERS, check_config
from fastdiff.unet import changes

FILE = "scheduler_config.json"


class Config(dict[str, Any]):
    """A configuration that does not change: a dictionary whose entries are attributes too, as in diffusers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the configuration of {self.get('_class_name')} has no {name}") from None

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise InvalidArgument("a configuration does not change; Scheduler.from_config(config, key=value) makes another")

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = __ior__ = _refuse
    pop = popitem = clear = update = setdefault = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return Config, (dict(self),)  # a copy or a pickle that sets entry by entry would be refused


def complete(config: Mapping[str, Any], changed: Mapping[str, Any]) -> Config:
    """Return a configuration with ``changed`` options and the scheduler's defaults.

    Options that had defaults before, by ``_use_default_values``, have those of this scheduler, as in diffusers.
    """
    known = {*KEYS, *OTHERS, "_class_name", *(key for options in DEFAULTS.values() for key in options)}
    unknown = sorted(set(changed) - known)
    if unknown:
        raise InvalidArgument(f"{', '.join(map(shown, unknown))}: no supported scheduler has this option")
    defaulted = items("_use_default_values", config.get("_use_default_values", ()), 1000, error=ConfigError)
    given = {key: value for key, value in config.items() if key not in defaulted}
    given.pop("_use_default_values", None)
    given |= changed
    name = scheduler_name(given)
    given = {key: _plain(value) for key, value in given.items()}
    check_config(given)
    absent = sorted(key for key in DEFAULTS[name] if key not in given)
    return Config({**DEFAULTS[name], **given, **({"_use_default_values": absent} if absent else {})})


def _plain(value: Any) -> Any:
    """Return arrays and tensors as lists, as JSON has them."""
    return value.tolist() if hasattr(value, "tolist") else value


def to_json(config: Mapping[str, Any]) -> str:
    """Return the text of a ``scheduler_config.json``."""
    kept = {key: value for key, value in config.items() if key != "_use_default_values"}
    try:
        return json.dumps(kept, indent=2, sort_keys=True) + "\n"
    except (TypeError, ValueError) as e:
        raise ConfigError(f"the configuration cannot be written as JSON: {e}") from e


def save(config: Mapping[str, Any], folder: str | Path) -> None:
    """Write ``scheduler_config.json`` into a folder, which is made if it is missing."""
    write_text(Path(folder) / FILE, to_json(config))


def _named_by_options(config: Mapping[str, Any]) -> str:
    """Return the only scheduler that has exactly the options of a configuration that names none."""
    keys = {key for key in config if not key.startswith("_")}
    names = [name for name, options in DEFAULTS.items() if keys == set(options)]
    if len(names) != 1:
        raise ConfigError(
            f"this configuration does not name its scheduler (_class_name), and {' and '.join(names) or 'none'} have "
            "exactly its options; give the scheduler itself in place of scheduler.config, or _class_name="
        )
    return names[0]


def configuration(source: Any) -> dict[str, Any]:
    """Return the configuration of a diffusers scheduler, or a given one, as a dictionary with ``_class_name``.

    A configuration without this key, as that of a scheduler that was made by its constructor, is the only scheduler's
    that has these options. A scheduler that is not supported, or that does not do what its configuration says, raises
    `ConfigError`.
    """
    if isinstance(source, Mapping):
        config = dict(source)
        if "_class_name" not in config and "_use_default_values" in config:
            config["_class_name"] = _named_by_options(config)
    elif isinstance(getattr(source, "config", None), Mapping):
        config = {**source.config, "_class_name": type(source).__name__}
    else:
        raise ConfigError(f"a {type(source).__name__} is neither a scheduler nor the configuration of one")
    name = scheduler_name(config)
    if not isinstance(source, Mapping):
        found = unsupported_changes(source)
        if found:
            raise ModifiedError(f"scheduler {name} is not what its configuration says: {changes.in_words(found)}")
        # DDPMScheduler.step reads this attribute instead of the configuration.
        config |= {key: value for key, value in vars(source).items() if key == "variance_type"}
    return config


# Attributes that a run changes, and that `set_timesteps` or the first step sets anew.
OF_A_RUN = {
    "num_inference_steps", "timesteps", "_timesteps", "prk_timesteps", "plms_timesteps", "sigmas", "custom_timesteps",
    "_step_index", "_begin_index", "counter", "ets", "cur_model_output", "cur_sample", "model_outputs",
    "timestep_list", "lower_order_nums", "last_sample", "is_scale_input_called", "prev_derivative", "dt", "sample",
    "order_list", "log_sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "mid_point_sigma", "noise_sampler",
    "discrete_sigmas",
}  # fmt: skip


def unsupported_changes(scheduler: Any) -> list[str]:
    """List what a scheduler of diffusers does, or has, beyond its configuration."""
    cls = type(scheduler)
    if changes.origin(cls) != "diffusers":
        return [f"it is a class of {cls.__module__}, not diffusers' own"]
    found = changes.replaced_functions([cls])
    if found:
        return found
    with torch.device("cpu"):  # a default device of the caller's must not be that of the new scheduler's tensors
        ours, theirs = vars(scheduler), vars(changes.rebuilt(cls, scheduler.config))
    found = [f"{name} was replaced" for name in ours if name not in theirs and hasattr(cls, name)]
    ignored = OF_A_RUN | {"_internal_dict", "variance_type"}
    other = [n for n, v in theirs.items() if n not in ignored and not changes.same(ours.get(n, found), v)]
    return found + [f"{name} was changed" for name in other]
