# SPDX-License-Identifier: Apache-2.0
"""The noise levels of a few-step run: those that the pipeline's own scheduler will visit."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from dit_sparse.distill.errors import DistillError
from dit_sparse.distill.objective import Level, Objective, objective_of

CLOSE = 1e-3  # relative; a table's level against the solver's own


@dataclass(frozen=True, eq=False)
class StepGrid:
    """K levels that the student sees, and the clean one behind them.

    Args:
        objective: What the model's output is.
        times: The K times, descending: sigma for flow, the timestep otherwise; float64 ``[K]``.
        told: What the transformer is told at each, float64 ``[K]``.
    """

    objective: Objective
    times: Tensor
    told: Tensor

    @property
    def steps(self) -> int:
        """K."""
        return len(self.times)

    def level(self, step: int, batch: int) -> Level:
        """Give the level at which a step starts; step K is the clean end."""
        if step == self.steps:
            one = torch.ones(batch, dtype=torch.float64)
            return Level(one, one * 0)
        return self.objective.level(self.times[step].expand(batch))

    def span(self, step: int, *, top: float, disjoint: bool) -> tuple[float, float]:
        """Give the times to which a step's result is noised again: [low, high).

        ``low`` is where the step ends. Disjoint: ``high`` is where it starts. Else it is ``top``
        of the whole range (0.98 as published), or where the step starts if that is higher.
        """
        low = float(self.times[step + 1]) if step + 1 < self.steps else 0.0
        start = float(self.times[step])
        table = self.objective.alphas_cumprod
        whole = 1.0 if table is None else float(len(table))
        return low, start if disjoint else max(start, top * whole)

    def draw(self, u: Tensor, step: int, *, top: float, disjoint: bool) -> Tensor:
        """Spread u from [0, 1) over a step's span; whole timesteps where they are in a table."""
        low, high = self.span(step, top=top, disjoint=disjoint)
        time = low + u.double() * (high - low)
        if self.objective.alphas_cumprod is None:
            return time.clamp(min=1e-4)  # at sigma 0 there is nothing to learn
        return time.floor()

    def step_of(self, time: float) -> int:
        """Name the step of a run in which a time falls: the last that starts at or above it."""
        later = [i for i in range(self.steps) if float(self.times[i]) >= time]
        return later[-1] if later else 0


def read_grid(scheduler: Any, told: list[float]) -> StepGrid:
    """Read the grid of the run that ``scheduler`` has just gone through.

    Args:
        scheduler: Of the pipeline, after the run.
        told: The ``timestep`` that the transformer was given at each of its steps.

    Raises:
        DistillError: The scheduler calls the model more often than once a step, or its levels
            are not those of its timesteps.
    """
    name = type(scheduler).__name__
    objective = objective_of(scheduler, told)
    timesteps = scheduler.timesteps.double().cpu()
    if len(timesteps) != len(told):
        raise DistillError(
            f"{name}: {len(timesteps)} timesteps, {len(told)} calls of the model; expected one "
            "call per step"
        )
    told_times = torch.tensor(told, dtype=torch.float64)
    sigmas = getattr(scheduler, "sigmas", None)
    if objective.alphas_cumprod is None:
        if sigmas is None:
            raise DistillError(f"{name}: has no sigmas; use a flow-matching scheduler")
        times = sigmas[: len(told)].double().cpu()
        if float((told_times / objective.time_scale - times).abs().max()) > 2e-3:
            raise DistillError(
                f"{name}: its sigmas {[round(float(s), 4) for s in times]} are not what the model "
                f"was told, {told} / {objective.time_scale:g}"
            )
    else:
        times = timesteps
        _check_table(name, objective, times, sigmas)
    if any(a <= b for a, b in pairwise(times.tolist())):
        raise DistillError(
            f"{name}: noise levels must decrease from step to step: {times.tolist()}"
        )
    return StepGrid(objective, times, told_times)


def _check_table(name: str, objective: Objective, times: Tensor, sigmas: Any) -> None:
    if not bool((times == times.round()).all()):
        raise DistillError(f"{name}: timesteps {times.tolist()} are not in its table")
    if sigmas is None or len(sigmas) < len(times):
        return
    level = objective.level(times)
    wanted = level.sigma / level.alpha  # how solvers of this kind write sigma
    gap = (sigmas[: len(times)].double().cpu() / wanted - 1).abs()
    if float(gap.max()) > CLOSE:
        raise DistillError(
            f"{name}: its noise levels do not match its timesteps (Karras or other sigma "
            "spacing); use only timestep_spacing"
        )


Renoise = Literal["overlapping", "disjoint"]
