"""Backend `native`: the C++ engine for CPUs, which runs fastdiff's own U-Net as a lowered program.

`runner` steps a state, `coding` runs the decoder or encoder of an autoencoder, `program` gives a lowered program its
addresses, `methods` chooses each convolution's algorithm, `packing` lays out the weights, and `cost` predicts what a
job takes.
"""

from fastdiff.backends.native.arrays import aligned
from fastdiff.backends.native.coding import NativeCoder
from fastdiff.backends.native.extension import engine_reasons, extension, isa, multiplies_bf16, reasons_against
from fastdiff.backends.native.methods import METHODS, choose_method, choose_methods
from fastdiff.backends.native.program import NativeProgram, ProgramInputs, dry_program, part_rows
from fastdiff.backends.native.runner import NativeRunner, prepare

__all__ = [
    "METHODS",
    "NativeCoder",
    "NativeProgram",
    "NativeRunner",
    "ProgramInputs",
    "aligned",
    "choose_method",
    "choose_methods",
    "dry_program",
    "engine_reasons",
    "extension",
    "isa",
    "multiplies_bf16",
    "part_rows",
    "prepare",
    "reasons_against",
]
