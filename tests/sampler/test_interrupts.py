"""Signals, forks and the end of the interpreter while a sampler runs: each ends in seconds, in a process of its own."""

from __future__ import annotations

import os

import pytest

from fastdiff.backends.native import extension
from tests.support import warm

WAIT = 240  # seconds
BACKENDS = ["eager", pytest.param("native", marks=pytest.mark.skipif(extension() is None, reason="it is not built"))]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")

START = """
import faulthandler, os, signal, sys, threading, time
import torch
import fastdiff
from fastdiff.errors import Cancelled, ReentrantCall
from fastdiff.sampler import Sampler
from tests.sampler.by_hand import SCHEDULE
from tests.support.unets import TINY, random_unet

faulthandler.enable()
torch.set_num_threads(1)
BACKEND = sys.argv[1]
unet = random_unet(TINY)
sampler = Sampler(unet, SCHEDULE, backend=BACKEND)
expected = sampler.sample(2, steps=3).images

def same(other=sampler):
    assert torch.equal(other.sample(2, steps=3).images, expected)

def within_a_step(call):
    # Run a call, and `call` in the middle of its second evaluation.
    count = []
    if BACKEND == "eager":
        def middle(*_):
            count.append(1)
            if len(count) == 2:
                hook.remove()
                call()
        hook = unet.mid_block.register_forward_pre_hook(middle)
    else:
        runner = sampler._runners.runner(2, (3, 8, 8))
        follow = runner._follow
        def middle(state):
            count.append(1)
            if len(count) == 2:
                del runner._follow
                call()
            return follow(state)
        runner._follow = middle
    return sampler.sample(2, steps=3)

def alarm(handler):
    def call():
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        end = time.monotonic() + 20
        while time.monotonic() < end and not handled:
            pass
    handled = []
    inner = handler
    def handler(*_):
        handled.append(1)
        inner()
    return call

def child(work, seconds=60):
    # Fork, run `work` in the child, and return how the child ended; None if it hangs.
    pid = os.fork()
    if pid == 0:
        try:
            work()
            sys.stdout.flush()
            os._exit(0)
        except BaseException as e:
            print("in the child:", repr(e), flush=True)
            os._exit(1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None
"""


def run(code: str, backend: str) -> str:
    """Run a script after `START`; it fails if it does not end, or ends with an error."""
    result = warm.run("-c", START + code, backend, timeout=WAIT)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_signal_handlers_that_interrupt_a_step(backend: str) -> None:
    """Each raises, is refused at once, or ends the call, and the sampler draws the same images afterwards."""
    run(
        """
class Stop(Exception):
    pass

def fail():
    raise Stop

try:
    within_a_step(alarm(fail))
except Stop:
    pass
else:
    raise SystemExit("the handler's exception is lost")
same()

try:
    within_a_step(alarm(lambda: sampler.sample(2, steps=1)))
except ReentrantCall:
    pass
else:
    raise SystemExit("a call from a handler was not refused")
same()

try:
    within_a_step(alarm(sampler.cancel))
except Cancelled:
    pass
else:
    raise SystemExit("cancel in a handler did nothing")
same()

other = Sampler(unet, SCHEDULE, backend=BACKEND)
inner = []
assert torch.equal(within_a_step(alarm(lambda: inner.append(other.sample(2, steps=3).images))).images, expected)
assert torch.equal(inner[0], expected)

try:
    within_a_step(alarm(sampler.close))
except Cancelled:
    pass
else:
    raise SystemExit("close in a handler did nothing")
assert not sampler._runners.prepared
""",
        backend,
    )


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), BACKENDS[1]])
def test_interrupts_at_any_moment(backend: str) -> None:
    """A hundred exceptions of a handler, each at another moment of a call; no lock stays taken, no image is wrong."""
    run(
        """
class Stop(Exception):
    pass

def handler(*_):
    raise Stop

signal.signal(signal.SIGALRM, handler)
started = time.monotonic()
sampler.sample(2, steps=3)
whole = time.monotonic() - started
ended = 0
for i in range(100):
    try:
        signal.setitimer(signal.ITIMER_REAL, max(whole * 1.2 * i / 100, 1e-5))
        sampler.sample(2, steps=3)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Stop:
        ended += 1
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    done = []
    def check():
        same()
        done.append(1)
    thread = threading.Thread(target=check, daemon=True)
    thread.start()
    thread.join(60)
    if not done:
        os._exit(7)
assert ended > 10, ended
same()
""",
        backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fork_while_another_thread_is_within_a_step(backend: str) -> None:
    """The child's sampler waits for no thread that the child does not have; the parent goes on."""
    run(
        """
within, forked = threading.Event(), threading.Event()

def wait():
    within.set()
    assert forked.wait(60)

def work():
    results.append(within_a_step(wait).images)

results = []
thread = threading.Thread(target=work)
thread.start()
assert within.wait(60)

def draws():
    assert not sampler._loop._turns._working
    if BACKEND == "eager":
        same()
    else:
        # The engine's threads in a forked child are not what is tested here.
        sampler._loop._turns.take(lambda: None)
    sampler.cancel()

status = child(draws)
forked.set()
thread.join(60)
assert status == 0, status
assert torch.equal(results[0], expected)
same()
""",
        backend,
    )


def test_a_fork_within_a_step_of_the_same_thread() -> None:
    """The child goes on with the call; a call from within the step is still refused there."""
    run(
        """
def fork():
    def goes_on():
        try:
            sampler.sample(1, steps=1)
        except ReentrantCall:
            return
        raise SystemExit("not refused")
    assert child(goes_on) == 0

assert torch.equal(within_a_step(fork).images, expected)
same()
""",
        "eager",
    )


def test_a_fork_while_another_thread_runs_an_accelerated_pipeline() -> None:
    run(
        """
from diffusers import DDIMPipeline, DDIMScheduler
from tests.support.unets import diffusers_twin

pipeline = DDIMPipeline(unet=diffusers_twin(random_unet(TINY)), scheduler=DDIMScheduler())
pipeline.set_progress_bar_config(disable=True)
fastdiff.accelerate(pipeline, "eager")
within, forked = threading.Event(), threading.Event()
bar = pipeline.progress_bar

def wait(timesteps):
    within.set()
    assert forked.wait(60)
    return bar(timesteps)

pipeline.progress_bar = wait
thread = threading.Thread(target=lambda: pipeline(1, num_inference_steps=1))
thread.start()
assert within.wait(60)

def draws():
    pipeline.progress_bar = bar
    pipeline(1, num_inference_steps=1)

status = child(draws)
forked.set()
thread.join(60)
assert status == 0, status
""",
        "eager",
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_interpreter_ends_while_a_daemon_thread_samples(backend: str) -> None:
    run(
        """
started = threading.Event()

def work():
    while True:
        sampler.sample(2, steps=100, callback=lambda _: started.set())

for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
assert started.wait(60)
""",
        backend,
    )


def test_ctrl_c_in_a_step() -> None:
    run(
        """
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    within_a_step(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(20)))
except KeyboardInterrupt:
    pass
else:
    raise SystemExit("lost")
same()
""",
        "eager",
    )
