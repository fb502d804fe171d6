"""Every kernel's cases, and the launches that fastdiff ships; one module per group of operations.

CASES: by name, what makes a `Case`, small. SHIPPED: by name, what makes a launch at a real network's shape on the meta
device, which is compiled ahead of time. ONES: the same where every size is 1, which the compiler takes for a constant.
TENSOR_CORES: operations whose binaries must multiply with them.
"""

from __future__ import annotations

from tests.support import cases_attention, cases_conv, cases_ends, cases_norm, cases_update

MODULES = (cases_attention, cases_conv, cases_ends, cases_norm, cases_update)
CASES = {name: build for module in MODULES for name, build in module.CASES.items()}
SHIPPED = {name: build for module in MODULES for name, build in module.SHIPPED.items()}
ONES = {name: build for module in MODULES for name, build in module.ONES.items()}
TENSOR_CORES = {"conv.conv", "conv.partial", "attention.attention"}
