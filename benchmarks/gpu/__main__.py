"""Entry point of ``python benchmarks/gpu``, which works from any folder: it imports from the root of the checkout."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from benchmarks.gpu.call import main  # noqa: E402 - needs the line above

if __name__ == "__main__":
    sys.exit(main())
