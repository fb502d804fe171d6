"""The share of a process in a job, from what launchers put into the environment; no process talks to another."""

from __future__ import annotations

import os
from collections.abc import Mapping

from fastdiff.checks import from_environment
from fastdiff.errors import InvalidArgument


def share(ranks: int | None = None, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return the rank of this process and the number of ranks.

    RANK and WORLD_SIZE are torchrun's, SLURM_ARRAY_TASK_ID and its companions those of a Slurm array, and
    JOB_COMPLETION_INDEX that of an indexed job of Kubernetes, which does not say how many there are: ``ranks`` does.
    Several at once, as torchrun in each task of an array, are multiplied. (0, 1) without any.
    """
    rank, world = 0, 1
    for index, count in (_slurm(environment), _kubernetes(environment, ranks), _torchrun(environment)):
        rank, world = rank * count + index, world * count
    return rank, world


def _torchrun(environment: Mapping[str, str]) -> tuple[int, int]:
    if "RANK" not in environment:
        return 0, 1
    return _checked(
        "RANK",
        from_environment("RANK", None, environment),
        "WORLD_SIZE",
        from_environment("WORLD_SIZE", None, environment),
    )


def _slurm(environment: Mapping[str, str]) -> tuple[int, int]:
    name = "SLURM_ARRAY_TASK_ID"
    if name not in environment:
        return 0, 1
    first = from_environment("SLURM_ARRAY_TASK_MIN", 0, environment)
    step = from_environment("SLURM_ARRAY_TASK_STEP", 1, environment)
    count = max(from_environment("SLURM_ARRAY_TASK_COUNT", None, environment), 1)
    # The numbers of --array=1,5,6 have no step; two tasks of one share then divide it by their claims.
    return (from_environment(name, None, environment) - first) // max(step, 1) % count, count


def _kubernetes(environment: Mapping[str, str], ranks: int | None) -> tuple[int, int]:
    name = "JOB_COMPLETION_INDEX"
    if name not in environment:
        if ranks is not None:
            raise InvalidArgument(
                f"ranks={ranks} is for indexed jobs of Kubernetes, but {name} is not set; torchrun and Slurm say how "
                "many processes there are, and several commands on one folder need no number at all"
            )
        return 0, 1
    if ranks is None:
        raise InvalidArgument(f"{name} is set, so ranks= (--ranks) is needed: the completions of the Kubernetes job")
    return _checked(name, from_environment(name, None, environment), "ranks", ranks)


def _checked(name: str, index: int, of: str, count: int) -> tuple[int, int]:
    if not 0 <= index < count:
        raise InvalidArgument(f"{name}={index}, {of}={count}: the first must be from 0 to the second - 1")
    return index, count
