"""A network that was changed otherwise than in its weights is refused by name, or its own code runs it."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.backends import native
from fastdiff.backends.network import unsupported_changes
from fastdiff.errors import BackendError
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNet
from tests.support.changed import CHANGES, GLOBAL_CHANGES, attribute, circular, twice
from tests.support.unets import TINY, change, diffusers_twin, random_unet

SCHEDULE = NoiseSchedule("linear", 100, beta_end=0.1)
needs_native = pytest.mark.skipif(native.extension() is None, reason="the native engine is not built")


def images(unet: nn.Module, **options: Any) -> Tensor:
    return Sampler(unet, SCHEDULE, **options).sample(1, steps=2).images


def by_hand(unet: UNet) -> Tensor:
    """Return images of the module itself, called by a sampler that knows nothing of it but its outputs."""

    class Plain(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = unet(x, t)
            return out

    return images(Plain().eval(), shape=(3, 8, 8), backend="eager")


RUNS = ["circular", "_conv_forward", "eps", "num_groups", "forward of a block", "hook", "class in place", "weight norm"]


@needs_native
@pytest.mark.parametrize("name", RUNS)
def test_auto_runs_the_module_itself_and_says_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    unet = random_unet(TINY)
    edit, words = CHANGES[name]
    edit(unet)
    with caplog.at_level(logging.INFO, "fastdiff"):
        sampler = Sampler(unet, SCHEDULE)
    (record,) = (r for r in caplog.records if r.name == "fastdiff")
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("backend auto: eager; native cannot: the network is not what its config")
    assert words in record.getMessage()
    assert sampler.backend == "eager"
    torch.testing.assert_close(sampler.sample(1, steps=2).images, by_hand(unet), rtol=1e-4, atol=1e-5)


@needs_native
@pytest.mark.parametrize("name", CHANGES)
def test_native_refuses_by_name_before_and_after_its_first_call(name: str) -> None:
    edit, words = CHANGES[name]
    unet = random_unet(TINY)
    sampler = Sampler(unet, SCHEDULE, backend="native")
    sampler.sample(1, steps=1)
    edit(unet)
    for attempt in (lambda: sampler.sample(1, steps=1), lambda: Sampler(unet, SCHEDULE, backend="native")):
        with pytest.raises(BackendError) as caught:
            attempt()
        assert words in str(caught.value)


@needs_native
@pytest.mark.parametrize("name", GLOBAL_CHANGES)
def test_native_refuses_changes_of_the_process(name: str) -> None:
    edit, words = GLOBAL_CHANGES[name]
    unet = random_unet(TINY)
    sampler = Sampler(unet, SCHEDULE, backend="native")
    expected = sampler.sample(1, steps=1).images
    with edit(), pytest.raises(BackendError) as caught:
        sampler.sample(1, steps=1)
    assert words in str(caught.value)
    assert torch.equal(sampler.sample(1, steps=1).images, expected)


@needs_native
@pytest.mark.parametrize("changed", [{"center_input_sample": True}, {"freq_shift": 1}, {"flip_sin_to_cos": False}])
def test_another_configuration_of_the_same_modules_is_run(changed: dict[str, Any]) -> None:
    unet = random_unet(TINY)
    sampler = Sampler(unet, SCHEDULE, backend="native")
    before = sampler.sample(1, steps=2).images
    unet.config = change(**changed)
    after = sampler.sample(1, steps=2).images
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, by_hand(unet), rtol=1e-4, atol=1e-5)


def forward_of_conv_out(unet: Any) -> None:
    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        return 2 * F.conv2d(x, self.weight, self.bias, padding=1)

    unet.conv_out.forward = types.MethodType(forward, unet.conv_out)


def without_hook(unet: Any) -> None:
    unet.time_embedding.linear_1._forward_hooks.clear()


STEPS: list[Callable[[Any], Any]] = [
    circular, CHANGES["eps"][0], CHANGES["hook"][0], without_hook, forward_of_conv_out, CHANGES["class in place"][0],
]  # fmt: skip


@pytest.mark.parametrize("make", [random_unet, lambda config: diffusers_twin(random_unet(config))])
def test_a_converted_copy_follows_changes(make: Callable[..., Any]) -> None:
    unet = make(TINY)
    sampler = Sampler(unet, SCHEDULE, backend="eager", dtype="float64")
    before = sampler.sample(1, steps=2).images
    assert torch.equal(sampler.sample(1, steps=2).images, before)
    for step in STEPS:
        step(unet)
        after = sampler.sample(1, steps=2).images
        assert (after - before).abs().max() > 1e-5
        assert torch.equal(after, images(unet, backend="eager", dtype="float64"))
        before = after
    if not isinstance(unet, UNet):
        unet.register_to_config(center_input_sample=True)
        assert (sampler.sample(1, steps=2).images - before).abs().max() > 1e-3


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Let Dynamo trace without a compiler behind it, and list what was compiled."""
    made: list[Any] = []
    compile_ = torch.compile

    def quick(function: Any, **options: Any) -> Any:
        made.append(function)
        return compile_(function, **{**options, "mode": None, "backend": "eager"})

    monkeypatch.setattr(torch, "compile", quick)
    monkeypatch.setattr("shutil.which", lambda *_: "c++")
    yield made
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_code_follows_changes(quick_compiler: list[Any]) -> None:
    """Dynamo's own guards see neither hooks nor methods of classes that are replaced after it has compiled."""
    unet = random_unet(TINY)
    sampler = Sampler(unet, SCHEDULE, backend="compiled")
    before = sampler.sample(1, steps=2).images
    count = len(quick_compiler)
    unet.conv_in.weight.data.mul_(1.5)
    before = sampler.sample(1, steps=2).images
    assert len(quick_compiler) == count, "compiled anew for other weights"
    for step in STEPS[1:4]:
        step(unet)
        after = sampler.sample(1, steps=2).images
        assert (after - before).abs().max() > 1e-5
        torch.testing.assert_close(after, images(unet, backend="eager"), rtol=1e-4, atol=1e-5)
        before = after
    forward = nn.GroupNorm.forward
    with attribute(nn.GroupNorm, "forward", lambda self, x: 2 * forward(self, x)):
        torch.testing.assert_close(
            sampler.sample(1, steps=2).images, images(unet, backend="eager"), rtol=1e-4, atol=1e-5
        )
    handle = nn.modules.module.register_module_forward_hook(functools.partial(twice))
    try:
        torch.testing.assert_close(
            sampler.sample(1, steps=2).images, images(unet, backend="eager"), rtol=1e-4, atol=1e-5
        )
    finally:
        handle.remove()
    assert torch.equal(sampler.sample(1, steps=2).images, before)
    assert unsupported_changes(random_unet(TINY)) == [], "Dynamo leaves a change of nn.Module behind"
