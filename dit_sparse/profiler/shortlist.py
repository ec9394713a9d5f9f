# SPDX-License-Identifier: Apache-2.0
"""Choose which candidates are measured on all calls, by what screening measured on a few.

Greedily: over a range of prices of error, each step adds the candidate that lowers the sum of time
and priced error most, with every head at its best candidate; what all of them remember stays
within the limit. Then densities between and below the chosen ones are added.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import log, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_sparse.profiler.cost import CostModel
from dit_sparse.profiler.table import NOT_MEASURED, cells_of, sum_up

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.profiler.candidates import Candidate, Wanted
    from dit_sparse.profiler.capture import Measuring
    from dit_sparse.profiler.search import Cell

PRICES = 12
FINER = 1 / 3  # of the shortlist: densities between and below those that were chosen
LEAST = 0.04  # density below which no finer one is added
STOP = 1e-4  # relative gain below which no candidate is added


@dataclass(frozen=True)
class Screened:
    """What the screening found of one candidate.

    Args:
        name: The candidate's.
        requested: Density requested of its method, mean over the screened calls; None: its
            params are as given.
        density: Mean kept share of pairs, searching steps left out.
        error: Root mean square of heads' relative errors.
        bytes: What it would remember for all layers until a step band ends.
        rank: Place in the greedy order, from 0; None: it gained nothing, or would remember too
            much.
    """

    name: str
    requested: float | None
    density: float
    error: float
    bytes: int
    rank: int | None


@dataclass
class Observed:
    """What screening saw, of all its calls.

    Args:
        grid: Of the calls.
        about: What all calls have in common, as in a unit.
        calls: What was measured on each, as in a unit.
        requested: Densities requested of a candidate, one for each call, by its name.
        bytes: What a candidate would remember for all layers, by its name.
    """

    grid: LatentsGrid
    about: dict[str, Any]
    calls: list[dict[str, Any]] = field(default_factory=list)
    requested: dict[str, list[float]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)


def shortlist(observed: Observed, how: Measuring) -> tuple[list[Candidate], list[Screened]]:
    """Choose what is measured on all calls.

    Args:
        observed: By screening.
        how: Candidates in the order in which they were screened, bands, and limits.

    Returns:
        The shortlist, first the chosen candidates in their order, then those of finer densities;
        and what was measured of every candidate.
    """
    requested = {name: sum(values) / len(values) for name, values in observed.requested.items()}
    candidates = [want.fitted(observed.grid, requested.get(want.text)) for want in how.wanted]
    steps = {call["stage"]: list(range(observed.about["num_steps"])) for call in observed.calls}
    unit = {"about": observed.about, "steps": steps, "calls": observed.calls}
    rows = sum_up([unit], candidates, how.bands)
    cells = cells_of(rows, candidates, CostModel.assumed(candidates, observed.about["heads"]))
    sizes = [0, *(observed.bytes.get(candidate.name, 0) for candidate in candidates)]
    picked = ranked(cells, how.shortlist - int(how.shortlist * FINER), sizes, how.state_limit)
    found = [candidates[column - 1] for column in sorted(picked)]
    room = how.state_limit - sum(sizes[column] for column in picked)
    for want in finer(how.wanted, [how.wanted[column - 1] for column in picked]):
        if len(found) == how.shortlist:
            break
        family = [each for each in how.wanted if each.family == want.family]
        size = max(observed.bytes.get(each.text, 0) for each in family)
        made = want.fitted(observed.grid, _interpolated(want, family, requested))
        known = any((made.method, made.params) == (each.method, each.params) for each in found)
        if size <= room and not known:
            found.append(made)
            room -= size
    return found, [
        _row(observed.calls, column, candidate.name, requested.get(want.text), sizes, picked)
        for column, (want, candidate) in enumerate(zip(how.wanted, candidates, strict=True), 1)
    ]


def _row(
    calls: Sequence[Mapping[str, Any]],
    column: int,
    name: str,
    requested: float | None,
    sizes: Sequence[int],
    picked: Sequence[int],
) -> Screened:
    measured = [each for c in calls if not (each := c["found"][column - 1])["searched"]]
    error = [x * x for each in measured for x in each["error"]]
    density = [x for each in measured for x in each["density"]]
    return Screened(
        name,
        requested,
        float(f"{np.mean(density or [1.0]):.4g}"),
        float(f"{sqrt(np.mean(error or [0.0])):.4g}"),
        sizes[column],
        picked.index(column) if column in picked else None,
    )


def ranked(
    cells: Sequence[Cell], limit: int, sizes: Sequence[int] = (), room: int = 0
) -> list[int]:
    """Order candidates by what each adds to those before it.

    The measure is the mean over prices of error of (time + price * error), with every head at its
    best among the chosen and dense, relative to its best among all.

    Args:
        cells: Tables of the screened layers and bands; launches are not counted.
        limit: Candidates at most.
        sizes: Bytes that each column's candidate remembers.
        room: Bytes that all of them may remember.

    Returns:
        Columns, dense (0) not among them; the first gains most.
    """
    time = np.concatenate([cell.time for cell in cells])
    error = np.concatenate([cell.steps * cell.error for cell in cells])
    usable = (error > 0) & (error < NOT_MEASURED / 2)
    if not usable.any():
        return []
    scale = float(time[:, 0].mean() / np.median(error[usable]))
    prices = scale * np.logspace(-1.5, 2.5, PRICES)
    value = time[None] + prices[:, None, None] * error[None]  # [prices, heads, candidates]
    ideal = value.min(-1).sum(-1)
    best, left = value[:, :, 0], set(range(1, time.shape[1]))
    found: list[int] = []
    worth = float((best.sum(-1) / ideal).mean())
    while len(found) < limit:
        left = {column for column in left if not sizes or sizes[column] <= room}
        if not left:
            break
        gains = {
            column: float((np.minimum(best, value[:, :, column]).sum(-1) / ideal).mean())
            for column in sorted(left)
        }
        column = min(gains, key=lambda c: (gains[c], c))
        if worth - gains[column] < STOP * worth:
            break
        worth, best = gains[column], np.minimum(best, value[:, :, column])
        found.append(column)
        left.remove(column)
        room -= sizes[column] if sizes else 0
    return found


def finer(wanted: Sequence[Wanted], chosen: Sequence[Wanted]) -> list[Wanted]:
    """List further densities of chosen families, of those chosen first before others.

    For each chosen level: halfway (by ratio) to the next lower and the next higher level, and
    below the lowest one half of it.
    """
    known = {want.text for want in wanted}
    found: dict[str, Wanted] = {}
    for want in chosen:
        if want.level is None:
            continue
        levels = sorted({w.level for w in wanted if w.family == want.family and w.level})
        at = levels.index(want.level)
        near = [
            sqrt(levels[at] * levels[at - 1]) if at else levels[0] / 2,
            sqrt(levels[at] * levels[at + 1]) if at + 1 < len(levels) else 0.0,
        ]
        for level in near:
            made = replace(want, level=float(f"{level:.2g}"))
            if level >= LEAST and made.text not in known:
                found.setdefault(made.text, made)
    return list(found.values())


def _interpolated(
    want: Wanted, family: Sequence[Wanted], requested: Mapping[str, float]
) -> float | None:
    """Interpolate the density to request between those that were tuned; None: the level."""
    assert want.level is not None
    tuned = sorted(
        (each.level, requested[each.text])
        for each in family
        if each.level and each.text in requested
    )
    if not tuned:
        return None
    levels, values = ([log(x) for x in side] for side in zip(*tuned, strict=True))
    at = log(want.level)
    if at < levels[0]:  # as far below the lowest request as below its level
        return float(f"{np.exp(values[0] + at - levels[0]):.4g}")
    return float(f"{np.exp(np.interp(at, levels, values)):.4g}")
