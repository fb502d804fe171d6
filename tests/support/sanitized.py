"""Plugin of pytest that takes the native engine from the folder ``FASTDIFF_NATIVE_FOLDER``, a build with sanitizers."""

from __future__ import annotations

import os
from pathlib import Path

import fastdiff

folder = Path(os.environ["FASTDIFF_NATIVE_FOLDER"]).resolve()
fastdiff.__path__.insert(0, str(folder))

from fastdiff import _native  # noqa: E402 - found in the folder now

assert Path(_native.__file__).parent == folder, f"{_native.__file__} is not in {folder}"
