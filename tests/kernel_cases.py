"""Every kernel's cases, and the launches that fastdiff ships; one module per group of operations.

CASES: by name, what makes a `Case`, small. SHIPPED: by name, what makes a launch at a real network's shape on the meta
device, which is compiled ahead of time. TENSOR_CORES: operations whose binaries must multiply with them.
"""

from __future__ import annotations

import cases_norm
import cases_update

CASES = {**cases_norm.CASES, **cases_update.CASES}
SHIPPED = {**cases_norm.SHIPPED, **cases_update.SHIPPED}
TENSOR_CORES: set[str] = set()
