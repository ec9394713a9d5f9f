# SPDX-License-Identifier: Apache-2.0
"""Means of dropped blocks in one launch: it continues the online softmax of the kept keys.

Output and LSE of the kept keys are the state of an online softmax after these keys, so the means
of the dropped blocks (``means.py``) are read as more keys. Neither scores nor a second output are
stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from dit_sparse.kernels.means import dropped_blocks, log_lengths
from dit_sparse.kernels.triton_blocks import (
    head_rows,
    load_rows,
    own_rows,
    row_mask,
    row_pointers,
    row_tokens,
    side_offsets,
)
from dit_sparse.kernels.triton_launch import (
    Launch,
    alignment,
    factors,
    owned_side,
    packed,
    rows_of,
    strides_of,
    tile_constants,
)
from dit_sparse.kernels.triton_scores import load_lse, row_lse, soften

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.plan import BlockPlan
    from dit_sparse.kernels.triton_target import Tiling


@triton.jit
def add_means_kernel(
    query,
    key,
    value,
    output,
    p_lse,
    lse_strides,
    q,
    p_dropped,
    dropped_strides,
    p_weight,
    weight_strides,
    means,
    scale,
    factor,
    drift,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Add the means to output and LSE of ``BLOCK_M`` query rows, in place."""
    i_head = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    q_at = side_offsets(q, i_batch, i_head)
    i_q, q_start, q_length, first = own_rows(q, q_at, i_batch, i_head, BLOCK_M)
    if first >= q_length:
        return
    rows = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_rows = rows < q_length  # [BLOCK_M]
    m_out = row_mask(m_rows, HEAD_DIM, BLOCK_D)
    b_q = load_rows(
        head_rows(query, i_batch, i_head, ALIGN), query, q.permutation, q_at[2], q_start,
        rows, m_rows, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip  # [BLOCK_M, BLOCK_D]
    p_output = row_pointers(
        head_rows(output, i_batch, i_head, ALIGN), output, q.permutation, q_at[2], q_start,
        rows, m_rows, BLOCK_D, ALIGN,
    )  # fmt: skip
    p_lse += i_batch * lse_strides[0] + i_head * lse_strides[1]
    p_lse += row_tokens(q, q_at, q_start, rows, m_rows)
    p_key = head_rows(key, i_batch, i_head, ALIGN)
    p_value = head_rows(value, i_batch, i_head, ALIGN)
    p_dropped += i_batch * dropped_strides[0] + i_head * dropped_strides[1]
    p_dropped += i_q.to(tl.int64) * means
    p_weight += i_batch * weight_strides[0] + i_head * weight_strides[1]

    peak, rest = load_lse(p_lse, m_rows, drift)  # [BLOCK_M]: +inf where nothing was kept
    empty = peak == float("inf")
    peak = tl.where(empty, float("-inf"), peak)
    total = tl.where(empty, 0.0, tl.exp2(-rest))
    b_out = tl.load(p_output, mask=m_out, other=0.0).to(tl.float32) * total[:, None]
    offsets = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    start = tl.full([], 0, tl.int32)
    for _ in range(0, means, BLOCK_N):
        # All rows of a block drop the same blocks, and nothing of a kept one's mean is loaded.
        m_all = start + offsets < means
        dropped = tl.load(p_dropped + start + offsets, mask=m_all, other=0) != 0  # [BLOCK_N]
        weight = tl.load(p_weight + start + offsets, mask=dropped, other=float("-inf"))
        b_k = load_rows(
            p_key, key, None, 0, start, offsets, dropped, HEAD_DIM, BLOCK_D, ALIGN
        )  # [BLOCK_N, BLOCK_D]
        score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        score = tl.where(dropped[None, :], tl.fma(score, scale, weight[None, :]), float("-inf"))
        b_v = load_rows(
            p_value, value, None, 0, start, offsets, dropped, HEAD_DIM, BLOCK_D, ALIGN
        )  # [BLOCK_N, BLOCK_D]
        b_p, shrink, peak, total = soften(score, peak, total, factor)
        b_out = b_out * shrink[:, None]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision=PRECISION)
        start += BLOCK_N
    b_out = tl.where(total[:, None] == 0.0, 0.0, b_out / total[:, None])
    tl.store(p_output, b_out.to(p_output.dtype.element_ty), mask=m_out)
    tl.store(p_lse, row_lse(peak, total, drift), mask=m_rows)


def add_means_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    scale: float,
    output: Tensor,
    lse: Tensor,
    tiling: Tiling,
) -> Launch:
    """Say with which grid and arguments the means are added to ``output`` and ``lse``.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``, any strides.
        key: Means, ``[batch, kv_blocks, heads, head_dim]``, any strides.
        value: Like ``key``.
        plan: Whose dropped blocks are read.
        scale: Of the scores, any sign.
        output: Of the kept keys, like ``query``; written.
        lse: Of the kept keys, fp32 ``[batch, heads, seq_len]``, last stride 1; written.
        tiling: Tile sizes and launch options.
    """
    batch, _, heads, head_dim = query.shape
    q_side, tiles = owned_side(plan.q, plan.q_permutation, tiling.block_m)
    dropped = plan.once("means dropped", lambda: dropped_blocks(plan).char().contiguous())
    weight = plan.once("means weight", lambda: packed(log_lengths(plan)))
    arguments = {
        "query": rows_of(query),
        "key": rows_of(key),
        "value": rows_of(value),
        "output": rows_of(output),
        "p_lse": lse,
        "lse_strides": strides_of(lse),
        "q": q_side,
        "p_dropped": dropped,
        "dropped_strides": strides_of(dropped),
        "p_weight": weight,
        "weight_strides": strides_of(weight),
        "means": plan.kv.blocks,
        **factors(scale, weighted=True),
        **tile_constants(head_dim, query.dtype, tiling),
        "ALIGN": alignment(query, key, value, output),
    }
    return Launch(add_means_kernel, (tiles, heads, batch), arguments, tiling.warps, tiling.stages)
