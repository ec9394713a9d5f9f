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
    head_offset,
    leading,
    load_rows,
    own_list,
    own_span,
    own_tile,
    row_mask,
    row_pointers,
    row_tokens,
    tile_bits,
    walk_first,
    walk_next,
    walk_total,
)
from dit_sparse.kernels.triton_launch import (
    Launch,
    alignment,
    list_arguments,
    side_arguments,
    strides_of,
)
from dit_sparse.kernels.triton_target import (
    Tiling,
    precision,
    repair_tiling,
    walk_chunks,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.plan import BlockPlan

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


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
def attend_fwd_kernel(
    p_query,
    p_key,
    p_value,
    p_output,
    p_lse,
    query_strides,
    key_strides,
    value_strides,
    output_strides,
    lse_strides,
    p_q_starts,
    p_q_lengths,
    p_q_permutation,
    p_q_tiles,
    q_strides,
    q_max,
    q_parts,
    p_kv_starts,
    p_kv_lengths,
    p_kv_permutation,
    p_kv_weight,
    kv_strides,
    kv_max,
    p_counts,
    p_indices,
    p_partial,
    p_tiles,
    list_strides,
    q_blocks,
    qk_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    Q_SPREAD: tl.constexpr,
    KV_SPREAD: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    REPAIR: tl.constexpr,
):
    """Compute ``BLOCK_M`` query rows of one (sample, head); arguments as ``forward_launch`` says.

    With ``REPAIR`` only tiles are computed again that hold anything not finite, with care that
    nothing of a dropped key's value reaches them.
    """
    i_head = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    i_q, i_part = own_tile(p_q_tiles, (q_strides[6], q_strides[7]), i_batch, i_head, q_parts)
    if i_q >= q_blocks:
        return
    q_start, q_length = own_span(
        p_q_starts, p_q_lengths, q_strides, i_batch, i_head, i_q, q_max, Q_SPREAD
    )
    if i_part * BLOCK_M >= q_length:
        return
    rows = i_part * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_rows = rows < q_length  # [BLOCK_M]
    if p_q_permutation is not None:
        p_q_permutation += i_batch * q_strides[4] + i_head * q_strides[5]
    p_output = row_pointers(
        p_output + head_offset(i_batch, i_head, output_strides, ALIGN), output_strides,
        p_q_permutation, q_start, rows, m_rows, BLOCK_D, ALIGN,
    )  # fmt: skip
    m_out = row_mask(m_rows, HEAD_DIM, BLOCK_D)
    if REPAIR:
        b_old = tl.load(p_output, mask=m_out, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
        if tl.max(((b_old - b_old) != 0.0).to(tl.int32)) == 0:
            return
    b_q = load_rows(
        p_query + head_offset(i_batch, i_head, query_strides, ALIGN), query_strides,
        p_q_permutation, q_start, rows, m_rows, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip  # [BLOCK_M, BLOCK_D]

    p_key += head_offset(i_batch, i_head, key_strides, ALIGN)
    p_value += head_offset(i_batch, i_head, value_strides, ALIGN)
    p_kv_starts = leading(p_kv_starts, i_batch, i_head, kv_strides[0], kv_strides[1])
    p_kv_lengths = leading(p_kv_lengths, i_batch, i_head, kv_strides[2], kv_strides[3])
    if p_kv_permutation is not None:
        p_kv_permutation += i_batch * kv_strides[4] + i_head * kv_strides[5]
    if p_kv_weight is not None:
        p_kv_weight += i_batch * kv_strides[6] + i_head * kv_strides[7]
    p_count, p_list = own_list(p_counts, p_indices, list_strides, i_batch, i_head, i_q)
    if p_partial is not None:
        p_partial += i_batch * list_strides[6] + i_head * list_strides[7]
        p_partial += i_q.to(tl.int64) * list_strides[8]

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)  # running maximum, in log2 units
    total = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_extra = tl.zeros([BLOCK_M, BLOCK_D], tl.float32) if REPAIR else 0.0
    kept = tl.zeros([BLOCK_M], tl.int32) if p_partial is not None else 0  # 0: no key kept yet
    # With weights the scores are scaled before they are added; else within the exponent.
    factor = qk_scale if p_kv_weight is None else 1.0
    count = tl.load(p_count)
    tiles = walk_total(p_list, count, p_kv_lengths, BLOCK_N, CHUNKS)
    start, length, ahead = walk_first(p_list, count, p_kv_starts, p_kv_lengths, kv_max, KV_SPREAD)
    i_entry = 0
    done = 0
    for _ in tl.range(0, tiles, num_stages=STAGES):
        columns = done + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        m_columns = columns < length  # [BLOCK_N]
        if p_kv_weight is not None:
            weight = tl.load(p_kv_weight + start + columns, mask=m_columns, other=float("-inf"))
            m_columns = m_columns & (weight != float("-inf"))
        b_k = load_rows(
            p_key, key_strides, p_kv_permutation, start, columns, m_columns, HEAD_DIM, BLOCK_D,
            ALIGN,
        )  # fmt: skip  # [BLOCK_N, BLOCK_D]
        score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if p_kv_weight is not None:
            score = score * qk_scale + (weight * LOG2_E)[None, :]
            score = tl.where(m_columns[None, :], score, float("-inf"))
        elif length - done < BLOCK_N:
            score = tl.where(m_columns[None, :], score, float("-inf"))
        b_v = load_rows(
            p_value, value_strides, p_kv_permutation, start, columns, m_columns, HEAD_DIM,
            BLOCK_D, ALIGN,
        )  # fmt: skip  # [BLOCK_N, BLOCK_D]
        m_pair = m_rows[:, None] & m_columns[None, :]  # [BLOCK_M, BLOCK_N]
        if p_partial is not None:
            m_tile, m_any = tile_bits(
                p_tiles, tl.load(p_partial + i_entry), q_max, kv_max, rows, done, length, BLOCK_M,
                BLOCK_N, TRANSPOSED=False,
            )  # fmt: skip
            score = tl.where(m_tile, score, float("-inf"))
            m_pair = m_pair & m_tile
            kept = kept | m_any
        elif p_kv_weight is not None:
            kept += tl.sum(m_columns.to(tl.int32), 0)
        else:
            kept += tl.maximum(length - done, 0)
        if REPAIR:
            b_v, b_more = split_non_finite(b_v, m_pair, PRECISION)
            b_extra += b_more

        peak_new = tl.maximum(peak, tl.max(score, 1) * factor)  # [BLOCK_M]
        base = tl.where(peak_new == float("-inf"), 0.0, peak_new)  # [BLOCK_M]: nothing kept yet
        b_p = tl.exp2(score * factor - base[:, None])  # [BLOCK_M, BLOCK_N]
        shrink = tl.exp2(peak - base)  # [BLOCK_M]
        total = total * shrink + tl.sum(b_p, 1)
        b_out = b_out * shrink[:, None]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision=PRECISION)
        peak = peak_new
        i_entry, done, start, length, ahead = walk_next(
            i_entry, done, start, length, ahead,
            p_list, count, p_kv_starts, p_kv_lengths, kv_max, BLOCK_N, CHUNKS, KV_SPREAD,
        )  # fmt: skip

    # Kept keys whose scores are all -inf give 0 / 0 = NaN, as dense attention does.
    b_out = b_out / total[:, None] + b_extra
    if p_partial is not None:
        if p_kv_weight is not None:  # the bits of a key that weighs nothing count for nothing
            kept = (total != 0.0).to(tl.int32)  # [BLOCK_M]
        b_out = tl.where(kept[:, None] == 0, 0.0, b_out)  # type: ignore[index]  # a block here
    elif kept == 0:
        b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tl.store(p_output, b_out.to(p_output.dtype.element_ty), mask=m_out)
    token = row_tokens(p_q_permutation, q_start, rows, m_rows)  # [BLOCK_M]
    lse = (peak + tl.log2(total)) * LN_2  # [BLOCK_M]; nothing kept: -inf + -inf
    p_lse += i_batch * lse_strides[0] + i_head * lse_strides[1]
    tl.store(p_lse + token, lse, mask=m_rows)


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
    q_side, q_tiles = side_arguments("q", plan.q, plan.q_permutation, tiling.block_m)
    kv_side, _ = side_arguments(
        "kv", plan.kv, plan.kv_permutation, None, weight=plan.kv_log_weight
    )
    arguments = {
        "p_query": query,
        "p_key": key,
        "p_value": value,
        "p_output": output,
        "p_lse": lse,
        "query_strides": query.stride(),
        "key_strides": key.stride(),
        "value_strides": value.stride(),
        "output_strides": output.stride(),
        "lse_strides": strides_of(lse),
        **q_side,
        **kv_side,
        **list_arguments(plan.kv_num_blocks, plan.kv_indices, plan.partial),
        "p_tiles": plan.tiles,
        "q_blocks": plan.q.blocks,
        "qk_scale": scale * LOG2_E.value,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "Q_SPREAD": plan.q.spread,
        "KV_SPREAD": plan.kv.spread,
        "CHUNKS": walk_chunks(plan.kv, tiling.block_n),
        "STAGES": tiling.stages,
        "PRECISION": precision(query.dtype),
        "ALIGN": alignment(query, key, value, output),
        "REPAIR": repair,
    }
    return Launch(
        attend_fwd_kernel, (q_tiles, heads, batch), arguments, tiling.warps, tiling.stages
    )


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
