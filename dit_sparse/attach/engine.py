# SPDX-License-Identifier: Apache-2.0
"""The engine of one attachment: finds each call's run, describes it, and has it computed.

For every pass of the transformer it finds the run that the pass belongs to and reads the clock.
A call that is not understood stays dense, and its record says why.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from dit_sparse.attach.compute import Computation
from dit_sparse.attach.describe import Decline, Stage, describe
from dit_sparse.attach.envelope import Envelope
from dit_sparse.attach.head_share import renumber
from dit_sparse.attach.idle import remarks
from dit_sparse.attach.report import CallRecord, Others, Part, Report, Stopwatch
from dit_sparse.attach.run import Pass, Run
from dit_sparse.core.sizes import nbytes
from dit_sparse.errors import GeometryError
from dit_sparse.pipelines import masks
from dit_sparse.pipelines.caller import find_caller
from dit_sparse.pipelines.clock import Moment
from dit_sparse.pipelines.site import HERE

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from dit_sparse.attach.guarantee import Guarantee
    from dit_sparse.attach.memory import Memory
    from dit_sparse.core.call import AttentionCall
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.kernels.dispatch import Backends
    from dit_sparse.pipelines.caller import Caller
    from dit_sparse.pipelines.clock import Clock
    from dit_sparse.pipelines.family import Shape
    from dit_sparse.pipelines.site import Site
    from dit_sparse.strategy import Strategy

    Dense = Callable[[Tensor, Tensor, Tensor], Tensor]

GRIDS = 4  # geometries whose plans are kept; beyond it all are dropped when a generation starts
_NUMBERS = itertools.count()


class SparseEngine(Computation):
    """Computes the attention calls of one attached pipeline (or bare transformer)."""

    LOCAL: ClassVar[type] = threading.local
    """Holds the run of a custom sampling loop, one per thread."""

    def __init__(
        self,
        strategy: Strategy,
        backends: Backends,
        clock: Clock,
        stages: dict[str, Stage],
        *,
        strict: bool = False,
        probe: int = 0,
        guarantee: Guarantee | None = None,
    ) -> None:
        """Build an engine that is not attached to anything yet.

        Args:
            strategy: Which method where.
            backends: Which kernel computes.
            clock: Tells the step.
            stages: The transformers by name.
            strict: Raise where a call would stay dense because it is not understood.
            probe: Query rows per call on which recall is measured, >= 0; costs as much as
                that many dense rows.
            guarantee: What every head's error must keep to; a head that does not goes back to
                dense. Errors of the guarantee itself are raised here.
        """
        super().__init__(strategy, backends, probe)
        self.clock, self.stages, self.strict = clock, stages, strict
        self.guarantee = guarantee
        self.remarks = True
        """Whether to warn where the strategy had no effect in a run."""
        self._limit = 0.0 if guarantee is None else guarantee.bound(strategy)
        self.run = Run(self._envelope())
        """The newest one: what a report is about."""
        self.others = Others()
        self._shared: dict[Hashable, Any] = {}
        self._grids: set[LatentsGrid] = set()
        self._local = self.LOCAL()
        self._name = f"dit_sparse run {next(_NUMBERS)}"  # of a run within its caller's scope
        self._schedule: Any = None  # the one that stood when we were attached
        self._said: set[str] = set()

    @property
    def memory(self) -> Memory:
        """What the newest run remembers."""
        return self.run.memory

    @property
    def records(self) -> list[CallRecord]:
        """What the newest run did."""
        return self.run.records

    @property
    def num_steps(self) -> int:
        """Steps of the newest run."""
        return self.run.num_steps

    @property
    def envelope(self) -> Envelope | None:
        """How the newest run keeps its guarantee, where there is one."""
        return self.run.envelope

    def set_step(self, step: int | None, num_steps: int, branch: str) -> None:
        """Set the step of this thread's passes by hand; None: it is not known."""
        self._local.moment = None if step is None else Moment(step, num_steps, branch)

    def find_caller(self) -> Caller | None:
        """Find the pipeline that runs the transformer now."""
        return find_caller(self.clock.pipe)

    # Listener's members, but adopt(), which is the handle's: it knows the modules.
    def begin_pass(self, timestep: Any) -> Pass:
        """Say which run a pass of the transformer belongs to, and when it is."""
        caller = self.find_caller()
        if (reason := self.clock.foreign(caller)) is not None:
            return Pass(self, None, None, reason)
        run = self._run_of(caller)
        moment: Moment | None = getattr(self._local, "moment", None)
        if moment is None:
            told = HERE.told[1] if HERE.told is not None and HERE.told[0] is self else {}
            try:
                moment = self.clock.read(caller, timestep, told)
            except LookupError as error:
                return Pass(self, run, None, str(error))
        if run.starts(moment):
            self._begin(run, moment)
        run.step = moment.step
        return Pass(self, run, moment)

    def end_generation(self) -> None:
        """Free the memory of the run that is under way here; its records stay."""
        caller = self.find_caller()
        if self.clock.foreign(caller) is None:
            run = self._run_of(caller)
            self._remark(run)
            run.end()

    def _envelope(self) -> Envelope | None:
        return None if self.guarantee is None else Envelope(self.guarantee, self._limit)

    def _run_of(self, caller: Caller | None) -> Run:
        """Find the run of this caller, or make it."""
        scope = vars(self._local) if caller is None else caller.scope
        run: Run | None = scope.get(self._name)
        if run is None:
            run = scope[self._name] = self.run = Run(self._envelope(), held=caller is not None)
        return run

    def _begin(self, run: Run, moment: Moment) -> None:
        if len(self._grids) > GRIDS:
            self._grids, self._shared = set(), {}
        run.begin(moment, self._shared, self._envelope())
        late = moment.step > 0 and moment.schedule is not None
        run.attached_at = moment.step if late and moment.schedule is self._schedule else None
        self._schedule = None
        self.run = run

    def _remark(self, run: Run) -> None:
        """Warn, once each, of what had no effect in a run."""
        ended = run.begun and not run.open
        if not self.remarks or ended or run.late or run.attached_at is not None:
            return
        for remark in remarks(run, self.strategy, over=run.step == run.num_steps - 1):
            if remark not in self._said:
                self._said.add(remark)
                warnings.warn(f"sparse attention {self.strategy.name!r} {remark}", stacklevel=3)

    def attention(
        self,
        site: Site,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        shape: Shape | None,
        scale: float | None,
        dense: Dense,
    ) -> Tensor:
        """Compute one call; see ``pipelines.site.Engine``."""
        now: Pass | None = HERE.passing
        if now is None or now.engine is not self:
            now = self._between(shape)
        run = now.run
        if run is None:
            self.others.add(now.reason or "")
            return dense(query, key, value)
        watch = Stopwatch(query.device)
        record = CallRecord(site.stage, site.layer, -1, "", [], watch)
        try:
            call, order = self._describe(
                now, run, site, query, key, value, mask, shape, scale, record
            )
        except Decline as decline:
            if self.strict and now.inside:
                raise GeometryError(
                    f"{site.path}: {decline}; strict=True forbids dense fallback"
                ) from None
            record.reason = str(decline)
            heads = tuple(range(query.shape[2]))
            record.parts.append(Part("dense", heads, site.dense_name))
            output = dense(query, key, value)
        else:
            self._grids.add(call.grid)
            output = self._in_order(run, site, call, order, dense, record)
        watch.stop()
        if HERE.share is not None:
            renumber(record, HERE.share.first)
        run.records.append(record)
        if (
            record.step == run.num_steps - 1
            and self.stages[site.stage].num_layers == site.layer + 1
        ):
            self._remark(run)  # not every model's pipeline says that a run is over
        return output

    def _between(self, shape: Shape | None) -> Pass:
        """Say when a call is that belongs to no pass we saw begin."""
        if shape is not None or hasattr(self._local, "moment"):
            return self.begin_pass(None)
        run = self._run_of(self.find_caller())
        run.late = True
        return Pass(
            self,
            run,
            None,
            "sparse attention was enabled during this pass, or the layer was called outside a "
            "pass",
            inside=False,
        )

    def _describe(self, now: Pass, run: Run, site: Site, *given: Any) -> Any:
        return describe(now, run, self.stages[site.stage], site, *given)

    def _in_order(
        self,
        run: Run,
        site: Site,
        call: AttentionCall,
        order: Tensor | None,
        dense: Dense,
        record: CallRecord,
    ) -> Tensor:
        """Put valid text before padded text where it does not stand so, run, and put it back."""
        if order is None:
            return self._compute(run, site, call, dense, record)

        def dense_in_order(*given: Tensor) -> Tensor:  # the model's mask knows its own order
            own = (masks.back(each, order) for each in given)
            return masks.take(dense(*own), order)

        query, key, value = (masks.take(x, order) for x in (call.query, call.key, call.value))
        moved = replace(call, query=query, key=key, value=value)
        return masks.back(self._compute(run, site, moved, dense_in_order, record), order)

    def report(self) -> Report:
        """Make the report of the newest generation (reads the device)."""
        run = self.run
        guarantee = None if run.envelope is None else run.envelope.as_dict()
        for each in () if guarantee is None else guarantee["returned"]:
            each["head"] += run.first.get(each["stage"], 0)
        return Report(
            strategy=self.strategy.name,
            grid="" if run.grid is None else str(run.grid),
            num_steps=run.num_steps,
            rows=[record.row() for record in run.records],
            state_bytes=self.state_size(),
            peak_state_bytes=run.memory.peak + nbytes(run.memory.shared),
            attached_at=run.attached_at,
            guarantee=guarantee,
            others=self.others.as_dict(),
            native_missing=self.backends.native_missing,
        )

    def state_size(self) -> int:
        """Bytes held now: per-call state and plans shared by all calls."""
        return nbytes(self.memory.states) + nbytes(self._shared)
