# SPDX-License-Identifier: Apache-2.0
"""Survey a strategy: what each head does in each band, and what is known of it."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_sparse.forecast.counted import counted_density, grid_of
from dit_sparse.inspect.atlas import Atlas, Band, Candidates, Choice, Layout, Quantity
from dit_sparse.methods.params import method_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dit_sparse.profiler.stored import Stored
    from dit_sparse.profiler.table import Key
    from dit_sparse.strategy import Rule, Strategy

COUNTED = 48  # choices whose density is counted from plans at most: large grids take seconds each


def layout_of(
    strategy: Strategy,
    *,
    layers: int,
    heads: int,
    num_steps: int,
    stages: tuple[str, ...] = ("transformer",),
    stored: Stored | None = None,
) -> Layout:
    """Cut the run where any head changes what it does, and where measured bands begin."""
    cuts = {0, num_steps}
    if stored is not None:
        for steps in stored.bands.steps(num_steps):
            cuts |= {steps.start, steps.stop}

    def doing(step: int) -> list[Any]:
        return [
            (choice.method, choice.heads)  # which of two equal rules says so does not count
            for stage in stages
            for layer in range(layers)
            for choice in strategy.assign(layer, step, num_steps, stage, heads, layers)
        ]

    before = doing(0)
    for step in range(1, num_steps):
        now = doing(step)
        if now != before:
            cuts.add(step)
        before = now
    edges = sorted(cuts)
    bands = tuple(Band(a, b, num_steps) for a, b in pairwise(edges))
    return Layout(stages, bands, layers, heads)


def strategy_atlas(strategy: Strategy, layout: Layout, stored: Stored | None = None) -> Atlas:
    """Map a strategy: who does what, and what is known of it.

    Args:
        strategy: With its receipt.
        layout: From ``layout_of``.
        stored: What its search measured, where that is still there.
    """
    atlas = Atlas(strategy.name, [], layout)
    found: dict[str, int] = {}
    rules: list[Rule | None] = []
    values: dict[str, list[float | None]] = {
        key: [None] * layout.spots for key in ("density", "error", "recall", "saved")
    }
    for stage, i_band, layer in _places(layout):
        band = layout.bands[i_band]
        for group in strategy.assign(
            layer, band.start, band.of, stage, layout.heads, layout.layers
        ):
            rule = None if group.method is None else strategy.rules[group.rule or 0]
            text = "dense" if rule is None else method_text((rule.method, rule.params))
            if text not in found:
                found[text] = len(atlas.choices)
                rules.append(rule)
                atlas.choices.append(
                    _choice(strategy, rule, layout, stored, count=len(found) <= COUNTED)
                )
            number = found[text]
            for head in group.heads:
                spot = layout.spot(stage, i_band, layer, head)
                _extend(atlas.choice_of, spot, number, layout.spots)
                for key, value in _figures(
                    atlas.choices[number], rule, stored, (stage, layer, i_band), band, head
                ).items():
                    values[key][spot] = value
    if stored is not None:
        atlas.candidates = _candidates(layout, stored)
    note = _source(stored)
    counted = "Counted from plans where that is possible, else what params ask for."
    if stored is not None:
        counted = f"Measured, searching steps counted as 1; what was not measured: {counted}"
    atlas.quantities = [
        Quantity("density", "density", values["density"], "low",
                 counted, share=True),
        Quantity("error", "error", values["error"], "low", note[0]),
        Quantity("saved", "time saved", values["saved"], "high", note[1], share=True),
        Quantity("recall", "recall", values["recall"], "high", note[0], share=True),
    ]  # fmt: skip
    return atlas


def _extend(numbers: list[int], spot: int, number: int, spots: int) -> None:
    if not numbers:
        numbers.extend([-1] * spots)
    numbers[spot] = number


def _places(layout: Layout) -> Iterator[tuple[str, int, int]]:
    for stage in layout.stages:
        for band in range(len(layout.bands)):
            for layer in range(layout.layers):
                yield stage, band, layer


def _choice(
    strategy: Strategy, rule: Rule | None, layout: Layout, stored: Stored | None, *, count: bool
) -> Choice:
    if rule is None:
        text = "full attention, computed by the model's own code"
        return Choice("dense", "dense", "dense", density=1.0, exact=True, why=text)
    name = method_text(
        (rule.method, {k: v for k, v in rule.params.items() if k != "block_size"}), short=True
    )
    column = None if stored is None else stored.column(rule.method, rule.params)
    if stored is not None and column:
        name = stored.candidates[column - 1].name
    choice = Choice(rule.method, method_text((rule.method, rule.params)), name, rule.params)
    if strategy.grid is not None and count:
        choice.density, choice.exact = counted_density(
            rule.method, rule.params, grid_of(strategy), heads=layout.heads,
            num_steps=layout.bands[0].of,
        )  # fmt: skip
    return choice


def _figures(
    choice: Choice,
    rule: Rule | None,
    stored: Stored | None,
    place: tuple[str, int, int],
    band: Band,
    head: int,
) -> dict[str, float]:
    """Give what is known of one head: measured, else counted."""
    if rule is None:
        return {"density": 1.0, "error": 0.0, "recall": 1.0, "saved": 0.0}
    found = {} if choice.density is None else {"density": choice.density}
    if stored is None or (column := stored.column(rule.method, rule.params)) is None:
        return found
    stage, layer, _ = place
    key = _key(stored, stage, layer, band)
    if key is None:
        return found
    row, cell = stored.rows[key], stored.cells[key]
    dense = float(cell.time[head, 0])
    found |= {
        "density": float(row.density[head, column]),
        "error": float(row.error[head, column]) ** 0.5,
        "saved": 1 - float(cell.time[head, column]) / dense,
    }
    if not np.isnan(row.recall[head, column]):
        found["recall"] = float(row.recall[head, column])
    return found


def _key(stored: Stored, stage: str, layer: int, band: Band) -> Key | None:
    """Find the measured band that holds a band of the map."""
    for number, steps in enumerate(stored.bands.steps(band.of)):
        if steps.start <= band.start and band.stop <= steps.stop:
            key = (stage, layer, number)
            return key if key in stored.rows else None
    return None


def _candidates(layout: Layout, stored: Stored) -> Candidates:
    names = ["dense", *(candidate.name for candidate in stored.candidates)]
    columns: dict[str, list[list[float | None]]] = {
        figure: [[] for _ in range(layout.spots)]
        for figure in ("error", "density", "recall", "time")
    }
    for stage, i_band, layer in _places(layout):
        key = _key(stored, stage, layer, layout.bands[i_band])
        if key is None:
            continue
        row, cell = stored.rows[key], stored.cells[key]
        tables = {
            "error": np.sqrt(row.error),
            "density": row.density,
            "recall": row.recall,
            "time": cell.time / cell.time[:, :1],
        }
        for figure, table in tables.items():
            for head in range(layout.heads):
                columns[figure][layout.spot(stage, i_band, layer, head)] = [
                    None if np.isnan(value) else float(f"{value:.3g}") for value in table[head]
                ]
    return Candidates(names, columns)


def _source(stored: Stored | None) -> tuple[str, str]:
    """Say where errors and times come from."""
    if stored is None:
        none = "No measurements next to the file, so the values of sparse heads are unknown."
        return none, none
    error = (
        f"Measured in {stored.units} generations on {stored.inputs}; relative L2 error of a "
        "head's output before the projection, root of the mean square over the captured steps."
    )
    time = "Predicted, as a fraction of this head's dense time, without kernel launches"
    return error, f"{time}: {stored.timing}."
