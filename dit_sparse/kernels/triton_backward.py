# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention, backward: exact gradients through the kept blocks, always deterministic.

Dao 2023, arXiv:2307.08691, section 3.1.2: ``P = exp(S - LSE)``, ``dV = P^T dO``, ``dP = dO V^T``,
``dS = P * (dP - D)`` with ``D = rowsum(dO * O) - dLSE``, ``dQ = scale * dS K``,
``dK = scale * dS^T Q``. Nothing is added atomically: one program owns its query rows and walks the
plan's lists, another owns its key rows and walks the transposed lists, made on the device.

One file because the three kernels share ``D`` and the launch arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from dit_sparse.kernels.triton_target import Tiling, precision, walk_chunks

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.plan import BlockPlan

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
ROWS = 64  # of a program of the delta kernel


@triton.jit
def delta_bwd_kernel(
    p_output,
    p_grad_output,
    p_lse,
    p_grad_lse,
    p_delta,
    output_strides,
    grad_output_strides,
    lse_strides,
    grad_lse_strides,
    tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Compute ``D = rowsum(dO * O) - dLSE``, 0 for rows that keep nothing."""
    i_head = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * ROWS
    rows = tl.arange(0, ROWS)  # [ROWS]
    m_rows = start + rows < tokens
    b_out = load_rows(
        p_output + head_offset(i_batch, i_head, output_strides, ALIGN), output_strides, None,
        start, rows, m_rows, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip  # [ROWS, BLOCK_D]
    b_grad = load_rows(
        p_grad_output + head_offset(i_batch, i_head, grad_output_strides, ALIGN),
        grad_output_strides, None, start, rows, m_rows, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip  # [ROWS, BLOCK_D]
    delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)  # [ROWS]
    i_lse = i_batch * lse_strides[0] + i_head * lse_strides[1] + start + rows
    i_grad = i_batch * grad_lse_strides[0] + i_head * grad_lse_strides[1]
    i_grad += (start + rows) * grad_lse_strides[2]
    lse = tl.load(p_lse + i_lse, mask=m_rows, other=0.0)  # [ROWS]
    delta -= tl.load(p_grad_lse + i_grad, mask=m_rows, other=0.0)
    tl.store(p_delta + i_lse, tl.where(lse == float("-inf"), 0.0, delta), mask=m_rows)


@triton.jit
def load_row_sums(p_lse, p_delta, offset, token, m_rows):
    """Load LSE (log2 units, +inf where nothing is kept) and D of query rows: ``[ROWS]`` each."""
    lse = tl.load(p_lse + offset + token, mask=m_rows, other=float("-inf")) * LOG2_E
    delta = tl.load(p_delta + offset + token, mask=m_rows, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse), delta


@triton.jit
def attend_bwd_query_kernel(
    p_query,
    p_key,
    p_value,
    p_grad_output,
    p_lse,
    p_delta,
    p_grad_query,
    query_strides,
    key_strides,
    value_strides,
    grad_output_strides,
    lse_strides,
    grad_query_strides,
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
    scale,
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
):
    """Compute dQ of ``BLOCK_M`` query rows; they walk the key blocks that they keep."""
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
    b_q = load_rows(
        p_query + head_offset(i_batch, i_head, query_strides, ALIGN), query_strides,
        p_q_permutation, q_start, rows, m_rows, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip  # [BLOCK_M, BLOCK_D]
    b_grad = load_rows(
        p_grad_output + head_offset(i_batch, i_head, grad_output_strides, ALIGN),
        grad_output_strides, p_q_permutation, q_start, rows, m_rows, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip  # [BLOCK_M, BLOCK_D]
    token = row_tokens(p_q_permutation, q_start, rows, m_rows)  # [BLOCK_M]
    i_row = i_batch * lse_strides[0] + i_head * lse_strides[1]
    lse, delta = load_row_sums(p_lse, p_delta, i_row, token, m_rows)

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
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
        score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * qk_scale
        if p_kv_weight is not None:
            score += (weight * LOG2_E)[None, :]
        elif length - done < BLOCK_N:
            score = tl.where(m_columns[None, :], score, float("-inf"))
        if p_partial is not None:
            m_tile, _ = tile_bits(
                p_tiles, tl.load(p_partial + i_entry), q_max, kv_max, rows, done, length, BLOCK_M,
                BLOCK_N, TRANSPOSED=False,
            )  # fmt: skip
            score = tl.where(m_tile, score, float("-inf"))
        b_v = load_rows(
            p_value, value_strides, p_kv_permutation, start, columns, m_columns, HEAD_DIM,
            BLOCK_D, ALIGN,
        )  # fmt: skip  # [BLOCK_N, BLOCK_D]
        b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        b_ds = tl.exp2(score - lse[:, None]) * (b_dp - delta[:, None])  # [BLOCK_M, BLOCK_N]
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
        i_entry, done, start, length, ahead = walk_next(
            i_entry, done, start, length, ahead,
            p_list, count, p_kv_starts, p_kv_lengths, kv_max, BLOCK_N, CHUNKS, KV_SPREAD,
        )  # fmt: skip
    p_block = row_pointers(
        p_grad_query + head_offset(i_batch, i_head, grad_query_strides, ALIGN),
        grad_query_strides, p_q_permutation, q_start, rows, m_rows, BLOCK_D, ALIGN,
    )  # fmt: skip
    b_dq = (b_dq * scale).to(p_grad_query.dtype.element_ty)
    tl.store(p_block, b_dq, mask=row_mask(m_rows, HEAD_DIM, BLOCK_D))


@triton.jit
def attend_bwd_key_kernel(
    p_query,
    p_key,
    p_value,
    p_grad_output,
    p_lse,
    p_delta,
    p_grad_key,
    p_grad_value,
    query_strides,
    key_strides,
    value_strides,
    grad_output_strides,
    lse_strides,
    grad_key_strides,
    grad_value_strides,
    p_q_starts,
    p_q_lengths,
    p_q_permutation,
    p_q_weight,  # noqa: ARG001  (a walked side has one)
    q_strides,
    q_max,
    p_kv_starts,
    p_kv_lengths,
    p_kv_permutation,
    p_kv_tiles,
    kv_strides,
    kv_max,
    kv_parts,
    p_kv_weight,
    weight_strides,
    p_counts,
    p_indices,
    p_partial,
    p_tiles,
    list_strides,
    kv_blocks,
    scale,
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
):
    """Compute dK and dV of ``BLOCK_N`` keys; they walk the query blocks that keep them.

    Everything is transposed: keys stand in rows, so that no product needs a transposed P.
    """
    i_head = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    i_kv, i_part = own_tile(p_kv_tiles, (kv_strides[6], kv_strides[7]), i_batch, i_head, kv_parts)
    if i_kv >= kv_blocks:
        return
    kv_start, kv_length = own_span(
        p_kv_starts, p_kv_lengths, kv_strides, i_batch, i_head, i_kv, kv_max, KV_SPREAD
    )
    if i_part * BLOCK_N >= kv_length:
        return
    first = i_part * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_columns = columns < kv_length  # [BLOCK_N]
    if p_kv_permutation is not None:
        p_kv_permutation += i_batch * kv_strides[4] + i_head * kv_strides[5]
    b_k = load_rows(
        p_key + head_offset(i_batch, i_head, key_strides, ALIGN), key_strides, p_kv_permutation,
        kv_start, columns, m_columns, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip  # [BLOCK_N, BLOCK_D]
    b_v = load_rows(
        p_value + head_offset(i_batch, i_head, value_strides, ALIGN), value_strides,
        p_kv_permutation, kv_start, columns, m_columns, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip  # [BLOCK_N, BLOCK_D]
    if p_kv_weight is not None:
        p_kv_weight += i_batch * weight_strides[0] + i_head * weight_strides[1] + kv_start
        weight = tl.load(p_kv_weight + columns, mask=m_columns, other=float("-inf")) * LOG2_E

    p_query += head_offset(i_batch, i_head, query_strides, ALIGN)
    p_grad_output += head_offset(i_batch, i_head, grad_output_strides, ALIGN)
    i_row = i_batch * lse_strides[0] + i_head * lse_strides[1]
    p_q_starts = leading(p_q_starts, i_batch, i_head, q_strides[0], q_strides[1])
    p_q_lengths = leading(p_q_lengths, i_batch, i_head, q_strides[2], q_strides[3])
    if p_q_permutation is not None:
        p_q_permutation += i_batch * q_strides[4] + i_head * q_strides[5]
    p_count, p_list = own_list(p_counts, p_indices, list_strides, i_batch, i_head, i_kv)
    if p_partial is not None:
        p_partial += i_batch * list_strides[6] + i_head * list_strides[7]
        p_partial += i_kv.to(tl.int64) * list_strides[8]
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    count = tl.load(p_count)
    tiles = walk_total(p_list, count, p_q_lengths, BLOCK_M, CHUNKS)
    start, length, ahead = walk_first(p_list, count, p_q_starts, p_q_lengths, q_max, Q_SPREAD)
    i_entry = 0
    done = 0
    for _ in tl.range(0, tiles, num_stages=STAGES):
        rows = done + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        m_rows = rows < length  # [BLOCK_M]
        token = row_tokens(p_q_permutation, start, rows, m_rows)  # [BLOCK_M]
        b_q = load_rows(
            p_query, query_strides, p_q_permutation, start, rows, m_rows, HEAD_DIM, BLOCK_D, ALIGN
        )  # [BLOCK_M, BLOCK_D]
        lse, delta = load_row_sums(p_lse, p_delta, i_row, token, m_rows)
        score = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * qk_scale
        if p_kv_weight is not None:
            score += weight[:, None]  # [BLOCK_N, BLOCK_M]
        if p_partial is not None:
            m_tile, _ = tile_bits(
                p_tiles, tl.load(p_partial + i_entry), q_max, kv_max, rows, first, kv_length,
                BLOCK_M, BLOCK_N, TRANSPOSED=True,
            )  # fmt: skip
            score = tl.where(m_tile, score, float("-inf"))
        b_p = tl.exp2(score - lse[None, :])  # [BLOCK_N, BLOCK_M]; 0 where there is no row
        b_grad = load_rows(
            p_grad_output, grad_output_strides, p_q_permutation, start, rows, m_rows, HEAD_DIM,
            BLOCK_D, ALIGN,
        )  # fmt: skip  # [BLOCK_M, BLOCK_D]
        b_dv = tl.dot(b_p.to(b_grad.dtype), b_grad, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        b_ds = b_p * (b_dp - delta[None, :])  # [BLOCK_N, BLOCK_M]
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
        i_entry, done, start, length, ahead = walk_next(
            i_entry, done, start, length, ahead,
            p_list, count, p_q_starts, p_q_lengths, q_max, BLOCK_M, CHUNKS, Q_SPREAD,
        )  # fmt: skip
    m_out = row_mask(m_columns, HEAD_DIM, BLOCK_D)
    p_block = row_pointers(
        p_grad_key + head_offset(i_batch, i_head, grad_key_strides, ALIGN), grad_key_strides,
        p_kv_permutation, kv_start, columns, m_columns, BLOCK_D, ALIGN,
    )  # fmt: skip
    tl.store(p_block, (b_dk * scale).to(p_grad_key.dtype.element_ty), mask=m_out)
    p_block = row_pointers(
        p_grad_value + head_offset(i_batch, i_head, grad_value_strides, ALIGN),
        grad_value_strides, p_kv_permutation, kv_start, columns, m_columns, BLOCK_D, ALIGN,
    )  # fmt: skip
    tl.store(p_block, b_dv.to(p_grad_value.dtype.element_ty), mask=m_out)


def transposed_lists(plan: BlockPlan) -> tuple[Tensor, Tensor, Tensor | None]:
    """List for every key block the query blocks that keep it, on the device, without a sync.

    Returns:
        Counts int32 ``[batch|1, heads|1, kv_blocks]``; indices int32 ``[..., kv_blocks,
        q_blocks]``, ascending; the bit tile of each entry, or None where the plan has no tiles.
    """
    mask = plan.block_mask().transpose(-1, -2)  # [batch|1, heads|1, kv_blocks, q_blocks]
    counts = mask.sum(-1, dtype=torch.int32)
    width = mask.shape[-1]
    slot = torch.where(mask, mask.cumsum(-1) - 1, width)
    column = torch.arange(width, dtype=torch.int32, device=plan.device)
    indices = column.new_zeros((*mask.shape[:-1], width + 1))
    indices.scatter_(-1, slot, column.expand_as(slot))
    indices = indices[..., :width]
    if plan.partial is None:
        return counts, indices, None
    shape = (*mask.shape[:2], plan.q.blocks)
    index = plan.kv_indices.expand(*shape, -1).long()
    entry = torch.arange(index.shape[-1], device=plan.device)
    live = entry < plan.kv_num_blocks.expand(shape)[..., None]
    number = column.new_full((*shape, plan.kv.blocks + 1), -1)
    number.scatter_(-1, torch.where(live, index, plan.kv.blocks), plan.partial.expand(index.shape))
    return counts, indices, number[..., :-1].transpose(-1, -2).gather(-1, indices.long())


def backward_launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    plan: BlockPlan,
    scale: float,
    query_tiling: Tiling,
    key_tiling: Tiling,
) -> list[Launch]:
    """Say which launches, in order, fill ``grads``: dQ, dK, dV.

    ``grads[1]`` and ``grads[2]`` must hold zeros: keys in no block are not written.
    """
    batch, tokens, heads, head_dim = query.shape
    grad_query, grad_key, grad_value = grads
    delta = torch.empty_like(lse)
    shared: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "ALIGN": alignment(query, key, value, output, grad_output, *grads),
    }
    first = {
        "p_output": output,
        "p_grad_output": grad_output,
        "p_lse": lse,
        "p_grad_lse": grad_lse,
        "p_delta": delta,
        "output_strides": output.stride(),
        "grad_output_strides": grad_output.stride(),
        "lse_strides": strides_of(lse),
        "grad_lse_strides": grad_lse.stride(),
        "tokens": tokens,
        "ROWS": ROWS,
        **shared,
    }
    inputs = {
        "p_query": query,
        "p_key": key,
        "p_value": value,
        "p_grad_output": grad_output,
        "p_lse": lse,
        "p_delta": delta,
        "query_strides": query.stride(),
        "key_strides": key.stride(),
        "value_strides": value.stride(),
        "grad_output_strides": grad_output.stride(),
        "lse_strides": strides_of(lse),
        "p_tiles": plan.tiles,
        "scale": scale,
        "qk_scale": scale * LOG2_E.value,
        "Q_SPREAD": plan.q.spread,
        "KV_SPREAD": plan.kv.spread,
        "PRECISION": precision(query.dtype),
        **shared,
    }
    q_side, q_tiles = side_arguments("q", plan.q, plan.q_permutation, query_tiling.block_m)
    kv_side, _ = side_arguments(
        "kv", plan.kv, plan.kv_permutation, None, weight=plan.kv_log_weight
    )
    second = {
        **inputs,
        **q_side,
        **kv_side,
        **list_arguments(plan.kv_num_blocks, plan.kv_indices, plan.partial),
        "p_grad_query": grad_query,
        "grad_query_strides": grad_query.stride(),
        "q_blocks": plan.q.blocks,
        "BLOCK_M": query_tiling.block_m,
        "BLOCK_N": query_tiling.block_n,
        "CHUNKS": walk_chunks(plan.kv, query_tiling.block_n),
        "STAGES": query_tiling.stages,
    }
    weight = kv_side["p_kv_weight"]
    q_side, _ = side_arguments("q", plan.q, plan.q_permutation, None)
    kv_side, kv_tiles = side_arguments("kv", plan.kv, plan.kv_permutation, key_tiling.block_n)
    third = {
        **inputs,
        **q_side,
        **kv_side,
        **list_arguments(*transposed_lists(plan)),
        "p_kv_weight": weight,
        "weight_strides": strides_of(weight),
        "p_grad_key": grad_key,
        "p_grad_value": grad_value,
        "grad_key_strides": grad_key.stride(),
        "grad_value_strides": grad_value.stride(),
        "kv_blocks": plan.kv.blocks,
        "BLOCK_M": key_tiling.block_m,
        "BLOCK_N": key_tiling.block_n,
        "CHUNKS": walk_chunks(plan.q, key_tiling.block_m),
        "STAGES": key_tiling.stages,
    }
    grids = ((triton.cdiv(tokens, ROWS), heads, batch), (q_tiles, heads, batch))
    return [
        Launch(delta_bwd_kernel, grids[0], first, 4, 1),
        Launch(attend_bwd_query_kernel, grids[1], second, query_tiling.warps, query_tiling.stages),
        Launch(
            attend_bwd_key_kernel,
            (kv_tiles, heads, batch),
            third,
            key_tiling.warps,
            key_tiling.stages,
        ),
    ]


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor,
    plan: BlockPlan,
    scale: float,
    tilings: tuple[Tiling, Tiling],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dQ, dK, dV from what ``forward`` took and gave.

    Args:
        query: As given to ``forward``; also ``key``, ``value``, ``plan``, ``scale``.
        key: See ``query``.
        value: See ``query``.
        output: As ``forward`` returned it.
        lse: As ``forward`` returned it.
        grad_output: Gradient of ``output``, any strides.
        grad_lse: Gradient of ``lse``.
        plan: See ``query``.
        scale: See ``query``.
        tilings: Of the query kernel and of the key kernel.

    Returns:
        Gradients, shaped and typed like query, key and value.
    """
    grads = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for launch in backward_launches(
        query, key, value, output, lse, grad_output, grad_lse, grads, plan, scale, *tilings
    ):
        launch.run()
    return grads
