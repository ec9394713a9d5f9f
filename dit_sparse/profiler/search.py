# SPDX-License-Identifier: Apache-2.0
"""Choose a candidate for every head from tables of error and time.

Two rules. Sparse-vDiT's (Chen et al. 2025, arXiv:2506.03065, section 4): each head takes the
pattern with the least error + lambda * (1 - S), S its sparsity, and stays dense where every
pattern's loss is above epsilon. Ours: least predicted time under an error target, or least error
under a time budget, over all cells at once.

Ours is a multiple-choice knapsack. Each cell (a layer in a step band) is reduced to the choices
that are best for some price of error (Lagrangian relaxation, Everett 1963), launches counted once
per group of heads; then cells move along their lower convex hulls, the best ratio first, and what
is left of the limit is filled by single and paired exchanges. Ties go to the earlier candidate, so
the same tables give the same choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise
from math import inf, sqrt
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from dit_sparse.profiler.errors import ProfileError

if TYPE_CHECKING:
    from collections.abc import Sequence

    Array = np.ndarray[Any, np.dtype[np.float64]]

Field = Literal[0, 1]  # of Option: time, error
PRICES = 160  # prices of error tried in a cell
EVERY_SUBSET = 8  # candidates up to which groups are found exactly
NEIGHBOURS = 10_000  # options of a cell up to which those that differ in one head are added
PAIRS = 300  # options of all cells up to which pairs are exchanged


@dataclass(frozen=True)
class Cell:
    """The table of one layer in one step band; candidate 0 is dense.

    Args:
        key: (stage, layer, band).
        steps: Steps of the band, the weight of an error.
        error: Mean squared relative error, >= 0: ``[heads, candidates]``; 0 for dense.
        time: Predicted time of a head over the band: ``[heads, candidates]``.
        launch: Time of the launches of a group over the band, paid once where any head takes it:
            ``[candidates]``.
    """

    key: tuple[str, int, int]
    steps: int
    error: Array
    time: Array
    launch: Array


class Option(NamedTuple):
    """One choice for all heads of a cell."""

    time: float
    error: float  # summed squares times steps
    choice: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """What a search gives.

    Args:
        choices: Candidate of each head, by cell, in the cells' order.
        time: Predicted time of all cells.
        dense_time: The same with every head dense.
        error: Root of the mean squared relative error over heads, layers and steps.
        bound: No choice made of the cells' convex hulls takes less (the relaxation's optimum): of
            time under a target, of ``error`` under a budget.
    """

    choices: tuple[tuple[int, ...], ...]
    time: float
    dense_time: float
    error: float
    bound: float


def minimise(
    cells: Sequence[Cell],
    *,
    target: float | None = None,
    budget: float | None = None,
    density: float | None = None,
) -> Found:
    """Find the least time with at most ``target`` error, or the least error in ``budget`` time.

    Args:
        cells: The tables.
        target: Largest root-mean-square relative error, >= 0.
        budget: Largest predicted time as a share of the dense time, > 0.
        density: The same where cells have densities for times (``table.density_cell``), > 0.

    Raises:
        ProfileError: Not one of the three given, out of range, or a limit that nothing meets.
    """
    if sum(each is not None for each in (target, budget, density)) != 1:
        raise ProfileError(
            "give exactly one of target (maximum error), budget (maximum time) and density"
        )
    what = "budget" if density is None else "density"
    budget = density if budget is None else budget
    if target is not None and not 0 <= target < inf:
        raise ProfileError(f"target must be a relative error of at least 0, got {target}; try 0.1")
    if budget is not None and not 0 < budget < inf:
        raise ProfileError(f"{what} must be a share of dense above 0, got {budget}")
    weight = sum(cell.steps * cell.error.shape[0] for cell in cells)
    dense = sum(float(cell.time[:, 0].sum() + cell.launch[0]) for cell in cells)
    options = [_options(cell) for cell in cells]
    if target is not None:
        limit = target**2 * weight
        picked, bound = _knapsack(options, limit, cost=0, bounded=1)
    else:
        assert budget is not None
        limit = budget * dense
        least = sum(min(o.time for o in each) for each in options)
        if least > limit * (1 + 1e-12):
            raise ProfileError(
                f"{what}: {budget:g} of dense cannot be reached, the sparsest choice takes "
                f"{least / dense:.3f}; give at least that, or sparser candidates"
            )
        picked, bound = _knapsack(options, limit, cost=1, bounded=0)
        bound = sqrt(max(bound, 0.0) / weight)
    return Found(
        tuple(o.choice for o in picked),
        sum(o.time for o in picked),
        dense,
        sqrt(sum(o.error for o in picked) / weight),
        bound,
    )


def sparse_vdit_rule(
    loss: Array, density: Array, *, weight: float = 0.5, epsilon: float = 1.0
) -> tuple[int, ...]:
    """Choose by Sparse-vDiT's rule: argmin of loss + weight * density, dense above epsilon.

    The main text penalises what is computed, lambda * (1 - S) with S the share of blocks left
    out; the appendix's lambda * S would punish sparsity and is not used.

    Args:
        loss: Mean squared or relative error of each pattern but the full one:
            ``[heads, patterns]``.
        density: 1 - S, like ``loss``.
        weight: The paper's lambda, >= 0; it has 0.5.
        epsilon: It has 1, on a scale of the error that it does not tell.

    Returns:
        Per head 0 for dense, else 1 + the pattern's column.
    """
    total = loss + weight * density
    best = total.argmin(axis=1)
    dense = total.min(axis=1) > epsilon
    return tuple(0 if d else 1 + int(b) for b, d in zip(best, dense, strict=True))


def assign(cell: Cell, price: float) -> Option:
    """Find the choice of a cell with the least time + price * error.

    Exact where launches cost nothing, and for up to ``EVERY_SUBSET`` candidates (every set of
    them is tried); beyond, sets are improved by adding, dropping and exchanging one candidate at
    a time.
    """
    value = cell.time + price * cell.steps * cell.error
    heads, count = value.shape
    if not cell.launch.any():
        return option(cell, tuple(map(int, value.argmin(axis=1))))

    def worth(used: tuple[int, ...]) -> float:
        return float(value[:, used].min(axis=1).sum() + cell.launch[list(used)].sum())

    if count <= EVERY_SUBSET:
        sets = [s for k in range(1, min(heads, count) + 1) for s in combinations(range(count), k)]
        used = min(sets, key=worth)
    else:
        used = tuple(sorted({int(i) for i in value.argmin(axis=1)}))
        best = worth(used)
        while True:
            near = [tuple(c for c in used if c != out) for out in used if len(used) > 1]
            near += [tuple(sorted((*used, c))) for c in range(count) if c not in used]
            near += [
                tuple(sorted({*used, c} - {out})) for out in used for c in range(count)
                if c not in used
            ]  # fmt: skip
            step = min(near, key=worth, default=used)
            if worth(step) >= best - 1e-12 * abs(best):
                break
            used, best = step, worth(step)
    columns = value[:, used].argmin(axis=1)
    return option(cell, tuple(used[int(c)] for c in columns))


def option(cell: Cell, choice: tuple[int, ...]) -> Option:
    """Add up time and error of a choice."""
    rows = np.arange(len(choice))
    time = cell.time[rows, choice].sum() + cell.launch[sorted(set(choice))].sum()
    return Option(
        float(time), float(cell.error[rows, choice].sum()) * cell.steps, tuple(map(int, choice))
    )


def _options(cell: Cell) -> list[Option]:
    """List choices worth having: none is beaten in both time and error; errors rise.

    The best ones for a range of prices, all heads alike, and those that differ from one of these
    in one head. Prices are scaled by the median error, which a column that must not be chosen
    (``NOT_MEASURED``) leaves as it is.
    """
    heads, count = cell.error.shape
    found = {option(cell, (c,) * heads) for c in range(count)}
    errors = cell.steps * cell.error
    positive = errors[errors > 0]
    scale = float(cell.time[:, 0].sum()) / (float(np.median(positive)) if positive.size else 1.0)
    found |= {assign(cell, 0.0), assign(cell, 1e12 * scale)}
    found |= {assign(cell, scale * 10.0**p) for p in np.linspace(-5, 7, PRICES)}
    if len(found) * heads * count <= NEIGHBOURS:
        found |= {
            option(cell, (*each.choice[:head], other, *each.choice[head + 1 :]))
            for each in tuple(found)
            for head in range(heads)
            for other in range(count)
        }
    best, kept = inf, []
    for each in sorted(found, key=lambda o: (o.error, o.time, o.choice)):
        if each.time < best:
            kept.append(each)
            best = each.time
    return kept


def _knapsack(
    options: list[list[Option]], limit: float, *, cost: Field, bounded: Field
) -> tuple[list[Option], float]:
    """Take one option a cell: least sum of field ``cost`` with the sum of ``bounded`` in limit.

    Returns:
        The options, and a lower bound of the cost over the relaxation.
    """
    limit *= 1 + 1e-12
    ordered = [sorted(each, key=lambda o: (o[bounded], o[cost])) for each in options]
    at = [each[0] for each in ordered]
    used = sum(o[bounded] for o in at)
    bound = sum(o[cost] for o in at)
    moves = []
    for i_cell, each in enumerate(ordered):
        hull = _hull(each, cost, bounded)
        for left, right in pairwise(hull):
            gain, price = left[cost] - right[cost], right[bounded] - left[bounded]
            moves.append((-gain / max(price, 1e-300), i_cell, right, gain, price))
    moves.sort(key=lambda move: move[:2])
    room, stopped = limit - used, set()
    for _, i_cell, right, gain, price in moves:
        if i_cell not in stopped and used + price <= limit:
            at[i_cell] = right
            used += price
        else:
            stopped.add(i_cell)
        if room > 0:  # the relaxation takes the last move in part
            bound -= gain * min(1.0, room / max(price, 1e-300))
            room -= price
    return _exchange(ordered, at, limit, cost=cost, bounded=bounded), bound


def _hull(options: list[Option], cost: Field, bounded: Field) -> list[Option]:
    """Keep the lower convex hull: each move gains less per price than the one before."""
    hull: list[Option] = []
    for each in options:
        if hull and each[cost] >= hull[-1][cost]:
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            steep = (a[cost] - b[cost]) * (each[bounded] - b[bounded])
            if steep > (b[cost] - each[cost]) * (b[bounded] - a[bounded]):
                break
            hull.pop()
        hull.append(each)
    return hull


def _exchange(
    options: list[list[Option]], at: list[Option], limit: float, *, cost: Field, bounded: Field
) -> list[Option]:
    """Use what is left of the limit: the best single change, else the best pair, until none."""
    at = list(at)
    paired = sum(map(len, options)) <= PAIRS
    while True:
        used = sum(o[bounded] for o in at)
        singles = [
            (o[cost] - at[i][cost], o[bounded] - at[i][bounded], i, o)
            for i, each in enumerate(options)
            for o in each
            if o != at[i]
        ]
        best: tuple[float, tuple[tuple[int, Option], ...]] = (-1e-12 * _size(at, cost), ())
        for gain, price, i, o in singles:
            if gain < best[0] and used + price <= limit:
                best = (gain, ((i, o),))
        if not best[1] and paired:
            for (g1, p1, i, o1), (g2, p2, j, o2) in combinations(singles, 2):
                if i != j and g1 + g2 < best[0] and used + p1 + p2 <= limit:
                    best = (g1 + g2, ((i, o1), (j, o2)))
        if not best[1]:
            return at
        for i, o in best[1]:
            at[i] = o


def _size(at: list[Option], field: Field) -> float:
    return sum(abs(o[field]) for o in at)
