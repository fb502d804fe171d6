"""``python benchmarks/gpu``, from any folder: the package is imported from the folder that holds it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from gpu.call import main  # noqa: E402 - found by the line above

if __name__ == "__main__":
    sys.exit(main())
