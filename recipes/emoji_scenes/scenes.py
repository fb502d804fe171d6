"""Compose scenes, a sprite of some colour and size on some ground, and write captions of them as people do.

Scene i is a function of (seed, i) alone. Pairs of a colour and a noun, and of a noun and a ground, that `held_out`
names are never composed for training: a model that draws them right has combined words that it met apart.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.emoji_scenes.sprites import ANIMALS, NOUNS

SIDE = 32  # pixels of a scene
COLOURS = {
    "red": (214, 38, 38), "orange": (245, 140, 30), "yellow": (250, 214, 50), "green": (52, 168, 70),
    "blue": (48, 98, 222), "purple": (138, 60, 190), "pink": (250, 130, 180), "brown": (130, 82, 46),
    "black": (42, 42, 46), "white": (246, 246, 246),
}  # fmt: skip
GROUNDS = ("grass", "sand", "snow", "sea", "road", "night", "wall", "plain")

# Words that people use for the same thing. Those of colours are in captions of training, as no general encoder of
# sentences tells crimson from purple; other words for nouns are not, so that they show how far it generalises.
COLOUR_WORDS = {
    "red": ("crimson", "scarlet"), "orange": ("amber",), "yellow": ("golden",), "green": ("emerald",),
    "blue": ("azure", "navy blue"), "purple": ("violet", "lilac"), "pink": ("rose-coloured",), "brown": ("chestnut",),
    "black": ("jet black", "dark"), "white": ("snow-white", "ivory"),
}  # fmt: skip
OTHER_NOUNS = {
    "dog": "puppy", "cat": "kitten", "rabbit": "bunny", "horse": "pony", "sheep": "lamb", "mouse": "rat",
    "frog": "toad", "bicycle": "bike", "airplane": "plane", "car": "automobile", "truck": "lorry", "house": "home",
    "hat": "top hat", "shoe": "sneaker", "dinosaur": "tyrannosaurus", "train": "locomotive", "ball": "football",
}  # fmt: skip
PHRASES = {
    "grass": ("on grass", "on the grass", "on green grass", "in a meadow", "on a lawn", "in a field"),
    "sand": ("on sand", "on the sand", "on a beach", "in the desert"),
    "snow": ("on snow", "in the snow", "on the snow", "in winter"),
    "sea": ("on the sea", "in the sea", "on water", "in the ocean"),
    "road": ("on a road", "on the road", "on the street", "in the street"),
    "night": ("at night", "under the stars", "in the night sky", "under a starry sky"),
    "wall": ("in front of a wall", "in front of a brick wall", "by a wall"),
    "plain": ("on a plain background", "on a grey background", "on nothing"),
}
SIZES = {"small": (11, 14), "": (16, 20), "big": (23, 27)}  # side of the sprite in pixels
SIZE_WORDS = {"small": ("small", "tiny", "little"), "big": ("big", "large", "huge")}
VERBS = ("sitting", "standing", "resting", "waiting")


@dataclasses.dataclass(frozen=True)
class Scene:
    """A description of a scene. An empty colour leaves the emoji its own colours."""

    noun: str
    colour: str
    ground: str
    size: str
    set: int  # of emoji
    x: float  # place, from 0 (left) to 1
    y: float  # how far up on the ground, from 0 to 1
    mirrored: bool


@functools.cache
def held_out(kind: str, first: str, second: str) -> bool:
    """Return whether a pair of kind "colour" (colour, noun) or "ground" (noun, ground) is one of the 15 % held out."""
    if (first, second) in {("white", "dog"), ("dog", "grass")}:  # the example of the documentation is never trained
        return True
    digest = hashlib.sha256(f"{kind}/{first}/{second}".encode()).digest()
    return digest[0] < 0.15 * 256


def trained(scene: Scene) -> bool:
    """Return whether a scene may be composed for training."""
    return not (
        (scene.colour and held_out("colour", scene.colour, scene.noun)) or held_out("ground", scene.noun, scene.ground)
    )


def draw_scene(choose: np.random.Generator, coloured: float = 0.75) -> Scene:
    """Draw a scene; with probability ``coloured`` it has one of the ten colours."""
    return Scene(
        noun=NOUNS[choose.integers(len(NOUNS))],
        colour=list(COLOURS)[choose.integers(len(COLOURS))] if choose.random() < coloured else "",
        ground=GROUNDS[choose.integers(len(GROUNDS))],
        size=("small", "", "", "big")[choose.integers(4)],
        set=int(choose.integers(4)),
        x=float(choose.random()),
        y=float(choose.random()),
        mirrored=bool(choose.random() < 0.5),
    )


def caption(scene: Scene, choose: np.random.Generator) -> str:
    """Write a caption as people do: the noun always, colour, size and ground mostly."""

    def pick(words: tuple[str, ...]) -> str:
        return words[choose.integers(len(words))]

    words = []
    if scene.size and choose.random() < 0.7:
        words.append(pick(SIZE_WORDS[scene.size]))
    if scene.colour and choose.random() < 0.92:
        words.append(pick(COLOUR_WORDS[scene.colour]) if choose.random() < 0.2 else scene.colour)
    words.append(scene.noun)
    phrase = pick(PHRASES[scene.ground]) if choose.random() < 0.92 else ""
    if phrase and scene.noun in ANIMALS and choose.random() < 0.35:
        words.append(pick(VERBS))
    text = " ".join([*words, phrase]).strip()
    if choose.random() < 0.7:
        text = f"{'an' if text[0] in 'aeio' else 'a'} {text}"
    start = choose.random()
    return f"a picture of {text}" if start < 0.05 else text.capitalize() if start < 0.15 else text


class Composer:
    """Pictures of scenes from the sprites that `sprites.py` renders.

    Args:
        path: The file that `sprites.py` wrote.
    """

    def __init__(self, path: str | Path):
        with np.load(path) as file:
            names, numbers, sprites = tuple(map(str, file["names"])), file["nouns"], file["sprites"]
        if names != NOUNS:
            raise SystemExit(f"{path} holds other nouns than sprites.py lists now; run it again")
        self.sprites: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for number, sprite in zip(numbers, sprites, strict=True):
            self.sprites[names[number]].append(sprite)
        self.small: dict[tuple[str, int, str, int], np.ndarray] = {}
        self.digest = hashlib.sha256(sprites.tobytes()).hexdigest()

    def picture(self, scene: Scene, choose: np.random.Generator) -> np.ndarray:
        """Compose a scene, uint8 [32, 32, 3]; ``choose`` draws the details of the ground and the exact size."""
        picture = ground(scene.ground, choose)
        low, high = SIZES[scene.size]
        side = int(choose.integers(low, high + 1))
        small = self._small(scene.noun, scene.set, scene.colour, side)
        if scene.mirrored:
            small = small[:, ::-1]
        left = round(scene.x * (SIDE - side))
        top = round((SIDE - side) * (1 - 0.35 * scene.y)) if scene.ground != "night" else round(scene.y * (SIDE - side))
        part = picture[top : top + side, left : left + side]
        alpha = small[..., 3:] / 255.0
        part[:] = part * (1 - alpha) + small[..., :3] * alpha
        return np.clip(np.rint(picture), 0, 255).astype(np.uint8)

    def _small(self, noun: str, number: int, colour: str, side: int) -> np.ndarray:
        """Return a recoloured sprite of a size, uint8 [side, side, 4]; all that were asked for are kept."""
        key = (noun, number, colour, side)
        if key not in self.small:
            sprite = self.sprites[noun][number]
            self.small[key] = shrunk(recoloured(sprite, COLOURS[colour]) if colour else sprite, side)
        return self.small[key]


def recoloured(sprite: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Give a sprite one colour: its luminance, stretched so that its median is that of the colour, shades it."""
    luminance = sprite[..., :3] @ np.array([0.299, 0.587, 0.114])
    inside = luminance[sprite[..., 3] > 128]
    low, high = np.percentile(inside, [4, 96])
    level = np.clip((luminance - low) / max(high - low, 1.0), 0.0, 1.0)
    median = np.clip((np.median(inside) - low) / max(high - low, 1.0), 0.05, 0.95)
    level = (level ** (np.log(0.6) / np.log(median)))[..., None]
    base = np.array(colour, np.float64)
    dark, light = base * 0.5, base + (255.0 - base) * 0.35
    ramp = np.where(level < 0.6, dark + (base - dark) * (level / 0.6), base + (light - base) * ((level - 0.6) / 0.4))
    return np.concatenate([np.rint(ramp).astype(np.uint8), sprite[..., 3:]], axis=-1)


def shrunk(sprite: np.ndarray, side: int) -> np.ndarray:
    """Shrink a sprite to uint8 [side, side, 4], with colours averaged by their alpha."""
    alpha = sprite[..., 3:].astype(np.float32)
    planes = np.concatenate([sprite[..., :3] * (alpha / 255.0), alpha], axis=-1)
    small = np.stack(
        [np.asarray(Image.fromarray(planes[..., c]).resize((side, side), Image.Resampling.BOX)) for c in range(4)], -1
    )
    small[..., :3] /= np.maximum(small[..., 3:] / 255.0, 1e-6)
    return np.clip(np.rint(small), 0, 255).astype(np.uint8)


def ground(kind: str, choose: np.random.Generator) -> np.ndarray:
    """Draw a ground, float64 [32, 32, 3]: a sky above the horizon, and what is below it."""
    horizon = int(choose.integers(9, 16))
    picture = np.empty((SIDE, SIDE, 3))
    rows = np.arange(SIDE)[:, None, None]
    sky, below = {
        "grass": ((150, 205, 250), (92, 172, 70)), "sand": ((160, 210, 250), (228, 200, 140)),
        "snow": ((196, 208, 222), (238, 242, 248)), "sea": ((170, 215, 250), (46, 118, 190)),
        "road": ((186, 200, 212), (108, 108, 112)), "night": ((18, 22, 58), (18, 22, 58)),
        "wall": ((168, 92, 70), (168, 92, 70)), "plain": ((206, 206, 210), (206, 206, 210)),
    }[kind]  # fmt: skip
    picture[:] = np.array(sky) + 1.2 * (rows - 6)
    if kind in ("night", "plain", "wall"):
        picture[:] = np.array(sky) + choose.normal(0, 3, 3)
    else:
        picture[horizon:] = np.array(below) + choose.normal(0, 4, 3) - 0.6 * (rows[horizon:] - 24)
    texture = choose.normal(0, 1, (SIDE, SIDE, 1))
    if kind == "grass":
        picture[horizon:] += texture[horizon:] * np.array([12, 16, 10])
    elif kind == "sand":
        picture[horizon:] += texture[horizon:] * 7
    elif kind == "snow":
        picture[horizon:] += texture[horizon:] * 3
    elif kind == "sea":
        wave = np.sin(np.arange(SIDE)[None, :] * 0.8 + np.arange(SIDE)[:, None] * 2.1 + choose.random() * 6)
        picture[horizon:] += (wave[horizon:, :, None] > 0.72) * 45.0
    elif kind == "road":
        middle = (horizon + SIDE) // 2 + 2
        picture[horizon : horizon + 1] = 150.0
        dash = (np.arange(SIDE) + int(choose.integers(8))) % 8 < 4
        picture[middle : middle + 2, dash] = (240.0, 236.0, 200.0)
        picture[horizon:] += texture[horizon:] * 3
    elif kind == "night":
        picture[choose.random((SIDE, SIDE)) < 0.035] = (236.0, 236.0, 200.0)
    elif kind == "wall":
        shift = int(choose.integers(8))
        for row in range(0, SIDE, 4):
            picture[row] = 205.0
            picture[row : row + 4, (np.arange(SIDE) + shift + 4 * (row // 4 % 2)) % 8 == 0] = 205.0
    return picture


def scene_of(seed: int, index: int, part: str = "train") -> Scene:
    """Return the description of scene ``index`` of a seed.

    ``part`` is "train" for scenes without held-out pairs, "held-out" for coloured scenes whose colour and noun, or noun
    and ground, are a held-out pair, and "seen" for coloured scenes without one.
    """
    choose = _choices(seed, index, part, 0)
    while True:
        scene = draw_scene(choose, 0.75 if part == "train" else 1.0)
        if trained(scene) == (part != "held-out"):
            return scene


def picture_of(composer: Composer, seed: int, index: int, part: str = "train") -> np.ndarray:
    """Return the picture of scene ``index`` of a seed, uint8 [32, 32, 3]."""
    return composer.picture(scene_of(seed, index, part), _choices(seed, index, part, 1))


def caption_of(seed: int, index: int, part: str = "train") -> str:
    """Return the caption of scene ``index`` of a seed."""
    return caption(scene_of(seed, index, part), _choices(seed, index, part, 2))


def _choices(seed: int, index: int, part: str, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, index, ("train", "held-out", "seen").index(part), purpose])
