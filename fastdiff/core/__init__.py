"""Core shared by all backends: noise, per-image state, the reference update, and the lowered program with its plan."""
