# SPDX-License-Identifier: Apache-2.0
"""Measure candidates on one captured attention call, head by head.

The dense result is computed once, by the same kernel on a plan that keeps everything; each
candidate then plans, attends and finishes as in a generation, on a sample of its rows if that is
asked for (``sampling.py``). Nothing of S x S elements is made: beyond query, key and value a call
takes ``memory_bound`` bytes, what the kernel and a method's own planning take, and what candidates
remember (``Meter.state_bytes``, which ``state_limit`` bounds).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.core.sizes import nbytes
from dit_sparse.profiler.candidates import block_for
from dit_sparse.profiler.errors import ProfileError
from dit_sparse.profiler.sampling import Rows, block_of_token, block_sums, draw
from dit_sparse.profiler.shared import SharedOps

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from torch import Tensor

    from dit_sparse.core.call import AttentionCall, Method
    from dit_sparse.profiler.candidates import Candidate

STATE_LIMIT = 8 * 2**30  # bytes
_SCRATCH = 8 * 2**20  # bytes of fp32 differences at a time
DENSE_BLOCK = 128


@dataclass(frozen=True)
class Measured:
    """What one candidate did on one call; every list has one number per head.

    Args:
        candidate: Its name.
        error: Relative L2 error of the output before the output projection,
            ||O - O_dense|| / ||O_dense|| over batch, tokens and head_dim; 0 where dense. On a
            sample of rows ``error ** 2`` is the estimate without bias, and may exceed the truth.
        doubt: Standard error of ``error ** 2`` from sampling rows; 0 where all were compared.
        recall: Kept share of the dense softmax mass, mean over samples and (drawn) queries; None
            where the plan weighs keys (pooled ones), so that its LSE does not tell.
        density: Kept share of (query, key) pairs.
        computed: Share of pairs that a block-wise kernel computes, see ``computed_share``.
        ordered: The plan permutes tokens.
        partial: Share of the kept blocks that a bit tile cuts.
        searched: This call kept everything, to search or to refresh.
    """

    candidate: str
    error: list[float]
    doubt: list[float]
    recall: list[float] | None
    density: list[float]
    computed: list[float]
    ordered: bool
    partial: float
    searched: bool


@dataclass
class Meter:
    """Measures calls of one generation; what methods remember is kept per (site, candidate).

    Args:
        candidates: What to measure.
        ops: The kernels.
        state_limit: Most bytes that candidates may remember at once.
        sample: Rows of blocks that are compared, of the grid's usual block size; None: all.
    """

    candidates: Sequence[Candidate]
    ops: SharedOps = field(default_factory=SharedOps)
    state_limit: int = STATE_LIMIT
    sample: int | None = None
    states: dict[Hashable, dict[str, Any]] = field(default_factory=dict)
    shared: dict[Hashable, Any] = field(default_factory=dict)
    _sizes: dict[tuple[str, ...], int] = field(default_factory=dict)

    @property
    def state_bytes(self) -> int:
        """Bytes that candidates remember now."""
        return sum(self._sizes.values())

    def remembered(self) -> dict[str, int]:
        """Count the bytes that each candidate remembers now."""
        found: dict[str, int] = {}
        for (*_, name), size in self._sizes.items():
            found[name] = found.get(name, 0) + size
        return found

    def forget(self) -> None:
        """Drop what candidates remember: a step band, or a generation, has ended."""
        self.states.clear()
        self._sizes.clear()

    def measure(self, call: AttentionCall, first_step: int) -> tuple[list[float], list[Measured]]:
        """Measure all candidates on one call.

        Args:
            call: All heads of one layer; query, key and value are only read.
            first_step: Step at which its band begins; the first captured call of a band must be
                there, as methods search on it.

        Returns:
            Mean square of each head's dense output, and one ``Measured`` per candidate.
        """
        with torch.no_grad():
            layout = call.layout(DENSE_BLOCK)
            everything = BlockPlan.full(layout, call.key_layout(DENSE_BLOCK))
            qkv = (call.query, call.key, call.value)
            exact, lse = self.ops.attend(*qkv, everything, call.scale)
            norm = _squares(exact).sum((0, 2), dtype=torch.float64).cpu()
            power = norm / (exact.numel() / exact.shape[2])
            self.ops.begin(call, exact, lse)
            try:
                found = [self._one(c, call, first_step, exact, lse, norm) for c in self.candidates]
            finally:
                self.ops.end()
        return power.tolist(), found

    def _one(
        self,
        candidate: Candidate,
        call: AttentionCall,
        first_step: int,
        exact: Tensor,
        lse: Tensor,
        norm: Tensor,
    ) -> Measured:
        method = candidate.instance
        place = (call.stage, str(call.layer), call.branch, candidate.name)
        own = replace(
            call,
            step=step_seen(candidate, call.step, first_step),
            state=self.states.setdefault(place, {}),
            shared=self.shared,
        )
        heads = call.query.shape[2]
        plan = method.plan(own, self.ops)
        if plan is None:
            one, zero = [1.0] * heads, [0.0] * heads
            return Measured(
                candidate.name, zero, zero, one, one, one, ordered=False, partial=0.0,
                searched=False,
            )  # fmt: skip
        rows = None if plan.complete else self._draw(plan, call)
        before = dict(own.state)
        output, kept = self._attend(method, own, plan, rows)
        if rows is not None and not _same(before, own.state):
            # What it remembers of a finished call must be of the whole one.
            own.state.clear()
            own.state.update(before)
            rows = None
            output, kept = self._attend(method, own, plan, rows)
        self._sizes[place] = nbytes(own.state)
        if self.state_bytes > self.state_limit:
            raise ProfileError(
                f"the state of the candidates takes {self.state_bytes / 2**30:.1f} GiB at layer "
                f"{call.layer}, the limit is {self.state_limit / 2**30:.1f} GiB: remove "
                f"{candidate.name}, raise state_limit, or profile a smaller size"
            )
        error, doubt, recall = _compare(output, kept, exact, lse, plan, rows)
        norm = norm.clamp(min=torch.finfo(torch.float64).tiny)
        return Measured(
            candidate.name,
            _numbers((error / norm).sqrt()),
            _numbers(doubt / norm),
            None
            if plan.means or plan.kv_log_weight is not None
            else _numbers(recall.clamp(max=1)),
            _numbers(_per_head(plan.density(), heads)),
            _numbers(computed_share(plan, heads)),
            ordered=plan.q_permutation is not None or plan.kv_permutation is not None,
            partial=_partial_share(plan),
            searched=bool(plan.complete),
        )

    def _attend(
        self, method: Method, call: AttentionCall, plan: BlockPlan, rows: Rows | None
    ) -> tuple[Tensor, Tensor]:
        """Compute the (drawn) rows of a plan and let the method finish: output and LSE."""
        plan = plan if rows is None else rows.thinned(plan)
        output, kept = self.ops.attend(call.query, call.key, call.value, plan, call.scale)
        return method.finish(call, output, kept, self.ops), kept

    def _draw(self, plan: BlockPlan, call: AttentionCall) -> Rows | None:
        """Draw rows: the same for all candidates of a call that have as many."""
        if self.sample is None:
            return None
        share = min(1.0, self.sample * block_for(call.grid) / call.grid.tokens)
        return draw(plan.q.blocks, share, call.layer * 100_003 + call.step)


def _same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before.keys() == after.keys() and all(before[key] is after[key] for key in before)


def _compare(
    output: Tensor, kept: Tensor, exact: Tensor, lse: Tensor, plan: BlockPlan, rows: Rows | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum squared differences, with the standard error of this sum, and average the recall.

    Returns:
        Three fp64 ``[heads]``, on the CPU.
    """
    squares = _squares(output, exact)
    recall = (kept.float() - lse.float()).exp().nan_to_num()
    if rows is None:
        total = squares.sum((0, 2), dtype=torch.float64).cpu()
        return total, torch.zeros_like(total), recall.mean((0, 2)).double().cpu()
    block = block_of_token(plan)
    total, variance = rows.total(block_sums(squares, block, rows.blocks))
    weights = torch.cat([rows.weights, torch.zeros(1, dtype=torch.float64)]).to(block.device)
    weight = weights[block].expand(recall.shape)  # of each token, 0 in no drawn block
    mean = (recall * weight).sum((0, 2)) / weight.sum((0, 2))
    return total, variance.sqrt(), mean.cpu()


def memory_bound(call: AttentionCall) -> int:
    """Bytes that measuring takes at most beyond its inputs, kernel, planning and states.

    The dense output, one candidate's, one spare (reordering) and as much for results that
    candidates share; eight numbers of 8 bytes a token and head (LSEs, squares, recall, their
    block and weight); and the scratch.
    """
    batch, tokens, heads, _ = call.query.shape
    output = call.query.numel() * call.query.element_size()
    return 4 * output + 8 * 8 * batch * tokens * heads + 4 * _SCRATCH


def computed_share(plan: BlockPlan, heads: int, granule: int | None = None) -> Tensor:
    """Count the pairs that kernels compute, as a share of all tokens' pairs: fp64 ``[heads]``.

    Args:
        plan: Any plan.
        heads: Of the call; a plan for all heads alike is spelled out.
        granule: Each block's sides are rounded up to whole multiples of it (tile quantisation);
            None: 1 for the CPU kernel, which joins a row's keys, elsewhere the largest block.
    """
    sizes = []
    for side in (plan.q, plan.kv):
        unit = granule or (1 if plan.device.type == "cpu" else side.max_length)
        lengths = (side.lengths + (unit - 1)) // unit * unit
        longest = -(-side.max_length // unit) * unit
        sizes.append(BlockLayout(side.starts, lengths, side.slots, longest))
    q, kv = sizes
    keys = plan.key_length if plan.dense_keys is None else plan.dense_keys
    whole = replace(plan, q=q, kv=kv, partial=None, tiles=None, dense_keys=keys)
    grown = q.lengths.double().sum(-1) / plan.query_length
    return (whole.density() * grown).mean(0).expand(heads).cpu()


def _partial_share(plan: BlockPlan) -> float:
    if plan.partial is None:
        return 0.0
    entry = torch.arange(plan.partial.shape[-1], device=plan.device)
    live = entry < plan.kv_num_blocks[..., None]
    return float((live & (plan.partial >= 0)).sum() / live.sum().clamp(min=1))


def step_seen(candidate: Candidate, step: int, first_step: int) -> int:
    """Tell a method that refreshes every few steps a step of its first round.

    What it remembers is from the band's first step, as the captured steps between are not run;
    its age is then right and what it remembers is older than in a generation, never younger.
    """
    age, period = step - first_step, candidate.period
    return step if age == 0 or period is None else first_step + 1 + (age - 1) % (period - 1)


def _squares(x: Tensor, other: Tensor | None = None) -> Tensor:
    """Sum squares (of the difference) over head_dim: fp32 ``[batch, heads, tokens]``."""
    batch, tokens, heads, _ = x.shape
    found = torch.empty((batch, heads, tokens), dtype=torch.float32, device=x.device)
    for part in _chunks(x):
        piece = x[:, part].float()
        if other is not None:
            piece = piece - other[:, part].float()
        found[..., part] = piece.square().sum(-1).transpose(1, 2)
    return found


def _chunks(x: Tensor) -> Iterator[slice]:
    batch, tokens, heads, dim = x.shape
    size = max(1, _SCRATCH // (4 * batch * heads * dim))
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def _per_head(x: Tensor, heads: int) -> Tensor:
    return x.mean(0).expand(heads).double().cpu()


def _numbers(x: Tensor) -> list[float]:
    """Round to six digits, so that stores are small and read back as they were written."""
    return [float(f"{value:.6g}") for value in x.tolist()]
