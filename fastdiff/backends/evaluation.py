"""A network in evaluation mode, and in another dtype if asked for, whose modules stay as they are.

Others may train them, or sample with them, at the same time.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import gc
import operator
import types
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.errors import BackendError

MISSING = object()
# Attributes that every module has. All but the first two, dicts of parameters, buffers and hooks, are shared by a twin.
NEVER_SET = frozenset(vars(nn.Module()))
SHARED = NEVER_SET - {"training", "_modules"}
PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size, Tensor)
MOST_OBJECTS = 5000  # that are searched behind one attribute


@dataclasses.dataclass
class Pair:
    """A module and its twin; ``given`` has the twin's attributes as they were when it was brought up to date."""

    module: nn.Module
    twin: nn.Module
    given: dict[str, Any]

    def bring(self, wanted: dict[str, Any]) -> None:
        """Set the attributes of the twin; those that are the same object already are not touched."""
        mine = vars(self.twin)
        for name in mine.keys() - wanted.keys():
            del mine[name]
        for name, value in wanted.items():
            if mine.get(name, MISSING) is not value:
                mine[name] = value
        self.given = dict(mine)


class Conversion(NamedTuple):
    """Device, dtype and memory layout (None: as it is) of the weights of twins that have copies."""

    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format | None

    def of(self, t: Tensor) -> Tensor:
        """Return a converted copy, as ``nn.Module.to`` converts."""
        dtype = self.dtype if t.is_floating_point() or t.is_complex() else t.dtype
        layout = self.layout if self.layout is not None and t.ndim == 4 else torch.preserve_format
        made = t.detach().to(self.device, dtype, copy=True, memory_format=layout)
        return nn.Parameter(made, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else made


class Evaluation:
    """Twins of the modules of ``network``, which run in evaluation mode.

    A twin is an object of the module's class that has the same parameters, buffers, hooks and attributes, not copies
    of them. It differs in its mode and in its submodules, which are twins too. Where other attributes refer to modules
    of the network (lists, bound methods, closures, partial functions, weak references), those of a twin refer to twins.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self._pairs: dict[int, Pair] = {}  # by the module's id
        self._assigning: list[Pair] = []  # those whose forward may set attributes
        # What takes the place of modules and of converted weights, by the id of those, and the other way round.
        self._twins: dict[int, Any] = {}
        self._modules: dict[int, Any] = {}
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # weights and converted copies, by the weight's id

    def follow(self, to: Conversion | None = None) -> nn.Module:
        """Bring the twins up to date and return that of the network, with converted copies of the weights by ``to``.

        Where the network cannot have twins, it is returned itself if all of it is in evaluation mode, or a new copy if
        it is to be converted. Otherwise a `BackendError` names the module and the reason.
        """
        modules = list(self.network.modules())
        training = any(m.training for m in modules)
        for m in modules:
            reason = _without_twin(m)
            if reason is not None:
                if to is not None:
                    return _converted(self.network, to)
                if training:
                    raise self._refusal(m, reason, to)
                return self.network
        self._pairs = {id(m): self._pair(m) for m in modules}
        self._twins = {key: pair.twin for key, pair in self._pairs.items()}
        self._modules = {id(pair.twin): pair.module for pair in self._pairs.values()}
        former, self._copies = self._copies, {}
        if to is not None:
            for t in (*self.network.parameters(), *self.network.buffers()):
                self._copies[id(t)] = (t, self._copy(t, to, former))
            self._twins |= {key: copied for key, (_, copied) in self._copies.items()}
            self._modules |= {id(copied): t for t, copied in self._copies.values()}
        for pair in self._pairs.values():
            pair.bring(self._wanted(pair, training, to))
        # No forward of torch's own layers sets an attribute in evaluation mode.
        own = "torch.nn.modules."
        self._assigning = [pair for pair in self._pairs.values() if not type(pair.module).__module__.startswith(own)]
        return self._twins[id(self.network)]

    def give_back(self) -> None:
        """Set on the modules what forwards have set on their twins since, such as counts of calls."""
        for pair in self._assigning:
            mine, given = vars(pair.twin), pair.given
            if len(mine) == len(given) and all(map(operator.is_, mine.values(), given.values())):
                continue
            theirs = vars(pair.module)
            for name, value in mine.items():
                if value is not given.get(name, MISSING) and name not in NEVER_SET:
                    theirs[name] = _translated(value, self._modules)
            for name in given.keys() - mine.keys() - NEVER_SET:
                theirs.pop(name, None)
            pair.given = dict(mine)

    def _pair(self, m: nn.Module) -> Pair:
        known = self._pairs.get(id(m))
        return known if known is not None and type(known.twin) is type(m) else Pair(m, object.__new__(type(m)), {})

    def _wanted(self, pair: Pair, training: bool, to: Conversion | None) -> dict[str, Any]:
        """Return the attributes of a twin, with the same objects as before where nothing has changed."""
        mine, wanted = vars(pair.twin), dict(vars(pair.module))
        same = SHARED if to is None else SHARED - {"_parameters", "_buffers"}
        for name, value in wanted.items():
            if name in same or (to is None and isinstance(value, PLAIN)):
                continue
            wanted[name] = new = _translated(value, self._twins)
            held = mine.get(name, MISSING)
            if new is not value and type(held) is type(new) and _equal(held, new):
                wanted[name] = held  # so that a compiled network sees the same object as before
            if (training or to is not None) and name not in NEVER_SET and self._reaches_a_module(new):
                raise self._refusal(pair.module, f"its attribute {name!r} refers to modules of the network", to)
        return {**wanted, "training": False}

    @torch.inference_mode(False)  # so that the copy can be written again in any mode
    @torch.no_grad()
    def _copy(self, t: Tensor, to: Conversion, former: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        """Return the converted copy of a weight, with its present values.

        The values are copied every time: fused optimizers and edits of ``.data`` change them without a trace.
        """
        held = former.get(id(t), (t, None))[1]
        if held is None or held.shape != t.shape or held.is_floating_point() != t.is_floating_point():
            return to.of(t)
        return held.copy_(t)

    def _reaches_a_module(self, value: Any) -> bool:
        """Return whether an object that is not translated refers, itself or by others, to a module of the network."""
        seen: set[int] = set()
        waiting = collections.deque([value])
        while waiting and len(seen) < MOST_OBJECTS:
            found = waiting.popleft()
            if id(found) in seen:
                continue
            seen.add(id(found))
            if id(found) in self._pairs:
                return True
            if isinstance(found, types.FunctionType):  # without its globals, which are a whole module's
                waiting += [found.__closure__, found.__defaults__, found.__dict__]
            elif not isinstance(found, (*PLAIN, type, types.ModuleType, nn.Module, types.CodeType)):
                waiting += gc.get_referents(found)
        return False

    def _refusal(self, m: nn.Module, reason: str, to: Conversion | None) -> BackendError:
        name = next((name for name, known in self.network.named_modules() if known is m), "")
        how = "in evaluation mode" if to is None else f"in {str(to.dtype).removeprefix('torch.')} on {to.device}"
        remedy = "call .eval() on it" if to is None else "convert it"
        return BackendError(
            f"the network cannot be run {how} without being changed itself: {name or 'it'} is a {type(m).__name__}, "
            f"and {reason}; {remedy}, or give the Sampler a copy"
        )


def _converted(network: nn.Module, to: Conversion) -> nn.Module:
    """Return a converted copy in evaluation mode of a network that cannot have twins."""
    with torch.inference_mode(False), torch.no_grad():
        made = copy.deepcopy(network).to(device=to.device, dtype=to.dtype).eval()
        return made if to.layout is None else made.to(memory_format=to.layout)  # type: ignore[call-overload]  # missing in torch's annotations


def _without_twin(m: nn.Module) -> str | None:
    """Return why a module can have no twin; None if it can."""
    if isinstance(m, torch.jit.ScriptModule):
        return "TorchScript holds its mode"
    if "_orig_mod" in m._modules or m._compiled_call_impl is not None:
        return "torch.compile has compiled it; give the module as it was before that"
    slots = [kind for kind in type(m).__mro__ if vars(kind).get("__slots__") and kind is not object]
    if slots:
        return f"{slots[0].__name__} has __slots__"
    return None


def _translated(value: Any, others: Mapping[int, Any], within: tuple[int, ...] = ()) -> Any:
    """Return a value in which objects are replaced by ``others``, by their ids; itself if it has none of them.

    ``within`` has the ids of the objects that contain the value, which may contain themselves.
    """
    if id(value) in others:
        return others[id(value)]
    if isinstance(value, (*PLAIN, nn.Module)) or id(value) in within:
        return value

    def inner(part: Any) -> Any:
        return _translated(part, others, (*within, id(value)))

    kind, new = type(value), value
    if kind in (list, tuple, set, frozenset):
        parts = [inner(part) for part in list(value)]
        if any(map(operator.is_not, parts, value)):
            new = kind(parts)
    elif kind in (dict, collections.OrderedDict):
        pairs = [(inner(k), inner(v)) for k, v in list(value.items())]
        if any(a is not c or b is not d for (a, b), (c, d) in zip(pairs, value.items(), strict=True)):
            new = kind(pairs)
    elif kind is types.MethodType:
        owner = inner(value.__self__)
        new = value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    elif kind is functools.partial:
        parts = inner((value.func, value.args, value.keywords))
        if any(map(operator.is_not, parts, (value.func, value.args, value.keywords))):
            new = functools.partial(parts[0], *parts[1], **parts[2])
            new.__dict__.update({name: inner(part) for name, part in value.__dict__.items()})
    elif kind is types.FunctionType:
        new = _translated_function(value, inner)
    elif kind is weakref.ReferenceType:
        target = value()
        new = value if inner(target) is target else weakref.ref(inner(target))
    return new


def _translated_function(function: types.FunctionType, inner: Any) -> types.FunctionType:
    """Return a function whose closure and default values are translated by ``inner``; itself if they stay the same."""
    defaults, named = inner((function.__defaults__, function.__kwdefaults__))
    cells = []
    for cell in function.__closure__ or ():
        try:
            part = inner(cell.cell_contents)
            cells.append(cell if part is cell.cell_contents else types.CellType(part))
        except ValueError:  # the cell is empty so far
            cells.append(cell)
    same = all(map(operator.is_, cells, function.__closure__ or ()))
    if same and defaults is function.__defaults__ and named is function.__kwdefaults__:
        return function
    code, closure = function.__code__, None if function.__closure__ is None else tuple(cells)
    new = types.FunctionType(code, function.__globals__, function.__name__, defaults, closure)
    new.__kwdefaults__ = named
    new.__dict__.update(function.__dict__)
    return new


def _equal(a: Any, b: Any) -> bool:
    """Return whether two translations of one value are the same, as far as it is known."""
    try:
        return bool(a == b)
    except Exception:  # elements of any kind
        return False
