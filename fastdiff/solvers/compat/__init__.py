"""Tables that repeat the sampling loops of other code bases, quirks included: ``sample(..., compat=...)``.

Without ``compat=`` a solver follows its paper. With it, a run from the same noise draws the images that the code base
draws, and ``spacing`` is an option in the terms of that code base:

- "diffusers": a ``timestep_spacing`` or a spacing by sigma (`fastdiff.solvers.compat.diffusers`).
- "openai", improved- and guided-diffusion: a ``timestep_respacing`` (`fastdiff.solvers.compat.openai`).
- "ho", the original DDPM and the original DDIM: a ``skip_type`` (`fastdiff.solvers.compat.ho`).

What a code base's networks expect of their input follows from the checkpoint and needs no option
(`fastdiff.checkpoints.layouts`; ``timestep_scale`` for rescaled timesteps).
"""

from __future__ import annotations

from collections.abc import Callable

from fastdiff.checks import shown
from fastdiff.errors import InvalidArgument
from fastdiff.solvers.compat.diffusers import diffusers_table, from_config
from fastdiff.solvers.compat.ho import ho_table
from fastdiff.solvers.compat.openai import openai_table
from fastdiff.solvers.compat.run import FROM_MODEL, CompatOptions
from fastdiff.solvers.table import StepTable, check_clip

__all__ = ["CODE_BASES", "FROM_MODEL", "CompatOptions", "compat_table", "from_config"]

CODE_BASES: dict[str, Callable[[CompatOptions], StepTable]] = {
    "diffusers": diffusers_table,
    "openai": openai_table,
    "ho": ho_table,
}


def compat_table(options: CompatOptions) -> StepTable:
    """Return the table of the own loop of ``options.code_base``.

    `InvalidArgument` says that the code base has no such solver or option, `ConfigError` that diffusers' own scheduler
    fails, or that an option of the model's scheduler is not supported.
    """
    base = options.code_base
    if not isinstance(base, str) or base not in CODE_BASES:
        raise InvalidArgument(f"compat={shown(base)} is unknown; allowed: {', '.join(CODE_BASES)}, or None")
    if not (isinstance(options.clip, str) and options.clip == FROM_MODEL):
        check_clip("clip", options.clip)
    return CODE_BASES[base](options)
