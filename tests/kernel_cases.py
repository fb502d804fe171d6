"""Every kernel's cases, and the launches that fastdiff ships; one module per group of operations.

CASES: by name, what makes a `Case`, small. SHIPPED: by name, what makes a launch at a real network's shape on the meta
device, which is compiled ahead of time. TENSOR_CORES: operations whose binaries must multiply with them.
"""

from __future__ import annotations

import cases_attention
import cases_conv
import cases_norm

CASES = {**cases_norm.CASES, **cases_conv.CASES, **cases_attention.CASES}
SHIPPED = {**cases_norm.SHIPPED, **cases_conv.SHIPPED, **cases_attention.SHIPPED}
TENSOR_CORES = {"conv.conv", "conv.partial", "attention.attention"}
