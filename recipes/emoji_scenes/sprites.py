"""Render the emoji of four sets as sprites, from the packages of npm that hold them as SVG.

    npm pack @iconify-json/noto @iconify-json/fluent-emoji-flat @iconify-json/fluent-emoji @iconify-json/twemoji
    pip install resvg-py
    python -m recipes.emoji_scenes.sprites . -o data/emoji-sprites.npz

The packages are those of Iconify: noto (Google, Apache-2.0), fluent-emoji and fluent-emoji-flat (Microsoft, MIT),
twemoji (Twitter and contributors, CC-BY-4.0). The sprites are data of this recipe; the model that is trained on scenes
of them holds none.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SETS = ("noto", "fluent-emoji-flat", "fluent-emoji", "twemoji")
SIDE = 72  # pixels of a rendered sprite: three times the largest in a scene

# The word of a noun, and the name of its icon, which all four sets have, where it is another.
ANIMALS = {
    "dog": "", "cat": "", "rabbit": "", "horse": "", "cow": "", "pig": "", "sheep": "ewe", "goat": "", "elephant": "",
    "tiger": "", "bear": "", "fox": "", "monkey": "", "mouse": "", "frog": "", "turtle": "", "snake": "", "fish": "",
    "bird": "", "duck": "", "owl": "", "penguin": "", "rooster": "", "whale": "", "octopus": "", "butterfly": "",
    "bee": "honeybee", "snail": "", "spider": "", "crab": "", "dinosaur": "t-rex", "unicorn": "", "giraffe": "",
    "camel": "", "panda": "", "kangaroo": "",
}  # fmt: skip
THINGS = {
    "tree": "deciduous-tree", "cactus": "", "tulip": "", "sunflower": "", "mushroom": "", "apple": "red-apple",
    "banana": "", "pear": "", "strawberry": "", "carrot": "", "pizza": "", "cake": "birthday-cake", "car": "automobile",
    "bus": "", "truck": "delivery-truck", "tractor": "", "bicycle": "", "train": "locomotive", "airplane": "",
    "rocket": "", "helicopter": "", "sailboat": "", "house": "", "castle": "", "tent": "", "chair": "", "guitar": "",
    "drum": "", "trumpet": "", "ball": "soccer-ball", "umbrella": "", "hat": "top-hat", "shoe": "running-shoe",
    "shirt": "t-shirt", "key": "", "balloon": "", "bell": "", "crown": "", "star": "", "heart": "red-heart",
    "robot": "", "ghost": "", "snowman": "", "backpack": "",
}  # fmt: skip
NOUNS = tuple(sorted(ANIMALS | THINGS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="the folder with the four .tgz files")
    parser.add_argument("-o", "--out", type=Path, default=Path("data/emoji-sprites.npz"))
    arguments = parser.parse_args()
    sprites, nouns = [], []
    for name in SETS:
        icons = read_icons(arguments.packages, name)
        for number, noun in enumerate(NOUNS):
            sprites.append(render(icons, (ANIMALS | THINGS)[noun] or noun))
            nouns.append(number)
        print(f"{name}: {len(NOUNS)} sprites")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.out, sprites=np.stack(sprites), nouns=np.asarray(nouns, np.int64), names=NOUNS)
    print(arguments.out)


def read_icons(folder: Path, name: str) -> dict[str, Any]:
    """Read icons.json of a package of Iconify, of whatever version it is."""
    found = sorted(folder.glob(f"iconify-json-{name}-[0-9]*.tgz"))
    if len(found) != 1:
        raise SystemExit(f"{folder}: one iconify-json-{name}-VERSION.tgz of npm pack is needed, found {len(found)}")
    with tarfile.open(found[0]) as archive:
        file = archive.extractfile("package/icons.json")
        if file is None:
            raise SystemExit(f"{found[0]} has no icons.json")
        icons: dict[str, Any] = json.load(file)
    return icons


def render(icons: dict[str, Any], name: str) -> np.ndarray:
    """Render an icon, cropped to what it shows and centred in a square, uint8 [SIDE, SIDE, 4] with straight alpha."""
    import resvg_py

    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * SIDE, height=4 * SIDE))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SIDE, SIDE))
    # Things rest on the ground, so a sprite touches the lower edge of its square.
    square.paste(image, ((SIDE - image.width) // 2, SIDE - image.height))
    return np.asarray(square)


if __name__ == "__main__":
    main()
