# SPDX-License-Identifier: Apache-2.0
"""Make the strategies that a fidelity table compares: each method alone, and the profiler's mix.

At one density, so that quality can be compared: each method's own knob is bisected until it
keeps that share of the pairs, steps on which it searches or refreshes counted as dense. Knobs are
set and heads profiled on calibration prompts; the table's densities are measured on others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from knobs import KNOBS, record, tuned

from dit_sparse.profiler import Bands, Store, Wish, profile
from dit_sparse.profiler.build import figures, rules_of
from dit_sparse.profiler.search import sparse_vdit_rule

if TYPE_CHECKING:
    from pathlib import Path

    from dit_sparse.call import AttentionCall
    from dit_sparse.profiler import Profile
    from dit_sparse.strategy import Strategy

TOLERANCE = 0.02  # of density; a method that cannot come nearer is left out, with the figure
MARGIN = 0.005  # of density, that other prompts may need more
LAMBDAS = (1e-4, 1e4)  # between which Sparse-vDiT's is searched
BISECTIONS = 18
BANDS = Bands((0.0, 1 / 3, 2 / 3, 1.0))


@dataclass
class Maker:
    """Makes strategies for one model.

    Args:
        model: Its folder.
        settings: Of every call.
        prompts: To calibrate on.
        store: Where the profiler keeps what it measured.
    """

    model: Path
    settings: dict[str, Any]
    prompts: tuple[str, ...]
    store: Path

    @cached_property
    def pipe(self) -> Any:
        """Load the model."""
        pipe = DiffusionPipeline.from_pretrained(self.model)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def calls(self) -> list[AttentionCall]:
        """Record a dense generation."""
        return record(self.pipe, {**self.settings, "prompt": self.prompts[0]}, 0)

    def strategy(self, method: str, density: float) -> tuple[Strategy, float]:
        """Make one.

        Args:
            method: Of `KNOBS`, or "sparse_vdit" (its own rule per head), or "mixed" (the
                profiler's search over all methods).
            density: To be had.

        Returns:
            The strategy, and the density it is predicted to have.
        """
        if method in KNOBS:
            return tuned(method, density, self.calls)
        found = profile(
            self.pipe,
            self.prompts,
            arguments=self.settings,
            wish=Wish(density=density - MARGIN),
            bands=BANDS,
            costs="assumed",
            check=False,
            name=f"{method}-{100 * density:g}",
            store=Store(self.store),
        )
        assert found is not None
        strategy = found.strategy
        if method == "sparse_vdit":
            choices = sparse_vdit_choices(density, found)
            receipt = strategy.receipt.model_copy(
                update={
                    "measured": figures(choices, found.rows),
                    "note": f"Sparse-vDiT's rule, lambda set for a density of {density:g}",
                }
            )
            rules = rules_of(choices, found.candidates, BANDS)
            strategy = strategy.model_copy(update={"rules": rules, "receipt": receipt})
        return strategy, strategy.receipt.measured["density"]


def sparse_vdit_choices(density: float, profile: Profile) -> dict[Any, tuple[int, ...]]:
    """Find Sparse-vDiT's own choices, its lambda bisected (on a log scale) for a density.

    Where its patterns cannot have so few pairs, the fewest that they can.
    """
    own = [i for i, c in enumerate(profile.candidates, 1) if c.method == "sparse_vdit"]
    low, high = LAMBDAS
    found: dict[Any, tuple[int, ...]] = {}
    choices: dict[Any, tuple[int, ...]] | None = None
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        kept = weight = 0.0
        found = {}
        for key, row in profile.rows.items():
            told = sparse_vdit_rule(
                row.error[:, own] ** 0.5, row.density[:, own], weight=middle, epsilon=1.0
            )
            found[key] = tuple(0 if one == 0 else own[one - 1] for one in told)
            kept += row.steps * sum(row.density[h, c] for h, c in enumerate(found[key]))
            weight += row.steps * len(told)
        if kept / weight > density:
            low = middle
        else:
            high, choices = middle, found
    return found if choices is None else choices
