"""The trilemma as a picture: quality and diversity against speed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Colours by solver (Okabe and Ito 2008: told apart by the colour-blind); the line by what else a setting says.
COLOURS = {
    "ddpm": "#D55E00", "ddim": "#0072B2", "dpmpp_2m": "#009E73", "unipc": "#CC79A7", "dpmpp_3m": "#56B4E9",
}  # fmt: skip
OTHERS = ("#E69F00", "#7570B3", "#666666", "#A6761D")


def drawable() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_picture(result: Mapping[str, Any], path: Path) -> None:
    pass
