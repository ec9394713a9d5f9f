# SPDX-License-Identifier: Apache-2.0
"""Apply a wish to the tables of what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dit_sparse.profiler.search import minimise, sparse_vdit_rule
from dit_sparse.profiler.table import density_cell

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dit_sparse.profiler.search import Cell
    from dit_sparse.profiler.table import Key, Row
    from dit_sparse.profiler.wish import Wish


def choose(cells: list[Cell], rows: Mapping[Key, Row], wish: Wish) -> list[tuple[int, ...]]:
    """Apply the wish's rule to the tables; cells and rows are in one order."""
    if wish.rule == "time" and wish.density is not None:
        by_density = [density_cell(key, row) for key, row in rows.items()]
        return list(minimise(by_density, density=wish.density).choices)
    if wish.rule == "time":
        return list(minimise(cells, target=wish.target, budget=wish.budget).choices)
    found = []
    for row in rows.values():
        loss = np.sqrt(row.error[:, 1:])
        if wish.loss == "mse":
            loss = row.error[:, 1:] * row.power[:, None]
        found.append(
            sparse_vdit_rule(loss, row.density[:, 1:], weight=wish.weight, epsilon=wish.epsilon)
        )
    return found


def predicted(cells: list[Cell], choices: Mapping[Key, tuple[int, ...]]) -> dict[str, float]:
    """Predict how much faster self-attention is, over all captured branches."""
    dense = sum(float(cell.time[:, 0].sum()) for cell in cells)
    time = 0.0
    for cell in cells:
        chosen = choices[cell.key]
        time += float(cell.time[np.arange(len(chosen)), chosen].sum())
        time += float(cell.launch[sorted(set(chosen))].sum())
    return {"predicted_attention_speedup": float(f"{dense / time:.6g}")}
