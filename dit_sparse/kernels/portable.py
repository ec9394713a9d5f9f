# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention in torch alone, on any device: Apple MPS, Intel XPU, Ascend, older CUDA.

Rows of query blocks are sorted by how many key blocks they keep, and computed in chunks of similar
rows whose scratch is bounded: the kept keys are gathered, multiplied, and masked where a block is
short. A plan's counts are read back once, since they decide how much is gathered; nothing else
waits for the device, and nothing is float64 unless the inputs are. Gathers and masks cost time
that a fused kernel does not need, so it may be slower than the device's own dense attention where
a plan keeps much.

A block is padded to the longest one, so blocks of very unequal lengths waste work. In a block that
bit tiles cut, a value that is not finite reaches every query of the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dit_sparse.core.plan import BlockPlan
from dit_sparse.core.tiles import unpack_tiles
from dit_sparse.kernels.autograd import differentiable
from dit_sparse.kernels.chunks import HALF, budget, scores, work_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from dit_sparse.core.grid import BlockLayout

HAS_BACKWARD = True
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Q_ROWS = 256  # queries of a block that are computed together, at most


def reasons_against(query: Tensor, plan: BlockPlan) -> list[str]:
    """Say why this kernel cannot run the call, a reason a line; empty: it can."""
    del plan
    if query.dtype not in DTYPES:
        return [f"computes {', '.join(map(str, DTYPES))}, query is {query.dtype}"]
    return []


def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend each query to the keys that its plan keeps; see ``cpu.attend`` for the contract."""
    return differentiable(_forward, _gradients, query, key, value, plan, scale)


@torch.no_grad()
def block_mass(
    query: Tensor, key: Tensor, lse: Tensor, q: BlockLayout, kv: BlockLayout, scale: float
) -> Tensor:
    """Sum ``exp(score - lse)`` over each block pair; see ``reference.block_mass``."""
    mass = lse.new_zeros(*lse.shape[:2], q.blocks, kv.blocks)
    for rows in _rows(BlockPlan.full(q, kv), query):
        score = _scores(rows, rows.queries(query), rows.keys(key), None, scale)
        base = rows.pick(lse.transpose(1, 2), rows.q_token)[..., None]
        dead = (base == -torch.inf) | ~rows.q_live[..., None]
        weight = (score - base).exp().masked_fill_(dead, 0)
        sums = weight.unflatten(-1, (-1, kv.max_length)).sum((1, 3)).to(mass.dtype)
        mass.index_put_((rows.sample, rows.head, rows.block), sums, accumulate=True)
    return mass


def _forward(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, head_dim = query.shape
    # Queries that do not exist write to a spare last token.
    output = query.new_zeros(batch, tokens + 1, heads, head_dim)
    lse = query.new_full((batch, tokens + 1, heads), -torch.inf, dtype=torch.float32)
    for rows in _rows(plan, query):
        q, k, v = rows.queries(query), rows.keys(key), rows.keys(value)
        o, e = _softmax(_scores(rows, q, k, rows.weights(), scale), v)
        at = rows.lead[0], rows.q_token.masked_fill(~rows.q_live, tokens), rows.lead[1]
        output.index_put_(at, o.to(output.dtype))
        lse.index_put_(at, e.float())
    return output[:, :tokens], lse[:, :tokens].transpose(1, 2)


def _gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,  # noqa: ARG001 (each chunk is computed again)
    lse: Tensor,  # noqa: ARG001
    grad_output: Tensor,
    grad_lse: Tensor,
    plan: BlockPlan,
    scale: float,
) -> tuple[Tensor | None, ...]:
    given = query, key, value
    work = work_dtype(given[0].dtype)
    grads = [torch.zeros_like(x, dtype=work) for x in given]
    d_weight = None if plan.kv_log_weight is None else torch.zeros_like(plan.kv_log_weight)
    for rows in _rows(plan, given[0]):
        q, k, v = (
            take(x).to(work).requires_grad_()
            for take, x in zip((rows.queries, rows.keys, rows.keys), given, strict=True)
        )
        w = rows.weights()
        leaves = [q, k, v] if w is None else [q, k, v, w.requires_grad_()]
        with torch.enable_grad():
            results = _softmax(_scores(rows, q, k, w, scale), v)
        d_o = rows.queries(grad_output).to(work)
        d_e = rows.pick(grad_lse.transpose(1, 2), rows.q_token).masked_fill(~rows.q_live, 0)
        found = torch.autograd.grad(results, leaves, (d_o, d_e.to(results[1].dtype)))
        (sample, head), (own_b, own_h) = rows.lead, rows.shared(plan.kv_log_weight)
        tokens = (rows.q_token, rows.kv_token, rows.kv_token)
        for grad, token, own in zip(grads, tokens, found[:3], strict=True):
            grad.index_put_((sample, token, head), own, accumulate=True)
        if d_weight is not None:
            own = found[3].to(d_weight.dtype)
            d_weight.index_put_((own_b, own_h, rows.kv_slot), own, accumulate=True)
    return *(g.to(x.dtype) for g, x in zip(grads, given, strict=True)), d_weight


def _scores(rows: _Rows, q: Tensor, k: Tensor, weight: Tensor | None, scale: float) -> Tensor:
    """Score the rows' queries by their keys, -inf where a pair is not kept."""
    score = scores(q, k) * scale  # [rows, queries, keys]
    if weight is not None:
        score = score + weight[:, None]
    return score.masked_fill(~rows.kept(), -torch.inf)


def _softmax(score: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Give output and LSE; 0 and -inf where a query keeps nothing."""
    peak = score.detach().amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0)
    weight = (score - peak).exp()
    total = weight.sum(-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1)
    lse = (total.log() + peak).masked_fill(nothing, -torch.inf)
    half = v.dtype in HALF and v.is_cuda  # there the product adds in fp32
    output = scores(weight.to(v.dtype) if half else weight, v.transpose(-1, -2)) / total
    return output, lse.squeeze(-1)


def _rows(plan: BlockPlan, query: Tensor) -> Iterator[_Rows]:
    """Cut the call into chunks of rows that keep about as many key blocks."""
    batch, _, heads, head_dim = query.shape
    own, wide = min(Q_ROWS, plan.q.max_length), work_dtype(query.dtype).itemsize
    pair = own * (3 * wide + (1 if plan.tiles is None else 9)) + 4 * head_dim * wide + 32
    most = budget(query.device) // (pair * plan.kv.max_length)  # blocks read in one chunk

    def listed() -> list[tuple[Tensor, int]]:
        parts = -(-plan.q.max_length // own)
        queries = plan.q.lengths.expand(batch, heads, -1)[..., None]
        part = torch.arange(parts, device=query.device)
        counts = plan.kv_num_blocks.expand(batch, heads, -1)[..., None]
        counts = torch.where(part * own < queries, counts, 0).flatten()
        if plan.complete or query.device.type == "meta":  # nothing has to be read
            order = torch.arange(counts.numel(), device=query.device)
            return _cut(order, [plan.kv_indices.shape[-1]] * counts.numel(), most)
        counts, order = counts.sort(descending=True, stable=True)
        return _cut(order, counts.tolist(), most)

    for number, width in plan.once(f"portable {batch} {heads} {most}", listed):
        yield _Rows.of(plan, number, width, own, heads)


def _cut(order: Tensor, counts: list[int], most: int) -> list[tuple[Tensor, int]]:
    """Cut rows in falling order of their counts: numbers of each chunk, and its largest count."""
    chunks, start = [], 0
    while start < len(counts) and counts[start]:
        stop, width = start + 1, counts[start]
        while stop < len(counts) and (stop + 1 - start) * width <= most:
            if 2 * counts[stop] < width:
                break
            stop += 1
        chunks.append((order[start:stop], width))
        start = stop
    return chunks


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a plan: parts of query blocks, each with the keys of the blocks that it keeps.

    Args:
        plan: Theirs.
        sample: Of each row, int64 ``[rows]``; so too ``head`` and ``block``, of queries.
        q_token: Token of each query, 0 where there is none, ``[rows, queries]``.
        q_live: Whether there is one.
        q_offset: Its place within its block.
        kv_slot: Slot of each key, ``[rows, keys]``.
        kv_token: Token of each key, 0 where there is none.
        kv_live: Whether there is one, and it counts.
        tile: Bit tile of each kept block, -1 where it is whole, ``[rows, blocks]``, or None.
    """

    plan: BlockPlan
    sample: Tensor
    head: Tensor
    block: Tensor
    q_token: Tensor
    q_live: Tensor
    q_offset: Tensor
    kv_slot: Tensor
    kv_token: Tensor
    kv_live: Tensor
    tile: Tensor | None

    @classmethod
    def of(cls, plan: BlockPlan, number: Tensor, width: int, own: int, heads: int) -> _Rows:
        """Look up rows by their number, ``((sample * heads + head) * blocks + block) * parts``."""
        parts = -(-plan.q.max_length // own)
        number, part = number // parts, number % parts
        number, block = number // plan.q.blocks, number % plan.q.blocks
        sample, head = number // heads, number % heads

        def at(tensor: Tensor, *index: Tensor) -> Tensor:
            """Index ``[batch|1, heads|1, ...]``: by the rows, and by what each of them reads."""
            shape = (-1, *[1] * (max(i.ndim for i in index) - 1))
            lead = sample % tensor.shape[0], head % tensor.shape[1]
            return tensor[(*(i.view(shape) for i in lead), *index)]

        def tokens(
            layout: BlockLayout, order: Tensor | None, index: Tensor, offset: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            live = offset < at(layout.lengths, index)[..., None]
            slot = (at(layout.starts, index)[..., None] + offset).clamp(max=layout.slots - 1)
            slot, live = slot.long().flatten(1), live.flatten(1)
            token = slot if order is None else at(order, slot)
            return slot, token.clamp(min=0), live & (token >= 0)

        q_offset = part[:, None] * own + torch.arange(own, device=plan.device)
        _, q_token, q_live = tokens(plan.q, plan.q_permutation, block, q_offset)
        entry = torch.arange(width, device=plan.device)[None]
        kept = at(plan.kv_indices, block[:, None], entry).long()
        offset = torch.arange(plan.kv.max_length, device=plan.device)
        kv_slot, kv_token, kv_live = tokens(plan.kv, plan.kv_permutation, kept, offset)
        listed = entry < at(plan.kv_num_blocks, block)[:, None]
        kv_live = kv_live & listed.repeat_interleave(plan.kv.max_length, 1)
        if plan.kv_log_weight is not None:  # what counts zero times may be nan
            kv_live = kv_live & (at(plan.kv_log_weight, kv_slot) != -torch.inf)
        tile = None
        if plan.partial is not None and plan.tiles is not None and len(plan.tiles):
            tile = at(plan.partial, block[:, None], entry)
        q_offset = q_offset.clamp(max=plan.q.max_length - 1)
        q_side, kv_side = (q_token, q_live, q_offset), (kv_slot, kv_token, kv_live)
        return cls(plan, sample, head, block, *q_side, *kv_side, tile)

    @property
    def lead(self) -> tuple[Tensor, Tensor]:
        """Sample and head of each row, to index with tokens."""
        return self.sample[:, None], self.head[:, None]

    def shared(self, tensor: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sample and head of each row in a tensor whose leading dimensions may be shared."""
        batch, heads = (1, 1) if tensor is None else tensor.shape[:2]
        return self.lead[0] % batch, self.lead[1] % heads

    def pick(self, x: Tensor, token: Tensor) -> Tensor:
        """Take tokens of ``[batch, seq_len, heads, ...]``: ``[rows, tokens, ...]``."""
        return x[self.lead[0], token, self.lead[1]]

    def queries(self, x: Tensor) -> Tensor:
        """Take the queries' tokens, 0 where there is none."""
        return self.pick(x, self.q_token).masked_fill(~self.q_live[..., None], 0)

    def keys(self, x: Tensor) -> Tensor:
        """Take the keys' tokens, 0 where there is none."""
        return self.pick(x, self.kv_token).masked_fill(~self.kv_live[..., None], 0)

    def weights(self) -> Tensor | None:
        """Take the keys' log weights, 0 where there is no key; None: the plan has none."""
        weight = self.plan.kv_log_weight
        if weight is None:
            return None
        return weight[(*self.shared(weight), self.kv_slot)].masked_fill(~self.kv_live, 0)

    def kept(self) -> Tensor:
        """Mark the pairs that are kept, ``[rows, queries or 1, keys]``."""
        live = self.kv_live[:, None]
        if self.tile is None or self.plan.tiles is None:
            return live
        words = self.plan.tiles[self.tile.clamp(min=0)[..., None].long(), self.q_offset[:, None]]
        bits = unpack_tiles(words, self.plan.kv.max_length)  # [rows, blocks, queries, keys]
        bits = bits | (self.tile < 0)[..., None, None]
        return bits.transpose(1, 2).flatten(2) & live
