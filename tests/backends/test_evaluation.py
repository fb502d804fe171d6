"""`Evaluation`: a network runs in evaluation mode while its modules keep their modes, and stays the same network."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastdiff.backends.evaluation import Conversion, Evaluation
from fastdiff.errors import BackendError
from fastdiff.unet import UNet
from tests.sampler.by_hand import TINY_DROPOUT
from tests.support.unets import random_unet

X = torch.ones(2, 3)
DOUBLE = Conversion(torch.device("cpu"), torch.float64, None)


class Net(nn.Module):
    """Multiplies by a weight; ``drop`` drops half of the result in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x * self.weight)


def dropped(out: Tensor) -> bool:
    """Return whether dropout was on: it doubles what it keeps."""
    return bool(((out == 0) | (out == 2)).all())


def modes(net: nn.Module) -> list[bool]:
    return [m.training for m in net.modules()]


def test_the_twin_shares_everything_but_modes() -> None:
    unet = random_unet(TINY_DROPOUT).train()
    unet.mid_block.eval()
    before = modes(unet)
    twin = Evaluation(unet).follow()
    assert modes(unet) == before
    assert type(twin) is UNet
    assert not any(modes(twin))
    assert all(a is b for a, b in zip(unet.parameters(), twin.parameters(), strict=True))
    assert all(a is not b for a, b in zip(unet.modules(), twin.modules(), strict=True))
    assert [name for name, _ in unet.named_modules()] == [name for name, _ in twin.named_modules()]


# Ways in which a module may refer to another one ----------------------------------------------------------------------


def in_a_list(net: Net) -> None:
    net.layers = [None, (net.drop, 3)]
    net.run = types.MethodType(lambda self, x: self.layers[1][0](x), net)


def in_a_dict(net: Net) -> None:
    layers = {"drop": net.drop}
    net.layers = layers
    net.run = types.MethodType(lambda self, x: self.layers["drop"](x), net)


def as_a_bound_method(net: Net) -> None:
    net.run = net.drop.forward


def as_a_partial(net: Net) -> None:
    net.run = functools.partial(lambda module, x: module(x), net.drop)


def in_a_closure(net: Net) -> None:
    drop = net.drop
    net.run = lambda x: drop(x)


def in_a_closure_of_a_closure(net: Net) -> None:
    def inner(x: Tensor) -> Tensor:
        return net.drop(x)

    net.run = lambda x: inner(x)


def as_a_default_value(net: Net) -> None:
    net.run = lambda x, drop=net.drop: drop(x)


def as_a_weak_reference(net: Net) -> None:
    net.owner = weakref.ref(net)
    net.run = types.MethodType(lambda self, x: self.owner().drop(x), net)


def hidden_from_modules(net: Net) -> None:
    net.__dict__["hidden"] = net.drop
    net.run = types.MethodType(lambda self, x: self.hidden(x), net)


def as_a_replaced_forward(net: Net) -> None:
    former = net.drop.forward
    net.drop.forward = lambda x: former(x)
    net.run = net.drop


def as_a_child_of_its_child(net: Net) -> None:
    net.drop.owner = net
    net.run = types.MethodType(lambda self, x: self.drop.owner.drop(x), net)


def within_itself(net: Net) -> None:
    ring: list[Any] = [net.drop]
    ring.append(ring)
    net.ring = ring
    net.run = types.MethodType(lambda self, x: self.ring[0](x), net)


WAYS = [
    in_a_list, in_a_dict, as_a_bound_method, as_a_partial, in_a_closure, in_a_closure_of_a_closure, as_a_default_value,
    as_a_weak_reference, hidden_from_modules, as_a_replaced_forward, as_a_child_of_its_child,
]  # fmt: skip


class Through(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x * self.weight)


@pytest.mark.parametrize("way", WAYS)
def test_references_of_all_kinds_lead_to_twins(way: Callable[[Net], None]) -> None:
    net = Through().train()
    way(net)
    evaluation = Evaluation(net)
    for _ in range(2):
        assert torch.equal(evaluation.follow()(X), X)
        evaluation.give_back()
    assert all(modes(net))
    assert dropped(net(X)), "the network itself was changed"


class Holder:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)


def held_by_an_object(net: Net) -> nn.Module:
    net.run = Holder(net.drop)
    return net


def held_deeper(net: Net) -> nn.Module:
    holder = Holder(net.drop)
    net.run = lambda x: holder(x)
    return net


def in_a_ring(net: Net) -> nn.Module:
    within_itself(net)
    return net


def scripted(net: Net) -> nn.Module:
    return torch.jit.script(Net().train())


def compiled(net: Net) -> nn.Module:
    return torch.compile(Net().train(), backend="eager")


def compiled_in_place(net: Net) -> nn.Module:
    net.run = nn.Identity()
    net.compile(backend="eager")
    return net


def with_slots(net: Net) -> nn.Module:
    class Slotted(Net):
        __slots__ = ("extra",)

    return Slotted()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (held_by_an_object, "'run' refers to modules"),
        (held_deeper, "'run' refers to modules"),
        (in_a_ring, "'ring' refers to modules"),
        (scripted, "TorchScript"),
        (compiled, "torch.compile has compiled it"),
        (compiled_in_place, "torch.compile has compiled it"),
        (with_slots, "Slotted has __slots__"),
    ],
)
def test_what_can_have_no_twin_is_refused_in_training_alone(make: Callable[[Net], nn.Module], words: str) -> None:
    net = make(Through()).train()
    evaluation = Evaluation(net)
    with pytest.raises(BackendError) as caught:
        evaluation.follow()
    assert words in str(caught.value)
    assert "; call .eval() on it" in str(caught.value)
    assert all(modes(net))
    net.eval()
    assert torch.equal(evaluation.follow()(X), X)
    assert not any(modes(net))


@pytest.mark.parametrize("way", WAYS)
def test_converted_twins(way: Callable[[Net], None]) -> None:
    """They have one copy of each weight in another dtype, which follows the present weights."""
    net = Through().train()
    net.tied = net.weight
    way(net)
    evaluation = Evaluation(net)
    twin = evaluation.follow(DOUBLE)
    assert twin(X.double()).dtype == torch.float64
    assert twin.tied is twin.weight is not net.weight
    with torch.no_grad():
        net.weight.data.mul_(2)
    copied = twin.weight
    assert evaluation.follow(DOUBLE) is twin
    assert twin.weight is copied
    assert torch.equal(twin(X.double()), 2 * X.double())
    net.weight = nn.Parameter(torch.full((3,), 3.0))
    assert torch.equal(evaluation.follow(DOUBLE)(X.double()), 3 * X.double())
    assert net.weight.dtype == torch.float32
    assert evaluation.follow().weight is net.weight
    assert all(modes(net))


def test_weights_that_modules_hold_elsewhere_are_converted() -> None:
    """An LSTM has a list of its weights besides its parameters."""
    net = nn.LSTM(3, 4).train()
    evaluation = Evaluation(net)
    for _ in range(2):
        got = evaluation.follow(DOUBLE)(X.double())[0]
        torch.testing.assert_close(got, copy.deepcopy(net).double().eval()(X.double())[0])
        with torch.no_grad():
            net.weight_hh_l0.mul_(2)
    torch.testing.assert_close(evaluation.follow()(X)[0], net(X)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_converted_networks_without_twins() -> None:
    """TorchScript is copied, as its modules have no twins; what refers to modules in hidden ways is refused."""
    net = scripted(Net())
    assert torch.equal(Evaluation(net).follow(DOUBLE)(X.double()), X.double())
    assert all(modes(net))
    with pytest.raises(BackendError, match=r"cannot be run in float64 on cpu .*'run' refers .*; convert it"):
        Evaluation(held_by_an_object(Through().eval())).follow(DOUBLE)


# It stays the same network --------------------------------------------------------------------------------------------


def another_parameter(net: Net) -> None:
    net.weight = nn.Parameter(torch.full((3,), 2.0))


@torch.no_grad()
def in_place(net: Net) -> None:
    net.weight.mul_(2)


def another_module(net: Net) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    net.drop = Double()


def a_hook(net: Net) -> None:
    net.drop.register_forward_hook(lambda module, inputs, out: 2 * out)


def a_pre_hook(net: Net) -> None:
    net.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def a_patched_forward(net: Net) -> None:
    net.forward = lambda x: 2 * Net.forward(net, x)


def a_parametrization(net: Net) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    parametrize.register_parametrization(net, "weight", Double())


def another_class(net: Net) -> None:
    class Other(Net):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net.__class__ = Other


@pytest.mark.parametrize(
    "change",
    [
        another_parameter,
        in_place,
        another_module,
        a_hook,
        a_pre_hook,
        a_patched_forward,
        a_parametrization,
        another_class,
    ],
)
def test_changes_are_followed(change: Callable[[Net], None]) -> None:
    net = Net().train()
    evaluation = Evaluation(net)
    assert torch.equal(evaluation.follow()(X), X)
    change(net)
    assert torch.equal(evaluation.follow()(X), 2 * X)
    assert net.training


def test_what_is_removed_is_gone() -> None:
    net = Net().train()
    net.extra, net.more = 1, nn.Identity()
    hook = net.register_forward_hook(lambda module, inputs, out: 2 * out)
    evaluation = Evaluation(net)
    twin = evaluation.follow()
    assert torch.equal(twin(X), 2 * X)
    hook.remove()
    del net.extra, net.more
    assert torch.equal(evaluation.follow()(X), X)
    assert not hasattr(twin, "extra")
    assert not hasattr(twin, "more")


def test_unchanged_networks_keep_their_objects() -> None:
    """A compiled network would be compiled anew otherwise."""
    net = Through().train()
    in_a_list(net)
    evaluation = Evaluation(net)
    twin = evaluation.follow()
    before = {name: id(value) for name, value in vars(twin).items()}
    assert evaluation.follow() is twin
    assert {name: id(value) for name, value in vars(twin).items()} == before


class Counting(Net):
    """Keeps things on itself, as caches and probes do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.kept = "to delete"

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        self.steps = [self.drop]
        if hasattr(self, "kept"):
            del self.kept
        return self.drop(x)


def test_what_a_forward_sets_is_set_on_the_module() -> None:
    net = Counting().train()
    evaluation = Evaluation(net)
    for calls in (1, 2, 3):
        evaluation.follow()(X)
        evaluation.give_back()
        assert net.calls == calls
        assert net.last is X
        assert net.steps == [net.drop]
        assert not hasattr(net, "kept")
        assert all(modes(net))
    net.calls = 10
    evaluation.follow()(X)
    evaluation.give_back()
    assert net.calls == 11


def test_running_statistics_are_not_changed() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    evaluation = Evaluation(net)
    x = torch.rand(4, 3) + 5
    assert torch.equal(evaluation.follow()(x), copy.deepcopy(net).eval()(x))
    evaluation.give_back()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_twins_are_freed() -> None:
    net = Net()
    evaluation = Evaluation(net)
    twin = weakref.ref(evaluation.follow())
    del evaluation
    assert twin() is None
