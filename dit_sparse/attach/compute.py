# SPDX-License-Identifier: Apache-2.0
"""Compute one described call: by rule, plan, kernel, and what the method does afterwards.

Where a call has only this process's share of the heads (``HERE.share``), heads are numbered within
it in here, and in the model's way for everybody else: strategy, methods, records.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dit_sparse.attach.envelope import Envelope, regroup, without
from dit_sparse.attach.head_groups import head_index, merge_plans, select_heads
from dit_sparse.attach.head_share import numbered, within
from dit_sparse.attach.probe import dense_lse, probe_rows, recall
from dit_sparse.attach.report import CallRecord, Part
from dit_sparse.core.call import overrides_attend
from dit_sparse.errors import AttachError
from dit_sparse.pipelines.site import HERE

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from dit_sparse.attach.memory import Memory
    from dit_sparse.attach.run import Run
    from dit_sparse.core.call import AttentionCall
    from dit_sparse.core.plan import BlockPlan
    from dit_sparse.kernels.dispatch import Backends
    from dit_sparse.pipelines.site import Site
    from dit_sparse.strategy import Choice, Strategy

    Dense = Callable[[Tensor, Tensor, Tensor], Tensor]


class Planned(NamedTuple):
    """One group of heads that a method planned for.

    Args:
        plan: What to compute.
        part: The call, for all heads of the group.
        method: The method.
        place: Where its memory is: stage, layer, branch, rule.
        kept: Those of its heads that are not dense for a guarantee's sake.
        memory: Of the run.
    """

    plan: BlockPlan
    part: AttentionCall
    method: Any
    place: tuple[str, int, str, int | None]
    kept: tuple[int, ...]
    memory: Memory


class Computation:
    """Takes described calls through strategy, method and kernel."""

    def __init__(self, strategy: Strategy, backends: Backends, probe: int) -> None:
        """See ``SparseEngine``."""
        self.strategy, self.backends, self.probe = strategy, backends, probe
        self.watch: Callable[[AttentionCall, BlockPlan | None, str], None] | None = None
        """Told of every group of heads that a rule governs: the call, its plan (None: dense),
        and the method's name. For looking, not for changing. A head that is dense for a
        guarantee's sake is among the dense ones, and keeps nothing in its own group's plan."""

    def _compute(
        self, run: Run, site: Site, call: AttentionCall, dense: Dense, record: CallRecord
    ) -> Tensor:
        memory, share = run.memory, HERE.share
        groups: Sequence[Choice] = self.strategy.assign(
            layer=call.layer,
            step=call.step,
            num_steps=call.num_steps,
            stage=call.stage,
            num_heads=len(call.heads) if share is None else share.total,
            num_layers=call.num_layers,
        )
        run.first[call.stage] = 0 if share is None else share.first
        if share is not None:
            if self.watch is not None:
                raise AttachError(
                    f"{site.path}: under context parallelism this process has only some of the "
                    "heads, but the profiler and inspect need all of them; run them on one GPU, "
                    "without enable_parallelism"
                )
            groups = within(groups, share.first, len(call.heads))
        groups, gone = self._take_back(run, call, groups, record)
        output = None if len(groups) == 1 else torch.empty_like(call.value)
        planned: list[Planned] = []
        for rule, method, heads in groups:
            plan, kept, place = None, heads, (call.stage, call.layer, call.branch, rule)
            if method is not None or self.watch is not None:
                part = select_heads(call, heads)
            if method is not None:
                part.state = memory.states.setdefault(place, {})
                plan = method.plan(numbered(part), self.backends)
                kept = tuple(h for h in heads if h not in gone)
                if plan is not None and kept != heads:
                    plan = without(plan, heads, gone)
            if self.watch is not None:
                self.watch(part, plan, self._method_name(rule))
            if plan is not None:
                planned.append(Planned(plan, part, method, place, kept, memory))
                continue
            if method is not None:
                _mind(memory, call, place)
            record.parts.append(Part(self._method_name(rule), kept, site.dense_name))
            own = self._dense(call, kept, dense)
            if output is None:
                return own
            output[:, :, head_index(kept, output.device)] = own
        for group, (own, lse) in zip(planned, self._attend(call, planned), strict=True):
            finished = self._finish(group, own, lse, record)
            if output is None:
                output = finished
                continue
            if group.kept != group.part.heads:
                finished = finished[:, :, _places(group)]
            output[:, :, head_index(group.kept, output.device)] = finished
        assert output is not None
        if run.envelope is not None:
            self._hold(run.envelope, site, call, planned, output, dense, record)
        return output

    def _take_back(
        self, run: Run, call: AttentionCall, groups: Sequence[Choice], record: CallRecord
    ) -> tuple[Sequence[Choice], frozenset[int]]:
        """Regroup the heads that are dense for a guarantee's sake, and name them."""
        gone = frozenset[int]() if run.envelope is None else run.envelope.gone(call)
        if not gone:
            return groups, gone
        for rule, method, heads in groups:
            if method is None:
                continue
            record.returned += tuple(head for head in heads if head in gone)
            if gone.issuperset(heads):  # nothing will ask for its memory again
                run.memory.drop((call.stage, call.layer, call.branch, rule))
        return regroup(groups, gone), gone

    def _hold(
        self,
        envelope: Envelope,
        site: Site,
        call: AttentionCall,
        planned: list[Planned],
        output: Tensor,
        dense: Dense,
        record: CallRecord,
    ) -> None:
        """Probe some heads that dropped something; those out of their envelope, compute anew."""
        watched = [
            (group.place[3], self._method_name(group.place[3]), group.kept)
            for group in planned
            if not group.plan.complete
        ]
        broken, record.error = envelope.check(call, output, watched)
        if broken:
            output[:, :, head_index(broken, output.device)] = self._dense(call, broken, dense)
            record.take_back(broken, site.dense_name)

    @staticmethod
    def _dense(call: AttentionCall, heads: tuple[int, ...], dense: Dense) -> Tensor:
        if len(heads) == len(call.heads):
            return dense(call.query, call.key, call.value)
        part = select_heads(call, heads)
        return dense(part.query, part.key, part.value)

    def _attend(
        self, call: AttentionCall, planned: list[Planned]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Compute all groups' plans, in one launch where their blocks are alike."""
        if not planned:
            return
        joint = None
        if not any(overrides_attend(group.method, group.plan) for group in planned):
            joint = merge_plans([(group.plan, group.part.heads) for group in planned])
        if joint is None or len(planned) == 1:
            for group in planned:
                yield group.method.attend(numbered(group.part), group.plan, self.backends)
            return
        plan, heads = joint
        whole = select_heads(call, heads)
        output, lse = self.backends.attend(whole.query, whole.key, whole.value, plan, call.scale)
        for group in planned:
            at = head_index(tuple(map(heads.index, group.part.heads)), output.device)
            yield output[:, :, at], lse[:, at]

    def _finish(self, group: Planned, output: Tensor, lse: Tensor, record: CallRecord) -> Tensor:
        """Let the method finish, write down what ran, and mind its state."""
        call, plan = group.part, group.plan
        kernel = self.backends.last_kernel or "?"
        part = Part(self._method_name(group.place[3]), call.heads, kernel, _of_each_head(plan))
        if self.probe and plan.kv_log_weight is None and not plan.means:
            part.recall = self._recall(call, lse)
        gone = tuple(head for head in call.heads if head not in group.kept)
        record.parts.append(part.without(gone) if gone else part)
        finished: Tensor = group.method.finish(numbered(call), output, lse, self.backends)
        _mind(group.memory, call, group.place)
        return finished

    def _method_name(self, rule: int | None) -> str:
        return "dense" if rule is None else self.strategy.rules[rule].method

    def _recall(self, call: AttentionCall, lse: Tensor) -> Tensor:
        seed = call.layer * 100_003 + call.step
        rows = probe_rows(call.query.shape[1], self.probe, seed)
        start = call.grid.text_start
        full = dense_lse(call.query, call.key, rows, call.scale, start, call.text_valid)
        return recall(lse, full, rows)


def _of_each_head(plan: BlockPlan) -> Tensor:
    """Give the density of each head, the mean over samples, ``[heads]``."""
    return plan.once("density of heads", lambda: plan.density().mean(0))


def _mind(memory: Memory, call: AttentionCall, place: Hashable) -> None:
    """Measure what a method remembers; free it where nothing will ask for it again."""
    memory.note(place)
    if call.step == call.num_steps - 1:
        memory.drop(place)


def _places(group: Planned) -> slice | Tensor:
    """Index a group's kept heads within the group."""
    places = tuple(map(group.part.heads.index, group.kept))
    return head_index(places, group.part.query.device)
