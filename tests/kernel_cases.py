"""Every kernel's cases, and the launches that fastdiff ships; one module per group of operations.

CASES: by name, what makes a `Case`, small. SHIPPED: by name, what makes a launch at a real network's shape on the meta
device, which is compiled ahead of time. ONES: the same where every size is 1, which the compiler takes for a constant.
TENSOR_CORES: operations whose binaries must multiply with them.
"""

from __future__ import annotations

import cases_ends
import cases_norm
import cases_update

CASES = {**cases_ends.CASES, **cases_norm.CASES, **cases_update.CASES}
SHIPPED = {**cases_ends.SHIPPED, **cases_norm.SHIPPED, **cases_update.SHIPPED}
ONES = {**cases_ends.ONES, **cases_norm.ONES, **cases_update.ONES}
TENSOR_CORES: set[str] = set()
