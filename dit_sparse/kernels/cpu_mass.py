# SPDX-License-Identifier: Apache-2.0
"""Exact block mass on the CPU: how much softmax weight each block pair holds, given the LSE."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.grid import BlockLayout

BUDGET = 8 << 20  # bytes of scores held at a time


@torch.no_grad()
def block_mass(
    query: Tensor, key: Tensor, lse: Tensor, q: BlockLayout, kv: BlockLayout, scale: float
) -> Tensor:
    """Sum ``exp(scale * q k^T - lse)`` over each block pair.

    Keys in no block count nowhere, nor do queries whose LSE is -inf.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``; slots are tokens.
        key: ``[batch, kv_seq_len, heads, head_dim]``.
        lse: Of the dense attention, ``[batch, heads, seq_len]``, natural log.
        q: Query blocks.
        kv: Key blocks.
        scale: Multiplies the scores.

    Returns:
        fp32 ``[batch, heads, q_blocks, kv_blocks]``; a row sums to its block's query tokens.
    """
    batch, tokens, heads, _ = query.shape
    keys = key.shape[1]
    work = torch.promote_types(query.dtype, torch.float32)
    mass = torch.zeros(batch, heads, q.blocks, kv.blocks)
    step = max(1, BUDGET // (keys * work.itemsize))
    scores = torch.empty(min(step, tokens), keys, dtype=work)
    for i_batch in range(batch):
        for i_head in range(heads):
            k = key[i_batch, :, i_head].to(work).T
            own = lse[i_batch, i_head].to(work)
            own = torch.where(own == -torch.inf, torch.inf, own)
            q_block = _block_of_token(q, i_batch, i_head)
            kv_block = _block_of_token(kv, i_batch, i_head)
            sums = torch.zeros(q.blocks + 1, kv.blocks + 1, dtype=work)
            for start in range(0, tokens, step):
                rows = query[i_batch, start : start + step, i_head].to(work) * scale
                score = torch.mm(rows, k, out=scores[: rows.shape[0]])
                score.sub_(own[start : start + step, None]).exp_()
                by_key = torch.zeros(kv.blocks + 1, rows.shape[0], dtype=work)
                by_key.index_add_(0, kv_block, score.T)
                sums.index_add_(0, q_block[start : start + step], by_key.T)
            mass[i_batch, i_head] = sums[:-1, :-1]
    return mass


def _block_of_token(layout: BlockLayout, i_batch: int, i_head: int) -> Tensor:
    """Give every token the number of its block, and ``blocks`` where it lies in none."""
    starts = layout.starts[i_batch % layout.starts.shape[0], i_head % layout.starts.shape[1]]
    lengths = layout.lengths[i_batch % layout.starts.shape[0], i_head % layout.starts.shape[1]]
    block = torch.full((layout.slots,), layout.blocks, dtype=torch.int64)
    for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        block[start : start + length] = i
    return block
