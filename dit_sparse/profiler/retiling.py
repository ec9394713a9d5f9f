# SPDX-License-Identifier: Apache-2.0
"""Fit a strategy to another resolution or length, and say what is extrapolated.

Most params are shares of the grid (densities, stripes, windows within a frame) or of the softmax
(thresholds), and stay; those that are counted in tokens grow with the grid: each method knows its
own (``Method.rescaled``). A static mask inside another method is fitted as the mask itself.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.errors import StrategyError
from dit_sparse.forecast.counted import counted_density, grid_of
from dit_sparse.methods import method_class
from dit_sparse.methods.params import method_text, params_of
from dit_sparse.profiler.candidates import BLOCK, SMALL_BLOCK, block_for
from dit_sparse.profiler.errors import ProfileError
from dit_sparse.strategy import Grid, Strategy

if TYPE_CHECKING:
    from dit_sparse.core.call import Method

DRIFT = 0.02  # densities that differ by more are told
COUNTED = 16  # static choices whose density is counted at most: a large grid takes seconds each


@dataclass(frozen=True)
class Retiled:
    """A strategy on another grid.

    Args:
        strategy: For the new grid, without the old one's measured figures.
        scaled: What was changed, a line each.
        stays: What was not and why, a line for each method.
        warnings: What is extrapolated.
    """

    strategy: Strategy
    scaled: tuple[str, ...] = ()
    stays: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def retile(strategy: Strategy, grid: LatentsGrid) -> tuple[Strategy, tuple[str, ...]]:
    """Fit a strategy to ``grid``; give it with the warnings of ``refit``."""
    found = refit(strategy, grid)
    return found.strategy, found.warnings


def refit(strategy: Strategy, grid: LatentsGrid, *, count: bool = False) -> Retiled:
    """Fit a strategy to ``grid``, and say what was scaled, what stays, what is extrapolated.

    Args:
        strategy: With the grid that it was made at.
        grid: The new one.
        count: Count what static methods keep on both grids, and warn where it differs.

    Raises:
        ProfileError: The strategy names no grid.
    """
    old = strategy.grid
    if old is None:
        raise ProfileError(f"{strategy.name}: grid: is missing, so there is no size to scale from")
    new = Grid(frames=grid.frames, height=grid.height, width=grid.width, text=grid.text_length)
    if new == old:
        return Retiled(strategy)
    before = LatentsGrid(old.frames, old.height, old.width, old.text)
    data = strategy.to_dict()
    changed: Counter[str] = Counter()
    told: dict[str, list[str]] = {}
    for place, rule in enumerate(strategy.rules):
        fitted = _fitted(strategy, place, before, grid)
        data["rules"][place]["params"] = params_of(fitted)
        changed.update(f"{rule.method}: {line}" for line in _changes(rule.instance, fitted))
        told.setdefault(rule.method, []).extend(rule.instance.drifts(before, grid))
    grown = grid.video_tokens / before.video_tokens
    size, was = (f"{g.frames}x{g.height}x{g.width}" for g in (new, old))
    if new.text != old.text:
        size, was = f"{size}+{new.text}", f"{was}+{old.text}"
    note = f"re-tiled from {was} to {size} tokens, not measured there"
    earlier = data["receipt"]["note"]
    data["receipt"] |= {
        "published": False,
        "measured": {},
        "note": note if earlier is None else f"{earlier} Then {note}.",
    }
    data["grid"] = new.model_dump()
    made = Strategy.from_dict(data, strategy.name)
    methods = sorted({rule.method for rule in strategy.rules})
    far = f"{grown:.2g} times the video tokens"
    warnings = [f"{strategy.name}: {note}: error, density and speed are extrapolated ({far})"]
    warnings += [f"{method}: {line}" for method in methods for line in dict.fromkeys(told[method])]
    warnings += _blocks(made, grid)
    if count:
        warnings += _drifts(strategy, made)
    return Retiled(
        made,
        tuple(f"{line} ({n} rule{'s' * (n > 1)})" for line, n in sorted(changed.items())),
        tuple(f"{method}: {method_class(method).stays}" for method in methods),
        tuple(warnings),
    )


def _fitted(strategy: Strategy, place: int, old: LatentsGrid, new: LatentsGrid) -> Method:
    try:
        return strategy.rules[place].instance.rescaled(old, new)
    except StrategyError as error:
        raise StrategyError(f"{strategy.name}: rules[{place}].params: {error}") from error


def _changes(old: Method, new: Method) -> list[str]:
    """List the params that differ; of a method with a static one inside, those of that one."""
    if old.inner is not None and new.inner is not None:
        return [f"mask {line}" for line in _changes(old.inner, new.inner)]
    before, after = params_of(old), params_of(new)
    return [f"{key} {before[key]} -> {after[key]}" for key in after if after[key] != before[key]]


def _blocks(strategy: Strategy, grid: LatentsGrid) -> list[str]:
    """Say where a search at the new size would have taken blocks of another size."""
    wanted = block_for(grid)
    other = SMALL_BLOCK + BLOCK - wanted
    methods = {r.method for r in strategy.rules if r.params.get("block_size") == other}
    if not methods:
        return []
    told = f"{', '.join(sorted(methods))}: blocks of {other} tokens are kept; a search at "
    return [f"{told}{grid.tokens:,} tokens would use {wanted}"]


def _drifts(one: Strategy, other: Strategy) -> list[str]:
    """Count what static choices keep on both grids."""
    found: list[str] = []
    seen: set[Method] = set()
    for a, b in zip(one.rules, other.rules, strict=True):
        if a.method == "dense" or a.instance in seen:
            continue
        if len(seen) == COUNTED:
            found.append(f"only the first {COUNTED} choices were counted")
            break
        seen.add(a.instance)
        was, now = (
            counted_density(r.method, r.params, grid_of(s)) for r, s in ((a, one), (b, other))
        )
        if not was.exact or was.density is None or now.density is None:
            continue
        if abs(was.density - now.density) > DRIFT:
            params = {k: v for k, v in b.params.items() if k != "block_size"}
            method = method_text((b.method, params), short=True)
            found.append(
                f"{method}: keeps {now.density:.3f} of the pairs, {was.density:.3f} before "
                "(counted)"
            )
    return found
