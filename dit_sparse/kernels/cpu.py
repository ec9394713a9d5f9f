# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention on the CPU: torch only, nothing to compile, bounded extra memory.

Each row of query blocks becomes one call of the fused attention that
``F.scaled_dot_product_attention`` itself reaches on the CPU, over just the keys that it keeps.
One head at a time, or several that share a plan where a row is little work: keys and values are
laid out once in the plan's order, side by side, so that a row's keys are a view, or a gather of
whole blocks (a few per cent of the time). Rows that keep the same keys share a call, so a complete
plan is one dense call. Masks are only built for partial blocks, whose result is merged in by its
LSE.

Rows run in one-thread workers. A thread-parallel call per row would be right too, but where
cores are shared its thousands of barriers cost several times the dense attention.

Reading the plan stands apart in ``cpu_rows.py``, its bit tiles in ``cpu_tiles.py``, the fused call
in ``cpu_fused.py``.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from dit_sparse.kernels.cpu_backward import attend_backward, attend_with_grad
from dit_sparse.kernels.cpu_fused import attend_not_finite, fused, merge
from dit_sparse.kernels.cpu_mass import block_mass
from dit_sparse.kernels.cpu_rows import (
    Row,
    Span,
    cut_row,
    cut_spans,
    pick,
    piece_length,
    pieces_of,
    rows_of,
    slots_of,
)
from dit_sparse.kernels.cpu_tiles import tile_bias, unpack

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.plan import BlockPlan

__all__ = ["HAS_BACKWARD", "attend", "attend_backward", "block_mass", "reasons_against"]

HAS_BACKWARD = True
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Relative error of an exponential in torch's fused attention: 20 units in the last place of fp32
# where the processor has AVX-512 (ATen's exp_u20).
EXP_ERROR = 20 * 2.0**-24
LAID_OUT = 32 << 20  # bytes of one head's keys and values in the plan's order, at most
GATHERED = 8 << 20  # bytes of gathered keys and values, over all workers
FEWEST_KEYS = 256  # but at least so many keys
Q_ROWS = 1024  # queries in one call at most, where they are gathered
BIG_CALL = 768  # from here on the fused call cuts queries into its largest pieces, of 256
WORTH_A_CALL = 1e8  # multiply-adds of one row: half a millisecond, several times a call's own cost
WORTH_A_THREAD = 2e8  # multiply-adds: some milliseconds, many times what starting a thread takes


def reasons_against(query: Tensor, plan: BlockPlan) -> list[str]:
    """Say why this kernel cannot run the call, a reason a line; empty: it can."""
    del plan
    reasons = []
    if query.device.type != "cpu":
        reasons.append(f"runs on the CPU, query is on {query.device}")
    if query.dtype not in DTYPES:
        reasons.append(f"computes {', '.join(map(str, DTYPES))}, query is {query.dtype}")
    return reasons


def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend each query to the keys that its plan keeps; differentiable.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``, any strides.
        key: ``[batch, kv_seq_len, heads, head_dim]``.
        value: Like ``key``.
        plan: Which blocks each query block reads; on the CPU.
        scale: Multiplies the scores before softmax.

    Returns:
        Output like ``query``; LSE fp32 ``[batch, heads, seq_len]``, natural log. Queries that
        keep nothing get 0 and -inf.
    """
    wanted = (query, key, value, plan.kv_log_weight)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in wanted):
        return attend_with_grad(_attend, query, key, value, plan, scale)
    return _attend(query, key, value, plan, scale)


@torch.no_grad()
def _attend(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    # The fused call takes a last dimension of another stride for one of stride 1, silently.
    q, k, v = (
        (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in (query, key, value)
    )  # [batch, heads, seq_len, head_dim]
    with torch.autocast("cpu", enabled=False):
        return _Call(q, k, v, plan, scale).run()


class _Call:
    """One attention call: its tensors, its workers, its results."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> None:
        self.q, self.k, self.v, self.plan, self.scale = q, k, v, plan, scale
        self.batch, self.heads, self.tokens, self.head_dim = q.shape
        self.threads = torch.get_num_threads()
        self.plain = (
            plan.q_permutation is None
            and plan.kv_permutation is None
            and plan.kv_log_weight is None
        )
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.tile_bias = tile_bias(plan, wide)

    def run(self) -> tuple[Tensor, Tensor]:
        """Compute output and LSE."""
        plan = self.plan
        rows = {
            (i_batch, i_head): rows_of(plan, i_batch, i_head)
            for i_batch in range(plan.batch)
            for i_head in range(plan.heads)
        }
        if len(rows) == 1 and self.plain and self._is_dense(rows[0, 0]):
            (first, last) = rows[0, 0][0].kv[0]
            k, v = self.k[:, :, first:last], self.v[:, :, first:last]
            o, e = fused(self.q, k, v, self.scale)
            return o.transpose(1, 2), e.float()
        self.output = self.q.new_zeros((self.batch, self.tokens, self.heads, self.head_dim))
        self.lse = torch.full((self.batch, self.heads, self.tokens), -torch.inf)
        work = self.head_dim * sum(
            row.queries * row.keys for listed in rows.values() for row in listed
        ) * (self.batch // plan.batch) * (self.heads // plan.heads)  # fmt: skip
        workers = max(1, min(self.threads, int(work / WORTH_A_THREAD)))
        with ExitStack() as stack:
            pool = None
            if workers > 1:
                # Set back once the last worker has ended. This thread's own goes down to 1 too:
                # after a thread-parallel copy the idle threads spin, against the workers.
                stack.callback(torch.set_num_threads, self.threads)
                torch.set_num_threads(1)
                pool = stack.enter_context(
                    ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
                )
            for i_batch in range(self.batch):
                first = 0
                while first < self.heads:
                    listed = rows[i_batch % plan.batch, first % plan.heads]
                    heads = slice(first, first + self._together(listed))
                    _Heads(self, i_batch, heads, workers).run(listed, pool)
                    first = heads.stop
        return self.output, self.lse

    def _together(self, rows: list[Row]) -> int:
        """Say how many heads of one plan share a call."""
        if self.plan.heads > 1 or not rows:
            return 1
        work = self.head_dim * sum(row.queries * row.keys for row in rows) / len(rows)
        return max(1, min(self.heads, int(WORTH_A_CALL / work)))

    def _is_dense(self, rows: list[Row]) -> bool:
        """Tell whether all queries read one run of keys."""
        return (
            len(rows) == 1
            and not rows[0].partial
            and rows[0].q == [(0, self.tokens)]
            and len(rows[0].kv) == 1
        )


class _Heads:
    """Heads of one sample that share one plan; often a single one."""

    def __init__(self, call: _Call, i_batch: int, heads: slice, workers: int) -> None:
        plan = call.plan
        self.call, self.plan, self.scale, self.workers = call, plan, call.scale, workers
        self.q, self.k, self.v = (x[i_batch, heads] for x in (call.q, call.k, call.v))
        self.output = call.output[i_batch, :, heads].transpose(0, 1)  # [heads, tokens, head_dim]
        self.lse = call.lse[i_batch, heads]  # [heads, tokens]
        self.count = self.q.shape[0]
        self.q_token, self.kv_token, self.weight = (
            None if x is None else pick(x, i_batch, heads.start)
            for x in (plan.q_permutation, plan.kv_permutation, plan.kv_log_weight)
        )
        self.row_bytes = call.head_dim * call.q.element_size()
        self.bias_dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
        self.finite = plan.tiles is not None and bool(
            self.k.isfinite().all() and self.v.isfinite().all()
        )
        # Keys and values that one call gathers at most.
        self.most_keys = max(FEWEST_KEYS, GATHERED // (2 * workers * self.count * self.row_bytes))

    def run(self, rows: list[Row], pool: ThreadPoolExecutor | None) -> None:
        """Compute all rows of these heads."""
        waiting: list[Row] = []
        for row in rows:
            if pool is None and row.queries >= BIG_CALL and self._is_view(row):
                self._attend_big(row)
            else:
                waiting += cut_row(row, Q_ROWS)
        self._lay_out(sum(row.keys for row in waiting))
        self.piece = piece_length([row.kv for row in waiting], self.plan.kv.slots)
        # The longest first: none is left over when the other workers are done.
        waiting.sort(key=lambda row: -row.queries * row.keys)
        queue = deque(waiting)
        if pool is None:
            self._work(queue)
            return
        inference = torch.is_inference_mode_enabled()
        tasks = [pool.submit(self._work_in_thread, queue, inference) for _ in range(self.workers)]
        try:
            for task in tasks:
                task.result()
        finally:
            queue.clear()  # one failed, or the user stopped it: the others end soon

    def _is_view(self, row: Row) -> bool:
        one = len(row.q) == 1 and len(row.kv) == 1 and not row.partial
        return one and self.call.plain

    def _attend_big(self, row: Row) -> None:
        """Attend many queries to one run of keys, nothing copied."""
        (start, stop), (first, last) = row.q[0], row.kv[0]
        k, v = (x[None, :, first:last] for x in (self.k, self.v))
        step = max(256, GATHERED // self.row_bytes // 256 * 256)
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            o, e = fused(self.q[None, :, begin:end], k, v, self.scale)
            self.output[:, begin:end] = o[0]
            self.lse[:, begin:end] = e[0]

    def _lay_out(self, reads: int) -> None:
        """Copy keys and values into slot order where they are read often and fit."""
        slots = self.plan.kv.slots
        if reads < 2 * slots or 2 * slots * self.count * self.row_bytes > LAID_OUT:
            return
        if self.kv_token is not None:
            token = self.kv_token.clamp(min=0)
            self.k, self.v = self.k.index_select(1, token), self.v.index_select(1, token)
            self.kv_token = None
        else:
            self.k, self.v = self.k.contiguous(), self.v.contiguous()

    def _work_in_thread(self, queue: deque[Row], inference: bool) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # both are a thread's own
            self._work(queue)

    def _work(self, queue: deque[Row]) -> None:
        buffers: dict[str, Tensor] = {}
        while True:
            try:
                row = queue.popleft()
            except IndexError:
                return
            self._attend_row(row, buffers)

    def _attend_row(self, row: Row, buffers: dict[str, Tensor]) -> None:
        q = self._queries(row)
        o: Tensor | None = None
        e: Tensor | None = None
        whole = len(row.kv) == 1 and self.kv_token is None
        for spans in [row.kv] if whole else cut_spans(row.kv, self.most_keys):
            weight = self._weights(spans)
            k, v = self._keys(spans, buffers)
            if weight is not None and bool((weight == -torch.inf).any()):
                counts = weight != -torch.inf  # what counts zero times is left out: it may be nan
                k, v, weight = k[:, :, counts], v[:, :, counts], weight[counts]
                if not weight.numel():
                    continue
            bias = None if weight is None else weight[None, None, None]
            o, e = merge(o, e, *fused(q, k, v, self.scale, bias))
        if row.partial:
            o, e = self._attend_partial(row, q, o, e, buffers)
        if o is None or e is None:
            return
        if self.q_token is None and len(row.q) == 1:
            start, stop = row.q[0]
            self.output[:, start:stop] = o[0]
            self.lse[:, start:stop] = e[0]
        else:
            token = self._tokens(self.q_token, row.q)
            self.output.index_copy_(1, token, o[0])
            self.lse.index_copy_(1, token, e[0].float())

    def _tokens(self, permutation: Tensor | None, spans: list[Span]) -> Tensor:
        if permutation is None:
            return torch.from_numpy(slots_of(spans))
        return torch.cat([permutation[start:stop] for start, stop in spans])

    def _keys(self, spans: list[Span], buffers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Lay the keys and values of ``spans`` side by side, ``[1, heads, keys, head_dim]``."""
        if self.kv_token is None and len(spans) == 1:
            keys = slice(*spans[0])
            return self.k[None, :, keys], self.v[None, :, keys]
        count = sum(stop - start for start, stop in spans)
        heads, slots, head_dim = self.k.shape
        length, rest, pieces = self.piece, 0, None
        if self.kv_token is None and self.k.is_contiguous() and self.v.is_contiguous():
            pieces = pieces_of(spans, length, slots)
        if pieces is None:
            length, index = 1, self._tokens(self.kv_token, spans)
        else:
            index = torch.tensor(pieces[0])
            rest = pieces[1]
        found = []
        for name, source in (("k", self.k), ("v", self.v)):
            size = heads * count * head_dim
            if name not in buffers or buffers[name].numel() < size:
                buffers[name] = source.new_empty(size)
            target = buffers[name][:size].view(heads, count, head_dim)
            if length == 1:
                torch.index_select(source, 1, index, out=target)
            else:
                whole = source[:, : slots // length * length].view(heads, slots // length, -1)
                into = target[:, : count - rest].view(heads, len(index), -1)
                torch.index_select(whole, 1, index, out=into)
                if rest:
                    target[:, count - rest :] = source[:, slots - rest :]
            found.append(target[None])
        return found[0], found[1]

    def _queries(self, row: Row) -> Tensor:
        """Lay the queries of a row side by side, ``[1, heads, queries, head_dim]``."""
        if self.q_token is None and len(row.q) == 1:
            return self.q[None, :, slice(*row.q[0])]
        return self.q.index_select(1, self._tokens(self.q_token, row.q))[None]

    def _weights(self, spans: list[Span]) -> Tensor | None:
        """Log weights of the keys of ``spans``; None where the plan has none."""
        if self.weight is None:
            return None
        return torch.cat([self.weight[a:b] for a, b in spans]).to(self.bias_dtype)

    def _attend_partial(
        self,
        row: Row,
        q: Tensor,
        o: Tensor | None,
        e: Tensor | None,
        buffers: dict[str, Tensor],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Attend to the blocks that a token-level border cuts, under their bit tiles."""
        longest = self.plan.kv.max_length
        room = min(self.most_keys, GATHERED // (16 * self.workers * row.queries))
        most = max(1, room // longest)
        for begin in range(0, len(row.partial), most):
            part = row.partial[begin : begin + most]
            spans = [(start, stop) for start, stop, _ in part]
            k, v = self._keys(spans, buffers)
            bias, nothing = self._bias(part, spans, row.queries)
            if self.finite or (bool(k.isfinite().all()) and bool(v.isfinite().all())):
                own = fused(q, k, v, self.scale, bias[None, None])
            else:
                keep = bias != -torch.inf
                own = attend_not_finite(q, k, v, bias, keep, self.scale)
            # The fused call gives an LSE of 0 to queries that keep nothing.
            own[0].masked_fill_(nothing[:, None], 0.0)
            own[1].masked_fill_(nothing, -torch.inf)
            o, e = merge(o, e, *own)
        return o, e

    def _bias(
        self, part: list[tuple[int, int, int]], spans: list[Span], queries: int
    ) -> tuple[Tensor, Tensor]:
        """Lay the tiles of ``part`` side by side.

        Returns:
            What is added to the scores, -inf where a key is not kept: ``[queries, keys]``; and
            which queries keep none of these keys.
        """
        known = self.call.tile_bias
        if known is not None:
            bias, some = known
            one = [bias[i, :queries, : stop - start] for start, stop, i in part]
            made = torch.cat(one, 1)
            if all(stop - start == bias.shape[2] for start, stop, _ in part):
                return made, ~some[[i for *_, i in part], :queries].any(0)
            return made, (made == -torch.inf).all(1)
        assert self.plan.tiles is not None
        keep = unpack(self.plan.tiles, part, queries)
        made = torch.zeros(keep.shape, dtype=self.bias_dtype)
        if (weight := self._weights(spans)) is not None:
            made += weight
            keep &= weight != -torch.inf
        return made.masked_fill_(~keep, -torch.inf), ~keep.any(-1)
