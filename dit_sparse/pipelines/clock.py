# SPDX-License-Identifier: Apache-2.0
"""Which step, of how many, of which generation: read from the scheduler, never counted.

``scheduler.step`` is not wrapped (several pipelines deep-copy their scheduler), and no callback
is injected (it belongs to the user).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Moment:
    """Where a generation stands."""

    step: int
    num_steps: int
    new: bool
    """A generation started since the last reading."""
    branch: str | None
    """Guidance branch where the pipeline tells it, else None."""


@dataclass(slots=True)
class Clock:
    """Reads the time from a pipeline, from a scheduler alone, or from what a caller sets.

    Args:
        pipe: A pipeline with a ``scheduler``; looked up at every reading, users replace it.
        scheduler: For a bare transformer with a loop of the user's own.
    """

    pipe: Any = None
    scheduler: Any = None
    told: dict[str, Any] = field(default_factory=dict)
    """What the running ``cache_context`` said: name and, from diffusers 0.41, step_index."""
    timestep: Any = None
    """The transformer's own ``timestep`` argument of this pass."""
    fixed: tuple[int, int, str] | None = None
    """(step, num_steps, branch) set by hand."""
    _timesteps: Any = None
    _last: int = -1
    _looked_up: tuple[Any, int | None] = (None, None)

    def read(self) -> Moment:
        """Read the present step; ``LookupError`` where nothing tells it."""
        if self.fixed is not None:
            step, num_steps, branch = self.fixed
            new, self._last = step < self._last or self._last < 0, step
            return Moment(step, num_steps, new, branch)
        scheduler = self.scheduler if self.pipe is None else self.pipe.scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None:
            raise LookupError(
                "no step is known: enable on the pipeline, give scheduler=..., or call "
                "handle.at(step, num_steps) before each pass"
            )
        step = self._step(scheduler, timesteps)
        told_steps = self.told.get("num_inference_steps")
        num_steps = len(timesteps) if told_steps is None else int(told_steps)
        if not 0 <= step < num_steps:
            raise LookupError(
                f"the scheduler stands at step {step} of {num_steps}: its run is over, so "
                "another pipeline or loop runs this transformer; disable sparse attention here "
                "and enable it there"
            )
        # set_timesteps makes a new tensor: another one means another generation. The second test
        # serves loops that keep their schedule.
        new = timesteps is not self._timesteps or step < self._last
        self._timesteps, self._last = timesteps, step
        names = {"cond_uncond": "both"}
        told: str | None = self.told.get("name")
        return Moment(step, num_steps, new, names.get(told or "", told))

    def start(self) -> None:
        """Note the schedule at attaching: it tells a running generation from a new one."""
        scheduler = self.scheduler if self.pipe is None else self.pipe.scheduler
        self._timesteps = getattr(scheduler, "timesteps", None)

    def forget(self) -> None:
        """Treat the next reading as the start of a generation."""
        self._timesteps, self._last, self._looked_up = None, -1, (None, None)
        self.timestep = None

    def _step(self, scheduler: Any, timesteps: Tensor) -> int:
        for index in (
            self.told.get("step_index"),
            getattr(scheduler, "step_index", None),
            getattr(scheduler, "begin_index", None),
        ):
            if index is not None:
                return int(index)
        now = getattr(self.pipe, "_current_timestep", None)
        now = self.timestep if now is None else now
        found = None if now is None else self._look_up(now, timesteps)
        if found is not None:
            return found
        if hasattr(scheduler, "step_index"):
            return 0  # it counts, and has not stepped yet (whole-model compile hides timestep)
        raise LookupError(
            "neither the scheduler nor the model's timestep tells the step; the pipeline that "
            "runs this transformer may not be the one that enabled sparse attention"
        )

    def _look_up(self, now: Any, timesteps: Tensor) -> int | None:
        """Find a timestep among the scheduler's; None where it is none of them.

        One look-up per timestep object: on a GPU it reads the device. FLUX's transformer gets it
        divided by 1000.
        """
        if self._looked_up[0] is not now:
            value = float(now.flatten()[0] if isinstance(now, Tensor) else now)
            known = timesteps.double().flatten()
            gaps = torch.stack([(known - value).abs(), (known - 1000 * value).abs()])
            place = int(gaps.argmin())
            near = float(gaps.flatten()[place]) <= 4e-3 * float(known.abs().max())  # bfloat16
            self._looked_up = (now, place % len(known) if near else None)
        return self._looked_up[1]
