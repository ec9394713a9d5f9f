# SPDX-License-Identifier: Apache-2.0
"""Write what a search chose as a strategy with its receipt."""

from __future__ import annotations

from collections import defaultdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_sparse._version import __version__
from dit_sparse.pipelines import known_class
from dit_sparse.strategy import Grid, Model, Receipt, Rule, Strategy, config_hash

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dit_sparse.profiler.candidates import Candidate
    from dit_sparse.profiler.capture import Bands
    from dit_sparse.profiler.table import Key, Row

    Choices = Mapping[Key, tuple[int, ...]]

PACKAGES = ("torch", "diffusers")


def rules_of(
    choices: Choices, candidates: Sequence[Candidate], bands: Bands, *, stages: int = 1
) -> tuple[Rule, ...]:
    """Make one rule for each candidate, band and set of heads, with all layers that share it.

    Args:
        choices: Candidate of each head (0: dense, which no rule names) by (stage, layer, band).
        candidates: Those that the numbers from 1 on stand for.
        bands: Where the run is cut.
        stages: Transformers of the pipeline; with one, rules name none.
    """
    layers: dict[tuple[str, int, int, tuple[int, ...]], list[int]] = defaultdict(list)
    for (stage, layer, band), chosen in choices.items():
        for number in sorted(set(chosen) - {0}):
            if candidates[number - 1].keeps_all:
                continue
            heads = tuple(head for head, c in enumerate(chosen) if c == number)
            layers[stage, band, number, heads].append(layer)
    count = {len(chosen) for chosen in choices.values()}
    found = []
    for (stage, band, number, heads), named in sorted(layers.items()):
        candidate = candidates[number - 1]
        found.append(
            Rule(
                layers=tuple(sorted(named)),
                heads="all" if count == {len(heads)} else heads,
                steps=(bands.edges[band], bands.edges[band + 1]),
                stage=stage if stages > 1 else None,  # type: ignore[arg-type]
                method=candidate.method,
                params=candidate.params,
            )
        )
    return tuple(found)


def figures(choices: Choices, rows: Mapping[Key, Row]) -> dict[str, float]:
    """Sum up what was measured of the chosen candidates, over heads, layers and steps.

    Returns:
        "relative_error" (root of the mean square), its "relative_error_doubt" where rows were
        sampled, "density", and "recall" where every chosen candidate's is known; dense heads
        count as 0, 0, 1 and 1. The doubt is a standard error: heads of a call, which share their
        rows, are added as if they erred together, layers and bands as if apart.
    """
    weight = error = density = recall = doubt = 0.0
    for key, chosen in choices.items():
        row, heads = rows[key], np.arange(len(chosen))
        weight += row.steps * len(chosen)
        error += row.steps * float(row.error[heads, chosen].sum())
        doubt += (row.steps * float(row.doubt[heads, chosen].sum())) ** 2
        density += row.steps * float(row.density[heads, chosen].sum())
        recall += row.steps * float(row.recall[heads, chosen].sum())
    found = {"relative_error": (error / weight) ** 0.5, "density": density / weight}
    if doubt > 0 and error > 0:
        found["relative_error_doubt"] = doubt**0.5 / weight / (2 * found["relative_error"])
    if not np.isnan(recall):
        found["recall"] = recall / weight
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def strategy_of(
    name: str,
    models: Mapping[str, Any],
    about: Mapping[str, Any],
    rules: tuple[Rule, ...],
    receipt: Receipt,
) -> Strategy:
    """Put the strategy together.

    Args:
        name: For people.
        models: The pipeline's transformers.
        about: Of a unit: its grid.
        rules: Who does what.
        receipt: How it was found.
    """
    frames, height, width, text, _ = about["grid"]
    classes = tuple(dict.fromkeys(known_class(model) for model in models.values()))
    hashes = {config_hash(model.config) for model in models.values()}
    return Strategy(
        name=name,
        model=Model(classes=classes, config_hash=hashes.pop() if len(hashes) == 1 else None),
        grid=Grid(frames=frames, height=height, width=width, text=text),
        rules=rules,
        receipt=receipt,
    )


def versions() -> dict[str, str]:
    """Name the versions that measured figures depend on."""
    return {"dit_sparse": __version__, **{name: version(name) for name in PACKAGES}}
