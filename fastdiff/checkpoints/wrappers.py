"""The sets of weights in a file: a state dict, several in dictionaries, or tensors below the prefix of a wrapper.

Nothing is recognised by the name of a wrapper: a set begins where the time embedding of a network is found, below
whatever prefix ("module.", "_orig_mod.", "unet.", nested ones) and in whatever dictionaries.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.checks import shown
from fastdiff.errors import CheckpointError

log = logging.getLogger("fastdiff")

# Every network of a layout has this tensor, once: those of diffusers, of DDPM, OpenAI and EDM.
MARKERS = ("time_embedding.linear_1.weight", "temb.dense.0.weight", "time_embed.0.weight", "map_layer0.weight")
# Names of averages have one of these words ("model_ema", "g_ema", "EMAModel"): "semantic_unet" is none.
AVERAGED = re.compile(
    r"(?<![a-zA-Z])(?:ema|swa|avg)(?![a-z])|(?<![A-Z])(?:EMA|SWA|Ema|Swa|Avg)(?![a-z])|(?i:shadow|averag)"
)
MOST_TENSORS = 1 << 14  # of a file
DEPTH = 6  # of dictionaries and lists
FEWEST = 16  # tensors of a network: a shorter list of tensors is none

State = dict[str, Tensor]


def choose(where: str | Path, value: Any, entry: str | None = None) -> State:
    """Return one set of weights of a file's contents, with the names that its network gives them.

    A list of averaged parameters without names is named by a state dict beside it, else its tensors have their
    positions as names ("0", "1", ...), which `parameter_order` replaces.

    Args:
        where: The file, for messages.
        value: Tensors, or dictionaries and lists that have some.
        entry: The name of the set; None for the averaged (EMA) weights if there is one such set, else the only set.

    Returns:
        The tensors.

    Raises:
        CheckpointError: If the file has no such set, or several; the message lists them.
    """
    found = dict(_marked(where, value)) or dict(_unmarked(value))
    names = ", ".join(shown(name[:80]) for name in list(found)[:20]) or "none"
    if entry is not None:
        if set(found) <= {""}:
            raise CheckpointError(
                f"{where}: weights={shown(entry)}: this file holds one set of weights only; leave it out"
            )
        if entry not in found:
            raise CheckpointError(
                f"{where}: weights={shown(entry)} is no set of weights in this file; it holds {names}"
            )
        return found[entry]
    averaged = [name for name in found if AVERAGED.search(name)]
    if isinstance(value, (list, tuple)) and len(found) == 2:
        averaged = [list(found)[1]]  # ermongroup's list: the model, later its average
    chosen = averaged or list(found)
    if len(chosen) != 1:
        raise CheckpointError(
            f"{where}: which weights? Name one with weights=; the file holds {names}{_other_kind(value)}"
        )
    if len(found) > 1:
        log.info("%s: reads the averaged weights %s; weights= chooses others of %s", where, shown(chosen[0]), names)
    return found[chosen[0]]


def is_state_dict(value: Any) -> bool:
    """Tell whether a value is a dictionary from names to tensors, not empty."""
    return (
        isinstance(value, Mapping)
        and 0 < len(value) <= MOST_TENSORS
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _unmarked(value: Any) -> Iterator[tuple[str, State]]:
    """Yield the state dicts of networks that are none of ours: the value itself, or its entries."""
    if is_state_dict(value):
        yield "", _below(value, "module." if all(k.startswith("module.") for k in value) else "")
        return
    for key, entry in _entries(value):
        if is_state_dict(entry) and not OPTIMIZER & entry.keys():
            yield str(key), _below(entry, "module." if all(k.startswith("module.") for k in entry) else "")


OPTIMIZER = {"exp_avg", "exp_avg_sq", "momentum_buffer"}


def _marked(where: str | Path, value: Any) -> Iterator[tuple[str, State]]:
    """Yield (name, weights) of every set below a value; a name has the keys that lead there, and prefixes if several.

    Lists of tensors are yielded too. Tensors beside the network that a prefix marks are named in the log.
    """
    lists: list[tuple[str, list[Tensor]]] = []
    named: dict[str, State] = {}
    for path, part in _parts(value, (), set(), DEPTH):
        if isinstance(part, Mapping):
            prefixes = _prefixes(part)
            for prefix in prefixes:
                others = [p for p in prefixes if p != prefix and p.startswith(prefix)]
                name = ".".join(path) if len(prefixes) == 1 else ".".join((*path, prefix.rstrip("."))).strip(".") or "."
                named[name] = _below(part, prefix, others)
            plain = dict(_without_dots(part, prefixes))
            named |= {".".join((*path, key)): state for key, state in plain.items()}
            known = (*prefixes, *(f"{key}." for key in plain))
            rest = [k for k, v in part.items() if isinstance(k, str) and isinstance(v, Tensor)]
            rest = [k for k in rest if not k.startswith(known)]
            if rest:
                log.warning("%s: %d tensors outside of the network are left out: %s", where, len(rest), _some(rest))
        else:
            lists.append((".".join(path), list(part)))
    yield from named.items()
    for name, tensors in lists:
        shapes = [t.shape for t in tensors]
        like = next((state for state in named.values() if [t.shape for t in state.values()] == shapes), None)
        keys: Iterable[str] = map(str, range(len(tensors))) if like is None else like
        yield name, dict(zip(keys, (t.detach() for t in tensors), strict=True))


def _parts(value: Any, path: tuple[str, ...], seen: set[int], depth: int) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (keys, part) of every dictionary with a network's tensors and every list of tensors below a value."""
    if depth == 0 or id(value) in seen:  # a file may nest an object in itself
        return
    seen.add(id(value))
    if isinstance(value, Mapping) and _prefixes(value):
        yield path, value
    if isinstance(value, (list, tuple)) and len(value) >= FEWEST and all(_is_weight(v) for v in value):
        yield path, value
        return
    for key, entry in _entries(value):
        if isinstance(entry, (Mapping, list, tuple)):
            yield from _parts(entry, (*path, str(key)), seen, depth - 1)


def _entries(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, (list, tuple)) else ()


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _prefixes(value: Mapping[Any, Any]) -> list[str]:
    """List the prefixes below which a dictionary has a network, at most 64; "" for none."""
    found = [
        key[: -len(marker)]
        for key, tensor in value.items()
        if isinstance(key, str) and isinstance(tensor, Tensor)
        for marker in MARKERS
        if key.endswith(marker) and key[: -len(marker)][-1:] in ("", ".")
    ]
    return found[:64]


def _some(names: list[str]) -> str:
    return ", ".join(shown(name[:80]) for name in names[:3]) + (", ..." if len(names) > 3 else "")


def _below(value: Mapping[Any, Any], prefix: str, others: Iterable[str] = ()) -> State:
    """Return the tensors below a prefix, and not below one of the others, which are sets of their own."""
    return {
        key.removeprefix(prefix): tensor.detach()
        for key, tensor in value.items()
        if isinstance(key, str) and isinstance(tensor, Tensor) and key.startswith(prefix)
        if not any(key.startswith(other) for other in others)
    }


def _without_dots(value: Mapping[Any, Any], prefixes: list[str]) -> Iterator[tuple[str, State]]:
    """Yield the averages whose names have lost their dots, as latent-diffusion's LitEma writes them."""
    for prefix in prefixes[:8]:
        names = list(_below(value, prefix))
        parts = prefix.split(".")
        for k in range(len(parts)):
            flat = {(".".join(parts[k:]) + name).replace(".", ""): name for name in names}
            for group in {key.partition(".")[0] for key in value if isinstance(key, str)} - {parts[0]}:
                if all(isinstance(value.get(f"{group}.{key}"), Tensor) for key in flat):
                    yield group, {name: value[f"{group}.{key}"].detach() for key, name in flat.items()}


def _other_kind(value: Any) -> str:
    """Say of files beside a model's weights in a training's folder what they are."""
    if isinstance(value, Mapping):
        if {"state", "param_groups"} <= value.keys():
            return ": it is the state of an optimizer; the weights are in another file of the training"
        if {"last_epoch", "_step_count"} & value.keys():
            return ": it is the state of a learning-rate schedule; the weights are in another file of the training"
        if {"scale", "growth_factor"} <= value.keys():
            return ": it is the state of a gradient scaler; the weights are in another file of the training"
    return ""


def parameter_order(names: Iterable[str]) -> list[str]:
    """Sort the names of a U-Net's parameters as diffusers' module lists them.

    Its blocks have their attentions before their residual blocks, and the middle block is made after the others.
    """
    given = list(names)
    top = ("conv_in", "time_proj", "time_embedding", "class_embedding", "down_blocks", "up_blocks", "mid_block")
    inner = ("attentions", "resnets")

    def key(i: int) -> tuple[Any, ...]:
        parts = given[i].split(".")
        first = top.index(parts[0]) if parts[0] in top else len(top)
        if parts[0] == "mid_block":
            return first, 0, inner.index(parts[1]) if parts[1] in inner else 2, i
        if parts[0] in ("down_blocks", "up_blocks"):
            return first, int(parts[1]), inner.index(parts[2]) if parts[2] in inner else 2, i
        return first, 0, 0, i

    return [given[i] for i in sorted(range(len(given)), key=key)]
