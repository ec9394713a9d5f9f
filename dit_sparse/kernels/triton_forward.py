# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention, forward, by pointers: any plan, any target that Triton has.

Online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867) over the kept blocks, tiled as in
FlashAttention-2 (Dao 2023, arXiv:2307.08691). What a plan does not use (permutation, bit tiles,
weights, unequal starts) is None or a constant, and is compiled away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from dit_sparse.kernels.triton_blocks import (
    head_rows,
    load_rows,
    own_list,
    own_rows,
    row_mask,
    row_pointers,
    row_tokens,
    side_offsets,
    walk_first,
    walk_next,
    walk_total,
    whole_run,
)
from dit_sparse.kernels.triton_launch import (
    Launch,
    alignment,
    factors,
    lists_of,
    owned_side,
    rows_of,
    strides_of,
    tile_constants,
    walked_side,
)
from dit_sparse.kernels.triton_scores import row_lse, score_tile, soften
from dit_sparse.kernels.triton_target import Tiling, peels, repair_tiling, walk_chunks

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.plan import BlockPlan


@triton.jit
def split_non_finite(b_v, m_pair, PRECISION: tl.constexpr):
    """Take values that are not finite out of a product, and add them where their key is kept.

    0 * NaN is NaN: a dropped key's value must not enter the product of a row that drops it.

    Returns:
        The values with zeros instead, and per row what the kept ones of these add: inf, -inf,
        NaN or 0, ``[BLOCK_M, BLOCK_D]``.
    """
    m_kept = m_pair.to(b_v.dtype)  # [BLOCK_M, BLOCK_N]
    m_nan = b_v != b_v  # [BLOCK_N, BLOCK_D]
    m_up = b_v == float("inf")
    m_down = b_v == float("-inf")
    ups = tl.dot(m_kept, m_up.to(b_v.dtype), input_precision=PRECISION)
    downs = tl.dot(m_kept, m_down.to(b_v.dtype), input_precision=PRECISION)
    nans = tl.dot(m_kept, m_nan.to(b_v.dtype), input_precision=PRECISION)
    b_extra = tl.where(ups > 0, float("inf"), 0.0) + tl.where(downs > 0, float("-inf"), 0.0)
    b_extra += tl.where(nans > 0, float("nan"), 0.0)
    return tl.where(m_nan | m_up | m_down, 0.0, b_v), b_extra


@triton.jit
def attend_tiles(
    state,
    b_q,
    p_key,
    key,
    p_value,
    value,
    kv,
    at,
    lists,
    at_partial,
    p_list,
    count,
    gap,
    gap_size,
    q_longest,
    rows,
    m_rows,
    scale,
    factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    REPAIR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Take the tiles of all listed blocks but ``gap_size`` from entry ``gap`` on into ``state``.

    The state is ``peak, total, b_out, b_extra, kept``, the arguments are those of ``score_tile``.
    The loop is a plain ``range``: with ``tl.range(num_stages=...)`` the loads of the walk too go
    through shared memory, with two more barriers for each.
    """
    peak, total, b_out, b_extra, kept = state
    tiles = walk_total(kv, at, p_list, count - gap_size, BLOCK_N, CHUNKS)
    start, length, ahead = walk_first(kv, at, p_list, count, gap, gap_size)
    i_entry = 0
    done = 0
    for _ in range(tiles):
        score, _b_k, m_columns, m_pair, kept_here = score_tile(
            b_q, p_key, key, kv, at, lists, at_partial, i_entry, q_longest, rows, start,
            done, length, scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, ALIGN, WHOLE,
        )  # fmt: skip
        kept = kept | kept_here
        b_v = load_rows(
            p_value, value, kv.permutation, at[2], start + done, tl.arange(0, BLOCK_N),
            m_columns, HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip  # [BLOCK_N, BLOCK_D]
        if REPAIR:
            b_v, b_more = split_non_finite(b_v, m_rows[:, None] & m_pair, PRECISION)
            b_extra += b_more
        b_p, shrink, peak, total = soften(score, peak, total, factor)
        b_out = b_out * shrink[:, None]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision=PRECISION)
        i_entry, done, start, length, ahead = walk_next(
            kv, at, p_list, count, i_entry, done, start, length, ahead, gap, gap_size, BLOCK_N,
            CHUNKS,
        )  # fmt: skip
    return peak, total, b_out, b_extra, kept


@triton.jit
def attend_fwd_kernel(
    query,
    key,
    value,
    output,
    p_lse,
    lse_strides,
    q,
    kv,
    lists,
    scale,
    factor,
    drift,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    REPAIR: tl.constexpr,
    PEEL: tl.constexpr,
):
    """Compute ``BLOCK_M`` query rows of one (sample, head); arguments as ``forward_launch`` says.

    With ``REPAIR`` only tiles are computed again that hold anything not finite, with care that
    nothing of a dropped key's value reaches them.
    """
    i_head = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    q_at = side_offsets(q, i_batch, i_head)
    i_q, q_start, q_length, first = own_rows(q, q_at, i_batch, i_head, BLOCK_M)
    if first >= q_length:
        return
    rows = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_rows = rows < q_length  # [BLOCK_M]
    m_out = row_mask(m_rows, HEAD_DIM, BLOCK_D)
    if REPAIR:
        p_output = row_pointers(
            head_rows(output, i_batch, i_head, ALIGN), output, q.permutation, q_at[2], q_start,
            rows, m_rows, BLOCK_D, ALIGN,
        )  # fmt: skip
        b_old = tl.load(p_output, mask=m_out, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
        if tl.max(((b_old - b_old) != 0.0).to(tl.int32)) == 0:
            return
    b_q = load_rows(
        head_rows(query, i_batch, i_head, ALIGN), query, q.permutation, q_at[2], q_start,
        rows, m_rows, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip  # [BLOCK_M, BLOCK_D]
    p_key = head_rows(key, i_batch, i_head, ALIGN)
    p_value = head_rows(value, i_batch, i_head, ALIGN)
    at = side_offsets(kv, i_batch, i_head)
    count, p_list, at_partial = own_list(lists, i_batch, i_head, i_q)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_extra = tl.zeros([BLOCK_M, BLOCK_D], tl.float32) if REPAIR else 0.0
    kept = tl.zeros([BLOCK_M], tl.int32) if lists.partial is not None else 0  # 0: none yet
    state = peak, total, b_out, b_extra, kept
    gap, gap_size = 0, 0
    if PEEL:
        gap, end = whole_run(kv, at, p_list, count, BLOCK_N, CHUNKS)
        gap_size = end - gap
        state = attend_tiles(
            state, b_q, p_key, key, p_value, value, kv, at, lists, at_partial, p_list + gap,
            gap_size, 0, 0, q.longest, rows, m_rows, scale, factor, HEAD_DIM, BLOCK_D, BLOCK_M,
            BLOCK_N, CHUNKS, PRECISION, ALIGN, REPAIR, WHOLE=True,
        )  # fmt: skip
    peak, total, b_out, b_extra, kept = attend_tiles(
        state, b_q, p_key, key, p_value, value, kv, at, lists, at_partial, p_list,
        count, gap, gap_size, q.longest, rows, m_rows, scale, factor, HEAD_DIM, BLOCK_D, BLOCK_M,
        BLOCK_N, CHUNKS, PRECISION, ALIGN, REPAIR, WHOLE=False,
    )  # fmt: skip

    # Kept keys whose scores are all -inf give 0 / 0 = NaN, as dense attention does.
    b_out = b_out / total[:, None] + b_extra
    if lists.partial is not None:
        if kv.weight is not None:  # the bits of a key that weighs nothing count for nothing
            kept = (total != 0.0).to(tl.int32)  # [BLOCK_M]
        b_out = tl.where(kept[:, None] == 0, 0.0, b_out)
    elif kept == 0:
        b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    p_output = row_pointers(
        head_rows(output, i_batch, i_head, ALIGN), output, q.permutation, q_at[2], q_start,
        rows, m_rows, BLOCK_D, ALIGN,
    )  # fmt: skip
    tl.store(p_output, b_out.to(p_output.dtype.element_ty), mask=m_out)
    p_lse += i_batch * lse_strides[0] + i_head * lse_strides[1]
    p_lse += row_tokens(q, q_at, q_start, rows, m_rows)
    tl.store(p_lse, row_lse(peak, total, drift), mask=m_rows)


def forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    plan: BlockPlan,
    scale: float,
    tiling: Tiling,
    *,
    repair: bool = False,
) -> Launch:
    """Say with which grid and arguments the forward kernel computes ``output`` and ``lse``.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``, any strides.
        key: ``[batch, kv_seq_len, heads, head_dim]``, any strides.
        value: Like ``key``.
        output: Like ``query``; written.
        lse: fp32 ``[batch, heads, seq_len]``, last stride 1; written.
        plan: What to compute.
        scale: Positive.
        tiling: Tile sizes and launch options.
        repair: Compute tiles again whose output is not finite, instead of all tiles.
    """
    batch, _, heads, head_dim = query.shape
    q_side, tiles = owned_side(plan.q, plan.q_permutation, tiling.block_m)
    arguments = {
        "query": rows_of(query),
        "key": rows_of(key),
        "value": rows_of(value),
        "output": rows_of(output),
        "p_lse": lse,
        "lse_strides": strides_of(lse),
        "q": q_side,
        "kv": walked_side(plan.kv, plan.kv_permutation, plan.kv_log_weight),
        "lists": lists_of(plan.kv_num_blocks, plan.kv_indices, plan.partial, plan.tiles),
        **factors(scale, weighted=plan.kv_log_weight is not None),
        **tile_constants(head_dim, query.dtype, tiling),
        "CHUNKS": walk_chunks(plan.kv, tiling.block_n),
        "ALIGN": alignment(query, key, value, output),
        "REPAIR": repair,
        "PEEL": peels(plan, tiling, query.dtype),
    }
    grid = (tiles, heads, batch)
    return Launch(attend_fwd_kernel, grid, arguments, tiling.warps, tiling.stages)


def forward(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float, tiling: Tiling
) -> tuple[Tensor, Tensor]:
    """Attend by ``plan``; ``triton_attention.attend`` checks what this takes on trust."""
    batch, tokens, heads, _ = query.shape
    output = torch.empty_like(query)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=query.device)
    forward_launch(query, key, value, output, lse, plan, scale, tiling).run()
    if plan.partial is not None:
        # A partial block's value that is not finite has reached rows that drop its key.
        small = repair_tiling(tiling)
        forward_launch(query, key, value, output, lse, plan, scale, small, repair=True).run()
    return output, lse
