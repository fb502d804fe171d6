"""Prompts of a call: what their checks need to know of a text encoder, and their states, each encoded once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.checks import items, shown, text
from fastdiff.core.state import Texts
from fastdiff.errors import InvalidArgument
from fastdiff.sampler.options import NetworkInfo, Options


class TextEncoder(Protocol):
    """An encoder of texts for the cross-attention of a network, such as a `fastdiff.text.CaptionEncoder`."""

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

    ``texts`` are the different ones. ``label`` has the number of each image's prompt among them, int64 [n], and
    ``null`` that of the text which guidance leads away from.
    """

    texts: tuple[str, ...]
    label: Tensor
    null: Tensor

    @property
    def of_images(self) -> tuple[str, ...]:
        """The prompt of each image."""
        return tuple(self.texts[i] for i in self.label.tolist())


def check(n: int, o: Options, info: NetworkInfo, encoder: TextEncoder | None) -> Prompts | None:
    """Return the checked prompts; None for a network that reads no text.

    `InvalidArgument` says what is wrong: with a text, with their number, or that the network takes none.
    """
    if encoder is None:
        for name in ("prompts", "negative"):
            if getattr(o, name) is not None:
                has = "classes; labels= asks for them" if info.classes is not None else "no text conditioning"
                raise InvalidArgument(f"{name}={shown(getattr(o, name))}: this network has {has}")
        return None
    if o.labels is not None:
        raise InvalidArgument(f"labels={shown(o.labels)}: this network reads text, so prompts= is needed")
    if o.prompts is None:
        raise InvalidArgument("this network reads text, so prompts= is needed: a text for all images, or one for each")
    prompts = _listed("prompts", o.prompts, n)
    negative = [""] * n if o.negative is None else _listed("negative", o.negative, n)
    numbers: dict[str, int] = {}
    for name, listed in (("prompts", prompts), ("negative", negative)):
        for i, each in enumerate(listed):
            if each in numbers:
                continue
            try:
                encoder.tokenize(text(name, each))
            except InvalidArgument as e:
                raise InvalidArgument(f"{name}[{i}]={shown(each)}: {e}") from e
            numbers[each] = len(numbers)
    label, null = (torch.tensor([numbers[each] for each in listed], dtype=torch.int64, device="cpu")
                   for listed in (prompts, negative))  # fmt: skip
    return Prompts(tuple(numbers), label, null)


def encode(prompts: Prompts, encoder: TextEncoder, pooled: bool) -> Texts:
    """Encode the texts one by one, so that the bits of each do not depend on the others.

    ``pooled`` is whether the network takes their pooled vectors.
    """
    found = [encoder.encode(each) for each in prompts.texts]
    vectors = [vector for _, vector in found]
    if not pooled:
        return Texts(torch.stack([states for states, _ in found]), None)
    if any(vector is None for vector in vectors):
        raise InvalidArgument("the network takes a pooled vector of each text, which the text encoder does not give")
    return Texts(torch.stack([states for states, _ in found]), torch.stack([v for v in vectors if v is not None]))


def _listed(name: str, value: Any, n: int) -> Sequence[str]:
    """Return one text for each image, of one for all or of a list."""
    listed = [value] * n if isinstance(value, str) else items(name, value, n)
    if len(listed) != n:
        raise InvalidArgument(f"{name}={shown(value)}: one text, or {n} of them, one for each image, are needed")
    return listed
