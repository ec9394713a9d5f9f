# SPDX-License-Identifier: Apache-2.0
"""Params for a density that is asked for: ``at_density`` of methods that have no such param."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from dit_sparse.core.call import AttentionCall

if TYPE_CHECKING:
    from collections.abc import Callable

    from dit_sparse.core.call import Method
    from dit_sparse.core.grid import LatentsGrid

_BISECTIONS = 12


def threshold_at(density: float) -> float:
    """Guess the threshold of a top-p rule that keeps about ``density``: the content decides."""
    return float(np.interp(density, (0.0, 0.125, 0.25, 0.5, 1.0), (0.0, 0.6, 0.8, 0.95, 1.0)))


def static_density(method: Method, grid: LatentsGrid) -> float:
    """Count what a static method keeps on a grid."""
    blank = torch.zeros(1, grid.tokens, 1, 1)
    call = AttentionCall(blank, blank, blank, grid, 1.0, heads=(0,))
    plan = method.plan(call, None)  # type: ignore[arg-type]  # a static plan needs no operations
    return 1.0 if plan is None else float(plan.density().mean())


def largest(
    build: Callable[[float], Method], density: float, grid: LatentsGrid, low: float, high: float
) -> float:
    """Bisect for the largest number whose static method keeps no more than ``density``.

    Args:
        build: Makes the method from a number; a larger one keeps more.
        density: Share of all pairs.
        grid: Where the tokens stand.
        low: The least number, taken where even that keeps too much.
        high: An upper limit.
    """
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if static_density(build(middle), grid) > density:
            high = middle
        else:
            low = middle
    return low
