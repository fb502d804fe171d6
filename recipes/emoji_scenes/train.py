"""Train the model "emoji-scenes" on scenes that are composed as they are needed, and write it as a folder.

    python -m recipes.emoji_scenes.train --sprites data/emoji-sprites.npz --out runs/emoji-scenes

A run may be interrupted at any time and continues when it is started again. The folder ``runs/emoji-scenes/model`` is
the model: `fastdiff sample runs/emoji-scenes/model --prompt "a white dog sitting on grass"`.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch

from fastdiff import NoiseSchedule, TrainConfig, Trainer, UNetCondition, UNetConditionConfig
from fastdiff.data import ImageData
from fastdiff.text import CaptionEncoder, CaptionEncoderConfig
from recipes.emoji_scenes.scenes import SIDE, Composer, caption_of, picture_of

SCENES = 1 << 22  # far more than a run meets
SEED = 0

TEXT = CaptionEncoderConfig(channels=128, layers=2, heads=4, tokens=24)
# Attention at 8x8 alone: at 16x16 it makes an update by half slower. The pooled text reaches all levels.
NETWORK = UNetConditionConfig(
    sample_size=SIDE, in_channels=3, out_channels=3, block_out_channels=(32, 48, 96), layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    cross_attention_dim=TEXT.channels, attention_head_dim=4, norm_num_groups=8, use_linear_projection=True,
    class_embed_type="simple_projection", projection_class_embeddings_input_dim=TEXT.channels,
)  # fmt: skip


class Captions(Sequence[str]):
    """The captions of the scenes of a seed, each written when it is asked for."""

    def __init__(self, seed: int):
        self.seed = seed

    def __len__(self) -> int:
        return SCENES

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(SCENES))]
        return caption_of(self.seed, index)


class Scenes(ImageData):
    """Scenes without held-out pairs, composed when they are asked for."""

    channels, size, num_classes = 3, (SIDE, SIDE), None

    def __init__(self, sprites: Path, seed: int = SEED):
        self.composer, self.seed = Composer(sprites), seed
        self.captions = Captions(seed)
        self.digest = f"emoji-scenes/{seed}/{self.composer.digest}"

    def __len__(self) -> int:
        return SCENES

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, None]:
        pictures = np.stack([picture_of(self.composer, self.seed, i) for i in indices])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", type=Path, default=Path("data/emoji-sprites.npz"))
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-scenes"))
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--lr-decay", default="none", help="none while more steps may follow, linear to end with")
    parser.add_argument("--sample-every", type=int, default=1000)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    config = TrainConfig(
        steps=arguments.steps, batch_size=64, prediction="v_prediction", min_snr_gamma=5.0, label_dropout=0.1, lr=8e-4,
        lr_warmup=200, lr_decay=arguments.lr_decay, ema_decay=0.9995, seed=SEED, log_every=20, save_every=100,
        sample_every=arguments.sample_every,
    )  # fmt: skip
    trainer = Trainer(
        UNetCondition(NETWORK).zero_residuals_(), Scenes(arguments.sprites), arguments.out, config,
        NoiseSchedule("cosine"), text_encoder=CaptionEncoder(TEXT),
    )  # fmt: skip
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: trainer.stop())
    trainer.fit(accept_changes=True)
    print(f"step {trainer.step} of {config.steps}: {arguments.out}")


if __name__ == "__main__":
    main()
