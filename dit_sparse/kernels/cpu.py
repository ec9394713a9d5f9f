# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention on the CPU: torch only, nothing to compile, bounded extra memory.

Every query row of blocks becomes one call of the fused attention that
``F.scaled_dot_product_attention`` itself reaches on the CPU, over just the keys that it keeps:
a view of them where they stand side by side, a gathered copy (a few per cent of the time) where
they do not. Rows that keep the same keys share a call, so a complete plan is one dense call.
Masks are only built for partial blocks, whose result is merged in by its LSE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dit_sparse.kernels.cpu_mass import block_mass

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from dit_sparse.plan import BlockPlan

__all__ = ["HAS_BACKWARD", "attend", "block_mass", "reasons_against"]

HAS_BACKWARD = False
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BUDGET = 12 << 20  # bytes of gathered keys, of gathered values, and of one call's output
PIECE = 32  # query rows that the fused attention gives to a thread (below 192 rows in a call)

_sdpa = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 (gives the LSE)


def reasons_against(query: Tensor, plan: BlockPlan) -> list[str]:
    """Say why this kernel cannot run the call, a reason a line; empty: it can."""
    del plan
    reasons = []
    if query.device.type != "cpu":
        reasons.append(f"runs on the CPU, query is on {query.device}")
    if query.dtype not in DTYPES:
        reasons.append(f"computes {', '.join(map(str, DTYPES))}, query is {query.dtype}")
    return reasons


@torch.no_grad()
def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend each query to the keys that its plan keeps.

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
    # The fused call reads a last dimension of another stride as if it were 1, silently.
    q, k, v = (
        (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in (query, key, value)
    )  # [batch, heads, seq_len, head_dim]
    return _Call(q, k, v, plan, scale).run()


@dataclass(frozen=True, slots=True)
class _Row:
    """Queries that keep the same keys. All spans are (first slot, behind the last slot)."""

    q: list[tuple[int, int]]
    kv: list[tuple[int, int]]
    partial: list[tuple[int, int, int]]  # a key span and its bit tile

    @property
    def queries(self) -> int:
        return sum(stop - start for start, stop in self.q)

    @property
    def keys(self) -> int:
        return sum(stop - start for start, stop in self.kv)


def _rows(plan: BlockPlan, i_batch: int, i_head: int) -> list[_Row]:
    """List one (sample, head)'s rows; neighbours with equal lists are joined."""

    def pick(tensor: Tensor) -> np.ndarray:
        return tensor[i_batch % tensor.shape[0], i_head % tensor.shape[1]].numpy()

    index, count = pick(plan.kv_indices), pick(plan.kv_num_blocks)
    i_q, entry = np.nonzero(np.arange(index.shape[1]) < count[:, None])
    block = index[i_q, entry]
    start = pick(plan.kv.starts)[block].astype(np.int64)
    stop = start + pick(plan.kv.lengths)[block]
    tile = np.full_like(block, -1) if plan.partial is None else pick(plan.partial)[i_q, entry]
    filled = stop > start
    whole, cut = filled & (tile < 0), filled & (tile >= 0)
    spans = np.stack([start[whole], stop[whole]], 1)  # [entries, 2]
    owner = i_q[whole]
    if len(spans):  # join blocks that stand side by side
        apart = (owner[1:] != owner[:-1]) | (spans[1:, 0] != spans[:-1, 1])
        first = np.flatnonzero(np.concatenate([[True], apart]))
        last = np.flatnonzero(np.concatenate([apart, [True]]))
        spans, owner = np.stack([spans[first, 0], spans[last, 1]], 1), owner[first]
    edges = np.searchsorted(owner, np.arange(plan.q.blocks + 1))
    cuts: dict[int, list[tuple[int, int, int]]] = {}
    for row, *span in zip(i_q[cut], start[cut], stop[cut], tile[cut], strict=True):
        cuts.setdefault(int(row), []).append((int(span[0]), int(span[1]), int(span[2])))

    rows: list[_Row] = []
    known: dict[bytes, _Row] = {}
    q_starts, q_lengths = pick(plan.q.starts).tolist(), pick(plan.q.lengths).tolist()
    for row in sorted(range(plan.q.blocks), key=q_starts.__getitem__):
        kept = spans[edges[row] : edges[row + 1]]
        q = (q_starts[row], q_starts[row] + q_lengths[row])
        if q[0] == q[1] or not (len(kept) or row in cuts):
            continue
        name = kept.tobytes()
        if row not in cuts and name in known:
            same = known[name].q
            if same[-1][1] == q[0]:
                same[-1] = (same[-1][0], q[1])
            else:
                same.append(q)
            continue
        kv = [(int(a), int(b)) for a, b in kept]
        rows.append(_Row([q], kv, cuts.get(row, [])))
        if row not in cuts:
            known[name] = rows[-1]
    return rows


@dataclass(frozen=True, slots=True)
class _Unit:
    """One row for one (sample, head)."""

    i_batch: int
    i_head: int
    row: _Row


class _Call:
    """One attention call: its tensors, and the buffers that its parts share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> None:
        self.q, self.k, self.v, self.plan, self.scale = q, k, v, plan, scale
        self.batch, self.heads, self.tokens, self.head_dim = q.shape
        self.threads = torch.get_num_threads()
        self.row_bytes = self.head_dim * q.element_size()
        self.bias_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.slots = np.arange(max(plan.q.slots, plan.kv.slots))
        self.buffers: dict[str, Tensor] = {}
        # Made on first use: a complete plan needs neither, it returns what the dense call made.
        self.output: Tensor | None = None  # [batch, tokens, heads, head_dim]
        self.lse: Tensor | None = None  # [batch, heads, tokens]

    def run(self) -> tuple[Tensor, Tensor]:
        units: list[_Unit] = []
        plan = self.plan
        for i_batch in range(plan.batch):
            batch = range(self.batch) if plan.batch == 1 else range(i_batch, i_batch + 1)
            for i_head in range(plan.heads):
                heads = range(self.heads) if plan.heads == 1 else range(i_head, i_head + 1)
                for row in _rows(plan, i_batch, i_head):
                    if self._views(row, len(batch) * len(heads)):
                        if (done := self._attend_views(row, batch, heads)) is not None:
                            return done
                        continue
                    units += [
                        _Unit(b, h, part)
                        for b in batch
                        for h in heads
                        for part in self._split(row)
                    ]
        for group in self._groups(units):
            self._attend_units(group)
        return self._results()

    def _results(self) -> tuple[Tensor, Tensor]:
        if self.output is None or self.lse is None:
            shape = (self.batch, self.tokens, self.heads, self.head_dim)
            self.output = self.q.new_zeros(shape)
            self.lse = self.q.new_full(
                (self.batch, self.heads, self.tokens), -torch.inf, dtype=torch.float32
            )
        return self.output, self.lse

    # Rows whose queries and keys stand side by side: no copy of anything.

    def _views(self, row: _Row, pairs: int) -> bool:
        if self.plan.q_permutation is not None or self.plan.kv_permutation is not None:
            return False
        if self.plan.kv_log_weight is not None or row.partial:
            return False
        # Few pieces for many threads: better stacked with other rows.
        busy = pairs * row.queries >= self.threads * PIECE
        return len(row.kv) == 1 and len(row.q) == 1 and busy

    def _attend_views(self, row: _Row, batch: range, heads: range) -> tuple[Tensor, Tensor] | None:
        (start, stop), (first, last) = row.q[0], row.kv[0]
        q, k, v = (
            x[batch.start : batch.stop, heads.start : heads.stop] for x in (self.q, self.k, self.v)
        )
        k, v = k[:, :, first:last], v[:, :, first:last]
        if q.shape == self.q.shape and stop - start == self.tokens:
            o, e = _sdpa(q, k, v, scale=self.scale)
            return o.transpose(1, 2), e.float()
        output, lse = self._results()
        # Pieces bound the memory; multiples of 256 rows are what the fused call cuts anyway.
        step = max(256, BUDGET // (self.row_bytes * len(batch) * len(heads)) // 256 * 256)
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            o, e = _sdpa(q[:, :, begin:end], k, v, scale=self.scale)
            output[batch.start : batch.stop, begin:end, heads.start : heads.stop] = o.transpose(
                1, 2
            )
            lse[batch.start : batch.stop, heads.start : heads.stop, begin:end] = e
        return None

    # All other rows.

    def _split(self, row: _Row) -> Iterator[_Row]:
        """Cut a joined row so that gathered queries stay few."""
        most = max(256, BUDGET // self.row_bytes // 4)
        if row.queries <= most or row.partial:
            yield row
            return
        held: list[tuple[int, int]] = []
        room = most
        for span in row.q:
            start, stop = span
            while start < stop:
                end = min(stop, start + room)
                held.append((start, end))
                room -= end - start
                start = end
                if not room:
                    yield _Row(held, row.kv, [])
                    held, room = [], most
        if held:
            yield _Row(held, row.kv, [])

    def _groups(self, units: list[_Unit]) -> Iterator[list[_Unit]]:
        """Join units of equal size until a call has work for every thread."""
        waiting: dict[tuple[int, int], list[_Unit]] = {}
        for unit in units:
            queries, keys = unit.row.queries, unit.row.keys
            want = -(-2 * self.threads * PIECE // queries)
            want = max(1, min(want, BUDGET // (self.row_bytes * max(keys, 1))))
            if unit.row.partial or want == 1 or self.plan.kv_log_weight is not None:
                yield [unit]
                continue
            group = waiting.setdefault((queries, keys), [])
            group.append(unit)
            if len(group) == want:
                yield waiting.pop((queries, keys))
        yield from waiting.values()

    def _attend_units(self, group: list[_Unit]) -> None:
        output, lse = self._results()
        row = group[0].row
        q_tokens = [self._tokens(self.plan.q_permutation, u, u.row.q) for u in group]
        q = self._fetch("q", self.q, group, q_tokens, [u.row.q for u in group])
        o: Tensor | None = None
        e: Tensor | None = None
        for spans in self._key_parts(row.kv) if len(group) == 1 else [row.kv]:
            lists = [spans] if len(group) == 1 else [u.row.kv for u in group]
            tokens = [
                self._tokens(self.plan.kv_permutation, u, own)
                for u, own in zip(group, lists, strict=True)
            ]
            bias = self._weights(group[0], spans)
            if bias is not None and bool((bias == -torch.inf).any()):
                # A key that counts zero times is left out, lest its value be nan.
                keep = (bias != -torch.inf).numpy()
                if not keep.any():
                    continue
                tokens, bias = [tokens[0][keep]], bias[torch.from_numpy(keep)]
                lists = [[]]
            k = self._fetch("k", self.k, group, tokens, lists)
            v = self._fetch("v", self.v, group, tokens, lists)
            mask = None if bias is None else bias.view(1, 1, 1, -1)
            o, e = _merge(o, e, *_sdpa(q, k, v, attn_mask=mask, scale=self.scale))
        if row.partial:
            o, e = _merge(o, e, *self._attend_partial(group[0], q))
        if o is None or e is None:
            return
        for i, (unit, tokens_) in enumerate(zip(group, q_tokens, strict=True)):
            b, h = unit.i_batch, unit.i_head
            if self.plan.q_permutation is None and len(unit.row.q) == 1:
                start, stop = unit.row.q[0]
                output[b, start:stop, h] = o[i, 0]
                lse[b, h, start:stop] = e[i, 0]
            else:
                where = torch.from_numpy(tokens_)
                output[b, :, h].index_copy_(0, where, o[i, 0])
                lse[b, h].index_copy_(0, where, e[i, 0].float())

    def _key_parts(self, spans: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """Cut key spans into lists that fit the budget."""
        most = BUDGET // self.row_bytes
        if len(spans) == 1 and self.plan.kv_permutation is None:
            yield spans
            return
        held: list[tuple[int, int]] = []
        room = most
        for span in spans:
            start, stop = span
            while start < stop:
                end = min(stop, start + room)
                held.append((start, end))
                room -= end - start
                start = end
                if not room:
                    yield held
                    held, room = [], most
        if held:
            yield held

    def _tokens(
        self, permutation: Tensor | None, unit: _Unit, spans: list[tuple[int, int]]
    ) -> np.ndarray:
        """List the tokens that stand in the slots of ``spans``."""
        source = self.slots
        if permutation is not None:
            shape = permutation.shape
            source = permutation[unit.i_batch % shape[0], unit.i_head % shape[1]].numpy()
        return np.concatenate([source[start:stop] for start, stop in spans] or [source[:0]])

    def _weights(self, unit: _Unit, spans: list[tuple[int, int]]) -> Tensor | None:
        """Gather the log weights of the keys of ``spans``; None where the plan has none."""
        weight = self.plan.kv_log_weight
        if weight is None:
            return None
        row = weight[unit.i_batch % weight.shape[0], unit.i_head % weight.shape[1]]
        return torch.cat([row[start:stop] for start, stop in spans]).to(self.bias_dtype)

    def _fetch(
        self,
        name: str,
        source: Tensor,
        group: list[_Unit],
        tokens: list[np.ndarray],
        spans: list[list[tuple[int, int]]],
    ) -> Tensor:
        """Stack the tokens of a group, ``[group, 1, tokens, head_dim]``; a view where one will do."""
        first = group[0]
        permutation = self.plan.q_permutation if name == "q" else self.plan.kv_permutation
        if len(group) == 1 and permutation is None and len(spans[0]) == 1:
            start, stop = spans[0][0]
            return source[
                first.i_batch : first.i_batch + 1, first.i_head : first.i_head + 1, start:stop
            ]
        count = len(tokens[0])
        need = len(group) * count
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape[0] < need:
            buffer = self.buffers[name] = source.new_empty((need, self.head_dim))
        for i, (unit, own) in enumerate(zip(group, tokens, strict=True)):
            torch.index_select(
                source[unit.i_batch, unit.i_head],
                0,
                torch.from_numpy(own),
                out=buffer[i * count : (i + 1) * count],
            )
        return buffer[:need].view(len(group), 1, count, self.head_dim)

    # Blocks that a token-level border cuts.

    def _attend_partial(self, unit: _Unit, q: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to the partial blocks of one row under their bit tiles."""
        row, tiles = unit.row, self.plan.tiles
        assert tiles is not None
        o: Tensor | None = None
        e: Tensor | None = None
        most = max(1, BUDGET // max(self.row_bytes, row.queries * 8) // self.plan.kv.max_length)
        for begin in range(0, len(row.partial), most):
            part = row.partial[begin : begin + most]
            spans = [(start, stop) for start, stop, _ in part]
            keep = _unpack(tiles, part, row.queries)  # [queries, keys]
            bias = torch.zeros(keep.shape, dtype=self.bias_dtype)
            if (weight := self._weights(unit, spans)) is not None:
                bias += weight
                keep &= weight != -torch.inf
            bias.masked_fill_(~keep, -torch.inf)
            tokens = [self._tokens(self.plan.kv_permutation, unit, spans)]
            k = self._fetch("k", self.k, [unit], tokens, [spans])
            v = self._fetch("v", self.v, [unit], tokens, [spans])
            if bool(k.isfinite().all()) and bool(v.isfinite().all()):
                own = _sdpa(q, k, v, attn_mask=bias[None, None], scale=self.scale)
            else:
                own = _attend_not_finite(q, k, v, bias, keep, self.scale)
            nothing = ~keep.any(-1)  # the fused call gives these an LSE of 0
            own[0].masked_fill_(nothing[:, None], 0.0)
            own[1].masked_fill_(nothing, -torch.inf)
            o, e = _merge(o, e, *own)
        assert o is not None
        assert e is not None
        return o, e


def _unpack(tiles: Tensor, part: list[tuple[int, int, int]], queries: int) -> Tensor:
    """Lay the bit tiles of ``part`` side by side: bool ``[queries, keys]``."""
    shift = torch.arange(32, dtype=torch.int32)
    words = tiles[[tile for _, _, tile in part], :queries]  # [part, queries, words]
    bits = ((words[..., None] >> shift) & 1).flatten(-2).bool()
    return torch.cat([bits[i, :, : stop - start] for i, (start, stop, _) in enumerate(part)], 1)


def _attend_not_finite(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend under a mask when a key or value is nan or inf: only queries that keep it see it."""
    work = torch.promote_types(q.dtype, torch.float32)
    score = (q.to(work) @ k.to(work).mT) * scale + torch.where(keep, bias, 0.0).to(work)
    score.masked_fill_(~keep, -torch.inf)
    lse = score.logsumexp(-1, keepdim=True)
    weight = (score - lse).exp().masked_fill_(~keep, 0.0)
    wide = v.to(work)
    finite = wide.isfinite().all(-1, keepdim=True)
    output = weight @ torch.where(finite, wide, 0.0)
    for j in (~finite[0, 0, :, 0]).nonzero().flatten().tolist():
        term = weight[..., j, None] * wide[..., j, None, :]
        output += torch.where(keep[:, j, None], term, 0.0)
    return output.to(q.dtype), lse.squeeze(-1)


def _merge(
    o: Tensor | None, e: Tensor | None, o_new: Tensor, e_new: Tensor
) -> tuple[Tensor, Tensor]:
    """Join two results over disjoint keys: ``O = sum O_i exp(LSE_i - LSE)``."""
    if o is None or e is None:
        return o_new, e_new
    lse = torch.logaddexp(e, e_new)
    base = torch.where(lse == -torch.inf, 0.0, lse)
    mixed = o * (e - base).exp()[..., None] + o_new * (e_new - base).exp()[..., None]
    return mixed.to(o.dtype), lse
