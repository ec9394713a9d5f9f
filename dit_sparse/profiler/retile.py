# SPDX-License-Identifier: Apache-2.0
"""Fit a strategy to another resolution or length, and say what is extrapolated.

Most params are shares of the grid (densities, stripes, Radial's windows) or of the softmax
(thresholds), and stay. GNA's windows are tokens: they grow with their axis, in whole strides where
they were whole strides, and an axis that was seen whole stays whole. Cluster counts grow with the
tokens. A static mask inside another method (Re-ttention's) is fitted as the mask itself.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import ceil, floor
from typing import TYPE_CHECKING, Any

from dit_sparse.methods.params import build_method, params_of
from dit_sparse.profiler.candidates import BLOCK, SMALL_BLOCK, block_for
from dit_sparse.profiler.counted import counted_density, grid_of
from dit_sparse.profiler.difference import words
from dit_sparse.profiler.errors import ProfileError
from dit_sparse.strategy import Grid, Strategy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dit_sparse.call import Method
    from dit_sparse.grid import LatentsGrid

    Sides = tuple[tuple[int, int], ...]  # (old, new) of frames, height, width

# Why a method's params stay as they are.
STAYS = {
    "adaspa": "density is a share of blocks, searches are fractions of the run",
    "blade": "density, floor and threshold are shares; a pooled key stands for as many tokens",
    "dense": "it has no params",
    "gna": "stride, dilation and tile are tokens of a block",
    "pooled": "density, top_p and floor are shares",
    "radial": "windows are shares of a frame, halved as frames stand further apart",
    "rettention": "refresh and ramp count steps",
    "sparse_vdit": "band densities are shares of pairs, stripes fractions of the video",
    "sparsed": "density is a share of blocks, the search a fraction of the run",
    "svg": "density is a share of pairs; as many rows judge",
    "svg2": "top_p and floor are shares",
    "xattention": "threshold and floor are shares; runs are as long",
}
# What a method keeps of a larger grid at the same params, for the warnings.
DRIFTS = {
    "blade": "as many tokens are drawn of each block, however many blocks there are",
    "radial": "keeps a smaller share of longer videos, a larger one of shorter",
    "rettention": "its mask may keep another share",
    "svg": "as many rows judge more tokens",
    "svg2": "clusters were counted anew in proportion to the tokens",
    "xattention": "its threshold keeps another share where attention spreads over more tokens",
}
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
        raise ProfileError(f"{strategy.name}: grid: names none, so there is nothing to scale from")
    new = Grid(frames=grid.frames, height=grid.height, width=grid.width, text=grid.text_length)
    if new == old:
        return Retiled(strategy)
    sides = ((old.frames, new.frames), (old.height, new.height), (old.width, new.width))
    data = strategy.to_dict()
    changed: Counter[str] = Counter()
    for rule in data["rules"]:
        params, told = _scaled(rule["method"], rule["params"], sides)
        rule["params"] = params
        changed.update(f"{rule['method']}: {line}" for line in told)
    tokens = 1.0
    for a, b in sides:
        tokens *= b / a
    size, was = "x".join(str(b) for _, b in sides), "x".join(str(a) for a, _ in sides)
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
    grown = f"{tokens:.2g} times the video tokens"
    warnings = [f"{strategy.name}: {note}: error, density and speed are extrapolated ({grown})"]
    warnings += [
        f"{method}: {DRIFTS[method]}"
        for method in methods
        if method in DRIFTS and (method != "radial" or old.frames != new.frames)
    ]
    if any(rule.params.get("form") == "released" for rule in strategy.rules):
        warnings.append("radial: the released form's narrowest window is as many tokens as before")
    warnings += _blocks(made, grid)
    if count:
        warnings += _drifts(strategy, made)
    return Retiled(
        made,
        tuple(f"{line} ({n} rule{'s' * (n > 1)})" for line, n in sorted(changed.items())),
        tuple(f"{method}: {STAYS[method]}" for method in methods if method in STAYS),
        tuple(warnings),
    )


def _scaled(
    method: str, params: dict[str, Any], sides: Sides
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Scale what is counted in tokens or clusters; give the params and what was changed."""
    if "mask_params" in params:  # of a method that has a static one inside
        inner = str(params["mask"])
        whole = params_of(build_method(inner, params["mask_params"]))
        scaled, told = _scaled(inner, whole, sides)
        new = {key: value for key, value in scaled.items() if value != whole[key]}
        mask = {**params["mask_params"], **new}
        return {**params, "mask_params": mask}, tuple(f"mask {line}" for line in told)
    changed: dict[str, Any] = {}
    if method == "gna":
        changed = {"window": _window(params["window"], params["stride"], sides)}
    if method == "svg2":
        tokens = 1.0
        for old, new_side in sides:
            tokens *= new_side / old
        changed = {
            key: max(1, round(params[key] * tokens)) for key in ("query_clusters", "key_clusters")
        }
    told = tuple(
        f"{key} {params[key]} -> {value}" for key, value in changed.items() if value != params[key]
    )
    return {**params, **changed}, told


def _window(window: Sequence[int], stride: Sequence[int], sides: Sides) -> list[int]:
    """Let each extent grow with its axis."""
    found = []
    for extent, step, (old, new) in zip(window, stride, sides, strict=True):
        if old == new:
            found.append(extent)
            continue
        unit = step if extent % step == 0 else 1
        steps = extent * new / old / unit
        # An axis that was seen whole is seen whole: rounding must not cut its ends off.
        grown = ceil(steps - 1e-9) if extent >= old else floor(steps + 0.5)
        found.append(max(step, grown * unit))
    return found


def _blocks(strategy: Strategy, grid: LatentsGrid) -> list[str]:
    """Say where a search at the new size would have taken blocks of another size."""
    wanted = block_for(grid)
    other = SMALL_BLOCK + BLOCK - wanted
    methods = {r.method for r in strategy.rules if r.params.get("block_size") == other}
    if not methods:
        return []
    told = f"{', '.join(sorted(methods))}: blocks of {other} tokens stay; a search at "
    return [f"{told}{grid.tokens:,} tokens would take {wanted}"]


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
            found.append(
                f"{words((b.method, params), short=True)}: keeps {now.density:.3f} of the pairs, "
                f"{was.density:.3f} before (counted)"
            )
    return found
