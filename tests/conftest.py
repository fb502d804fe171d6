"""Settings for every test."""

from __future__ import annotations

import os

# Tests need no network, and must not learn whether there is one.
os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import settings

# Machines that run tests are shared: a slow example is no failure.
settings.register_profile("fastdiff", deadline=None, print_blob=True)
settings.load_profile("fastdiff")
