# SPDX-License-Identifier: Apache-2.0
"""Sum up units: for every layer, band, head and candidate one error, density, recall and time."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_sparse.profiler.errors import ProfileError
from dit_sparse.profiler.search import Cell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dit_sparse.profiler.candidates import Candidate
    from dit_sparse.profiler.capture import Bands
    from dit_sparse.profiler.cost import CostModel

    Array = np.ndarray[Any, np.dtype[np.float64]]
    Key = tuple[str, int, int]

NOT_MEASURED = 1e12  # the error of what must not be chosen


@dataclass(frozen=True)
class Row:
    """One layer in one band; arrays are ``[heads, candidates]``, column 0 is dense.

    Args:
        steps: Steps of the band that this stage ran.
        error: Mean squared relative error over steps, prompts and seeds.
        doubt: Standard error of ``error`` from comparing a sample of rows.
        density: Mean kept share of pairs, searching steps counted as 1.
        computed: Mean share that kernels compute on the other steps.
        recall: Mean kept softmax mass; NaN where it is not known.
        power: Mean square of the dense output, ``[heads]``.
        ordered: ``[candidates]``.
        partial: ``[candidates]``.
    """

    steps: int
    error: Array
    doubt: Array
    density: Array
    computed: Array
    recall: Array
    power: Array
    ordered: tuple[bool, ...]
    partial: tuple[float, ...]


def sum_up(
    units: Sequence[dict[str, Any]], candidates: Sequence[Candidate], bands: Bands
) -> dict[Key, Row]:
    """Put the units together; their order does not matter beyond rounding, so it is fixed.

    A method that searches or refreshes has no error on these steps, and they are as many as its
    schedule has in the band; the captured calls between stand for the other steps.

    Raises:
        ProfileError: Prompts led to different sizes, or a unit has other candidates.
    """
    about = units[0]["about"]
    for number, unit in enumerate(units):
        if unit["about"] != about:
            raise ProfileError(
                f"unit {number} has {unit['about']}, unit 0 has {about}: all prompts must "
                "have the same size and number of steps"
            )
    calls: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    wanted = [candidate.name for candidate in candidates]
    for number, unit in enumerate(units):
        for call in unit["calls"]:
            if (came := [each["candidate"] for each in call["found"]]) != wanted:
                raise ProfileError(
                    f"unit {number} holds measurements of {', '.join(came)}; this search needs "
                    f"{', '.join(wanted)}: add --fresh (fresh=True) to measure again"
                )
            calls[call["stage"], call["layer"], call["band"]].append(call)
    of_band = bands.steps(about["num_steps"])
    ran = {stage: set(steps) for stage, steps in units[0]["steps"].items()}
    found = {}
    for key in sorted(calls):
        stage, _, band = key
        steps = len(ran[stage] & set(of_band[band]))
        found[key] = _row(calls[key], candidates, steps, about["heads"])
    return found


def _row(
    calls: list[dict[str, Any]], candidates: Sequence[Candidate], steps: int, heads: int
) -> Row:
    columns: dict[str, list[Array]] = {
        name: [] for name in ("error", "doubt", "density", "computed")
    }
    one = np.ones(heads)
    columns["error"].append(0 * one)
    columns["doubt"].append(0 * one)
    columns["density"].append(one)
    columns["computed"].append(one)
    recalls, ordered, partial = [one], [False], [0.0]
    for i_candidate, candidate in enumerate(candidates):
        taken = [call["found"][i_candidate] for call in calls]
        searched = [each for each in taken if each["searched"] and candidate.dense_steps(steps)]
        rest = [each for each in taken if each not in searched]
        full = min(candidate.dense_steps(steps), steps) if searched else 0
        share = full / steps
        if not rest and full < steps:  # only its search was seen
            columns["error"].append(NOT_MEASURED * one)
            columns["doubt"].append(0 * one)
            columns["density"].append(one)
            columns["computed"].append(one)
            recalls.append(np.nan * one)
        else:
            error = share * _mean(searched, "error", heads, 2) + (1 - share) * _mean(
                rest, "error", heads, 2
            )
            columns["error"].append(error)
            columns["doubt"].append(
                np.hypot(share * _doubt(searched, heads), (1 - share) * _doubt(rest, heads))
            )
            columns["computed"].append(_mean(rest, "computed", heads) if rest else one)
            columns["density"].append(share + (1 - share) * _mean(rest, "density", heads))
            known = all(each["recall"] is not None for each in rest)
            recalls.append(
                share + (1 - share) * _mean(rest, "recall", heads) if known else np.nan * one
            )
        ordered.append(any(each["ordered"] for each in taken))
        partial.append(max((each["partial"] for each in rest), default=0.0))
    power = np.mean([call["power"] for call in calls], axis=0)
    stacked = {name: np.stack(value, axis=1) for name, value in columns.items()}
    return Row(
        steps,
        stacked["error"],
        stacked["doubt"],
        stacked["density"],
        stacked["computed"],
        np.stack(recalls, axis=1),
        power,
        tuple(ordered),
        tuple(partial),
    )


def cells_of(
    rows: dict[Key, Row], candidates: Sequence[Candidate], costs: CostModel
) -> list[Cell]:
    """Add predicted times: the tables of the search."""
    cells = []
    for key, row in rows.items():
        heads = row.error.shape[0]
        time = np.empty_like(row.error)
        time[:, 0] = costs.dense_band(row.steps)
        for column, candidate in enumerate(candidates, 1):
            for head in range(heads):
                time[head, column] = costs.band(
                    candidate,
                    row.steps,
                    float(row.computed[head, column]),
                    ordered=row.ordered[column],
                    partial=row.partial[column],
                )
        launch = np.array(
            [0.0, *(0.0 if c.keeps_all else costs.launch * row.steps for c in candidates)]
        )
        cells.append(Cell(key, row.steps, row.error, time, launch))
    return cells


def density_cell(key: Key, row: Row) -> Cell:
    """Make the table of a search in which density is the price: it stands where time does."""
    launch = np.zeros(row.density.shape[1])
    return Cell(key, row.steps, row.error, row.density * row.steps, launch)


def _mean(taken: list[dict[str, Any]], name: str, heads: int, power: int = 1) -> Array:
    if not taken:
        return np.zeros(heads)
    found: Array = np.mean([np.asarray(each[name]) ** power for each in taken], axis=0)
    return found


def _doubt(taken: list[dict[str, Any]], heads: int) -> Array:
    """Standard error of the mean of squared errors: calls draw their rows apart."""
    if not taken:
        return np.zeros(heads)
    squares = np.sum([np.asarray(each["doubt"]) ** 2 for each in taken], axis=0)
    found: Array = np.sqrt(squares) / len(taken)
    return found
