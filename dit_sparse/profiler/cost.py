# SPDX-License-Identifier: Apache-2.0
"""Predict the time of attention from block counts.

One launch for the heads of a layer that share a choice takes

    launch + sum over heads (head + pair[block] * computed * (1 + cut * partial) + order)

where ``computed`` counts kept blocks as whole blocks of the largest size (tile quantisation),
``partial`` is the share of them that a bit tile cuts, and ``order`` is paid where tokens are
permuted. To it comes planning, amortised over the steps of a band. The numbers come from a
micro-benchmark of the device (``micro.py``) or are assumed; ``source`` says which.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dit_sparse.profiler.candidates import Candidate

EFFICIENCY = 0.9  # (dense time x density) / sparse time, where none was measured
PLANNING = 0.01  # of a dense call, a dynamic method's planning, where none was measured
SEARCH = 1.0  # of a dense call, an exact search beside the dense result, where none was measured


@dataclass(frozen=True)
class CostModel:
    """What a device takes for the parts of one call; times in milliseconds.

    Args:
        source: Where the numbers come from, for people.
        unit: "ms", or "dense calls" where nothing was measured.
        heads: Heads of the call they are for.
        dense: A dense call, all heads, by the model's own kernel.
        launch: One sparse launch whatever it computes.
        head: One head of a launch whatever it computes, by block size.
        pair: One head's full square of pairs at block granularity, by block size.
        order: Permuting one head's tokens there and back.
        cut: What a bit tile adds to a block, as a share of the block's time.
        planning: Of each candidate, all heads: [on a searching step, on every other step].
    """

    source: str
    unit: str
    heads: int
    dense: float
    launch: float
    head: dict[str, float]
    pair: dict[str, float]
    order: float
    cut: float
    planning: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def assumed(
        cls, candidates: Sequence[Candidate], heads: int, efficiency: float = EFFICIENCY
    ) -> CostModel:
        """Make a model of shares of a dense call without measuring anything."""
        pair = 1 / heads / efficiency
        blocks = {str(block_of(candidate)) for candidate in candidates}
        return cls(
            source=f"assumed: kernel efficiency {efficiency:g}, planning {PLANNING:g} of dense, "
            f"a search {SEARCH:g} of dense",
            unit="dense calls",
            heads=heads,
            dense=1.0,
            launch=0.0,
            head=dict.fromkeys(blocks, 0.0),
            pair=dict.fromkeys(blocks, pair),
            order=0.0,
            cut=0.0,
            planning={c.name: _assumed_planning(c) for c in candidates},
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostModel:
        """Read what ``to_dict`` gave."""
        planning = {name: (float(a), float(b)) for name, (a, b) in data["planning"].items()}
        return cls(**{**data, "planning": planning})

    def to_dict(self) -> dict[str, Any]:
        """Give plain data."""
        return asdict(self)

    def attend(
        self, block: int, computed: float, *, ordered: bool = False, partial: float = 0.0
    ) -> float:
        """Predict one head's part of a launch.

        Args:
            block: Tokens in a block; the nearest size that the model knows stands for it.
            computed: Share of pairs that whole blocks make up, >= 0.
            ordered: Tokens are permuted.
            partial: Share of the kept blocks that a bit tile cuts.
        """
        known = min(self.pair, key=lambda size: (abs(int(size) - block), int(size)))
        pairs = self.pair[known] * computed * (1 + self.cut * partial)
        return self.head[known] + pairs + self.order * ordered

    def launch_time(self, block: int, computed: Sequence[float], **how: Any) -> float:
        """Predict one launch of heads that compute these shares."""
        return self.launch + sum(self.attend(block, share, **how) for share in computed)

    def band(
        self,
        candidate: Candidate,
        steps: int,
        computed: float,
        *,
        ordered: bool = False,
        partial: float = 0.0,
    ) -> float:
        """Predict one head over all steps of a band, planning included, launches not.

        A searching or refreshing step computes everything; the others ``computed``.
        """
        if candidate.keeps_all:
            return steps * self.dense / self.heads
        block, full = block_of(candidate), min(candidate.dense_steps(steps), steps)
        sparse = self.attend(block, computed, ordered=ordered, partial=partial)
        first, later = self.planning.get(candidate.name, (0.0, 0.0))
        searches = full or 1  # a method that never searches still begins once
        planning = (first * searches + later * (steps - searches)) / self.heads
        return full * self.attend(block, 1.0) + (steps - full) * sparse + planning

    def dense_band(self, steps: int) -> float:
        """Predict one dense head over all steps of a band."""
        return steps * self.dense / self.heads


def block_of(candidate: Candidate) -> int:
    """Tokens in the candidate's blocks, at most."""
    return candidate.instance.block_tokens


def _assumed_planning(candidate: Candidate) -> tuple[float, float]:
    """Plan on a searching step and on every other one, in dense calls."""
    if candidate.dense_steps(1):
        return SEARCH, 0.0
    each = 0.0 if candidate.instance.static else PLANNING
    return each, each


def agreement(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """Compare predicted with measured times.

    Returns:
        Spearman's rank correlation (ties get their mean rank; 0 where all of a side are equal),
        and the median of |predicted - measured| / measured.
    """
    if len(predicted) != len(measured) or len(measured) < 2:
        raise ValueError(
            f"need two lists of equal length, at least 2, got {len(predicted)} and {len(measured)}"
        )
    one, other = np.asarray(predicted, float), np.asarray(measured, float)
    if not (other > 0).all():
        raise ValueError("measured times must be above 0")
    a, b = _ranks(one), _ranks(other)
    a, b = a - a.mean(), b - b.mean()
    spread = float(np.sqrt((a**2).sum() * (b**2).sum()))
    rank = float((a * b).sum()) / spread if spread else 0.0
    return rank, float(np.median(np.abs(one - other) / other))


def _ranks(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, Any]:
    """Rank from 0; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    first = np.cumsum(count) - count
    ranks: np.ndarray[Any, Any] = (first + (count - 1) / 2)[place]
    return ranks
