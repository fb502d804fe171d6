"""``fastdiff serve`` whose drawing process fails when an image of a certain seed takes a step: for tests of faults.

python -m tests.support.faulty serve MODEL... takes what ``fastdiff serve`` does. Everything else is fastdiff's own.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

HANGS = 990_001  # a step that does not end, until there is the file that GOES_ON names in the environment
SMALL_MEMORY = 990_002  # memory suffices for two images
NO_MEMORY = 990_003  # memory suffices for no image
STICKY = 990_004  # an error after which no device of CUDA does anything
GOES_ON = "FASTDIFF_TEST_GOES_ON"


def enter(connection: Connection, setup: bytes, parent: int) -> None:
    """Run the drawing process, whose steps fail on request."""
    import torch

    from fastdiff.core.slots import Slots
    from fastdiff.serving import worker

    step = Slots.step

    def failing(self: Slots, runner: Any, slots: Sequence[int], previewed: Sequence[int] = ()) -> Any:
        seeds = set(self.state.seed[list(slots)].tolist())
        while HANGS in seeds and not os.path.exists(os.environ.get(GOES_ON, "")):
            time.sleep(0.05)
        if NO_MEMORY in seeds or (SMALL_MEMORY in seeds and len(slots) > 2):
            raise torch.OutOfMemoryError("CUDA out of memory (a test's)")
        if STICKY in seeds:
            raise RuntimeError("CUDA error: an illegal memory access was encountered (a test's)")
        return step(self, runner, slots, previewed)

    Slots.step = failing  # type: ignore[method-assign]
    worker.main(connection, setup, parent)


def main() -> None:
    """Run the command line with this drawing process."""
    from fastdiff import cli
    from fastdiff.serving import process
    from tests.support import faulty

    process.enter = faulty.enter  # by a name that the new process can import
    sys.argv[0] = "fastdiff"
    cli.main()


if __name__ == "__main__":
    main()
