# SPDX-License-Identifier: Apache-2.0
"""Set a method's own knob for a density, on recorded calls of a dense generation."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dit_sparse.inspect.observe import observe_run
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.methods import method_class
from dit_sparse.methods.params import build_method, param_names, params_of
from dit_sparse.profiler.candidates import Candidate, block_for
from dit_sparse.profiler.capture import call_of
from dit_sparse.profiler.tuning import call_density
from dit_sparse.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dit_sparse.core.call import AttentionCall
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.core.plan import BlockPlan

BISECTIONS = 9
NEAR = 0.01  # of density: no other way to set the knob is tried


def ways(
    method: str, share: float, grid: LatentsGrid, given: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Give the params of each of a method's knobs at a setting in (0, 1]; more keeps more.

    Params that are ``given`` stay as they are.
    """
    cls, block = method_class(method), block_for(grid)
    size = {"block_size": block} if "block_size" in param_names(method) else {}
    known = cls.knobs(share, grid, block)
    return [{**size, **cls.at_start, **params, **(given or {})} for params in known]


def record(pipe: Any, arguments: dict[str, Any], seed: int) -> list[AttentionCall]:
    """Generate once, dense, and keep all calls of the first, a middle and the last step.

    The unconditional pass is left out. Step 0 must be there: methods search on it.
    """
    calls: list[AttentionCall] = []

    def keep(call: AttentionCall, plan: BlockPlan | None, method: str) -> None:  # noqa: ARG001
        tensors = {name: getattr(call, name).clone() for name in ("query", "key", "value")}
        calls.append(replace(call, **tensors))

    last = arguments["num_inference_steps"] - 1
    seeded = call_of(pipe, arguments, seed)
    observe_run(pipe, Strategy.single("dense"), seeded, {0, (last + 1) // 2, last}, keep)
    return calls


def density_of(method: str, params: dict[str, Any], calls: Sequence[AttentionCall]) -> float:
    """Predict the density of a whole run from its recorded calls."""
    made = build_method(method, params)
    steps, ops = calls[0].num_steps, Backends()
    candidate = Candidate(method, method, params_of(made))
    dense = candidate.dense_steps(steps) / steps
    states: dict[tuple[str, int], dict[str, Any]] = {}
    found = []
    for call in calls:
        state = states.setdefault((call.stage, call.layer), {})
        own = replace(call, state=state, shared={})
        refreshes = candidate.period is not None and call.step % candidate.period == 0
        found.append(call_density(candidate, own, ops, refreshes=refreshes))
    known = [density for density in found if density is not None]  # the others are in ``dense``
    return dense + (1 - dense) * sum(known) / len(known) if known else 1.0


def tuned(
    method: str,
    density: float,
    calls: Sequence[AttentionCall],
    given: Mapping[str, Any] | None = None,
) -> tuple[Strategy, float]:
    """Bisect a method's knob for a density.

    Args:
        method: Its name.
        density: To be had, of all pairs.
        calls: Recorded ones.
        given: Params that stay as they are.

    Returns:
        The strategy, and the density it is predicted to have.
    """
    best: tuple[float, dict[str, Any], float] = (float("inf"), {}, 1.0)
    grid = calls[0].grid
    for way in range(len(ways(method, 1.0, grid, given))):
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            params = ways(method, float(f"{middle:.4g}"), grid, given)[way]
            found = density_of(method, params, calls)
            if abs(found - density) < best[0]:
                best = abs(found - density), params, found
            low, high = (middle, high) if found < density else (low, middle)
        if best[0] <= NEAR:
            break
    return Strategy.single(method, **best[1]), best[2]
