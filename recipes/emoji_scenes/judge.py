"""Measure how often an image shows what its prompt asks for: noun, colour and ground.

    python -m recipes.emoji_scenes.judge train --sprites data/emoji-sprites.npz --out runs/emoji-judge.safetensors
    python -m recipes.emoji_scenes.judge measure runs/emoji-scenes --judge runs/emoji-judge.safetensors \
        --sprites data/emoji-sprites.npz --out out/emoji-scenes

The judge is a small network, trained on real scenes of all pairs, also of those that the model is never trained on. Its
accuracy on new real scenes is the ceiling of what can be measured. ``measure`` writes adherence.json, with Wilson's
intervals, and held-out.png: the first 64 images of held-out prompts, as they come.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import Sampler
from fastdiff.data import grid
from fastdiff.evaluation.classifier import Block, Down
from fastdiff.evaluation.metrics import share_interval
from fastdiff.files import write_text
from recipes.emoji_scenes.scenes import (
    COLOURS,
    GROUNDS,
    OTHER_NOUNS,
    PHRASES,
    Composer,
    Scene,
    draw_scene,
    picture_of,
    scene_of,
    trained,
)
from recipes.emoji_scenes.sprites import NOUNS

HEADS = {"noun": NOUNS, "colour": tuple(COLOURS), "ground": GROUNDS}
WIDTHS = (48, 96, 128)
TRAIN_SEED, TEST_SEED = 101, 202  # of scenes; the model's training has seed 0


class Judge(nn.Module):
    """Network that names noun, colour and ground of a scene, [B, 3, 32, 32] in [-1, 1] to logits by the names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential()
        for channels, out in zip((3, *WIDTHS), WIDTHS, strict=False):
            self.body.append(Down(channels, out, kernel=5 if channels == 3 else 3))
            self.body.append(Block(out))
        self.heads = nn.ModuleDict(
            {name: nn.Linear(WIDTHS[-1] * 16, len(values), dtype=torch.float32) for name, values in HEADS.items()}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x).flatten(1)
        return {name: head(features) for name, head in self.heads.items()}


def any_scene(choose: np.random.Generator) -> Scene:
    """Draw a coloured scene, of trained and held-out pairs alike."""
    return draw_scene(choose, coloured=1.0)


def real(composer: Composer, seed: int, indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Compose real scenes, [n, 3, 32, 32] in [-1, 1], with the numbers of their noun, colour and ground."""
    pictures, scenes = [], []
    for i in indices:
        choose = np.random.default_rng([seed, i])
        scenes.append(any_scene(choose))
        pictures.append(composer.picture(scenes[-1], choose))
    return as_input(np.stack(pictures)), asked(scenes)


def as_input(pictures: np.ndarray) -> Tensor:
    """Return pictures, uint8 [n, 32, 32, 3], as the judge's input."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def asked(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Return the number of each scene's noun, colour and ground."""
    return {
        name: torch.tensor([values.index(getattr(scene, name)) for scene in scenes], dtype=torch.int64, device="cpu")
        for name, values in HEADS.items()
    }


def train(composer: Composer, steps: int, batch: int = 64) -> Judge:
    """Train a judge on real scenes, each of which it sees once, with a learning rate that falls to 0."""
    torch.manual_seed(0)
    judge = Judge().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        x, want = real(composer, TRAIN_SEED, range(step * batch, (step + 1) * batch))
        logits = judge(x.contiguous(memory_format=torch.channels_last))
        loss = torch.stack([F.cross_entropy(logits[name], want[name]) for name in HEADS]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49 or step == steps - 1:
            print(f"step {step + 1}/{steps}  loss {float(loss.detach()):.3f}", flush=True)
    return judge.eval()


@torch.no_grad()
def right(judge: Judge, x: Tensor, want: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return which images show the wanted noun, colour and ground, and which show all of them, each bool [n]."""
    found = [judge(part) for part in x.split(256)]
    result = {name: torch.cat([logits[name].argmax(1) for logits in found]) == want[name] for name in HEADS}
    return {**result, "all": torch.stack(list(result.values())).all(0)}


def shares(flags: dict[str, Tensor]) -> dict[str, Any]:
    """Return the share of each, with the ends of its 95 % interval."""
    result = {}
    for name, values in flags.items():
        found = share_interval(values)
        result[name] = {"share": round(found.value, 4), "interval": [round(found.low, 4), round(found.high, 4)]}
    return result


def prompt(scene: Scene, noun: str | None = None) -> str:
    """Write a prompt that says noun, colour and ground, the ground in its first phrase."""
    words = f"{scene.colour} {noun or scene.noun} {PHRASES[scene.ground][0]}"
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"


def images(sampler: Sampler, prompts: Sequence[str], steps: int, guidance: float) -> Tensor:
    """Draw an image of each prompt, as the bytes of a picture would be."""
    output = sampler.sample(len(prompts), prompts=list(prompts), solver="dpmpp_2m", steps=steps, guidance=guidance)
    return (output.images.clamp(-1, 1) * 127.5).round() / 127.5


def measure(sampler: Sampler, judge: Judge, composer: Composer, n: int, steps: int, guidance: float, out: Path) -> None:
    """Measure adherence to held-out and seen prompts, to other words for nouns, and to shuffled prompts."""
    report: dict[str, Any] = {"n": n, "steps": steps, "guidance": guidance, "solver": "dpmpp_2m"}
    x, want = real(composer, TEST_SEED, range(n))
    report["judge on real scenes"] = shares(right(judge, x, want))
    out.mkdir(parents=True, exist_ok=True)
    for part in ("held-out", "seen"):
        scenes = [scene_of(TEST_SEED, i, part) for i in range(n)]
        drawn = images(sampler, [prompt(scene) for scene in scenes], steps, guidance)
        report[part] = shares(right(judge, drawn, asked(scenes)))
        composed = as_input(np.stack([picture_of(composer, TEST_SEED, i, part) for i in range(n)]))
        report[f"judge on real scenes, {part}"] = shares(right(judge, composed, asked(scenes)))
        if part == "held-out":
            report["held-out, shuffled prompts"] = shares(right(judge, drawn.roll(1, 0), asked(scenes)))
            save(drawn[:64], out / "held-out.png")
            write_text(out / "held-out.txt", "\n".join(prompt(scene) for scene in scenes[:64]) + "\n")
    scenes = [scene for scene in (scene_of(TEST_SEED, i, "seen") for i in range(20 * n)) if scene.noun in OTHER_NOUNS]
    scenes = scenes[:n]
    drawn = images(sampler, [prompt(scene, OTHER_NOUNS[scene.noun]) for scene in scenes], steps, guidance)
    report["other words for nouns"] = shares(right(judge, drawn, asked(scenes)))
    example = Scene("dog", "white", "grass", "", 0, 0.5, 0.5, False)
    assert not trained(example)
    drawn = images(sampler, ["a white dog sitting on grass"] * 10, steps, guidance)
    report["a white dog sitting on grass"] = {
        k: int(v.sum()) for k, v in right(judge, drawn, asked([example] * 10)).items()
    }
    write_text(out / "adherence.json", json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def save(drawn: Tensor, path: Path) -> None:
    """Write images as one picture, three times as large."""
    picture = grid(drawn, 8)
    picture.resize((picture.width * 3, picture.height * 3), 0).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training, measuring = commands.add_parser("train"), commands.add_parser("measure")
    for command in (training, measuring):
        command.add_argument("--sprites", type=Path, default=Path("data/emoji-sprites.npz"))
    training.add_argument("--out", type=Path, default=Path("runs/emoji-judge.safetensors"))
    training.add_argument("--steps", type=int, default=4000)
    measuring.add_argument("model")
    measuring.add_argument("--judge", type=Path, default=Path("runs/emoji-judge.safetensors"))
    measuring.add_argument("--out", type=Path, default=Path("out/emoji-scenes"))
    measuring.add_argument("--n", type=int, default=1000)
    measuring.add_argument("--steps", type=int, default=20)
    measuring.add_argument("--guidance", type=float, default=3.0)
    arguments = parser.parse_args()
    composer = Composer(arguments.sprites)
    if arguments.command == "train":
        judge = train(composer, arguments.steps)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in judge.state_dict().items()}, arguments.out)
        print(json.dumps(shares(right(judge, *real(composer, TEST_SEED, range(1000))))))
        return
    judge = Judge().eval()
    judge.load_state_dict(load_file(arguments.judge))
    sampler = Sampler.from_pretrained(arguments.model)
    measure(sampler, judge, composer, arguments.n, arguments.steps, arguments.guidance, arguments.out)


if __name__ == "__main__":
    main()
