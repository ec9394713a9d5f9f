# SPDX-License-Identifier: Apache-2.0
"""Block means: every key block that a row of blocks drops is read as one key.

A dropped block of n keys gives one key: its mean key, its mean value, weight n, so that its score
is scale * q . mean(k) + ln n. Kept keys and means share one softmax; no key counts twice.

Sources: BLADE's ASA_G (arXiv:2508.10774) and SVG-EAR (arXiv:2603.08982) compensate so; the first
counts kept keys twice, the second takes means of whole clusters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.kernels.chunks import (
    block_of_slot,
    block_of_token,
    budget,
    head_parts,
    of_heads,
    scores,
    work_dtype,
)
from dit_sparse.kernels.pool import pool

if TYPE_CHECKING:
    from torch import Tensor


def block_means(x: Tensor, plan: BlockPlan) -> Tensor:
    """Average the tokens of each key block: like ``x``, blocks for tokens; 0 where it is empty."""
    return pool(x, plan.kv, plan.kv_permutation).transpose(1, 2).to(x.dtype)


def means_plan(plan: BlockPlan) -> BlockPlan:
    """Plan the means that each row of blocks reads: key j is the mean of key block j.

    Every mean is a block of its own, so it suits kernels that join a row's blocks, as the CPU's
    do. A block that is kept in part counts as kept.
    """
    return plan.once("means plan", lambda: _means_plan(plan))


def _means_plan(plan: BlockPlan) -> BlockPlan:
    kv = plan.kv
    length = (kv.lengths > 0).int()
    start = torch.arange(kv.blocks, dtype=torch.int32, device=kv.device).expand_as(length)
    return BlockPlan.from_block_mask(
        dropped_blocks(plan),
        plan.q,
        BlockLayout(start, length, kv.blocks, 1, spread=True),
        q_permutation=plan.q_permutation,
        kv_log_weight=log_lengths(plan),
        q_tokens=plan.q_tokens,
    )


def add_means(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    scale: float,
    output: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Merge the means into the attention over kept keys by masked products, in torch alone.

    For devices whose kernel reads whole tiles of keys. Gradients pass; scratch is bounded by
    chunks of queries.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``.
        key: Means, ``[batch, kv_blocks, heads, head_dim]``.
        value: Like ``key``.
        plan: What the kernel computed.
        scale: Multiplies the scores before softmax.
        output: Of the kept keys, like ``query``.
        lse: Of the kept keys, fp32 ``[batch, heads, seq_len]``.

    Returns:
        Output and LSE over kept keys and means.
    """
    batch, tokens, heads, _ = query.shape
    bias, block = plan.once("means bias", lambda: _bias(plan, tokens))
    half = query.dtype if query.is_cuda else work_dtype(query.dtype)
    bytes_per_row = 4 * batch * plan.kv.blocks
    step = max(1, min(tokens, budget(query.device) // bytes_per_row))
    outputs, sums = [], []
    for part in head_parts(heads, bytes_per_row * step, query.device):
        k, v = (x[:, :, part].transpose(1, 2).to(half) for x in (key, value))
        merged = []
        for rows in (slice(first, first + step) for first in range(0, tokens, step)):
            q = query[:, rows, part].transpose(1, 2)
            score = scores(q.to(half), k) * scale
            score = score + _rows_of(of_heads(bias, part), of_heads(block, part)[..., rows])
            kept = lse[:, part, rows].to(score.dtype)
            total = torch.logaddexp(kept, score.logsumexp(-1))
            base = total.masked_fill(total == -torch.inf, 0)[..., None]  # nothing to read at all
            seen = scores((score - base).exp().to(half), v.transpose(-1, -2))
            seen = seen + (kept[..., None] - base).exp() * output[:, rows, part].transpose(1, 2)
            merged.append((seen.transpose(1, 2).to(output.dtype), total.to(lse.dtype)))
        parts = list(zip(*merged, strict=True))
        outputs.append(torch.cat(parts[0], 1))
        sums.append(torch.cat(parts[1], 2))
    return torch.cat(outputs, 2), torch.cat(sums, 1)


def log_lengths(plan: BlockPlan) -> Tensor:
    """Give ln n of each key block, the log weight of its mean: fp32, 0 where it is empty."""
    return plan.kv.lengths.clamp(min=1).float().log()


def dropped_blocks(plan: BlockPlan) -> Tensor:
    """Mark the blocks with keys that each row drops whole, ``[batch, heads, q, kv_blocks]``."""
    return ~plan.block_mask() & (plan.kv.lengths > 0)[..., None, :]


def _bias(plan: BlockPlan, tokens: int) -> tuple[Tensor, Tensor]:
    """Give ln n of each dropped block, -inf for others, and the query block of every token."""
    bias = torch.where(dropped_blocks(plan), log_lengths(plan)[..., None, :], -torch.inf)
    if plan.q_permutation is None:
        return bias, block_of_slot(plan.q)
    return bias, block_of_token(plan.q, plan.q_permutation, tokens)


def _rows_of(bias: Tensor, block: Tensor) -> Tensor:
    """Expand rows of blocks to tokens: ``[batch|1, heads|1, tokens, kv_blocks]``."""
    lead = torch.broadcast_shapes(bias.shape[:2], block.shape[:2])
    index = block.expand(*lead, -1)[..., None].expand(*lead, -1, bias.shape[-1])
    return bias.expand(*lead, -1, -1).gather(2, index)
