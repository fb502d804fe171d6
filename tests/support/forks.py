"""A process that samples with two threads, forks children that sample or end in various ways, and ends itself.

Run as a script, it prints a line "name code" for each child, negative for one that a signal ended. When its interpreter
ends, daemon threads sample.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastdiff import NoiseSchedule, Sampler, UNet, UNetConfig

LIMIT_S = 60
torch.set_num_threads(2)
torch.manual_seed(0)
CONFIG = UNetConfig(
    sample_size=32, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
    down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
)  # fmt: skip
UNET = UNet(CONFIG).eval()
SCHEDULE = NoiseSchedule()
N = 16  # enough numbers for torch to use its threads for the noise and the update


def sampler(backend: str = "native") -> Sampler:
    return Sampler(UNET, SCHEDULE, backend=backend)


def draw(sampler: Sampler) -> np.ndarray:
    """Return images as an array, because comparing them in torch would use its threads."""
    return sampler.sample(N, steps=2).images.numpy()


USED = sampler()
EXPECTED = draw(USED)
assert torch.rand(1 << 20).sin().sum() > 0  # torch's threads have run


def check(right: bool = True) -> None:
    if not right:
        os._exit(1)


def draws_the_same(sampler: Sampler = USED) -> None:
    check(np.array_equal(draw(sampler), EXPECTED) and torch.get_num_threads() == 2)


def draws_with_another_backend() -> None:
    check(bool(np.abs(draw(sampler("eager")) - EXPECTED).max() < 1e-3))


def goes_on_with_a_stream() -> None:
    check(np.array_equal([event.x for event in STREAM][-1].numpy(), EXPECTED))


def draws_in_threads() -> None:
    wrong = []

    def work() -> None:
        wrong.append(not np.array_equal(draw(sampler()), EXPECTED))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(wrong == [False] * 3)


def closes() -> None:
    USED.close()


def deletes() -> None:
    global USED
    del USED


def forks_again() -> None:
    draws_the_same()
    check(code_of(draws_the_same) == 0)


def same(_: int) -> bool:
    return np.array_equal(draw(USED), EXPECTED)


def draws_in_a_pool() -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        check(pool.map(same, range(3)) == [True] * 3)


def leaves_daemons() -> None:
    """Ends while threads sample."""

    def work(backend: str) -> None:
        mine = sampler(backend)
        while True:
            draw(mine)

    for backend in ("native", "native", "eager"):
        threading.Thread(target=work, args=(backend,), daemon=True).start()
    time.sleep(1.0)


def serves_until_it_is_asked_to_end() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    while True:
        draw(USED)


def code_of(child: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        signal.alarm(LIMIT_S)
        child()
        sys.exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


STREAM = USED.stream(N, steps=2)
next(STREAM)
CHILDREN = (
    sys.exit,
    closes,
    deletes,
    draws_the_same,
    draws_with_another_backend,
    goes_on_with_a_stream,
    draws_in_threads,
    draws_in_a_pool,
    forks_again,
    serves_until_it_is_asked_to_end,
    leaves_daemons,
)


def main() -> None:
    names = sys.argv[1:]
    for child in CHILDREN:
        if not names or child.__name__ in names:
            print(child.__name__, code_of(child), flush=True)
    if not names or "while_sampling" in names:
        mine, stop = sampler(), threading.Event()

        def work() -> None:
            while not stop.is_set():
                draw(mine)

        thread = threading.Thread(target=work)
        thread.start()
        codes = [code_of(child) for child in (sys.exit, closes, draws_the_same, draws_the_same)]
        stop.set()
        thread.join()
        print("while_sampling", max(map(abs, codes)), flush=True)
    leaves_daemons()


if __name__ == "__main__":
    main()
