"""The cases and launches with which all kernels are tested; each group of operations has a module.

CASES: functions by name that build small cases to be interpreted. SHIPPED: functions that build launches at shapes of
real networks on the meta device, which are compiled ahead of time. ONES: the same with every size 1, which the compiler
makes a constant. TENSOR_CORES: operations that must use tensor cores.
"""

from __future__ import annotations

from tests.support import cases_attention, cases_conv, cases_ends, cases_norm, cases_transformer, cases_update

MODULES = (cases_attention, cases_conv, cases_ends, cases_norm, cases_transformer, cases_update)
CASES = {name: build for module in MODULES for name, build in module.CASES.items()}
SHIPPED = {name: build for module in MODULES for name, build in module.SHIPPED.items()}
ONES = {name: build for module in MODULES for name, build in module.ONES.items()}
TENSOR_CORES = {"conv.conv", "conv.partial", "attention.attention", "geglu"}
