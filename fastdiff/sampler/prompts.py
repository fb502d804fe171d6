"""Prompts of a call: what their checks need to know of a text encoder, and their states, each encoded once."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.checks import items, shown, text
from fastdiff.core.lower import added_vector
from fastdiff.core.state import Texts
from fastdiff.errors import InvalidArgument
from fastdiff.sampler.editing import check_dense
from fastdiff.sampler.options import NetworkInfo, Options, scales
from fastdiff.unet import UNetCondition

MOST_TEXTS = 1 << 16  # that are encoded at once


class TextEncoder(Protocol):
    """An encoder of texts for the cross-attention of a network, such as a `fastdiff.text.CaptionEncoder`.

    Where it has an attribute ``negative_is_zeros`` that is true, no negative prompt is zeros in the place of states,
    and not the text "".
    """

    def tokenize(self, text: str) -> list[int]:
        """Return the numbers of a text's pieces; `InvalidArgument` says why a text cannot be encoded.

        Args:
            text: The text.
        """

    def encode(self, text: str) -> tuple[Tensor, Tensor | None]:
        """Return the states [T, C] of a text, T the same for all texts, and its pooled vector [D], or None.

        Args:
            text: The text.
        """


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The checked prompts of a call.

    ``given`` are the texts that the caller has encoded, and ``texts`` the different ones to be encoded, whose numbers
    follow those. ``label`` has the number of each image's text, int64 [n], and ``null`` that of the one which guidance
    leads away from.
    """

    texts: tuple[str, ...]
    label: Tensor
    null: Tensor
    given: Texts | None = None

    @property
    def of_images(self) -> tuple[str, ...] | None:
        """The prompt of each image; None where the caller has encoded them."""
        first = 0 if self.given is None else len(self.given)
        numbers = [i - first for i in self.label.tolist()]
        return None if min(numbers) < 0 else tuple(self.texts[i] for i in numbers)


def check(n: int, o: Options, info: NetworkInfo, encoder: TextEncoder | None) -> Prompts | None:
    """Return the checked prompts; None for a network that reads no text.

    `InvalidArgument` says what is wrong: with a text, with their number, or that the network takes none.
    """
    if encoder is None:
        for name in ("prompts", "negative", "context"):
            if getattr(o, name) is not None:
                has = "classes; labels= asks for them" if info.classes is not None else "no text conditioning"
                raise InvalidArgument(f"{name}={shown(getattr(o, name))}: this network has {has}")
        return None
    if o.labels is not None:
        raise InvalidArgument(f"labels={shown(o.labels)}: this network reads text, so prompts= is needed")
    if o.prompts is None and o.context is None:
        raise InvalidArgument("this network reads text, so prompts= is needed: a text for all images, or one for each")
    if o.prompts is not None and o.context is not None:
        raise InvalidArgument(f"prompts={shown(o.prompts)} and context= both say what to draw; give one of them")
    bank = _Bank(n, info, encoder)
    label: list[str] | range
    null: list[str] | range
    label = bank.texts("prompts", o.prompts) if o.context is None else bank.states("context", o.context)
    if isinstance(o.negative, (Tensor, Texts)):
        null = bank.states("negative", o.negative)
    elif o.context is not None and o.negative is None and not (scales(o.guidance, n) != 1.0).any():
        null = label  # nothing is guided, so that no text need be encoded
    elif o.negative is None and getattr(encoder, "negative_is_zeros", False):
        null = bank.zeros("negative")
    else:
        null = bank.texts("negative", "" if o.negative is None else o.negative)
    return bank.prompts(label, null)


def check_texts(prompts: Any, info: NetworkInfo, encoder: TextEncoder) -> Prompts:
    """Return checked texts, as the prompts of as many images."""
    listed = [prompts] if isinstance(prompts, str) else items("prompts", prompts, MOST_TEXTS)
    if not listed:
        raise InvalidArgument("prompts is empty: a text, or a list of them, is needed")
    bank = _Bank(len(listed), info, encoder)
    found = bank.texts("prompts", listed)
    return bank.prompts(found, found)


class _Bank:
    """The texts of a call, numbered: first those that the caller has encoded, then the others."""

    def __init__(self, n: int, info: NetworkInfo, encoder: TextEncoder):
        self.n = n
        self.info = info
        self.encoder = encoder
        self.numbers: dict[str, int] = {}
        self.given: list[Texts] = []

    def texts(self, name: str, value: Any) -> list[str]:
        """Check texts, and return one for each image."""
        listed = [value] * self.n if isinstance(value, str) else items(name, value, self.n)
        if len(listed) != self.n:
            raise InvalidArgument(
                f"{name}={shown(value)}: one text, or {self.n} of them, one for each image, are needed"
            )
        for i, each in enumerate(listed):
            if isinstance(each, str) and each in self.numbers:
                continue
            try:
                self.encoder.tokenize(text(name, each))
            except InvalidArgument as e:
                raise InvalidArgument(f"{name}[{i}]={shown(each)}: {e}") from e
            self.numbers[each] = len(self.numbers)
        return listed

    def states(self, name: str, value: Any) -> range:
        """Check states that the caller has encoded, and return the number of each image's."""
        given = value if isinstance(value, Texts) else Texts(value)
        width = self.info.text_channels
        fits = isinstance(given.states, Tensor) and given.states.ndim in (2, 3) and 0 not in given.states.shape
        if not fits or given.states.shape[-1] != width:
            what = f"{list(given.states.shape)}" if isinstance(given.states, Tensor) else type(given.states).__name__
            raise InvalidArgument(
                f"{name} is {what}; states of a text [tokens, {width}] for all images, or {self.n} of them "
                f"[{self.n}, tokens, {width}], are needed, as Sampler.encode gives them"
            )
        states = given.states if given.states.ndim == 3 else given.states[None]
        pooled = given.pooled
        wanted = (len(states), self.info.pooled_channels) if self.info.pooled else None
        if (tuple(pooled.shape) if isinstance(pooled, Tensor) else pooled) != wanted:
            need = f"pooled vectors {list(wanted)} too, as Sampler.encode gives them" if wanted else "states only"
            raise InvalidArgument(f"{name}: this network takes {need}")
        for each in (states, pooled):
            if each is not None:
                check_dense(name, each)
                if not each.is_floating_point() or not torch.isfinite(each).all():
                    raise InvalidArgument(f"{name} is a tensor of {each.dtype}; finite floats are needed")
        if len(states) not in (1, self.n):
            raise InvalidArgument(f"{name} has the states of {len(states)} texts; 1 or {self.n} are needed")
        if self.given and self.given[0].states.shape[1] != states.shape[1]:
            raise InvalidArgument(
                f"{name} has {states.shape[1]} tokens, context {self.given[0].states.shape[1]}; they must agree"
            )
        first = sum(map(len, self.given))
        self.given.append(
            Texts(
                states.detach().to("cpu", torch.float32, copy=True),
                None if pooled is None else pooled.detach().to("cpu", torch.float32, copy=True),
            )
        )
        return range(first, first + self.n) if len(states) == self.n else range(first, first + 1)

    def zeros(self, name: str) -> range:
        """Return the number of states that are zeros, for all images."""
        tokens = self.given[0].states.shape[1] if self.given else len(self.encoder.tokenize(""))
        pooled = torch.zeros(1, self.info.pooled_channels or 0, dtype=torch.float32, device="cpu")
        states = torch.zeros(1, tokens, self.info.text_channels or 0, dtype=torch.float32, device="cpu")
        return self.states(name, Texts(states, pooled if self.info.pooled else None))

    def prompts(self, *halves: list[str] | range) -> Prompts:
        """Return the prompts of the images' two halves."""
        first = sum(map(len, self.given))
        found = []
        for half in halves:
            numbers = [*half] * (1 if len(half) == self.n else self.n) if isinstance(half, range) else [
                first + self.numbers[each] for each in half
            ]  # fmt: skip
            found.append(torch.tensor(numbers, dtype=torch.int64, device="cpu"))
        given = None
        if self.given:
            pooled = [each.pooled for each in self.given if each.pooled is not None]
            given = Texts(torch.cat([each.states for each in self.given]), torch.cat(pooled) if pooled else None)
        return Prompts(tuple(self.numbers), found[0], found[1], given)


def encode(prompts: Prompts, encoder: TextEncoder, pooled: bool) -> Texts:
    """Encode the texts one by one, so that the bits of each do not depend on the others.

    ``pooled`` is whether the network takes their pooled vectors.
    """
    found = [encoder.encode(each) for each in prompts.texts]
    states, vectors = [states.cpu() for states, _ in found], [vector for _, vector in found]
    if pooled and any(vector is None for vector in vectors):
        raise InvalidArgument("the network takes a pooled vector of each text, which the text encoder does not give")
    given = prompts.given
    if given is not None and states and given.states.shape[1] != len(states[0]):
        raise InvalidArgument(
            f"context has {given.states.shape[1]} tokens, the text encoder gives {len(states[0])}; give negative= "
            "states of the same number, or guidance=1"
        )
    all_states = [*([] if given is None else given.states), *states]
    if not pooled:
        return Texts(torch.stack(all_states), None)
    before = [] if given is None or given.pooled is None else [*given.pooled]
    return Texts(torch.stack(all_states), torch.stack([*before, *(v.cpu() for v in vectors if v is not None)]))


def with_sizes(texts: Texts, unet: UNetCondition, wanted: int | None, size: tuple[int, int]) -> Texts:
    """Return the texts with the whole vector that a network of "text_time" adds to its time embedding.

    Beside the vectors of the texts it has the sizes that Stable Diffusion XL was trained with, for images of ``size``
    (height, width) in pixels that are no crops: original size, corner of the crop, target size. The vectors of the
    texts must have the ``wanted`` number of channels.
    """
    assert texts.pooled is not None
    if texts.pooled.shape[1] != wanted:
        raise InvalidArgument(
            f"the text encoder gives vectors of {texts.pooled.shape[1]} numbers, the network takes {wanted}"
        )
    sizes = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device="cpu").expand(len(texts), -1)
    return dataclasses.replace(texts, pooled=added_vector(unet, texts.pooled, sizes).float())
