"""``python -m fastdiff``, as torchrun starts it."""

from fastdiff.cli import main

main()
