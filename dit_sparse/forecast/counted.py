# SPDX-License-Identifier: Apache-2.0
"""What a choice keeps on a grid, where that can be known without queries and keys."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from dit_sparse.forecast.generation import forecast_method
from dit_sparse.methods.params import build_method
from dit_sparse.pipelines import family_by_name
from dit_sparse.pipelines.size import ModelSize

if TYPE_CHECKING:
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.strategy import Strategy

ANY_CLASS = "WanTransformer3DModel"  # of a strategy for any model: text stands behind the video


class Counted(NamedTuple):
    """Density of a choice; None: it depends on the content."""

    density: float | None
    exact: bool
    """Counted from plans; otherwise what the params ask for."""


def grid_of(strategy: Strategy) -> LatentsGrid:
    """Give the strategy's grid, with text where its model's family has it."""
    grid = strategy.grid
    if grid is None:
        raise ValueError(f"{strategy.name} has no grid")
    name = ANY_CLASS if strategy.model is None else strategy.model.classes[0]
    return family_by_name(name).grid((grid.frames, grid.height, grid.width, grid.text))


def counted_density(
    method: str, params: dict[str, Any], grid: LatentsGrid, *, heads: int = 1, num_steps: int = 8
) -> Counted:
    """Count what a static method keeps on its sparse calls, or take what params ask for.

    Args:
        method: A name from the table of methods.
        params: Its params.
        grid: Where the tokens stand.
        heads: Of the model, for a method that tells them apart; the mean over them is given.
        num_steps: Of the generation, for a method that refreshes.
    """
    built: Any = build_method(method, params)
    return _counted(method, built, grid, heads if built.names_heads else 1, num_steps)


@lru_cache(maxsize=256)
def _counted(name: str, method: Any, grid: LatentsGrid, heads: int, num_steps: int) -> Counted:
    # Of the model only its geometry is read: no weights, no floating-point operations.
    size = ModelSize(ANY_CLASS, family_by_name(ANY_CLASS), grid, 1, heads, 1, 0, 0.0, 0.0)
    known = forecast_method(name, method, size, num_steps)
    return Counted(known.density, known.exact)
