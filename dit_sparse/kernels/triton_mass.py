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
    head_rows,
    load_rows,
    own_rows,
    side_offsets,
)
from dit_sparse.kernels.triton_launch import (
    Launch,
    alignment,
    factors,
    rows_of,
    strides_of,
    tile_constants,
    walked_side,
)
from dit_sparse.kernels.triton_scores import load_lse, softmax_weights

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.grid import BlockLayout
    from dit_sparse.kernels.triton_target import Tiling


@triton.jit
def block_mass_fwd_kernel(
    query,
    key,
    p_lse,
    p_mass,
    lse_strides,
    mass_strides,
    q,
    kv,
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
    """Sum ``exp(score - lse)`` of ``BLOCK_M`` query rows over each key block; no permutations."""
    i_head = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    q_at = side_offsets(q, i_batch, i_head)
    i_q, q_start, q_length, first = own_rows(q, q_at, i_batch, i_head, BLOCK_M)
    if first >= q_length:
        return
    rows = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_rows = rows < q_length  # [BLOCK_M]
    b_q = load_rows(
        head_rows(query, i_batch, i_head, ALIGN), query, None, 0, q_start, rows, m_rows,
        HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip  # [BLOCK_M, BLOCK_D]
    p_lse += i_batch * lse_strides[0] + i_head * lse_strides[1] + q_start
    log2_lse, rest = load_lse(p_lse + rows, m_rows, drift)
    p_key = head_rows(key, i_batch, i_head, ALIGN)
    at = side_offsets(kv, i_batch, i_head)
    p_mass += i_batch * mass_strides[0] + i_head * mass_strides[1]
    p_mass += i_q.to(tl.int64) * mass_strides[2] + first // BLOCK_M * mass_strides[3]

    mass = tl.zeros([BLOCK_M], tl.float32)
    i_kv = 0
    done = 0
    start, length = block_span(kv, at, 0)
    for _ in range(kv.blocks * CHUNKS):
        columns = done + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        m_columns = columns < length  # [BLOCK_N]
        b_k = load_rows(
            p_key, key, None, 0, start, columns, m_columns, HEAD_DIM, BLOCK_D, ALIGN
        )  # [BLOCK_N, BLOCK_D]
        score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if length - done < BLOCK_N:
            score = tl.where(m_columns[None, :], score, float("-inf"))
        b_p = softmax_weights(score, log2_lse[:, None], rest[:, None], factor, PRECISION)
        mass += tl.sum(b_p, 1)
        i_ahead = tl.minimum(i_kv + 1, kv.blocks - 1)
        start_ahead, length_ahead = block_span(kv, at, i_ahead)
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
    arguments = {
        "query": rows_of(query),
        "key": rows_of(key),
        "p_lse": lse,
        "p_mass": mass,
        "lse_strides": strides_of(lse),
        "mass_strides": mass.stride(),
        # A part of ``mass`` per tile: all blocks take as many tiles as the longest, no table.
        "q": walked_side(q)._replace(parts=mass.shape[3]),
        "kv": walked_side(kv),
        **factors(scale, weighted=False),
        **tile_constants(head_dim, query.dtype, tiling),
        "CHUNKS": -(-kv.max_length // tiling.block_n),
        "ALIGN": alignment(query, key),
    }
    del arguments["scale"]  # for weights, which there are none of
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
