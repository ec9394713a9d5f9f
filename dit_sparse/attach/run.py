# SPDX-License-Identifier: Apache-2.0
"""One generation by one caller: what it has done so far, and what it remembers.

A run is held by the execution of the pipeline's ``__call__`` that it belongs to, or by the thread
of a loop that is no pipeline's, so callers that share a transformer share no state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.attach.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import Tensor

    from dit_sparse.attach.envelope import Envelope
    from dit_sparse.attach.report import CallRecord
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.pipelines.clock import Moment

    # Valid text tokens of each sample, and the order that puts them first; None: as it is.
    Text = tuple[Tensor | None, Tensor | None]


class Run:
    """One generation.

    ``begin`` starts it, and starts it anew for a loop that goes on to the next generation.
    """

    def __init__(self, envelope: Envelope | None, *, held: bool = False) -> None:
        """Nothing has run yet.

        Args:
            envelope: Keeps its guarantee, where there is one.
            held: By one execution of a pipeline, which is one generation.
        """
        self.envelope, self.held = envelope, held
        self.memory = Memory()
        self.records: list[CallRecord] = []
        self.num_steps = 0
        self.step = -1
        self.schedule: Any = None
        self.open = self.begun = False
        """Whether a generation is under way, and whether one ever was."""
        self.late = False  # sparse attention was enabled in the middle of one of its passes
        self.attached_at: int | None = None
        """The step at which sparse attention was enabled, where that was in its middle."""
        self.grid: LatentsGrid | None = None
        self.stage = ""
        self.first: dict[str, int] = {}
        """The first head that this process computes, by stage."""
        self.text: tuple[Any, Text] = (None, (None, None))

    def starts(self, moment: Moment) -> bool:
        """Whether a generation starts at this moment.

        ``set_timesteps`` makes a new schedule; loops that keep theirs step backwards. Another
        thread may make the same schedule anew, where schedulers without a state are shared.
        """
        if not self.open or moment.step < self.step:
            return True
        if moment.schedule is self.schedule:
            return False
        same = self.held and torch.equal(moment.schedule, self.schedule)
        self.schedule = moment.schedule
        return not same

    def begin(
        self, moment: Moment, shared: dict[Hashable, Any], envelope: Envelope | None
    ) -> None:
        """Forget the generation before; calls that came before the first one stay written down."""
        if self.begun:
            self.records = []
        self.memory = Memory(shared=shared)
        self.text = (None, (None, None))
        self.num_steps, self.schedule = moment.num_steps, moment.schedule
        self.grid, self.stage, self.first = None, "", {}
        self.envelope = envelope
        self.open = self.begun = True

    def enter(self, stage: str, grid: LatentsGrid) -> None:
        """Note where a call is that is understood; free what another transformer left behind."""
        self.grid = grid
        if stage != self.stage:  # Wan 2.2 never comes back to its first transformer
            for old in [key for key in self.memory.states if key[0] != stage]:  # type: ignore[index]
                self.memory.drop(old)
            self.stage = stage

    def end(self) -> None:
        """Free its memory; the next pass starts a generation.

        What a call of another thread is using stays with that call.
        """
        self.memory = Memory(shared=self.memory.shared, peak=self.memory.peak)
        self.text = (None, (None, None))
        self.schedule, self.open = None, False


@dataclass(slots=True)
class Pass:
    """One forward of the transformer.

    Args:
        engine: Whose pass it is.
        run: The run it belongs to; None: another pipeline's.
        moment: When; None: not known.
        reason: Why it stays dense, where it does.
        inside: It began under sparse attention; False: the call belongs to no pass that we saw.
    """

    engine: Any
    run: Run | None
    moment: Moment | None
    reason: str | None = None
    inside: bool = True
