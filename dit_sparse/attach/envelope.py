# SPDX-License-Identifier: Apache-2.0
"""Watch heads during a generation, and name those that must go back to dense.

A place is one layer of one stage in one guidance branch: each has its own account. Which heads
and rows are probed follows from a seed alone, so a generation is the same each time; nothing is
drawn from torch's own generators, and a probe only reads.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch

from dit_sparse.attach.head_groups import head_index
from dit_sparse.attach.probe import dense_output, relative_error, spread_rows
from dit_sparse.strategy import Choice

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from torch import Tensor

    from dit_sparse.attach.guarantee import Guarantee
    from dit_sparse.core.call import AttentionCall
    from dit_sparse.core.plan import BlockPlan

    Watched = Sequence[tuple[Hashable, str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Return:
    """One head that went back to dense.

    Args:
        stage: Where: the transformer.
        layer: The layer.
        branch: The guidance branch.
        head: The head.
        step: Step at which it left its envelope; that call was computed anew, dense.
        method: What it ran until then.
        error: The estimate that was too large.
        spread: Its standard error.
    """

    stage: str
    layer: int
    branch: str
    head: int
    step: int
    method: str
    error: float
    spread: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; None where an output was not finite."""
        found = {name: getattr(self, name) for name in self.__slots__}
        for name in ("error", "spread"):
            found[name] = found[name] if math.isfinite(found[name]) else None
        return found


@dataclass(slots=True)
class _Place:
    """The account of one layer in one guidance branch."""

    random: torch.Generator
    gone: frozenset[int] = frozenset()
    seen: set[tuple[Hashable, int]] = field(default_factory=set)  # (rule, head) probed once
    order: deque[int] = field(default_factory=deque)  # whose turn it is, the next first
    credit: int = 0  # head calls that no probe has answered for yet

    def turn(self, watched: Watched, every: int) -> tuple[int, ...]:
        """Choose the heads to probe in this call, ascending."""
        chosen: set[int] = set()
        waiting: set[int] = set()
        for rule, _, heads in watched:
            for head in heads:
                (waiting if (rule, head) in self.seen else chosen).add(head)
                self.seen.add((rule, head))
        everybody = sorted(waiting)
        self.credit += len(everybody)
        while self.credit >= every and waiting:
            if not self.order:
                shuffled = torch.randperm(len(everybody), generator=self.random).tolist()
                self.order.extend(everybody[i] for i in shuffled)
            if (head := self.order.popleft()) in waiting:
                waiting.remove(head)
                chosen.add(head)
                self.credit -= every
        return tuple(sorted(chosen))


class Envelope:
    """Keeps one attachment's guarantee.

    Args:
        guarantee: What was asked for.
        limit: Its limit as a number.
    """

    def __init__(self, guarantee: Guarantee, limit: float) -> None:
        self.guarantee, self.limit = guarantee, limit
        self.reset()

    def reset(self) -> None:
        """Start anew: a generation begins, and every head may be sparse again."""
        self._places: dict[tuple[str, int, str], _Place] = {}
        self.returns: list[Return] = []
        self.probes = 0
        self.worst: float | None = None

    def gone(self, call: AttentionCall) -> frozenset[int]:
        """Name the heads that are dense at this place for the rest of the generation."""
        return self._place(call).gone

    def check(
        self, call: AttentionCall, output: Tensor, watched: Watched
    ) -> tuple[tuple[int, ...], float | None]:
        """Probe the heads whose turn it is; on a GPU this waits for the call, by one small read.

        Args:
            call: All heads of the call.
            output: What the model is about to get, like ``call.query``.
            watched: Rule, method and heads of each group that dropped something.

        Returns:
            The heads that left their envelope, ascending, now written off, and the largest error
            seen (None: nothing was probed).
        """
        place = self._place(call)
        heads = place.turn(watched, self.guarantee.every)
        if not heads:
            return (), None
        rows = spread_rows(call.query.shape[1], self.guarantee.rows, place.random)
        found = probe(call, output, rows, heads)
        self.probes += len(heads)
        method_of = {head: method for _, method, own in watched for head in own}
        broken = []
        for head, (error, spread) in zip(heads, found, strict=True):
            if error <= self.limit:
                self.worst = max(error, self.worst or 0.0)
                continue
            broken.append(head)  # nan too
            self.returns.append(
                Return(
                    call.stage,
                    call.layer,
                    call.branch,
                    head,
                    call.step,
                    method_of[head],
                    error,
                    spread,
                )
            )
        place.gone = place.gone.union(broken)
        errors = [error for error, _ in found]
        return tuple(broken), math.nan if any(map(math.isnan, errors)) else max(errors)

    def as_dict(self) -> dict[str, Any]:
        """Give what a report says of the guarantee."""
        return {
            "limit": self.limit,
            "from": self.guarantee.limit if isinstance(self.guarantee.limit, str) else "given",
            "rows": self.guarantee.rows,
            "every": self.guarantee.every,
            "probes": self.probes,
            "heads": len({(id(p), head) for p in self._places.values() for _, head in p.seen}),
            "worst_kept": self.worst,
            "returned": [each.as_dict() for each in self.returns],
        }

    def _place(self, call: AttentionCall) -> _Place:
        key = (call.stage, call.layer, call.branch)
        found = self._places.get(key)
        if found is None:
            # Not the seed of any method's own draw: judging on the rows that a method chose by
            # would flatter it.
            name = f"guarantee {self.guarantee.seed} {call.stage} {call.layer} {call.branch}"
            random = torch.Generator().manual_seed(crc32(name.encode()))
            found = self._places[key] = _Place(random)
        return found


def probe(
    call: AttentionCall, output: Tensor, rows: Tensor, heads: tuple[int, ...]
) -> list[tuple[float, float]]:
    """Estimate the error of some heads; of the samples in the batch the worst counts.

    Args:
        call: All heads of the call.
        output: Its final output, ``[batch, seq_len, heads, head_dim]``.
        rows: Rows to compare, int64 ``[count]``.
        heads: Which heads.

    Returns:
        Error and standard error of each, see ``probe.relative_error``. One device read.
    """
    text = (call.grid.text_start, call.text_valid)
    device = call.query.device
    rows = rows.to(device, non_blocking=True)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        q, k, v, o = _narrow(heads, call.query, call.key, call.value, output)
        exact = dense_output(q, k, v, rows, call.scale, *text)
        error, spread = relative_error(o, exact, rows, *text)
        worst = error.max(0)  # nan is the largest
        both = torch.stack([worst.values, spread.gather(0, worst.indices[None])[0]]).tolist()
    return list(zip(*both, strict=True))


def _narrow(heads: tuple[int, ...], *tensors: Tensor) -> list[Tensor]:
    """Take some heads; neighbours as a view, without a wait for the device either way."""
    at = head_index(heads, tensors[0].device)
    return [x[:, :, at] if isinstance(at, slice) else x.index_select(2, at) for x in tensors]


def regroup(groups: Sequence[Choice], gone: frozenset[int]) -> list[Choice]:
    """Put the heads that went back to dense to those that are dense anyway, first of all.

    The other groups keep all their heads' numbers, as a method's memory is for all of them; a
    group all of whose heads went back is left out.
    """
    if not gone:
        return list(groups)
    dense = [each for each in groups if each.method is None]
    sparse = [each for each in groups if each.method is not None]
    heads = gone.intersection(head for each in groups for head in each.heads)
    heads = heads.union(head for each in dense for head in each.heads)
    rule = dense[0].rule if dense else None
    return [
        Choice(rule, None, tuple(sorted(heads))),
        *(each for each in sparse if not gone.issuperset(each.heads)),
    ]


def without(plan: BlockPlan, heads: tuple[int, ...], gone: Iterable[int]) -> BlockPlan:
    """Let some heads of a plan keep nothing, so that no kernel computes them.

    Their output is 0, and their LSE -inf, by the kernel contract; a method's ``finish`` sees them
    so. With ``means`` they still read the mean of every block, which nobody uses. A complete plan
    stays as it is: methods remember what it gives, for all heads.

    Args:
        plan: For ``heads``.
        heads: The heads that the plan is for, in the model's numbers.
        gone: Those that went back to dense.
    """
    places = [i for i, head in enumerate(heads) if head in gone]
    if plan.complete or not places:
        return plan
    batch, _, blocks = plan.kv_num_blocks.shape
    counts = plan.kv_num_blocks.expand(batch, len(heads), blocks).clone()
    for place in places:  # a list as an index would be copied to the device, which waits
        counts[:, place] = 0
    wide = (-1, len(heads), -1, -1)
    return replace(
        plan,
        kv_num_blocks=counts,
        kv_indices=plan.kv_indices.expand(wide),
        partial=None if plan.partial is None else plan.partial.expand(wide),
    )
