# SPDX-License-Identifier: Apache-2.0
"""Gradients of attention by a plan, on the CPU: exact through every kept pair, memory bounded.

Weights are recomputed from the LSE, ``P = exp(S - LSE)``, a piece of one head at a time; then
``dV = P^T dO``, ``dS = P (dO V^T - rowsum(dO O) + dLSE)``, ``dQ = scale dS K``,
``dK = scale dS^T Q``, and a key's log weight gets its column's sum of ``dS``. Sums are fp32
(fp64 for fp64), in a fixed order. Heads run in one-thread workers, as in the forward pass.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from dit_sparse.core.tiles import unpack_tiles
from dit_sparse.kernels.autograd import differentiable
from dit_sparse.kernels.cpu_rows import Row, Span, cut_row, cut_spans, pick, rows_of, slots_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from dit_sparse.core.plan import BlockPlan
    from dit_sparse.kernels.autograd import Forward

Q_ROWS = 512  # queries at a time, but for a partial block, which is never cut
SCORES = 2 << 20  # bytes of one piece's scores; five such are held
WORTH_A_THREAD = 2e8  # multiply-adds


def attend_with_grad(
    forward: Forward, query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Run ``forward`` so that output and LSE pass gradients to its inputs."""
    return differentiable(forward, _gradients, query, key, value, plan, scale)


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor,
    plan: BlockPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value.

    Args:
        query: As given to ``attend``; also ``key``, ``value``, ``plan``, ``scale``.
        key: See ``query``.
        value: See ``query``.
        output: As ``attend`` returned it.
        lse: As ``attend`` returned it.
        grad_output: Gradient of ``output``.
        grad_lse: Gradient of ``lse``; zeros where nothing used it.
        plan: See ``query``.
        scale: See ``query``.
    """
    return _gradients(query, key, value, output, lse, grad_output, grad_lse, plan, scale)[:3]


@torch.no_grad()
def _gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor,
    plan: BlockPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    batch, _, heads, head_dim = query.shape
    grads = [torch.empty_like(x) for x in (query, key, value)]
    heads_of = [(b, h) for b in range(batch) for h in range(heads)]
    rows = {
        (b, h): rows_of(plan, b, h) for b in range(plan.batch) for h in range(plan.heads)
    }  # queries and keys of each (sample, head) that the plan tells apart
    weight = plan.kv_log_weight
    work_dtype = torch.promote_types(query.dtype, torch.float32)
    columns = None  # gradients of the log weights, by (sample, head)
    if weight is not None:
        columns = torch.zeros(batch, heads, weight.shape[-1], dtype=work_dtype)

    def run(pair: tuple[int, int]) -> None:
        b, h = pair
        q, k, v = (x[b, :, h].to(work_dtype) for x in (query, key, value))
        head = _Head(q, k, v, plan, scale, pair)
        delta = (grad_output[b, :, h].to(work_dtype) * output[b, :, h]).sum(-1) - grad_lse[b, h]
        delta.masked_fill_(lse[b, h] == -torch.inf, 0)  # what kept nothing is a constant
        listed = rows[b % plan.batch, h % plan.heads]
        found = head.run(listed, grad_output[b, :, h].to(work_dtype), lse[b, h], delta)
        for grad, own in zip(grads, found[:3], strict=True):
            grad[b, :, h] = own
        if columns is not None:
            columns[b, h] = found[3]

    _spread(run, heads_of, rows, head_dim)
    dw = None
    if weight is not None and columns is not None:
        dw = columns.sum_to_size(weight.shape).to(weight.dtype)
    return grads[0], grads[1], grads[2], dw


def _spread(
    run: Callable[[tuple[int, int]], None],
    pairs: list[tuple[int, int]],
    rows: dict[tuple[int, int], list[Row]],
    head_dim: int,
) -> None:
    """Run the heads, in one-thread workers where there is work for several."""
    threads = torch.get_num_threads()
    listed = [row for own in rows.values() for row in own]
    pairs_work = head_dim * sum(row.queries * row.keys for row in listed) / max(1, len(rows))
    workers = min(threads, len(pairs), int(5 * pairs_work * len(pairs) / WORTH_A_THREAD))
    if workers < 2:
        for pair in pairs:
            run(pair)
        return
    inference = torch.is_inference_mode_enabled()

    def run_in_thread(pair: tuple[int, int]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            run(pair)

    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for done in [pool.submit(run_in_thread, pair) for pair in pairs]:
                done.result()
    finally:
        torch.set_num_threads(threads)  # what later threads start with


class _Head:
    """One head of one sample: its tensors ``[tokens, head_dim]`` in the dtype of the sums."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan,
        scale: float,
        pair: tuple[int, int],
    ) -> None:
        self.q, self.k, self.v, self.plan, self.scale = q, k, v, plan, scale
        self.q_token, self.kv_token, self.weight = (
            None if x is None else pick(x, *pair)
            for x in (plan.q_permutation, plan.kv_permutation, plan.kv_log_weight)
        )

    def run(
        self, rows: list[Row], grad_output: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sum the gradients of queries, keys, values and log weights over all rows."""
        dq, dk, dv = (torch.zeros_like(x) for x in (self.q, self.k, self.v))
        dw = self.q.new_zeros(self.plan.kv.slots)
        for whole in rows:
            for row in cut_row(whole, Q_ROWS):
                token = _tokens(self.q_token, row.q)
                q, d_o, d = self.q[token], grad_output[token], delta[token, None]
                e = self._lse(row, q, lse[token])
                own = torch.zeros_like(q)
                for slots, keep in self._pieces(row):
                    kv_token = slots if self.kv_token is None else self.kv_token[slots]
                    k, v = self.k[kv_token], self.v[kv_token]
                    p = self._scores(q, k, slots, keep).sub_(e).exp_()
                    dv.index_add_(0, kv_token, p.T @ d_o)
                    ds = (d_o @ v.T).sub_(d).mul_(p)
                    if keep is not None:
                        ds.masked_fill_(~keep, 0)
                    if self.weight is not None:
                        dw.index_add_(0, slots, ds.sum(0))
                    own.addmm_(ds, k, alpha=self.scale)
                    dk.index_add_(0, kv_token, ds.T @ q, alpha=self.scale)
                dq[token] = own
        return dq, dk, dv, dw

    def _pieces(self, row: Row) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Cut a row's keys: slots, and under bit tiles which pairs are kept."""
        most = max(256, SCORES // (row.queries * self.q.element_size()))
        for spans in cut_spans(row.kv, most):
            yield self._counted(torch.from_numpy(slots_of(spans))), None
        for start, stop, tile in row.partial:
            assert self.plan.tiles is not None
            bits = unpack_tiles(self.plan.tiles[tile, : row.queries], stop - start)
            slots = torch.arange(start, stop)
            if self.weight is not None:
                bits = bits[:, self.weight[slots] != -torch.inf]
            yield self._counted(slots), bits

    def _counted(self, slots: Tensor) -> Tensor:
        """Leave out keys that count zero times: they may be nan."""
        return slots if self.weight is None else slots[self.weight[slots] != -torch.inf]

    def _scores(self, q: Tensor, k: Tensor, slots: Tensor, keep: Tensor | None) -> Tensor:
        score = (q @ k.T).mul_(self.scale)
        if self.weight is not None:
            score.add_(self.weight[slots].to(score.dtype))
        return score if keep is None else score.masked_fill_(~keep, -torch.inf)

    def _lse(self, row: Row, q: Tensor, lse: Tensor) -> Tensor:
        """Give the LSE to divide by, inf where nothing was kept: every weight is 0 then."""
        if q.dtype == torch.float64:  # the LSE handed in is rounded to fp32
            lse = q.new_full(lse.shape, -torch.inf)
            for slots, keep in self._pieces(row):
                token = slots if self.kv_token is None else self.kv_token[slots]
                own = self._scores(q, self.k[token], slots, keep).logsumexp(-1)
                lse = torch.logaddexp(lse, own)
        return torch.where(lse == -torch.inf, torch.inf, lse.to(q.dtype))[:, None]


def _tokens(permutation: Tensor | None, spans: list[Span]) -> Tensor:
    if permutation is None:
        return torch.from_numpy(slots_of(spans))
    return torch.cat([permutation[start:stop] for start, stop in spans])
