"""The share of a process, from the environment of torchrun, of a Slurm array, and of an indexed job of Kubernetes."""

from __future__ import annotations

import pytest

from fastdiff.bulk.ranks import share
from fastdiff.errors import InvalidArgument


def slurm(task: int, count: int, first: int = 0, step: int = 1) -> dict[str, str]:
    return {
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_COUNT": str(count),
        "SLURM_ARRAY_TASK_MIN": str(first),
        "SLURM_ARRAY_TASK_STEP": str(step),
    }


@pytest.mark.parametrize(
    ("environment", "ranks", "expected"),
    [
        ({}, None, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, None, (3, 8)),
        ({"WORLD_SIZE": "8"}, None, (0, 1)),
        (slurm(0, 4), None, (0, 4)),
        (slurm(7, 4, first=4), None, (3, 4)),
        (slurm(30, 4, step=10), None, (3, 4)),
        (slurm(9, 3, first=1), None, (2, 3)),  # --array=1,5,9: two tasks may have one share, and claims divide it
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}, None, (1, 2)),
        ({"JOB_COMPLETION_INDEX": "5"}, 6, (5, 6)),
        ({"JOB_COMPLETION_INDEX": "1", "RANK": "2", "WORLD_SIZE": "4"}, 3, (6, 12)),
        ({**slurm(1, 2), "RANK": "0", "WORLD_SIZE": "4"}, None, (4, 8)),
    ],
)
def test_shares(environment: dict[str, str], ranks: int | None, expected: tuple[int, int]) -> None:
    assert share(ranks, environment) == expected


@pytest.mark.parametrize(
    ("environment", "ranks", "words"),
    [
        ({"RANK": "3"}, None, "WORLD_SIZE is not set"),
        ({"RANK": "8", "WORLD_SIZE": "8"}, None, "RANK=8, WORLD_SIZE=8"),
        ({"RANK": "-1", "WORLD_SIZE": "8"}, None, "RANK='-1'"),
        ({"RANK": "one", "WORLD_SIZE": "8"}, None, "RANK='one'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, None, "WORLD_SIZE=0"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, None, "a whole number"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, None, "SLURM_ARRAY_TASK_COUNT is not set"),
        ({"JOB_COMPLETION_INDEX": "1"}, None, "--ranks"),
        ({"JOB_COMPLETION_INDEX": "4"}, 4, "JOB_COMPLETION_INDEX=4, ranks=4"),
        ({"JOB_COMPLETION_INDEX": ""}, 4, "JOB_COMPLETION_INDEX=''"),
        ({}, 4, "JOB_COMPLETION_INDEX is not set"),
        ({"RANK": "0", "WORLD_SIZE": "8"}, 4, "JOB_COMPLETION_INDEX is not set"),
    ],
)
def test_environments_that_make_no_sense(environment: dict[str, str], ranks: int | None, words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        share(ranks, environment)
    assert words in str(caught.value)
