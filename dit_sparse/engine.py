# SPDX-License-Identifier: Apache-2.0
"""The engine of one attachment: takes each attention call through strategy, method and kernel.

For every call it reads the clock, checks that geometry and mask are understood, asks the strategy
which heads use which method, lets each method plan, a kernel compute, the method finish, and
writes a record. What it does not understand stays dense, and the record says why.

Where a call has only this process's share of the heads (``HERE.share``), heads are numbered within
it in here, and in the model's way for everybody else: strategy, methods, records.

Past 300 lines, as it is one call's way from end to end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dit_sparse.call import AttentionCall, overrides_attend
from dit_sparse.envelope import Envelope, regroup, without
from dit_sparse.errors import AttachError, GeometryError
from dit_sparse.head_groups import head_index, merge_plans, select_heads
from dit_sparse.head_share import numbered, renumber, within
from dit_sparse.memory import Memory
from dit_sparse.nbytes import nbytes
from dit_sparse.pipelines import masks
from dit_sparse.pipelines.site import HERE
from dit_sparse.plan import BlockPlan
from dit_sparse.probe import dense_lse, probe_rows, recall
from dit_sparse.report import CallRecord, Part, Report, Stopwatch
from dit_sparse.strategy import Choice

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from dit_sparse.backends import Backends
    from dit_sparse.grid import LatentsGrid
    from dit_sparse.guarantee import Guarantee
    from dit_sparse.pipelines.clock import Clock, Moment
    from dit_sparse.pipelines.family import Family, Shape
    from dit_sparse.pipelines.site import Site
    from dit_sparse.strategy import Strategy

    Dense = Callable[[Tensor, Tensor, Tensor], Tensor]
    # Valid text tokens of each sample, and the order that puts them first; None: as it is.
    Text = tuple[Tensor | None, Tensor | None]

GRIDS = 4  # geometries whose plans are kept; beyond it all are dropped when a generation starts


class Decline(Exception):  # noqa: N818  (not an error: this call stays dense)
    """Why one call cannot be sparse."""


@dataclass(slots=True)
class Stage:
    """One transformer of the pipeline."""

    name: str
    family: Family
    num_layers: int


class Planned(NamedTuple):
    """One group of heads that a method planned for.

    Args:
        plan: What to compute.
        part: The call, for all heads of the group.
        method: The method.
        place: Where its memory is: stage, layer, branch, rule.
        kept: Those of its heads that are not dense for a guarantee's sake.
    """

    plan: BlockPlan
    part: AttentionCall
    method: Any
    place: tuple[str, int, str, int | None]
    kept: tuple[int, ...]


class SparseEngine:
    """Computes the attention calls of one attached pipeline (or bare transformer)."""

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
        self.strategy, self.backends, self.clock = strategy, backends, clock
        self.stages, self.strict, self.probe = stages, strict, probe
        self.envelope = (
            None if guarantee is None else Envelope(guarantee, guarantee.bound(strategy))
        )
        self.memory = Memory()
        self.records: list[CallRecord] = []
        self.num_steps = 0
        self.attached_at: int | None = None
        self.watch: Callable[[AttentionCall, BlockPlan | None, str], None] | None = None
        """Told of every group of heads that a rule governs: the call, its plan (None: dense),
        and the method's name. For looking, not for changing. A head that is dense for a
        guarantee's sake is among the dense ones, and keeps nothing in its own group's plan."""
        self._grid: LatentsGrid | None = None
        self._stage = ""
        self._first: dict[str, int] = {}  # of the heads that this process computes, by stage
        self._running = False
        self._text: tuple[Any, Text] = (None, (None, None))
        self._order: Tensor | None = None

    # Two of Listener's three members; adopt() is the handle's, which knows the modules.
    def end_generation(self) -> None:
        """Free the generation's memory; its records stay until the next one starts."""
        self.memory.free_generation()
        self.clock.forget()
        self._text = (None, (None, None))
        self._order = None
        self._running = False

    def _begin_generation(self, moment: Moment) -> None:
        self.memory.free_generation()
        self.memory.peak = 0
        if self.envelope is not None:
            self.envelope.reset()
        if len(self.memory.grids) > GRIDS:
            self.memory.grids.clear()
            self.memory.shared.clear()
        self.records = []
        self.num_steps = moment.num_steps
        # The schedule is the one that stood when we were attached: we came in its middle.
        self.attached_at = moment.step if moment.step > 0 and not moment.new else None
        self._running = True

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
        watch = Stopwatch(query.device)
        heads = tuple(range(query.shape[2]))
        record = CallRecord(site.stage, site.layer, -1, "", [], watch)
        try:
            call = self._describe(site, query, key, value, mask, shape, scale, record)
        except Decline as decline:
            if self.strict:
                raise GeometryError(
                    f"{site.path}: {decline}; strict=True forbids to stay dense"
                ) from None
            record.reason = str(decline)
            record.parts.append(Part("dense", heads, self._dense_name(site)))
            output = dense(query, key, value)
        else:
            output = self._in_order(site, call, dense, record)
        watch.stop()
        if HERE.share is not None:
            renumber(record, HERE.share.first)
        self.records.append(record)
        return output

    def _describe(
        self,
        site: Site,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        shape: Shape | None,
        scale: float | None,
        record: CallRecord,
    ) -> AttentionCall:
        """Gather what a method may know, or raise ``Decline``."""
        stage = self.stages[site.stage]
        try:
            moment = self.clock.read()
        except LookupError as error:
            raise Decline(str(error)) from error
        if moment.new or not self._running:
            self._begin_generation(moment)
        branch = self._branch(site, stage, moment, query.shape[0])
        record.step, record.branch = moment.step, branch
        if HERE.declined is not None:
            raise Decline(HERE.declined)
        if shape is None:
            raise Decline(HERE.unplaced)
        if min(query.shape) < 1 or min(shape[:3]) < 1:
            raise Decline(f"nothing to attend to: query {tuple(query.shape)}, grid {shape}")
        grid = stage.family.grid(shape, query.shape[1])
        if grid.tokens != query.shape[1]:
            raise Decline(
                f"the latents are {grid} = {grid.tokens} tokens, attention has {query.shape[1]} "
                "(reference images, history frames or a cache that drops tokens)"
            )
        if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
            raise Decline("gradients are asked for; run under torch.no_grad()")
        self._grid = grid
        self.memory.grids.add(grid)
        if site.stage != self._stage:  # Wan 2.2 never comes back to its first transformer
            for old in [k for k in self.memory.states if k[0] != site.stage]:  # type: ignore[index]
                self.memory.drop(old)
            self._stage = site.stage
        valid, self._order = self._text_valid(mask, grid, stage, record, query.shape[0])
        return AttentionCall(
            query,
            key,
            value,
            grid,
            query.shape[-1] ** -0.5 if scale is None else scale,
            text_valid=valid,
            layer=site.layer,
            num_layers=stage.num_layers,
            heads=tuple(range(query.shape[2])),
            step=moment.step,
            num_steps=moment.num_steps,
            stage=site.stage,
            branch=record.branch,
            shared=self.memory.shared,
        )

    def _branch(self, site: Site, stage: Stage, moment: Moment, batch: int) -> str:
        """Name the guidance branch: as told, else by counting this layer's passes in the step."""
        told = "both" if moment.branch is None and stage.family.batched_cfg else moment.branch
        if told is not None and not stage.family.per_sample:
            full = self.memory.batches.setdefault((site.stage, told), batch)
            # FasterCache leaves the unconditional half of the batch out in some steps.
            return "cond" if told == "both" and 2 * batch == full else told
        place = (site.stage, site.layer, told)
        step, count = self.memory.passes.get(place, (-1, 0))
        count = count + 1 if step == moment.step else 0
        self.memory.passes[place] = (moment.step, count)
        if told is not None:
            return f"{told}, sample {count}"
        names = ("cond", "uncond")  # two-pass pipelines run the conditional pass first
        return names[count] if count < len(names) else f"pass{count}"

    def _text_valid(
        self,
        mask: Tensor | None,
        grid: LatentsGrid,
        stage: Stage,
        record: CallRecord,
        batch: int,
    ) -> Text:
        """Read from a text-padding mask how many text tokens are valid, and how to order them."""
        if mask is None:
            return None, None
        if self._text[0] is mask:  # the same object in every layer of a pass
            return self._text[1]
        row = masks.video_row(mask, grid, batch)
        if not stage.family.text_padding or row is None:
            raise Decline(
                f"an attention mask {mask.dtype} {tuple(mask.shape)} that is not "
                f"{stage.family.name}'s text padding"
            )
        valid = row[:, grid.text_start : grid.text_start + grid.text_length].sum(-1)
        seen = (record.stage, record.branch)
        if seen not in self.memory.masks_checked:  # one device read per generation and branch
            if not masks.only_padding(mask, row, grid):
                raise Decline("an attention mask that hides more than the padding of the text")
            self.memory.masks_checked[seen] = masks.at_the_end(row, grid)
        order = None if self.memory.masks_checked[seen] else masks.valid_first(row, grid)
        result = (valid, order) if grid.text_length else (None, None)
        if mask.shape[2] == 1:  # one of [tokens, tokens] is big, and made anew in every layer
            self._text = (mask, result)
        return result

    def _in_order(
        self, site: Site, call: AttentionCall, dense: Dense, record: CallRecord
    ) -> Tensor:
        """Put valid text before padded text where it does not stand so, run, and put it back."""
        order = self._order
        if order is None:
            return self._run(site, call, dense, record)

        def dense_in_order(*given: Tensor) -> Tensor:  # the model's mask knows its own order
            own = (masks.back(each, order) for each in given)
            return masks.take(dense(*own), order)

        query, key, value = (masks.take(x, order) for x in (call.query, call.key, call.value))
        moved = replace(call, query=query, key=key, value=value)
        return masks.back(self._run(site, moved, dense_in_order, record), order)

    def _run(self, site: Site, call: AttentionCall, dense: Dense, record: CallRecord) -> Tensor:
        share = HERE.share
        groups: Sequence[Choice] = self.strategy.assign(
            layer=call.layer,
            step=call.step,
            num_steps=call.num_steps,
            stage=call.stage,
            num_heads=len(call.heads) if share is None else share.total,
            num_layers=call.num_layers,
        )
        self._first[call.stage] = 0 if share is None else share.first
        if share is not None:
            if self.watch is not None:
                raise AttachError(
                    f"{site.path}: context parallelism gives this process a part of the heads, "
                    "and the profiler and inspect look at all of them: do so on one GPU, on a "
                    "model without enable_parallelism"
                )
            groups = within(groups, share.first, len(call.heads))
        groups, gone = self._take_back(call, groups, record)
        output = None if len(groups) == 1 else torch.empty_like(call.value)
        planned: list[Planned] = []
        for rule, method, heads in groups:
            part = select_heads(call, heads)
            plan = None
            place = (call.stage, call.layer, call.branch, rule)
            if method is not None:
                part.state = self.memory.states.setdefault(place, {})
                plan = method.plan(numbered(part), self.backends)
            kept = heads if method is None else tuple(h for h in heads if h not in gone)
            if plan is not None and kept != heads:
                plan = without(plan, heads, gone)
            if self.watch is not None:
                self.watch(part, plan, self._method_name(rule))
            if plan is not None:
                planned.append(Planned(plan, part, method, place, kept))
                continue
            if method is not None:
                self._mind(call, place)
            record.parts.append(Part(self._method_name(rule), kept, self._dense_name(site)))
            own = self._dense(call, kept, dense)
            if output is None:
                return own
            output[:, :, head_index(kept)] = own
        for group, (own, lse) in zip(planned, self._attend(call, planned), strict=True):
            finished = self._finish(group, own, lse, record)
            if output is None:
                output = finished
            elif group.kept == group.part.heads:
                output[:, :, head_index(group.kept)] = finished
            else:
                output[:, :, head_index(group.kept)] = finished[:, :, _places(group)]
        assert output is not None
        if self.envelope is not None:
            self._hold(self.envelope, site, call, planned, output, dense, record)
        return output

    def _take_back(
        self, call: AttentionCall, groups: Sequence[Choice], record: CallRecord
    ) -> tuple[Sequence[Choice], frozenset[int]]:
        """Regroup the heads that are dense for a guarantee's sake, and name them."""
        gone = frozenset[int]() if self.envelope is None else self.envelope.gone(call)
        if not gone:
            return groups, gone
        for rule, method, heads in groups:
            if method is None:
                continue
            record.returned += tuple(head for head in heads if head in gone)
            if gone.issuperset(heads):  # nothing will ask for its memory again
                self.memory.drop((call.stage, call.layer, call.branch, rule))
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
            output[:, :, head_index(broken)] = self._dense(call, broken, dense)
            record.take_back(broken, self._dense_name(site))

    @staticmethod
    def _dense(call: AttentionCall, heads: tuple[int, ...], dense: Dense) -> Tensor:
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
            at = head_index(tuple(heads.index(head) for head in group.part.heads))
            yield output[:, :, at], lse[:, at]

    def _finish(self, group: Planned, output: Tensor, lse: Tensor, record: CallRecord) -> Tensor:
        """Let the method finish, write down what ran, and mind its state."""
        call, plan = group.part, group.plan
        kernel = self.backends.last_kernel or "?"
        part = Part(self._method_name(group.place[3]), call.heads, kernel, plan.density().mean(0))
        if self.probe and plan.kv_log_weight is None:
            part.recall = self._recall(call, lse)
        gone = tuple(head for head in call.heads if head not in group.kept)
        record.parts.append(part.without(gone) if gone else part)
        finished: Tensor = group.method.finish(numbered(call), output, lse, self.backends)
        self._mind(call, group.place)
        return finished

    def _mind(self, call: AttentionCall, place: Hashable) -> None:
        """Measure what a method remembers; free it where nothing will ask for it again."""
        self.memory.note(place)
        if call.step == call.num_steps - 1:
            self.memory.drop(place)

    def _method_name(self, rule: int | None) -> str:
        return "dense" if rule is None else self.strategy.rules[rule].method

    def _recall(self, call: AttentionCall, lse: Tensor) -> Tensor:
        seed = call.layer * 100_003 + call.step
        rows = probe_rows(call.query.shape[1], self.probe, seed)
        start = call.grid.text_start
        full = dense_lse(call.query, call.key, rows, call.scale, start, call.text_valid)
        return recall(lse, full, rows)

    @staticmethod
    def _dense_name(site: Site) -> str:
        backend = getattr(site.processor, "_attention_backend", None)
        return "model's own" if backend is None else f"model's own ({backend})"

    def report(self) -> Report:
        """Make the report of the newest generation (reads the device)."""
        guarantee = None if self.envelope is None else self.envelope.as_dict()
        for each in () if guarantee is None else guarantee["returned"]:
            each["head"] += self._first.get(each["stage"], 0)
        return Report(
            strategy=self.strategy.name,
            grid=str(self._grid) if self._grid is not None else "",
            num_steps=self.num_steps,
            rows=[record.row() for record in self.records],
            state_bytes=self.state_size(),
            peak_state_bytes=self.memory.peak + nbytes(self.memory.shared),
            attached_at=self.attached_at,
            guarantee=guarantee,
        )

    def state_size(self) -> int:
        """Bytes held now: per-call state and plans shared by all calls."""
        return nbytes(self.memory.states) + nbytes(self.memory.shared)


def _places(group: Planned) -> slice | list[int]:
    """Index a group's kept heads within the group."""
    return head_index(tuple(group.part.heads.index(head) for head in group.kept))
