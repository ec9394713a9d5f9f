# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803  (BLOCK_M: constexpr arguments are capitals)
"""The yardstick of the instruction counts: dense attention with nothing but its inner loop.

The loop of Triton's fused attention tutorial (FlashAttention-2, Dao 2023, arXiv:2307.08691,
without a causal mask), by pointers: all keys one after the other, no masks, no lists.
"""

import triton
import triton.language as tl

from dit_sparse.kernels.triton_launch import Launch


@triton.jit
def dense_fwd_kernel(
    query,
    key,
    value,
    output,
    stride_head,
    stride_seq,
    tokens,
    factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute ``BLOCK_M`` query rows of one head; ``tokens`` is a multiple of both tile sizes."""
    i_head = tl.program_id(1).to(tl.int64) * stride_head
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    dims = tl.arange(0, HEAD_DIM)
    offset = i_head + rows[:, None] * stride_seq + dims[None, :]  # [BLOCK_M, HEAD_DIM]
    b_q = tl.load(query + offset)
    tile = i_head + tl.arange(0, BLOCK_N)[:, None] * stride_seq + dims[None, :]
    p_key, p_value = key + tile, value + tile  # [BLOCK_N, HEAD_DIM]
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for _ in range(0, tokens, BLOCK_N):
        score = tl.dot(b_q, tl.trans(tl.load(p_key)))  # [BLOCK_M, BLOCK_N]
        peak_new = tl.maximum(peak, tl.max(score, 1) * factor)
        b_p = tl.exp2(score * factor - peak_new[:, None])  # [BLOCK_M, BLOCK_N]
        shrink = tl.exp2(peak - peak_new)
        total = total * shrink + tl.sum(b_p, 1)
        b_v = tl.load(p_value)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * shrink[:, None])
        peak = peak_new
        p_key += BLOCK_N * stride_seq
        p_value += BLOCK_N * stride_seq
    tl.store(output + offset, (b_out / total[:, None]).to(output.dtype.element_ty))


def dense_launch(query, key, value, output, tiling):
    """Launch it on ``[batch, seq_len, heads, head_dim]`` at the tiling of another kernel."""
    _, tokens, heads, head_dim = query.shape
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "output": output,
        "stride_head": query.stride(2),
        "stride_seq": query.stride(1),
        "tokens": tokens // tiling.block_n * tiling.block_n,
        "factor": 0.1,
        "HEAD_DIM": head_dim,
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
    }
    grid = (tokens // tiling.block_m, heads, 1)
    return Launch(dense_fwd_kernel, grid, arguments, tiling.warps, tiling.stages)
