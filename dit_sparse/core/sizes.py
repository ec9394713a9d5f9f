# SPDX-License-Identifier: Apache-2.0
"""How much memory remembered things hold."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dit_sparse.core.plan import BlockPlan


def nbytes(value: Any) -> int:
    """Bytes of all tensors and plans inside containers."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, BlockPlan):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(nbytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(nbytes, value))
    return 0
