# SPDX-License-Identifier: Apache-2.0
"""The two kernels of the backward pass; ``triton_backward.py`` has the formulas and launches them.

``P`` is computed again from scores and LSE; ``D`` (``p_delta``) is there already.
"""

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
)
from dit_sparse.kernels.triton_scores import load_lse, score_tile, softmax_weights, tile_bits


@triton.jit
def attend_bwd_query_kernel(
    query,
    key,
    value,
    grad_output,
    p_lse,
    p_delta,
    lse_strides,
    grad_query,
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
):
    """Compute dQ of ``BLOCK_M`` query rows; they walk the key blocks that they keep."""
    i_head = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    q_at = side_offsets(q, i_batch, i_head)
    i_q, q_start, q_length, first = own_rows(q, q_at, i_batch, i_head, BLOCK_M)
    if first >= q_length:
        return
    rows = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_rows = rows < q_length  # [BLOCK_M]
    b_q = load_rows(
        head_rows(query, i_batch, i_head, ALIGN), query, q.permutation, q_at[2], q_start,
        rows, m_rows, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip  # [BLOCK_M, BLOCK_D]
    b_grad = load_rows(
        head_rows(grad_output, i_batch, i_head, ALIGN), grad_output, q.permutation,
        q_at[2], q_start, rows, m_rows, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip  # [BLOCK_M, BLOCK_D]
    i_row = i_batch * lse_strides[0] + i_head * lse_strides[1]
    i_row += row_tokens(q, q_at, q_start, rows, m_rows)  # [BLOCK_M]
    lse, rest = load_lse(p_lse + i_row, m_rows, drift)
    delta = tl.load(p_delta + i_row, mask=m_rows, other=0.0)  # [BLOCK_M]
    p_key = head_rows(key, i_batch, i_head, ALIGN)
    p_value = head_rows(value, i_batch, i_head, ALIGN)
    at = side_offsets(kv, i_batch, i_head)
    count, p_list, at_partial = own_list(lists, i_batch, i_head, i_q)

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tiles = walk_total(kv, at, p_list, count, BLOCK_N, CHUNKS)
    start, length, ahead = walk_first(kv, at, p_list, count, 0, 0)
    i_entry = 0
    done = 0
    for _ in range(tiles):
        score, b_k, m_columns, _m_pair, _kept = score_tile(
            b_q, p_key, key, kv, at, lists, at_partial, i_entry, q.longest, rows, start,
            done, length, scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, ALIGN, False,
        )  # fmt: skip
        b_v = load_rows(
            p_value, value, kv.permutation, at[2], start + done, tl.arange(0, BLOCK_N),
            m_columns, HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip  # [BLOCK_N, BLOCK_D]
        b_p = softmax_weights(score, lse[:, None], rest[:, None], factor, PRECISION)
        b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        b_ds = b_p * (b_dp - delta[:, None])  # [BLOCK_M, BLOCK_N]
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
        i_entry, done, start, length, ahead = walk_next(
            kv, at, p_list, count, i_entry, done, start, length, ahead, 0, 0, BLOCK_N, CHUNKS
        )
    p_block = row_pointers(
        head_rows(grad_query, i_batch, i_head, ALIGN), grad_query, q.permutation, q_at[2],
        q_start, rows, m_rows, BLOCK_D, ALIGN,
    )  # fmt: skip
    b_dq = (b_dq * scale).to(p_block.dtype.element_ty)
    tl.store(p_block, b_dq, mask=row_mask(m_rows, HEAD_DIM, BLOCK_D))


@triton.jit
def attend_bwd_key_kernel(
    query,
    key,
    value,
    grad_output,
    p_lse,
    p_delta,
    lse_strides,
    grad_key,
    grad_value,
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
):
    """Compute dK and dV of ``BLOCK_N`` keys; they walk the query blocks that keep them.

    Everything is transposed: keys stand in rows, so that no product needs a transposed P.
    """
    i_head = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    kv_at = side_offsets(kv, i_batch, i_head)
    i_kv, kv_start, kv_length, first = own_rows(kv, kv_at, i_batch, i_head, BLOCK_N)
    if first >= kv_length:
        return
    columns = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_columns = columns < kv_length  # [BLOCK_N]
    b_k = load_rows(
        head_rows(key, i_batch, i_head, ALIGN), key, kv.permutation, kv_at[2], kv_start,
        columns, m_columns, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip  # [BLOCK_N, BLOCK_D]
    b_v = load_rows(
        head_rows(value, i_batch, i_head, ALIGN), value, kv.permutation, kv_at[2],
        kv_start, columns, m_columns, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip  # [BLOCK_N, BLOCK_D]
    if kv.weight is not None:
        p_weight = kv.weight + kv_at[3] + kv_start + columns
        weight = tl.load(p_weight, mask=m_columns, other=float("-inf"))  # [BLOCK_N]
    p_query = head_rows(query, i_batch, i_head, ALIGN)
    p_grad_output = head_rows(grad_output, i_batch, i_head, ALIGN)
    i_head_row = i_batch * lse_strides[0] + i_head * lse_strides[1]
    at = side_offsets(q, i_batch, i_head)
    count, p_list, at_partial = own_list(lists, i_batch, i_head, i_kv)

    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    tiles = walk_total(q, at, p_list, count, BLOCK_M, CHUNKS)
    start, length, ahead = walk_first(q, at, p_list, count, 0, 0)
    i_entry = 0
    done = 0
    for _ in range(tiles):
        rows = done + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        m_rows = rows < length  # [BLOCK_M]
        i_row = i_head_row + row_tokens(q, at, start, rows, m_rows)  # [BLOCK_M]
        b_q = load_rows(
            p_query, query, q.permutation, at[2], start, rows, m_rows, HEAD_DIM, BLOCK_D,
            ALIGN,
        )  # fmt: skip  # [BLOCK_M, BLOCK_D]
        lse, rest = load_lse(p_lse + i_row, m_rows, drift)
        delta = tl.load(p_delta + i_row, mask=m_rows, other=0.0)  # [BLOCK_M]
        score = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if kv.weight is not None:
            score = tl.fma(score, scale, weight[:, None])
        if lists.partial is not None:
            m_tile, _ = tile_bits(
                lists.bits, tl.load(lists.partial + at_partial + i_entry), q.longest, kv.longest,
                rows, first, kv_length, BLOCK_M, BLOCK_N, TRANSPOSED=True,
            )  # fmt: skip
            score = tl.where(m_tile, score, float("-inf"))
        # 0 where there is no row
        b_p = softmax_weights(score, lse[None, :], rest[None, :], factor, PRECISION)
        b_grad = load_rows(
            p_grad_output, grad_output, q.permutation, at[2], start, rows, m_rows,
            HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip  # [BLOCK_M, BLOCK_D]
        b_dv = tl.dot(b_p.to(b_grad.dtype), b_grad, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        b_ds = b_p * (b_dp - delta[None, :])  # [BLOCK_N, BLOCK_M]
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
        i_entry, done, start, length, ahead = walk_next(
            q, at, p_list, count, i_entry, done, start, length, ahead, 0, 0, BLOCK_M, CHUNKS
        )
    m_out = row_mask(m_columns, HEAD_DIM, BLOCK_D)
    p_block = row_pointers(
        head_rows(grad_key, i_batch, i_head, ALIGN), grad_key, kv.permutation, kv_at[2],
        kv_start, columns, m_columns, BLOCK_D, ALIGN,
    )  # fmt: skip
    tl.store(p_block, (b_dk * scale).to(p_block.dtype.element_ty), mask=m_out)
    p_block = row_pointers(
        head_rows(grad_value, i_batch, i_head, ALIGN), grad_value, kv.permutation,
        kv_at[2], kv_start, columns, m_columns, BLOCK_D, ALIGN,
    )  # fmt: skip
    tl.store(p_block, b_dv.to(p_block.dtype.element_ty), mask=m_out)
