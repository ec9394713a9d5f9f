# SPDX-License-Identifier: Apache-2.0
"""Which step, of how many, of which schedule: read from what the pass was given, never counted.

``scheduler.step`` is not wrapped (several pipelines step copies of their scheduler), and no
callback is injected (it belongs to the user). A step that cannot be told raises ``LookupError``:
the call then stays dense, and the report says why.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dit_sparse.pipelines.caller import Caller

UNKNOWN = (
    "the step is unknown; enable sparse attention on the pipeline, pass scheduler=..., or call "
    "handle.at(step, num_steps) before each pass, in the same thread"
)


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a generation stands.

    Args:
        step: 0-based index into the whole schedule.
        num_steps: Its length.
        branch: Guidance branch where the pipeline tells it, else None.
        guided: Whether it uses classifier-free guidance; None where it does not say.
        schedule: The object that is the schedule: ``set_timesteps`` makes a new one. None where
            the step was set by hand.
    """

    step: int
    num_steps: int
    branch: str | None
    guided: bool | None = None
    schedule: Any = None


class Clock:
    """Reads the step from a pipeline, or from a scheduler alone.

    Args:
        pipe: A pipeline with a ``scheduler``; looked up at every reading, users replace it. Held
            weakly.
        scheduler: For a bare transformer with a loop of the user's own.
    """

    def __init__(self, pipe: Any = None, scheduler: Any = None) -> None:
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._scheduler = scheduler

    @property
    def pipe(self) -> Any:
        """The pipeline, or None."""
        return None if self._pipe is None else self._pipe()

    @property
    def scheduler(self) -> Any:
        """The scheduler, or None."""
        return self._scheduler if self._pipe is None else getattr(self.pipe, "scheduler", None)

    def foreign(self, caller: Caller | None) -> str | None:
        """Say why a caller's passes are not ours to change; None where they are.

        Pipelines that share the scheduler count as one (``from_pipe`` makes such).
        """
        if caller is None or (self._pipe is not None and caller.pipe is self._pipe()):
            return None
        own = self.scheduler
        if (self._pipe is None and own is None) or getattr(caller.pipe, "scheduler", 0) is own:
            return None
        where = "a bare transformer" if self._pipe is None else type(self.pipe).__name__
        return (
            f"another {type(caller.pipe).__name__} shares this transformer but has its own "
            f"scheduler, and sparse attention is enabled on {where}; disable it there and enable "
            "it on the other pipeline"
        )

    def read(self, caller: Caller | None, timestep: Any, told: dict[str, Any]) -> Moment:
        """Read the step of a pass.

        Args:
            caller: The pipeline that runs it, None for a loop of another kind.
            timestep: The transformer's own argument; None: within a graph it is not seen.
            told: What the running ``cache_context`` was given: name and, from diffusers 0.41,
                step_index.
        """
        scheduler = self.scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor):
            raise LookupError(UNKNOWN)  # noqa: TRY004  (no argument of ours)
        seen = [timestep]
        if caller is not None:
            seen = [getattr(caller.pipe, "_current_timestep", None), timestep, caller.timestep]
        seen = [each for each in seen if each is not None]
        step = told.get("step_index")
        if step is None:
            step = next((i for x in seen if (i := _as_view(x, timesteps)) is not None), None)
        if step is None:
            trusted = caller is not None or self._pipe is None
            step = _from_scheduler(scheduler, timesteps, seen, trusted=trusted)
        steps = told.get("num_inference_steps")
        num_steps = len(timesteps) if steps is None else int(steps)
        if not 0 <= step < num_steps:
            raise LookupError(
                f"the scheduler is at step {step} of {num_steps}, so its run is over and another "
                "pipeline or loop is running this transformer; disable sparse attention here "
                "and enable it there"
            )
        name: str | None = told.get("name")
        guided = None if caller is None else caller.guided
        return Moment(
            int(step), num_steps, "both" if name == "cond_uncond" else name, guided, timesteps
        )


def _from_scheduler(scheduler: Any, timesteps: Tensor, seen: list[Any], *, trusted: bool) -> int:
    """Read the scheduler's own index, and compare values where it has none.

    A loop that is no pipeline's (not ``trusted``) may step another scheduler than ours: then
    index and value must agree.
    """
    index: int | None = getattr(scheduler, "step_index", None)
    if trusted and index is not None:
        return index
    found = None
    for each in seen:  # some models are given a function of the time, which is in no schedule
        found = look_up(each, timesteps)
        if found is not None:
            break
    if not trusted and (found is None or index not in {None, found}):
        raise LookupError(
            "this transformer runs in a custom loop, and its timestep does not match the "
            "scheduler of the pipeline on which sparse attention is enabled; enable it on the "
            "transformer with scheduler=..."
        )
    if found is None:
        found = getattr(scheduler, "begin_index", None)
    if found is None:
        raise LookupError(
            "the step cannot be determined from the scheduler or the timestep of this pass; "
            "call scheduler.set_begin_index(0) before the loop, or handle.at(step, num_steps) "
            "before each pass of a bare transformer"
        )
    return found


def _as_view(now: Any, timesteps: Tensor) -> int | None:
    """Find the index of a timestep that is a view into the schedule, as in ``for t in timesteps``.

    No device is read, and timesteps that occur twice (PNDM, Heun) are told apart.
    """
    if not isinstance(now, Tensor) or now.dtype != timesteps.dtype or timesteps.ndim != 1:
        return None
    if any(step and size > 1 for size, step in zip(now.shape, now.stride(), strict=True)):
        return None  # more than one value
    if (
        not now.numel()
        or now.device != timesteps.device
        or now.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr()
    ):
        return None
    offset = int(now.storage_offset()) - int(timesteps.storage_offset())
    place, rest = divmod(offset, max(timesteps.stride(0), 1))
    return place if rest == 0 and 0 <= place < len(timesteps) else None


def look_up(now: Any, timesteps: Tensor) -> int | None:
    """Find the step at which all that is denoised in a pass stands, by value; reads the device.

    Samples, frames or tokens may each have a time. Those that stand nowhere in the schedule are
    given, not denoised (a first frame, a finished one). FLUX's transformer gets the time divided
    by 1000.

    Returns:
        The step; None where no value is in the schedule.

    Raises:
        LookupError: Several steps in one pass, or a time that several steps have.
    """
    now = now.detach() if isinstance(now, Tensor) else torch.as_tensor(now)
    known = timesteps.detach().double().flatten().cpu()
    places: set[int] = set()
    for value in now.flatten().unique().cpu():
        alike = _alike(value, known, 1)
        if value.is_floating_point():
            alike |= _alike(value, known, 1000)
        if len(alike) > 1:
            raise LookupError(
                f"the timestep {float(value):g} of this pass matches several steps of the "
                f"schedule, {min(alike)} to {max(alike)}"
            )
        places |= alike
    if len(places) > 1:
        raise LookupError(
            f"one pass contains steps {min(places)} to {max(places)} (frames or samples with "
            "individual timesteps, as in diffusion forcing with ar_step > 0)"
        )
    return places.pop() if places else None


def _alike(value: Tensor, known: Tensor, scale: int) -> set[int]:
    """Find the steps whose time over ``scale`` is this value, as near as its dtype tells."""
    rounded = (known / scale).to(value.dtype)
    if not value.is_floating_point():
        return set((rounded == value).nonzero().flatten().tolist())
    gaps = (known - scale * value.double()).abs()
    place = int(gaps.argmin())
    # A rounding to the dtype, before the division or after it.
    if not float(gaps[place]) <= torch.finfo(value.dtype).eps * float(known[place].abs()):
        return set()
    return set((rounded == rounded[place]).nonzero().flatten().tolist())
