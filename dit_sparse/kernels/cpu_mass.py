# SPDX-License-Identifier: Apache-2.0
"""Exact block mass on the CPU: how much softmax weight each block pair holds, given the LSE."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.grid import BlockLayout

BUDGET = 2 << 20  # bytes of scores held at a time: they stay in the cache


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
    work = torch.promote_types(query.dtype, torch.float32)
    mass = torch.zeros(batch, heads, q.blocks, kv.blocks)
    length = kv.max_length
    slot = {}  # of each key: block * max_length + place, by (batch, head) of the layout
    for i_batch in range(batch):
        for i_head in range(heads):
            own = lse[i_batch, i_head].to(work)
            minus = torch.where(own == -torch.inf, -torch.inf, -own)
            part = i_batch % kv.starts.shape[0], i_head % kv.starts.shape[1]
            if part not in slot:
                slot[part] = _padded_slots(kv, *part)
            token, padding = slot[part]
            k = key[i_batch, :, i_head].to(work)[token].T  # [head_dim, blocks * max_length]
            sums = torch.zeros(q.blocks + 1, kv.blocks, dtype=work)
            q_block = _block_of_token(q, i_batch, i_head)
            step = max(1, BUDGET // (k.shape[1] * work.itemsize))
            scores = torch.empty(min(step, tokens), k.shape[1], dtype=work)
            for start in range(0, tokens, step):
                rows = query[i_batch, start : start + step, i_head].to(work) * scale
                bias = minus[start : start + step, None].expand(-1, k.shape[1])
                weight = torch.addmm(bias, rows, k, out=scores[: rows.shape[0]]).exp_()
                if padding.numel():
                    weight.index_fill_(1, padding, 0.0)
                by_block = weight.view(rows.shape[0], kv.blocks, length).sum(-1)
                sums.index_add_(0, q_block[start : start + step], by_block)
            mass[i_batch, i_head] = sums[:-1]
    return mass


def _padded_slots(layout: BlockLayout, i_batch: int, i_head: int) -> tuple[Tensor, Tensor]:
    """Lay blocks side by side at their greatest length, so that a block's sum is a view's.

    Returns:
        The token in each slot, int64 ``[blocks * max_length]`` (0 on padding), and the slots that
        are padding.
    """
    place = torch.arange(layout.max_length)
    starts = layout.starts[i_batch, i_head].long()[:, None]
    live = place < layout.lengths[i_batch, i_head][:, None]
    token = torch.where(live, starts + place, 0).flatten()
    return token, (~live).flatten().nonzero().flatten()


def _block_of_token(layout: BlockLayout, i_batch: int, i_head: int) -> Tensor:
    """Give every token the number of its block, and ``blocks`` where it lies in none."""
    starts = layout.starts[i_batch % layout.starts.shape[0], i_head % layout.starts.shape[1]]
    lengths = layout.lengths[i_batch % layout.starts.shape[0], i_head % layout.starts.shape[1]]
    block = torch.full((layout.slots,), layout.blocks, dtype=torch.int64)
    for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        block[start : start + length] = i
    return block
