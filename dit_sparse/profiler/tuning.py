# SPDX-License-Identifier: Apache-2.0
"""Set a candidate to a density on calls of a layer.

What a method is asked for is bisected until its plans keep the wanted share of pairs, means
counted: thresholds follow the content, and windows and blocks come in whole numbers.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from typing import TYPE_CHECKING, Any

from dit_sparse.core.plan import BlockPlan
from dit_sparse.profiler.measure import DENSE_BLOCK, step_seen
from dit_sparse.profiler.shared import SharedOps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dit_sparse.core.call import AttentionCall, Ops
    from dit_sparse.profiler.candidates import Candidate, Wanted

BISECTIONS = 6
NEAR, SETTLED = 0.03, 0.12  # of the density, close enough: where calls must tell it, where not


def searches(candidate: Candidate) -> bool:
    """Whether a candidate must see the first step of a band before it drops anything."""
    return bool(candidate.instance.at_start) or candidate.period is not None


def video_share(call: AttentionCall) -> float:
    """Give the share of a call's pairs that are of the video's tokens alone."""
    queries, keys = (
        layout.lengths.sum(-1).double()
        for layout in (call.layout(DENSE_BLOCK), call.key_layout(DENSE_BLOCK))
    )
    return float((call.grid.video_tokens**2 / (queries * keys)).mean())


def overall(density: float, share: float) -> float:
    """Give the density of all pairs where ``density`` of the video's are kept, and all others.

    Args:
        density: In [0, 1].
        share: ``video_share`` of the call.
    """
    return 1 - share * (1 - density)


def call_density(
    candidate: Candidate, call: AttentionCall, ops: Ops, *, refreshes: bool
) -> float | None:
    """Count what a candidate keeps on one call; None: it searches or refreshes on it.

    Args:
        candidate: Its method plans, and after a search finishes, as in a generation.
        call: With the state that the candidate has by then.
        ops: The kernels.
        refreshes: A method with a period computes everything on this step.
    """
    method = candidate.instance
    plan = method.plan(call, ops)
    if plan is None:
        return None if refreshes and candidate.period is not None else 1.0
    if not plan.complete:
        return float(plan.density().mean())
    output, lse = ops.attend(call.query, call.key, call.value, plan, call.scale)
    method.finish(call, output, lse, ops)
    return None


class Tuner:
    """Sets candidates to a density on one or two calls of a layer.

    Args:
        calls: In the order of their steps; the first is the first of its band.
    """

    def __init__(self, calls: Sequence[AttentionCall]) -> None:
        self.calls = [(call, SharedOps()) for call in calls]
        for call, ops in self.calls:
            everything = BlockPlan.full(call.layout(DENSE_BLOCK), call.key_layout(DENSE_BLOCK))
            qkv = (call.query, call.key, call.value)
            ops.begin(call, *ops.attend(*qkv, everything, call.scale))

    def end(self) -> None:
        """Free what candidates shared."""
        for _, ops in self.calls:
            ops.end()

    def request(self, want: Wanted) -> float:
        """Find the density to ask a method for, so that its plans keep the level.

        Returns:
            It, in (0, 1]; the nearest that was tried where the method cannot have the level.
        """
        assert want.level is not None
        call, _ = self.calls[0]
        wanted = overall(want.level, video_share(call))
        near = (SETTLED if want.settled else NEAR) * wanted
        low, high = 0.0, 1.0
        request, best = want.level, (float("inf"), want.level)
        for _ in range(BISECTIONS + 1):
            kept = self.density(want.fitted(call.grid, request))
            best = min(best, (abs(kept - wanted), request))
            if best[0] <= near:
                break
            low, high = (request, high) if kept < wanted else (low, request)
            # By ratio, as thresholds for low densities lie close to 0.
            request = float(f"{sqrt(low * high) if low > 0 else high / 2:.4g}")
        return best[1]

    def density(self, candidate: Candidate) -> float:
        """Count what a candidate keeps on these calls, those on which it searches left out."""
        first = self.calls[0][0].step
        state: dict[str, Any] = {}
        found = []
        for call, ops in self.calls if searches(candidate) else self.calls[-1:]:
            step = step_seen(candidate, call.step, first)
            own = replace(call, step=step, state=state, shared={})
            found.append(call_density(candidate, own, ops, refreshes=step == first))
        known = [density for density in found if density is not None]
        return sum(known) / len(known) if known else 1.0
