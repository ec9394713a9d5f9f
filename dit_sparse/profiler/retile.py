# SPDX-License-Identifier: Apache-2.0
"""Fit a strategy to another resolution or length, and say what is extrapolated.

Most params are shares of the grid (densities, stripes, Radial's factor) or of the softmax
(thresholds), and stay. GNA's windows are tokens: they grow with their axis, in whole strides where
they were. Cluster counts grow with the tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_sparse.profiler.errors import ProfileError
from dit_sparse.strategy import Grid, Strategy

if TYPE_CHECKING:
    from dit_sparse.grid import LatentsGrid

# What a method keeps of a larger grid at the same params, for the warning.
DRIFTS = {
    "radial": "keeps a smaller share of longer videos",
    "rettention": "its mask may keep another share",
    "svg2": "clusters were counted anew in proportion to the tokens",
    "xattention": "its threshold keeps another share where attention spreads over more tokens",
}


def retile(strategy: Strategy, grid: LatentsGrid) -> tuple[Strategy, tuple[str, ...]]:
    """Fit a strategy to ``grid``.

    Args:
        strategy: With the grid that it was made at.
        grid: The new one.

    Returns:
        The strategy for the new grid, without the old one's measured figures, and warnings that
        say what is extrapolated; none where the grids are the same.

    Raises:
        ProfileError: The strategy names no grid.
    """
    old = strategy.grid
    if old is None:
        raise ProfileError(f"{strategy.name}: grid: names none, so there is nothing to scale from")
    new = Grid(frames=grid.frames, height=grid.height, width=grid.width, text=grid.text_length)
    if new == old:
        return strategy, ()
    sides = ((old.frames, new.frames), (old.height, new.height), (old.width, new.width))
    ratio = [b / a for a, b in sides]
    tokens = ratio[0] * ratio[1] * ratio[2]
    data = strategy.to_dict()
    for rule in data["rules"]:
        rule["params"] = _scaled(rule["method"], rule["params"], ratio, tokens)
    size, was = "x".join(str(b) for _, b in sides), "x".join(str(a) for a, _ in sides)
    note = f"re-tiled from {was} to {size} tokens, not measured there"
    earlier = data["receipt"]["note"]
    data["receipt"] |= {
        "published": False,
        "measured": {},
        "note": note if earlier is None else f"{earlier} Then {note}.",
    }
    data["grid"] = new.model_dump()
    grown = f"{tokens:.2g} times the video tokens"
    warnings = [f"{strategy.name}: {note}: error, density and speed are extrapolated ({grown})"]
    methods = sorted({rule["method"] for rule in data["rules"]})
    warnings += [f"{method}: {DRIFTS[method]}" for method in methods if method in DRIFTS]
    return Strategy.from_dict(data, strategy.name), tuple(warnings)


def _scaled(
    method: str, params: dict[str, Any], ratio: list[float], tokens: float
) -> dict[str, Any]:
    """Scale what is counted in tokens or clusters."""
    if method == "gna":
        window = [
            max(stride, round(width * r / stride) * stride)
            for width, stride, r in zip(params["window"], params["stride"], ratio, strict=True)
        ]
        return {**params, "window": window}
    if method == "svg2":
        counts = {
            key: max(1, round(params[key] * tokens)) for key in ("query_clusters", "key_clusters")
        }
        return {**params, **counts}
    return params
