# SPDX-License-Identifier: Apache-2.0
"""Make the strategies that a fidelity table compares: each method alone, and the profiler's mix.

At one density, so that quality can be compared: each method's own knob is bisected until it
keeps that share of the pairs, steps on which it searches or refreshes counted as dense. Text
is exact in every method, so where the sequence has text the share is of the video's pairs alone.
Knobs are set and heads profiled on calibration prompts; the table's densities are measured on
others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import inf, sqrt
from typing import TYPE_CHECKING, Any

from composition import PER_HEAD
from diffusers import DiffusionPipeline
from knobs import record, tuned

from dit_sparse.profiler import Bands, Store, Wish, profile
from dit_sparse.profiler.build import figures, rules_of
from dit_sparse.profiler.capture import SHORTLIST
from dit_sparse.profiler.search import sparse_vdit_rule
from dit_sparse.profiler.tuning import video_share

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dit_sparse.core.call import AttentionCall
    from dit_sparse.profiler import Profile
    from dit_sparse.strategy import Strategy

TOLERANCE = 0.02  # of density; a method that cannot come nearer is left out, with the figure
MARGIN = 0.005  # of density, that other prompts may need more
LAMBDA = 0.5  # Sparse-vDiT's
LEAST, MOST = 1e-4, 1e4  # between which its epsilon and, where that is not enough, lambda are set
BISECTIONS = 24
BANDS = Bands((0.0, 1 / 3, 2 / 3, 1.0))
# Compositions that stand in the tables beside the methods: a method, and params that are given.
COMPOSED: dict[str, tuple[str, dict[str, Any]]] = {
    "svg2+means": ("svg2", {"compensate": "means"}),
    "tiles+means": (
        "composed",
        {
            "query_order": "tiles",
            "key_order": "tiles",
            "score": "centroid",
            "compensate": "means",
        },
    ),
}


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
        pipe = DiffusionPipeline.from_pretrained(self.model, use_safetensors=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def calls(self) -> list[AttentionCall]:
        """Record a dense generation."""
        return record(self.pipe, {**self.settings, "prompt": self.prompts[0]}, 0)

    @cached_property
    def video_share(self) -> float:
        """The share of all pairs that are of the video's (picture's) tokens alone."""
        return video_share(self.calls[0])

    def strategy(self, method: str, density: float) -> tuple[Strategy, float]:
        """Make one.

        Args:
            method: A method's name ("sparse_vdit" by its authors' rule per head), a name in
                ``COMPOSED``, or "mixed" (the profiler's search over all methods).
            density: To be had, of all pairs.

        Returns:
            The strategy, and the density it is predicted to have.
        """
        if method not in PER_HEAD:
            name, given = COMPOSED.get(method, (method, {}))
            return tuned(name, density, self.calls, given)
        found = profile(
            self.pipe,
            self.prompts,
            arguments=self.settings,
            wish=Wish(density=density - MARGIN),
            bands=BANDS,
            candidates="sparse-vdit" if method == "sparse_vdit" else "default",
            shortlist=0 if method == "sparse_vdit" else SHORTLIST,
            costs="assumed",
            check=False,
            store=Store(self.store / method),
        )
        assert found is not None
        strategy = found.strategy
        if method == "sparse_vdit":
            choices, weight, epsilon = sparse_vdit_choices(density - MARGIN, found)
            receipt = strategy.receipt.model_copy(
                update={
                    "measured": figures(choices, found.rows),
                    "note": f"Sparse-vDiT's rule, lambda {weight:.3g}, epsilon {epsilon:.3g}",
                }
            )
            rules = rules_of(choices, found.candidates, BANDS)
            strategy = strategy.model_copy(update={"rules": rules, "receipt": receipt})
        return strategy, strategy.receipt.measured["density"]


def sparse_vdit_choices(density: float, profile: Profile) -> tuple[dict[Any, Any], float, float]:
    """Set Sparse-vDiT's rule for a density.

    Its lambda is the published one and epsilon, above which a head stays dense, is bisected on a
    log scale; where no head is dense and too many pairs are kept still, lambda is raised.

    Returns:
        The choices, lambda, epsilon.
    """
    own = [i for i, c in enumerate(profile.candidates, 1) if c.method == "sparse_vdit"]

    def choose(weight: float, epsilon: float) -> dict[Any, tuple[int, ...]]:
        found = {}
        for key, row in profile.rows.items():
            told = sparse_vdit_rule(
                row.error[:, own] ** 0.5, row.density[:, own], weight=weight, epsilon=epsilon
            )
            found[key] = tuple(0 if one == 0 else own[one - 1] for one in told)
        return found

    def fits(weight: float, epsilon: float) -> bool:
        choices = choose(weight, epsilon)
        return bool(figures(choices, profile.rows)["density"] <= density)

    weight, epsilon = LAMBDA, inf
    if fits(weight, inf):
        epsilon = _bisect(lambda x: fits(weight, x), LEAST, MOST)
    else:
        weight = _bisect(lambda x: fits(x, inf), LAMBDA, MOST)
    return choose(weight, epsilon), weight, epsilon


def _bisect(fits: Callable[[float], bool], low: float, high: float) -> float:
    """Find the least value that fits, on a log scale; ``high`` where none does."""
    for _ in range(BISECTIONS):
        middle = sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
