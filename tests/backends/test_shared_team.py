"""Check which threads engines of one process share, and what is left of them after a fork, an exit or a failure."""

from __future__ import annotations

import gc
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastdiff import NoiseSchedule, Sampler
from fastdiff.backends.native import threads
from fastdiff.backends.native.extension import extension as load
from fastdiff.errors import BackendError
from tests.support import warm
from tests.support.unets import TINY, random_unet

extension = load()
pytestmark = [
    pytest.mark.skipif(extension is None, reason="the extension is not built"),
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them"),
]


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    monkeypatch.setattr(threads, "number", lambda: 3)


def threads_now() -> int:
    return len(os.listdir("/proc/self/task"))


def settled(expected: int) -> int:
    """Return the number of threads; one that was joined may be listed a moment longer."""
    end = time.monotonic() + 20
    while threads_now() != expected and time.monotonic() < end:
        time.sleep(0.01)
    return threads_now()


def vary(samplers: list[Sampler], calls: int) -> None:
    for i in range(calls):
        size = (16, 24, 32)[i % 3]
        samplers[i % len(samplers)].sample(1 + i % 5, size=size, steps=1)


def samplers(n: int) -> list[Sampler]:
    return [Sampler(random_unet(TINY), NoiseSchedule(), backend="native") for _ in range(n)]


@pytest.mark.parametrize(
    ("n", "calls"), [(1, 15), (16, 16), *(pytest.param(*c, marks=pytest.mark.slow) for c in [(64, 64), (8, 500)])]
)
def test_samplers_share_the_threads_of_one_team(n, calls):
    gc.collect()
    before = threads_now()
    several = samplers(n)
    assert threads_now() == before, "there are no threads before something runs"
    vary(several, calls)
    assert settled(before + 2) == before + 2
    for sampler in several:
        sampler.close()
    del several, sampler
    gc.collect()
    assert settled(before) == before, "a team ends with the last engine that uses it"


def test_different_samplers_in_different_threads():
    several = samplers(4)
    expected = several[0].sample(2, steps=4).images
    before, most, wrong = threads_now(), [0], []

    def work(sampler: Sampler) -> None:
        for _ in range(5):
            wrong.append(not torch.equal(sampler.sample(2, steps=4).images, expected))
            most[0] = max(most[0], threads_now())

    workers = [threading.Thread(target=work, args=(sampler,)) for sampler in several]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == [False] * 20
    assert most[0] <= before + len(workers)


def exit_code(work: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        code = 100
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def limited_memory(free: int) -> Callable[[], None]:
    """Limit the memory of this process to what it has and ``free`` bytes; return what lifts the limit."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    former = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + free, former[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_AS, former)


@pytest.mark.parametrize("stacks", [0, 1, 3, 6])
def test_threads_that_cannot_be_started(monkeypatch, stacks):
    """Without room for the stacks of all of them, of which libc keeps a few; the sampler works once there is room."""
    monkeypatch.setattr(threads, "number", lambda: 17)
    sampler = samplers(1)[0]
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    room = stacks * (stack if 0 < stack < 1 << 30 else 8 << 20) + (4 << 20)

    def work() -> int:
        before = threads_now()
        lift = limited_memory(room)
        try:
            sampler.sample(1, steps=1)
            return 1
        except BackendError as e:
            lift()
            if "of 17 of the engine cannot be started" not in str(e) or "set_num_threads" not in str(e):
                return 2
        if settled(before) != before:
            return 3
        sampler.sample(1, steps=1)
        return 0 if settled(before + 16) == before + 16 else 4

    assert exit_code(work) == 0


def test_no_memory_for_the_working_space():
    sampler = samplers(1)[0]

    def work() -> int:
        sampler.sample(1, steps=1)  # threads and buffers are there
        x, out, index = torch.zeros(1, 1, 8, 8), torch.zeros(1, 8, 8, 16), torch.zeros(1, dtype=torch.int64)
        maps = torch.zeros(1, 8, 8, 1 << 18)  # for a space beyond what the C library holds in reserve
        engine = extension.Engine("", 3, x=x, out=out, out_channels=1, timestep=index, label=index)
        engine.attention(src=[maps, maps], heads=1, head_dim=1 << 18, text=None, norm=None, bf16=False, dst=maps)
        lift = limited_memory(engine.space // 4)
        try:
            engine.run(0, 1)
            return 1
        except BackendError as e:
            lift()
            return 0 if "bytes of the engine's working space" in str(e) else 2

    assert exit_code(work) == 0


@pytest.fixture(scope="module")
def forks() -> dict[str, int]:
    done = warm.run("-m", "tests.support.forks", timeout=550)
    codes = {name: int(code) for name, code in (line.split() for line in done.stdout.splitlines())}
    assert done.stderr == ""
    return {**codes, "itself": done.returncode}


@pytest.mark.parametrize(
    "child",
    [
        "exit", "closes", "deletes", "draws_the_same", "draws_with_another_backend", "goes_on_with_a_stream",
        "draws_in_threads", "draws_in_a_pool", "forks_again", "serves_until_it_is_asked_to_end", "leaves_daemons",
        "while_sampling", "itself",
    ],
)  # fmt: skip
@pytest.mark.xdist_group("forks")
def test_forks_and_exits(forks, child):
    """Neither hangs nor crashes, and draws the right images (tests/support/forks.py)."""
    assert forks[child] == 0
