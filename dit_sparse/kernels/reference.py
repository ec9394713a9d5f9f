# SPDX-License-Identifier: Apache-2.0
"""The definition of correct: attention by a plan, over token-level masks, in float64.

Slow on purpose and plain on purpose: every kernel is compared with this file, so it shares no
arithmetic and no layout code with any of them. One (sample, head) at a time, ``ROWS`` query
tokens at a time, so that 8k tokens fit into a laptop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.grid import BlockLayout
    from dit_sparse.core.plan import BlockPlan

ROWS = 1024  # query tokens at a time
NOT_COVERED = -1
HAS_BACKWARD = True


def reasons_against(query: Tensor, plan: BlockPlan) -> list[str]:
    """Say why this kernel cannot run the call, a reason a line: it always can."""
    del query, plan
    return []


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    scale: float,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attend each query token to the key tokens that the plan keeps.

    ``S = scale * Q K^T + log_weight``, dropped ``S = -inf``, ``LSE = log sum exp S``,
    ``O = exp(S - LSE) V``; where nothing is kept ``O = 0``, ``LSE = -inf``.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``.
        key: ``[batch, kv_seq_len, heads, head_dim]``.
        value: Like ``key``; its head_dim may differ.
        plan: Which keys each query reads.
        scale: Multiplies the scores before softmax.
        dtype: What is computed in, and what is returned where it is float64.

    Returns:
        Output ``[batch, seq_len, heads, head_dim]``, LSE ``[batch, heads, seq_len]``, both in
        ``dtype``. Round them to the dtype that a kernel under test returns.
    """
    batch, tokens, heads, _ = query.shape
    output = torch.zeros((batch, tokens, heads, value.shape[-1]), dtype=dtype, device=query.device)
    lse = torch.full((batch, heads, tokens), -torch.inf, dtype=dtype, device=query.device)
    for i_batch in range(batch):
        for i_head in range(heads):
            mask, bias = token_mask(plan, i_batch, i_head)  # [q_tokens, kv_tokens], [kv_tokens]
            k = key[i_batch, :, i_head].to(dtype)
            v = value[i_batch, :, i_head].to(dtype)
            for start in range(0, tokens, ROWS):
                rows = slice(start, start + ROWS)
                o, e = _attend_rows(
                    query[i_batch, rows, i_head].to(dtype), k, v, mask[rows], bias.to(dtype), scale
                )
                output[i_batch, rows, i_head] = o
                lse[i_batch, i_head, rows] = e
    return output, lse


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    # A key that counts zero times (log weight -inf) is a key that is not kept.
    mask = mask & (bias != -torch.inf)
    score = (q @ k.T) * scale + torch.where(bias == -torch.inf, 0.0, bias)
    score = torch.where(mask, score, -torch.inf)
    peak = score.amax(-1, keepdim=True)
    nothing = ~mask.any(-1, keepdim=True)
    peak = torch.where(nothing, 0.0, peak)
    weight = torch.where(mask, (score - peak).exp(), 0.0)
    total = weight.sum(-1, keepdim=True)
    lse = torch.where(nothing, -torch.inf, total.log() + peak)
    weight = weight / torch.where(nothing, 1.0, total)
    # 0 * nan is nan: a value that is not finite is added for the queries that keep its key only.
    finite = v.isfinite().all(-1)
    output = weight @ torch.where(finite[:, None], v, 0.0)
    for j in (~finite).nonzero().flatten().tolist():
        output = output + torch.where(mask[:, j, None], weight[:, j, None] * v[j], 0.0)
    return output, lse.squeeze(-1)


def token_mask(plan: BlockPlan, i_batch: int, i_head: int) -> tuple[Tensor, Tensor]:
    """Spell one (sample, head) of a plan out: which query token reads which key token.

    Returns:
        Mask, bool ``[query_length, key_length]``, and log weights, fp64 ``[key_length]``.
    """
    kept = _pick(plan.block_mask(), i_batch, i_head)  # [q_blocks, kv_blocks]
    q_block, q_offset = _block_of_slot(plan.q, i_batch, i_head)
    kv_block, kv_offset = _block_of_slot(plan.kv, i_batch, i_head)
    covered = (q_block[:, None] != NOT_COVERED) & (kv_block[None, :] != NOT_COVERED)
    by_slot = kept[q_block[:, None], kv_block[None, :]] & covered  # [q.slots, kv.slots]
    if plan.partial is not None and plan.tiles is not None:
        tile = torch.full(kept.shape, -1, dtype=torch.int64, device=plan.device)
        index = _pick(plan.kv_indices, i_batch, i_head)
        for i_q, count in enumerate(_pick(plan.kv_num_blocks, i_batch, i_head).tolist()):
            tile[i_q, index[i_q, :count].long()] = _pick(plan.partial, i_batch, i_head)[
                i_q, :count
            ].long()
        number = tile[q_block[:, None], kv_block[None, :]]
        if plan.tiles.shape[0]:
            word = plan.tiles[number.clamp(min=0), q_offset[:, None], kv_offset[None, :] // 32]
            bit = (word >> (kv_offset % 32).int()) & 1
            by_slot &= (number < 0) | (bit == 1)
    q_token = _token_of_slot(plan.q_permutation, plan.q.slots, i_batch, i_head, plan.device)
    kv_token = _token_of_slot(plan.kv_permutation, plan.kv.slots, i_batch, i_head, plan.device)
    mask = torch.zeros(
        (plan.query_length + 1, plan.key_length + 1), dtype=torch.bool, device=plan.device
    )
    # Slots without a token all land in the spare last row and column.
    mask[
        torch.where(q_token < 0, plan.query_length, q_token)[:, None],
        torch.where(kv_token < 0, plan.key_length, kv_token)[None, :],
    ] = by_slot
    bias = torch.zeros(plan.key_length + 1, dtype=torch.float64, device=plan.device)
    if plan.kv_log_weight is not None:
        weight = _pick(plan.kv_log_weight, i_batch, i_head).double()
        bias[torch.where(kv_token < 0, plan.key_length, kv_token)] = weight
    return mask[:-1, :-1], bias[:-1]


def block_mass(
    query: Tensor, key: Tensor, lse: Tensor, q: BlockLayout, kv: BlockLayout, scale: float
) -> Tensor:
    """Sum ``exp(score - lse)`` over each block pair, in float64.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``; slots are tokens.
        key: ``[batch, kv_seq_len, heads, head_dim]``.
        lse: Of the dense attention, ``[batch, heads, seq_len]``; -inf: the row counts nothing.
        q: Query blocks.
        kv: Key blocks; keys in no block count nowhere.
        scale: Multiplies the scores.

    Returns:
        Mass, float64 ``[batch, heads, q_blocks, kv_blocks]``; a row sums to its query tokens.
    """
    batch, _, heads, _ = query.shape
    mass = torch.zeros(
        (batch, heads, q.blocks, kv.blocks), dtype=torch.float64, device=query.device
    )
    for i_batch in range(batch):
        for i_head in range(heads):
            score = query[i_batch, :, i_head].double() @ key[i_batch, :, i_head].double().T
            row = lse[i_batch, i_head].double()[:, None]
            weight = torch.where(row == -torch.inf, 0.0, (score * scale - row).exp())
            for i_q, (q_start, q_length) in enumerate(_spans(q, i_batch, i_head)):
                for i_kv, (kv_start, kv_length) in enumerate(_spans(kv, i_batch, i_head)):
                    mass[i_batch, i_head, i_q, i_kv] = weight[
                        q_start : q_start + q_length, kv_start : kv_start + kv_length
                    ].sum()
    return mass


def _pick(tensor: Tensor, i_batch: int, i_head: int) -> Tensor:
    """Take one (sample, head) of a tensor whose leading dimensions may be shared."""
    return tensor[i_batch % tensor.shape[0], i_head % tensor.shape[1]]


def _spans(layout: BlockLayout, i_batch: int, i_head: int) -> list[tuple[int, int]]:
    starts = _pick(layout.starts, i_batch, i_head).tolist()
    return list(zip(starts, _pick(layout.lengths, i_batch, i_head).tolist(), strict=True))


def _block_of_slot(layout: BlockLayout, i_batch: int, i_head: int) -> tuple[Tensor, Tensor]:
    """Give every slot the number of its block (or NOT_COVERED) and its place in that block."""
    block = torch.full((layout.slots,), NOT_COVERED, dtype=torch.int64, device=layout.device)
    offset = torch.zeros(layout.slots, dtype=torch.int64, device=layout.device)
    for i, (start, length) in enumerate(_spans(layout, i_batch, i_head)):
        block[start : start + length] = i
        offset[start : start + length] = torch.arange(length, device=layout.device)
    return block, offset


def _token_of_slot(
    permutation: Tensor | None, slots: int, i_batch: int, i_head: int, device: torch.device
) -> Tensor:
    if permutation is None:
        return torch.arange(slots, device=device)
    return _pick(permutation, i_batch, i_head)
