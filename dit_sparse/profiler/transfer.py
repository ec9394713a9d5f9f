# SPDX-License-Identifier: Apache-2.0
"""Judge a strategy by what was measured elsewhere: does one that was re-tiled still hold?

The strategy's choices are looked up in the tables of a search at its grid. A choice that was
measured there is taken as it is. One that was not (Radial's factor is bisected anew at every grid)
is read off between the two measured choices of the same method whose densities enclose its own:
mean squared error, density and time, linearly in the density; beyond them the nearest stands.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dit_sparse.forecast.counted import counted_density, grid_of
from dit_sparse.profiler.errors import ProfileError

if TYPE_CHECKING:
    from dit_sparse.profiler.stored import Stored
    from dit_sparse.profiler.table import Key
    from dit_sparse.strategy import Rule, Strategy


@dataclass(frozen=True)
class Judged:
    """A strategy by another search's tables, over heads, layers and steps.

    Args:
        error: Root of the mean squared relative error; a dense head counts 0.
        density: Kept share of pairs; a dense head counts 1.
        time: Predicted time of self-attention as a share of dense, launches included.
        shares: Share of head-steps by method.
        exact: Share of head-steps whose choice was measured as it is (dense ones are).
    """

    error: float
    density: float
    time: float
    shares: dict[str, float] = field(default_factory=dict)
    exact: float = 1.0


def judge(strategy: Strategy, stored: Stored) -> Judged:
    """Look a strategy's choices up in the tables of a search at its grid.

    Raises:
        ProfileError: A method that the search did not measure, or more layers or heads than it.
    """
    error = density = time = dense = exact = 0.0
    shares: dict[str, float] = defaultdict(float)
    places = _Places(strategy, stored)
    of_band = stored.bands.steps(stored.num_steps)
    for key, row in stored.rows.items():
        stage, layer, band = key
        cell = stored.cells[key]
        dense += float(cell.time[:, 0].sum())
        steps = of_band[band]
        weight = row.steps / len(steps)  # of two transformers each runs a part of a band
        for step in steps:
            groups = strategy.assign(
                layer, step, stored.num_steps, stage, stored.heads, stored.layers
            )
            launched = set()
            for group in groups:
                rule = None if group.rule is None else strategy.rules[group.rule]
                own = None if group.method is None or rule is None else rule
                name = "dense" if own is None else own.method
                for head in group.heads:
                    spread = [(0, 1.0)] if own is None else places.find(own, key, head)
                    for column, part in spread:
                        error += weight * part * row.error[head, column]
                        density += weight * part * row.density[head, column]
                        time += part * cell.time[head, column] / len(steps)
                    shares[name] += weight
                    exact += weight * (own is None or places.measured(own))
                    launched.add(spread[0][0])
            time += float(sum(cell.launch[column] for column in launched)) / len(steps)
    heads = sum(row.steps * row.error.shape[0] for row in stored.rows.values())
    return Judged(
        float((error / heads) ** 0.5),
        float(density / heads),
        float(time / dense),
        {name: share / heads for name, share in sorted(shares.items())},
        exact / heads,
    )


class _Places:
    """Finds where choices stand among the measured ones."""

    def __init__(self, strategy: Strategy, stored: Stored) -> None:
        self.stored, self.grid = stored, grid_of(strategy)
        self._density: dict[int, float] = {}

    def measured(self, rule: Rule) -> bool:
        """Say whether the choice was measured as it is."""
        return self.stored.column(rule.method, rule.params) is not None

    def find(self, rule: Rule, key: Key, head: int) -> list[tuple[int, float]]:
        """Give columns and their weights."""
        column = self.stored.column(rule.method, rule.params)
        if column is not None:
            return [(column, 1.0)]
        known = [i for i, c in enumerate(self.stored.candidates, 1) if c.method == rule.method]
        if not known:
            raise ProfileError(
                f"{self.stored.folder}: {rule.method} was not among the candidates, so its cost "
                "there is unknown; search with the same candidates"
            )
        wanted = self._wanted(rule)
        row = self.stored.rows[key]
        order = sorted(known, key=lambda c: (row.density[head, c], c))
        there = np.array([row.density[head, c] for c in order])
        right = int(np.searchsorted(there, wanted))
        if right in {0, len(order)}:
            return [(order[min(right, len(order) - 1)], 1.0)]
        gap = there[right] - there[right - 1]
        share = float((wanted - there[right - 1]) / gap)
        return [(order[right - 1], 1 - share), (order[right], share)]

    def _wanted(self, rule: Rule) -> float:
        """Give the density of a choice: counted from its plan, or as its params ask."""
        if id(rule) not in self._density:
            found = counted_density(
                rule.method, rule.params, self.grid, num_steps=self.stored.num_steps
            ).density
            if found is None:
                raise ProfileError(
                    f"{self.stored.folder}: {rule.method} was measured with other params, and "
                    "its density depends on the content; search with the same candidates"
                )
            self._density[id(rule)] = found
        return self._density[id(rule)]
