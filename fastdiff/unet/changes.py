"""Comparison of a module with a reference: all that may change its results and is no weight, by name.

A configuration describes a network only while its modules are as they were made. `differences` compares a module with
a reference of the same configuration. `replaced_functions` lists the functions of the classes themselves that were
replaced: then the reference has the change too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import reprlib
import sys
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.utils import _python_dispatch
from torch.utils._device import DeviceContext  # of torch.device as a context, and of torch.set_default_device

PACKAGES = frozenset({"torch", "diffusers", "fastdiff"})
TRUSTED = PACKAGES | sys.stdlib_module_names
# Attributes that every module has, and those that no result without gradients depends on.
MODULE = frozenset(vars(nn.Module()))
WITHOUT_EFFECT = MODULE | {"gradient_checkpointing", "_gradient_checkpointing_func"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_module_registration_hooks",
    "_global_parameter_registration_hooks",
    "_global_buffer_registration_hooks",
)
# Methods of base classes that lie on the way of every call; classes with one of ENTRIES are compared whole.
CALLED = frozenset({"__init__", "__call__", "_wrapped_call_impl", "_call_impl", "__getattr__", "__getattribute__"})
ENTRIES = frozenset({"forward", "__call__", "step"})
MODULE_CLASS = "torch.nn.modules.module.Module"
PYTHON_CLASS = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def in_words(changes: Sequence[str], most: int = 4) -> str:
    """Join the first few changes and count the rest: one call may change every convolution."""
    more = [f"and {len(changes) - most} more"] if len(changes) > most else []
    return "; ".join([*changes[:most], *more])


# Objects --------------------------------------------------------------------------------------------------------------


def differences(module: nn.Module, reference: nn.Module, ignore: Collection[str] = ()) -> list[str]:
    """List all that may make a module compute something else than ``reference`` does with the same weights.

    Types, attributes, methods set on an instance, hooks, and the names and shapes of parameters and buffers are
    compared, at every depth. Attributes named in ``ignore`` are not. Weights may be on any device and in any dtype.
    """
    comparison = _Comparison(reference, WITHOUT_EFFECT.union(ignore))
    try:
        comparison.compare(module, reference, "")
    except RecursionError:
        return ["its attributes refer to each other in a circle, so they cannot be compared"]
    return comparison.found


def without_weights(module: nn.Module) -> nn.Module:
    """Return a copy of a module that shares its weights, as a reference to notice later changes by."""
    shared = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(t): t for t in shared})


class _Comparison:
    """A walk through two trees of modules. ``found`` has the differences, each with its path."""

    def __init__(self, root: nn.Module, ignore: frozenset[str]):
        self.root = root
        self.ignore = ignore
        self.found: list[str] = []

    def compare(self, module: nn.Module, reference: nn.Module, path: str) -> None:
        """Add the differences of the modules at ``path``, and of those below them."""
        ours, theirs = vars(module), vars(reference)
        before = f"{path}." if path else ""
        missing = self.found  # equal to no attribute
        changed = [n for n in theirs.keys() - self.ignore if not same(ours.get(n, missing), theirs[n])]
        for name in sorted(changed):
            # A share of a dropout has no effect in evaluation, and a module in place of an attribute is listed below.
            if name not in ours["_modules"] and not (name == "p" and isinstance(reference, nn.Dropout)):
                now = brief(ours[name]) if name in ours else "missing"
                self.found.append(f"{before}{name} = {now} (not {brief(theirs[name])})")
        if ours.keys() != theirs.keys():
            self.found += self.added(module, reference, before)
        for kind in HOOKS:
            if (ours[kind] or theirs[kind]) and not same(list(ours[kind].values()), list(theirs[kind].values())):
                names = ", ".join(map(brief, ours[kind].values()))
                self.found.append(f"{path or 'it'} has forward hooks ({names})")
        for kind, word in (("_parameters", "parameter"), ("_buffers", "buffer")):
            if ours[kind] or theirs[kind]:
                self.found += _tensors(ours[kind], theirs[kind], f"{word} {before}")
        children = theirs["_modules"]
        for name, child in ours["_modules"].items():
            if name not in children:
                self.found.append(f"{before}{name} was added (a {type(child).__name__})")
            elif type(child) is not type(children[name]):
                self.found.append(f"{before}{name} is a {type(child).__name__}, not a {type(children[name]).__name__}")
            elif child is not None:
                self.compare(child, children[name], before + name)
        if ours["_modules"].keys() != children.keys():
            self.found += [f"{before}{name} is missing" for name in children if name not in ours["_modules"]]
        elif isinstance(module, (nn.ModuleList, nn.Sequential)) and list(ours["_modules"]) != list(children):
            self.found.append(f"{path} is in another order")

    def added(self, module: nn.Module, reference: nn.Module, before: str) -> Iterator[str]:
        """Yield attributes that the reference lacks and that hide one of the class, or that some method may read."""
        kinds: set[Any] = {type(m) for m in self.root.modules()}
        for name, value in vars(module).items():
            if name in vars(reference) or name in self.ignore:
                continue
            if name == "_compiled_call_impl":
                yield f"{before.rstrip('.') or 'it'} was compiled"
            elif hasattr(type(module), name):
                yield f"{before}{name} was replaced"
            elif any(name in names_of(kind) for kind in kinds):
                yield f"{before}{name} = {brief(value)} was added"


def _tensors(ours: Mapping[str, Any], theirs: Mapping[str, Any], what: str) -> Iterator[str]:
    for name, t in theirs.items():
        now = ours.get(name)
        if now is None or t is None:
            if now is not t:
                yield f"{what}{name} is {'missing' if now is None else 'new'}"
        elif type(now) is not type(t):
            yield f"{what}{name} is a {type(now).__name__}, not a {type(t).__name__}"
        elif now.shape != t.shape:
            yield f"{what}{name} has shape {tuple(now.shape)}, not {tuple(t.shape)}"
    for name in ours.keys() - theirs.keys():
        yield f"{what}{name} is new"


def same(a: Any, b: Any) -> bool:
    """Return whether two values of an attribute are equal. What cannot be compared is not."""
    if a is b:
        return True
    if isinstance(a, (int, float, str)):
        return isinstance(b, (int, float, str)) and a == b
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.shape != b.shape or a.is_meta or b.is_meta:
            return False
        return torch.equal(a.detach().cpu(), b.detach().cpu().to(a.dtype))
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, types.MethodType):  # of a module and of its copy
        return a.__func__ is b.__func__ and type(a.__self__) is type(b.__self__)
    if isinstance(a, functools.partial):
        return same((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    if isinstance(a, nn.Module):
        return not differences(a, b)
    kind: Any = type(a)
    if kind.__eq__ is not object.__eq__:
        try:
            return bool(a == b)
        except Exception:
            return False
    if isinstance(a, (type, types.FunctionType)) or not all(c.__flags__ & PYTHON_CLASS for c in type(a).__mro__[:-1]):
        return False
    return same(vars(a), vars(b)) if hasattr(a, "__dict__") else False


def brief(value: Any) -> str:
    """Describe a value in a message: functions, classes and plain objects by their names."""
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
        return str(value.__qualname__)
    kind: Any = type(value)
    return str(kind.__name__) if kind.__repr__ is object.__repr__ else reprlib.repr(value)


# Classes --------------------------------------------------------------------------------------------------------------


def rebuilt(cls: type[Any], config: Mapping[str, Any]) -> Any:
    """Make an object of diffusers anew from the values of its configuration, as its class does."""
    known = inspect.signature(cls).parameters
    return cls(**{name: value for name, value in config.items() if name in known})


def overridden(module: nn.Module, cls: type) -> Iterator[str]:
    """Yield what a subclass of ``cls`` does differently, but for what it computes when it is made."""
    kinds = type(module).__mro__
    used = (vars(cls).keys() - {name for name in vars(cls) if name.startswith("__")}) | CALLED - {"__init__"}
    used |= vars(module).keys() | module._modules.keys()
    for base in kinds[: kinds.index(cls)]:
        for name in sorted(used & vars(base).keys()):
            yield f"{name} was replaced (by {base.__name__})"


def global_changes(module: nn.Module, classes: Iterable[type] = ()) -> list[str]:
    """List changes of the process, which a reference made now would have too: hooks, modes, classes, functions.

    The functions are those of the classes of the modules below ``module``, and of ``classes``.
    """
    found = []
    for name in GLOBAL_HOOKS:
        if hooks := getattr(torch_module, name):
            found.append(f"torch has {name[1:].replace('_', ' ')} ({', '.join(map(brief, hooks.values()))})")
    modes = [*torch.overrides._get_current_function_mode_stack(), *_python_dispatch._get_current_dispatch_mode_stack()]
    found += [f"the mode {type(m).__name__} is on" for m in modes if not isinstance(m, DeviceContext)]
    kinds = dict.fromkeys(classes)
    for name, m in module.named_modules():
        if origin(type(m)) in PACKAGES:
            kinds[type(m)] = None
        elif name:
            found.append(f"{name} is a {type(m).__name__} of {type(m).__module__}")
    return found + replaced_functions(kinds)


def replaced_functions(classes: Iterable[type]) -> list[str]:
    """List the functions of classes, and those that they call by name, that are no longer torch's, diffusers' or ours.

    A function that was replaced comes from another module, or has another name, than the one in its place.
    """
    found: list[str] = []
    for base in dict.fromkeys(base for cls in classes for base in cls.__mro__):
        whole = base is not nn.Module and not ENTRIES.isdisjoint(vars(base))
        for name, value in vars(base).items():
            if whole or name in CALLED:
                found += replaced(value, f"{base.__module__}.{base.__qualname__}", name)
    return list(dict.fromkeys(found))


def origin(value: Any) -> str:
    """Return the package that a function, a class, or the class of an object was defined in."""
    f = getattr(value, "__func__", value)
    # The decorators of contextlib, such as those of `plain_modes`, only wrap a function of another package.
    while isinstance(f, types.FunctionType) and f.__globals__ is vars(contextlib) and hasattr(f, "__wrapped__"):
        f = f.__wrapped__
    if isinstance(f, types.FunctionType):
        return str(f.__globals__.get("__name__", "")).partition(".")[0]
    return str((value if isinstance(value, type) else type(value)).__module__).partition(".")[0]


def replaced(value: Any, owner: str, name: str) -> Iterator[str]:
    """Yield the name of an entry of a class, or of functions that it calls, where they were replaced."""
    f: Any = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    if not isinstance(f, types.FunctionType):
        if callable(f) and not isinstance(f, (type, types.BuiltinFunctionType, types.WrapperDescriptorType)):
            yield f"{owner}.{name} was replaced"
        return
    # Two methods of nn.Module have other names: torch.compile replaces __init__, and __call__ is a second name of one.
    if owner != MODULE_CLASS and (f.__name__ != name or not owner.endswith(f.__qualname__.rpartition(".")[0])):
        yield f"{owner}.{name} was replaced"
        return
    while isinstance(f, types.FunctionType):
        if origin(f) not in PACKAGES:
            yield f"{owner}.{name} was replaced"
            return
        yield from _replaced_globals(f)
        f = getattr(f, "__wrapped__", None)


def _replaced_globals(f: types.FunctionType) -> Iterator[str]:
    for name in f.__code__.co_names:
        for namespace in (f.__globals__, vars(F), vars(torch)):
            g = namespace.get(name)
            if callable(g) and not isinstance(g, type):
                python = isinstance(g, types.FunctionType)
                other = python and namespace is vars(F) and g.__name__ != name
                if other or origin(g) not in TRUSTED:
                    yield f"{namespace['__name__']}.{name} was replaced"


@functools.lru_cache(maxsize=256)
def names_of(cls: type) -> frozenset[str]:
    """Return all names and strings in the code of a class."""
    names: set[str] = set()
    for base in cls.__mro__:
        if not ENTRIES.isdisjoint(vars(base)) and base is not nn.Module:
            for f in vars(base).values():
                if isinstance(f, types.FunctionType):
                    names |= _names(f.__code__)
    return frozenset(names)


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, str):
            names.add(constant)
        elif isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names
