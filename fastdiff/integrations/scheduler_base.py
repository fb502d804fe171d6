"""The configuration of `Scheduler`: what it is made from, how it is changed, shown and saved."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fastdiff.checkpoints.folders import read_scheduler
from fastdiff.core.state import State
from fastdiff.errors import CheckpointError, ConfigError
from fastdiff.integrations.arguments import TWO_STAGES
from fastdiff.integrations.configuration import FILE, Config, complete, configuration, save, to_json
from fastdiff.integrations.places import Place
from fastdiff.integrations.ve import Levels
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import StepTable
from fastdiff.solvers.compat.defaults import DEFAULTS
from fastdiff.solvers.compat.diffusers import FLOW_SCHEDULERS, IN_SIGMA, WITHOUT_SCHEDULE
from fastdiff.solvers.compat.source import noise_schedule
from fastdiff.solvers.keys import value_of

if TYPE_CHECKING:
    from typing_extensions import Self


class SchedulerBase:
    """A scheduler as its configuration describes it, with no run yet; `Scheduler` documents the arguments."""

    config_name: ClassVar[str] = FILE
    has_compatibles: ClassVar[bool] = True
    _deprecated_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, **options: Any):
        config = config.config if isinstance(config, SchedulerBase) else config
        if isinstance(config, Mapping) and "_class_name" in options:
            config = {**config, "_class_name": options["_class_name"]}
        self._use(complete(configuration(config), options))

    def _use(self, config: Config) -> None:
        self._config = config
        self._name = name = str(config["_class_name"])
        self.in_sigma = name in IN_SIGMA
        self.of_flow = name in FLOW_SCHEDULERS
        self._levels: Levels | None = None  # of ScoreSdeVeScheduler
        self.schedule: NoiseSchedule | None = None
        if name not in WITHOUT_SCHEDULE:
            self.schedule = noise_schedule(config)
        self.order = 2 if name in TWO_STAGES else 1
        self._shift: float | None = None  # by `set_shift`
        self.num_inference_steps: int | None = None
        self._asked: tuple[Mapping[str, Any], dict[str, Any]] | None = None
        self._forget()

    def _forget(self) -> None:
        """Drop the tables and the history of a run."""
        self._tables: dict[tuple[Any, ...], StepTable] = {}
        self._timesteps: Tensor | None = None
        self._sigmas: Tensor | None = None
        self._state: State | None = None
        self._next: list[Place | None] | None = None  # the place of each image after its last step
        self._begin_index: int | None = None

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> Self:
        """Make a scheduler from a configuration, a diffusers scheduler or another `Scheduler`.

        Args:
            config: The configuration or the scheduler to take it from. The ``config`` of a diffusers scheduler that was
                made by its constructor does not say of which class it is; its options do, where only one has them.
            **options: Options that replace those of ``config``, ``_class_name`` among them.

        Returns:
            The scheduler, with the timesteps of its training.

        Raises:
            ConfigError: If the scheduler or one of its options is not supported.
            InvalidArgument: If no scheduler has one of ``options``.
        """
        made = cls.__new__(cls)
        SchedulerBase.__init__(made, config, **options)
        return made

    @classmethod
    def from_pretrained(cls, path: str | Path, subfolder: str | None = None, **options: Any) -> Self:
        """Make a scheduler from a folder on disk; nothing is downloaded.

        Args:
            path: The folder of a pipeline, or one with a ``scheduler_config.json``.
            subfolder: A folder within ``path`` to look in instead.
            **options: Options that replace those of the file.

        Returns:
            The scheduler, with the timesteps of its training.

        Raises:
            CheckpointError: If there is no ``scheduler_config.json``, or it cannot be read.
            ConfigError: If the scheduler or one of its options is not supported.
            InvalidArgument: If no scheduler has one of ``options``.
        """
        folder = Path(path) / (subfolder or "")
        config = read_scheduler(folder)
        if not config:
            raise CheckpointError(f"{folder}: no scheduler_config.json and no scheduler/scheduler_config.json")
        made = cls.__new__(cls)
        SchedulerBase.__init__(made, config, **options)
        return made

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``scheduler_config.json``, which `from_pretrained` and diffusers' class of the same name read.

        Args:
            save_directory: The folder, which is made if it is missing.

        Raises:
            WriteError: If the file cannot be written.
            ConfigError: If an option cannot be written as JSON.
        """
        save(self.config, save_directory)

    save_config = save_pretrained

    def register_to_config(self, **options: Any) -> None:
        """Set options of the configuration, known ones or others; a run starts anew.

        Args:
            **options: The options.

        Raises:
            ConfigError: If the scheduler does not support a value.
        """
        self._use(Config({**self.config, **options}))

    @property
    def config(self) -> Config:
        """The configuration: every option of diffusers' scheduler, as an entry and as an attribute."""
        return self._config

    @property
    def compatibles(self) -> list[type]:
        """The schedulers of diffusers that can be made from this configuration; diffusers must be installed."""
        try:
            diffusers: Any = importlib.import_module("diffusers")
        except ImportError as e:
            raise ConfigError("compatibles are classes of diffusers, which is not installed") from e
        karras = [scheduler.name for scheduler in diffusers.schedulers.KarrasDiffusionSchedulers]
        own = getattr(getattr(diffusers.schedulers, self._name, None), "_compatibles", karras)
        classes = [getattr(diffusers, name, None) for name in sorted({self._name, *own})]
        # Where a library is missing that a class needs, diffusers has a dummy of that name.
        return [cls for cls in classes if cls is not None and type(cls).__name__ != "DummyObject"]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {to_json(self.config)}"

    def __len__(self) -> int:
        """Return the number of timesteps that the network was trained with."""
        if self.schedule is not None:
            return self.schedule.timesteps
        return int(value_of(self.config, "num_train_timesteps", DEFAULTS[self._name]["num_train_timesteps"]))

    def __getattr__(self, name: str) -> Any:
        config = self.__dict__.get("_config", {})
        if name in config and not name.startswith("_"):
            warnings.warn(f"read scheduler.config.{name} instead of scheduler.{name}", FutureWarning, stacklevel=2)
            return config[name]
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
