# SPDX-License-Identifier: Apache-2.0
"""Exact softmax mass of every block pair, given the dense LSE: one pass over the keys.

Score of AdaSpa (Xia et al. 2025, "Training-free and Adaptive Sparse Attention for Efficient Long
Video Generation", arXiv:2502.21079): with a cached LSE no second pass is needed to normalise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from dit_sparse.kernels.triton_blocks import (
    block_span,
    head_offset,
    leading,
    load_rows,
    own_span,
    own_tile,
)
from dit_sparse.kernels.triton_launch import Launch, alignment, side_arguments, strides_of
from dit_sparse.kernels.triton_target import Tiling, precision

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.grid import BlockLayout

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def block_mass_fwd_kernel(
    p_query,
    p_key,
    p_lse,
    p_mass,
    query_strides,
    key_strides,
    lse_strides,
    mass_strides,
    p_q_starts,
    p_q_lengths,
    p_q_permutation,  # noqa: ARG001  (slots are tokens here)
    p_q_tiles,
    q_strides,
    q_max,
    q_parts,
    p_kv_starts,
    p_kv_lengths,
    p_kv_permutation,  # noqa: ARG001  (slots are tokens here)
    p_kv_weight,  # noqa: ARG001  (a walked side has one)
    kv_strides,
    kv_max,
    kv_blocks,
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
    """Sum ``exp(score - lse)`` of ``BLOCK_M`` query rows over each key block."""
    i_head = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    i_q, i_part = own_tile(p_q_tiles, (q_strides[6], q_strides[7]), i_batch, i_head, q_parts)
    q_start, q_length = own_span(
        p_q_starts, p_q_lengths, q_strides, i_batch, i_head, i_q, q_max, Q_SPREAD
    )
    if i_part * BLOCK_M >= q_length:
        return
    rows = i_part * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_rows = rows < q_length  # [BLOCK_M]
    b_q = load_rows(
        p_query + head_offset(i_batch, i_head, query_strides, ALIGN), query_strides, None,
        q_start, rows, m_rows, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip  # [BLOCK_M, BLOCK_D]
    p_lse += i_batch * lse_strides[0] + i_head * lse_strides[1] + q_start
    lse = tl.load(p_lse + rows, mask=m_rows, other=float("-inf")) * LOG2_E  # [BLOCK_M]
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # such rows count nothing
    p_key += head_offset(i_batch, i_head, key_strides, ALIGN)
    p_kv_starts = leading(p_kv_starts, i_batch, i_head, kv_strides[0], kv_strides[1])
    p_kv_lengths = leading(p_kv_lengths, i_batch, i_head, kv_strides[2], kv_strides[3])
    p_mass += i_batch * mass_strides[0] + i_head * mass_strides[1]
    p_mass += i_q.to(tl.int64) * mass_strides[2] + i_part * mass_strides[3]

    mass = tl.zeros([BLOCK_M], tl.float32)
    i_kv = 0
    done = 0
    start, length = block_span(p_kv_starts, p_kv_lengths, 0, kv_max, KV_SPREAD)
    for _ in tl.range(0, kv_blocks * CHUNKS, num_stages=STAGES):
        columns = done + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        m_columns = columns < length  # [BLOCK_N]
        b_k = load_rows(
            p_key, key_strides, None, start, columns, m_columns, HEAD_DIM, BLOCK_D, ALIGN
        )  # [BLOCK_N, BLOCK_D]
        score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if length - done < BLOCK_N:
            score = tl.where(m_columns[None, :], score, float("-inf"))
        mass += tl.sum(tl.exp2(score * qk_scale - lse[:, None]), 1)
        i_ahead = tl.minimum(i_kv + 1, kv_blocks - 1)
        start_ahead, length_ahead = block_span(
            p_kv_starts, p_kv_lengths, i_ahead, kv_max, KV_SPREAD
        )
        if CHUNKS == 1:
            tl.store(p_mass + i_kv, tl.sum(mass, 0))
            mass = tl.zeros([BLOCK_M], tl.float32)
            i_kv += 1
            start, length = start_ahead, length_ahead
        else:
            done += BLOCK_N
            turn = done >= CHUNKS * BLOCK_N
            tl.store(p_mass + i_kv, tl.sum(mass, 0), mask=turn)
            mass = tl.where(turn, 0.0, mass)
            i_kv = tl.where(turn, i_kv + 1, i_kv)
            start = tl.where(turn, start_ahead, start)
            length = tl.where(turn, length_ahead, length)
            done = tl.where(turn, 0, done)


def block_mass_launch(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    mass: Tensor,
    q: BlockLayout,
    kv: BlockLayout,
    scale: float,
    tiling: Tiling,
) -> Launch:
    """Say how ``mass``, ``[batch, heads, q_blocks, parts, kv_blocks]``, is computed.

    A query block of several tiles has several parts; ``mass`` is zero where a part is empty.
    """
    batch, _, heads, head_dim = query.shape
    q_side, _ = side_arguments("q", q, None, tiling.block_m, table=False)
    kv_side, _ = side_arguments("kv", kv, None, None)
    arguments = {
        "p_query": query,
        "p_key": key,
        "p_lse": lse,
        "p_mass": mass,
        "query_strides": query.stride(),
        "key_strides": key.stride(),
        "lse_strides": strides_of(lse),
        "mass_strides": mass.stride(),
        **q_side,
        **kv_side,
        "kv_blocks": kv.blocks,
        "qk_scale": scale * LOG2_E.value,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "Q_SPREAD": q.spread,
        "KV_SPREAD": kv.spread,
        "CHUNKS": -(-kv.max_length // tiling.block_n),
        "STAGES": tiling.stages,
        "PRECISION": precision(query.dtype),
        "ALIGN": alignment(query, key),
    }
    grid = (q.blocks * mass.shape[3], heads, batch)
    return Launch(block_mass_fwd_kernel, grid, arguments, tiling.warps, tiling.stages)


def block_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    q: BlockLayout,
    kv: BlockLayout,
    scale: float,
    tiling: Tiling,
) -> Tensor:
    """Compute the mass; see ``triton_attention.block_mass``, which checks what this trusts."""
    batch, _, heads, _ = query.shape
    parts = -(-q.max_length // tiling.block_m)
    mass = torch.zeros(
        (batch, heads, q.blocks, parts, kv.blocks), dtype=torch.float32, device=query.device
    )
    block_mass_launch(query, key, lse, mass, q, kv, scale, tiling).run()
    return mass.squeeze(3) if parts == 1 else mass.sum(3)
