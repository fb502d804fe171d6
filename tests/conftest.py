"""Settings for every test."""

from __future__ import annotations

import os

# One thread, here and in every process that a test starts, before torch counts the cores: the networks are small, and
# bits and rounding bands are compared between processes.
os.environ["OMP_NUM_THREADS"] = "1"
# Tests need no network, and must not learn whether there is one.
os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import settings

# Machines that run tests are shared: a slow example is no failure.
settings.register_profile("fastdiff", deadline=None, print_blob=True)
settings.load_profile("fastdiff")
