"""Parts that `native` and `triton`, the backends that run a lowered program, have in common.

They are the check that a program describes the module it was lowered from, the checksum that notices changed weights,
the weights of merged layers, and the tables of embeddings that replace the time MLP.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.core.lower import (
    embed_classes,
    embed_text,
    embed_timesteps,
    projection_keys,
    text_attentions,
    unlowered,
    vector_kind,
    vector_width,
)
from fastdiff.core.program import Conv, Program
from fastdiff.core.state import TableBank, Texts
from fastdiff.errors import BackendError
from fastdiff.modes import plain_modes
from fastdiff.solvers.table import COLUMNS
from fastdiff.unet import UNet, UNetCondition, UNetConditionConfig, UNetConfig, changes
from fastdiff.unet.model import ClassProjection

# Buffers written by the matrix products of the embedding. They are small, and computed in float32 in every precision.
EMBEDDING_PRODUCTS = ("projections", "time_embedding.linear_2")
WORDS_BYTES = 1 << 25  # bytes of weights whose checksum is computed at a time; it takes a few times as much memory


def network_reasons(unet: nn.Module) -> list[str]:
    """List every reason why a network cannot run as a lowered program; empty where it can."""
    if type(unet) is not UNet:
        return [f"it runs fastdiff.UNet only, not {type(unet).__name__}"]
    reasons = unsupported_changes(unet)
    if isinstance(unet.config, UNetConfig):
        reasons += unlowered(unet.config)
    if unet.config.class_embed_type is not None:
        reasons.append(f"it has no class_embed_type {unet.config.class_embed_type!r}")
    return reasons


def condition_reasons(unet: UNetCondition) -> list[str]:
    """List every reason why a text-conditioned network cannot run as a lowered program; empty where it can."""
    reasons = unsupported_changes(unet)
    config = unet.config
    if not isinstance(config, UNetConditionConfig):
        return reasons
    if not text_attentions(unet):
        reasons.append("no attention of the network reads a text")
    added = config.addition_embed_type
    if added is not None and config.class_embed_type is not None:
        reasons.append(f"it has no addition_embed_type {added!r} beside a class embedding")
    if config.class_embed_type == "timestep":
        reasons.append("it has no class_embed_type 'timestep'")
    elif config.class_embed_type is None and config.num_class_embeds is not None:
        reasons.append(f"it has no labels beside a text (num_class_embeds={config.num_class_embeds})")
    elif (config.class_embed_type or added) is not None and config.time_embedding_act_fn is not None:
        reasons.append(
            f"it has no time_embedding_act_fn {config.time_embedding_act_fn!r} with a class embedding or added vector"
        )
    return reasons


def program_reasons(unet: nn.Module, shape: tuple[int, int, int]) -> list[str]:
    """List every reason why a network cannot run as a lowered program on images of ``shape`` (C, H, W)."""
    if type(unet) is not UNetCondition:
        return network_reasons(unet)
    reasons = condition_reasons(unet)
    multiple, (channels, height, width) = unet.config.stride, shape
    if height % multiple or width % multiple:
        reasons.append(f"it needs images whose height and width are multiples of {multiple}, not {height}x{width}")
    if channels != unet.config.in_channels:
        reasons.append(f"it feeds the network {channels} channels of an image, which reads {unet.config.in_channels}")
    return reasons


def unsupported_changes(unet: UNet | UNetCondition) -> list[str]:
    """List what the network does beyond its configuration, which lowering cannot see."""
    kind = UNetConditionConfig if isinstance(unet, UNetCondition) else UNetConfig
    if not isinstance(unet.config, kind):
        return [f"its config is a {type(unet.config).__name__}, not a {kind.__name__}"]
    # Changes of the process come first: a reference made after them has them too.
    changed = changes.global_changes(unet) or changes.differences(unet, _as_described(unet.config))
    return [f"the network is not what its configuration says: {changes.in_words(changed)}"] if changed else []


@functools.lru_cache(maxsize=8)
def _as_described(config: UNetConfig | UNetConditionConfig) -> nn.Module:
    with torch.device("meta"):
        return UNetCondition(config) if isinstance(config, UNetConditionConfig) else UNet(config)


def checksum(module: nn.Module) -> int:
    """Compute a checksum of the bits of a module's weights, from 0 to 2^64 - 1.

    In-place edits of ``.data`` and fused optimizers change weights without bumping tensor versions, so only the bits
    show it. It is fast and in memory only; files name a model by `fastdiff.checkpoints.weights_digest`. The native
    engine computes it on the CPU, at about the speed of reading memory; `plain_checksum` is the same elsewhere.
    """
    weights = [p.detach() for p in module.parameters()]
    parts = _checksums(weights)
    return plain_checksum(weights) if parts is None else (sum(parts) + layout_checksum(weights)) % (1 << 64)


def checksums(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Compute a checksum of each of a module's weights, with its strides, by all of its names.

    Where two of them are equal, the weights are. It takes as long as `checksum`.
    """
    named = dict(module.named_parameters(remove_duplicate=False))
    weights = {id(p): p.detach() for p in named.values()}
    found = _checksums(list(weights.values()))
    if found is None:
        found = [plain_checksum([w]) for w in weights.values()]
    of = dict(zip(weights, found, strict=True))
    return {name: (of[id(p)], *p.stride()) for name, p in named.items()}


def _checksums(weights: list[Tensor]) -> list[int] | None:
    """Compute the part of each weight in the checksum of all by the native engine; None where it cannot."""
    from fastdiff.backends.native.extension import extension  # it imports this module

    native = extension()
    if native is None or not native.isas() or any(w.device.type != "cpu" for w in weights):
        return None
    found: list[int] = native.checksums([in_memory_order(w) for w in weights], threads=torch.get_num_threads())
    return found


def embedding_checksum(unet: UNet | UNetCondition) -> int:
    """Compute the `checksum` of the weights by which timesteps are embedded alone, which are few."""
    projections = [unet.get_submodule(key) for key in projection_keys(unet)]
    return checksum(nn.ModuleList([unet.time_embedding, *projections]))


def plain_checksum(tensors: Sequence[Tensor]) -> int:
    """Compute the checksum of tensors, one after the other, each filled up with zeros to whole words of 8 bytes:

        sum over i = 1, 2, ... of mix(word_i ^ c i)  modulo 2^64,    c = floor(2^64 / golden ratio)

    ``mix`` maps different words to different ones, and each bit of its result depends on all bits of the word; so
    neither flips of signs nor exchanged weights cancel. One value is read from the device, and no tensor is copied but
    in parts: one that is dense in another order, as with torch.channels_last, is read in the order of its memory, and
    its strides are words too, on the host.
    """
    sums, first = [], 1
    for words in _words([in_memory_order(t) for t in tensors]):
        sums.append(_mixed(words, first))
        first += len(words)
    return (layout_checksum(tensors) + (int(torch.stack(sums).sum()) if sums else 0)) % (1 << 64)


def layout_checksum(tensors: Sequence[Tensor]) -> int:
    """Compute the part of `plain_checksum` that the sizes and strides of tensors in another order add, on the host."""
    strides = [n for t in tensors if not t.is_contiguous() and t.ndim != 1 for n in (*t.shape, *t.stride())]
    return int(_mixed(torch.tensor(strides, dtype=torch.int64, device="cpu"), 0).numpy())


def _mixed(words: Tensor, first: int) -> Tensor:
    """Sum the mixed words, of which the first has the number ``first``, modulo 2^64."""
    c = 0x9E3779B97F4A7C15 - (1 << 64)
    i = torch.arange(first, first + len(words), dtype=torch.int64, device=words.device)
    return _mix(words ^ (i * c)).sum()


def in_memory_order(t: Tensor) -> Tensor:
    """Return a tensor's numbers, flat if it is not row-major, without a copy unless it has gaps or overlaps."""
    if t.is_contiguous():
        return t
    strides = t.stride()
    t = t.permute(sorted(range(t.ndim), key=lambda d: (-strides[d], -t.shape[d])))
    return t.contiguous().view(-1)


def _words(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the words of contiguous tensors, int64, in parts of about `WORDS_BYTES`."""
    parts: list[Tensor] = []
    held = 0
    for tensor in tensors:
        whole = tensor.view(-1).view(torch.uint8)
        for part in (whole,) if len(whole) <= WORDS_BYTES else whole.split(WORDS_BYTES):
            parts.append(part)
            if len(part) % 8:
                parts.append(part.new_zeros(-len(part) % 8))
            held += -(-len(part) // 8) * 8
            if held >= WORDS_BYTES:
                yield torch.cat(parts).view(torch.int64)
                parts, held = [], 0
    if held:
        yield torch.cat(parts).view(torch.int64)


def _mix(x: Tensor) -> Tensor:
    """Mix the bits of words, int64 (the finaliser of SplitMix64: Steele, Lea & Flood 2014; constants: variant 13)."""
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift words to the right, filling with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def merged_layer(op: Conv, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return W [N, C, k, k] and b [N] of a convolution whose layers are stacked, in ``dtype``, or merged (see `Conv`).

    Products of merged layers are computed, and returned, in float64.
    """
    dtype = torch.float64 if op.merged else dtype
    W = [state[f"{key}.weight"].to(dtype) for key in op.weights]
    b = [
        state[f"{key}.bias"].to(dtype) if op.bias else w.new_zeros(len(w)) for key, w in zip(op.weights, W, strict=True)
    ]
    if op.merged == "first transposed":
        return (W[0].T @ W[1])[:, :, None, None], W[0].T @ b[1]
    if op.merged == "in turn":
        return (W[0] @ W[1])[:, :, None, None], W[0] @ b[1] + b[0]
    return torch.cat(W).reshape(-1, W[0].shape[1], op.kernel, op.kernel), torch.cat(b)


def embedding_width(program: Program) -> int:
    """Return the number of features that `fastdiff.core.lower.embed_timesteps` computes for a timestep."""
    return program.buffers["time" if "time" in program.buffers else "projections"].shape[2]


class EmbeddingTables:
    """Embeddings of timesteps and of class labels, computed once for all steps.

    ``times``, float32 [room, features], has one row for every distinct timestep, whichever step table it comes from; a
    larger tensor takes its place when more than ``room`` timesteps are needed. ``places`` has the row of each timestep.
    Beyond ``most`` timesteps the rows are given to others: then another dict takes its place, and earlier results of
    `entries` no longer hold. ``classes`` is float32 [labels, features], or None where the network has no such table.
    """

    @plain_modes()
    def __init__(self, unet: UNet | UNetCondition, program: Program, device: torch.device, room: int, most: int):
        self.unet = unet
        self.most = most
        self.times = torch.zeros(room, embedding_width(program), dtype=torch.float32, device=device)
        self.places: dict[float, int] = {}
        self.classes: Tensor | None = None
        if isinstance(unet, UNet) and isinstance(unet.class_embedding, (nn.Embedding, ClassProjection)):
            self.classes = embed_classes(unet).to(device, torch.float32, copy=True).contiguous()

    @plain_modes()
    def refresh(self) -> None:
        """Drop what was computed from weights that have changed since; all tensors keep their addresses."""
        self.places = {}
        if self.classes is not None:
            assert isinstance(self.unet, UNet)
            self.classes.copy_(embed_classes(self.unet))

    @plain_modes()
    def entries(self, bank: TableBank, places: Sequence[int] | None = None) -> Tensor:
        """Return the row of ``times`` for each row of the bank's tables, or of those at ``places``.

        The result is int64 [tables, rows] on the CPU. Timesteps that were not embedded yet are embedded now.
        """
        timesteps = (bank.host if places is None else bank.host[list(places)])[..., COLUMNS.index("t")]
        t, inverse = np.unique(timesteps, return_inverse=True)
        wanted = t.tolist()
        if len(self.places.keys() | set(wanted)) > self.most:
            self.places = {}
        new = [v for v in wanted if v not in self.places]
        if new:
            first, end = len(self.places), len(self.places) + len(new)
            if end > len(self.times):
                grown = self.times.new_zeros(max(2 * first, end), self.times.shape[1])
                grown[:first] = self.times[:first]
                self.times = grown
            t32 = torch.tensor(new, dtype=torch.float32, device=self.times.device)
            self.times[first:end] = embed_timesteps(self.unet, t32)
            self.places |= {v: first + i for i, v in enumerate(new)}
        found = np.array([self.places[v] for v in wanted], dtype=np.int64)
        return torch.from_numpy(found[inverse.reshape(timesteps.shape)])


def check_texts(unet: UNetCondition, texts: Texts | None) -> Texts:
    """Return the texts of a state; raise `BackendError` unless their shapes are those that the network reads."""
    width = unet.config.context_channels
    if texts is None or texts.states.ndim != 3 or 0 in texts.states.shape or texts.states.shape[2] != width:
        given = None if texts is None else list(texts.states.shape)
        raise BackendError(f"this network needs texts, states of the shape [texts, tokens, {width}], not {given}")
    kind = vector_kind(unet)
    wanted = None if kind is None else [len(texts), vector_width(unet)]
    given = None if texts.pooled is None else list(texts.pooled.shape)
    if given != wanted and not (kind == "condition" and given is None):
        raise BackendError(f"this network needs pooled vectors of texts of the shape {wanted}, not {given}")
    return texts


def _digest(texts: Texts, i: int) -> bytes:
    """Compute a digest of a text's numbers, which is the same for equal texts."""
    digest = hashlib.blake2b()
    for given in (texts.states, texts.pooled):
        if given is not None:
            digest.update(given[i].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.digest()


class TextTables:
    """Keys and values of texts for every attention that reads them, computed once for all steps.

    ``banks`` has those of each external buffer ``<key>.text``, [room, tokens, C] in ``dtype``, and ``classes`` the
    class embeddings that come with the texts, float32 [room, features], or None. Equal texts share a row, whichever
    `Texts` they come from. ``places`` has the row of each text by a digest of its numbers. Where the room does not
    suffice, larger tensors take the place of all, up to ``most_bytes``, or as many as one `Texts` needs. Beyond that
    the rows are given to others: then another dict takes the place of ``places``, and earlier results of `entries` no
    longer hold.

    Texts that come and go (`Texts.names`) are instead in rows of their own numbers, see `follow`. A table serves texts
    of one kind only.
    """

    @plain_modes()
    def __init__(
        self,
        unet: UNetCondition,
        tokens: int,
        device: torch.device,
        most_bytes: int,
        dtype: torch.dtype = torch.float32,
    ):
        self.unet = unet
        self.tokens = tokens
        self.widths = {name: 2 * m.to_k.out_features for name, m in text_attentions(unet).items()}
        features = 0 if vector_kind(unet) is None else unet.config.temb_channels
        held = dtype.itemsize * tokens * sum(self.widths.values()) + 4 * features  # bytes of a text
        self.most = max(1, most_bytes // held)
        self.places: dict[bytes, int] = {}
        self.names: list[Hashable] = []  # of the texts in rows of their own numbers
        self.banks = {
            name: torch.zeros(0, tokens, width, dtype=dtype, device=device) for name, width in self.widths.items()
        }
        self.classes = torch.zeros(0, features, dtype=torch.float32, device=device) if features else None
        self.room = 0

    def refresh(self) -> None:
        """Drop what was computed from weights that have changed since; all tensors keep their addresses."""
        self.places, self.names = {}, []

    @plain_modes()
    def entries(self, texts: Texts) -> Tensor:
        """Return the row of each of the texts, int64 [texts] on the CPU. New texts are computed now."""
        wanted = [_digest(texts, i) for i in range(len(texts))]
        if len(self.places.keys() | set(wanted)) > max(self.most, len(set(wanted))):
            self.places = {}
        for i, digest in enumerate(wanted):
            if digest not in self.places:
                self._grow(len(self.places) + 1)
                self._compute(texts, i, len(self.places))
                self.places[digest] = len(self.places)
        return torch.tensor([self.places[digest] for digest in wanted], dtype=torch.int64, device="cpu")

    @plain_modes()
    def follow(self, texts: Texts) -> bool:
        """Have the row of each text that comes and goes at its own number; return whether a row was another's before.

        Texts that are new at their place are computed now.
        """
        assert texts.names is not None
        self._grow(len(texts))
        before = self.names or [None] * len(texts)
        new = [i for i, name in enumerate(texts.names) if name is not None and name != before[i]]
        self.names = list(before)
        for i in new:
            self.names[i] = None  # until it is computed
            self._compute(texts, i, i)
            self.names[i] = texts.names[i]
        return any(before[i] is not None for i in new)

    def _compute(self, texts: Texts, i: int, place: int) -> None:
        like = self.unet.conv_in.weight
        vector = None if texts.pooled is None else texts.pooled[i].to(like)
        rows, embedded = embed_text(self.unet, texts.states[i].to(like), vector)
        for name, row in rows.items():
            self.banks[name][place] = row
        if self.classes is not None:
            assert embedded is not None
            self.classes[place] = embedded

    def _grow(self, room: int) -> None:
        """Have room for so many texts; the tensors are others if they were too small."""
        if room <= self.room:
            return
        self.room = max(room, min(2 * self.room, self.most))

        def grown(t: Tensor) -> Tensor:
            larger = t.new_zeros(self.room, *t.shape[1:])
            larger[: len(t)] = t
            return larger

        self.banks = {name: grown(bank) for name, bank in self.banks.items()}
        self.classes = None if self.classes is None else grown(self.classes)
