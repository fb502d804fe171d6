"""Backend `native`: the C++ engine for CPUs."""
