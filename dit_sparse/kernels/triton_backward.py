# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention, backward: exact gradients through the kept blocks, always deterministic.

Dao 2023, arXiv:2307.08691, section 3.1.2: ``P = exp(S - LSE)``, ``dV = P^T dO``, ``dP = dO V^T``,
``dS = P * (dP - D)`` with ``D = rowsum(dO * O) - dLSE``, ``dQ = scale * dS K``,
``dK = scale * dS^T Q``. Nothing is added atomically: one program owns its query rows and walks the
plan's lists, another owns its key rows and walks the transposed lists, made on the device.
``triton_gradients.py`` has these two kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from dit_sparse.kernels.triton_blocks import head_rows, load_rows
from dit_sparse.kernels.triton_gradients import attend_bwd_key_kernel, attend_bwd_query_kernel
from dit_sparse.kernels.triton_launch import (
    Launch,
    alignment,
    factors,
    lists_of,
    owned_side,
    padded_dim,
    rows_of,
    strides_of,
    tile_constants,
    walked_side,
)
from dit_sparse.kernels.triton_target import Tiling, walk_chunks

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.plan import BlockPlan

ROWS = 64  # of a program of the delta kernel


@triton.jit
def delta_bwd_kernel(
    output,
    grad_output,
    p_lse,
    p_grad_lse,
    p_delta,
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
        head_rows(output, i_batch, i_head, ALIGN), output, None, 0, start, rows, m_rows,
        HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip  # [ROWS, BLOCK_D]
    b_grad = load_rows(
        head_rows(grad_output, i_batch, i_head, ALIGN), grad_output, None, 0, start, rows,
        m_rows, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip  # [ROWS, BLOCK_D]
    delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)  # [ROWS]
    i_lse = i_batch * lse_strides[0] + i_head * lse_strides[1] + start + rows
    i_grad = i_batch * grad_lse_strides[0] + i_head * grad_lse_strides[1]
    i_grad += (start + rows) * grad_lse_strides[2]
    lse = tl.load(p_lse + i_lse, mask=m_rows, other=0.0)  # [ROWS]
    delta -= tl.load(p_grad_lse + i_grad, mask=m_rows, other=0.0)
    tl.store(p_delta + i_lse, tl.where(lse == float("-inf"), 0.0, delta), mask=m_rows)


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
    align = alignment(query, key, value, output, grad_output, *grads)
    first = {
        "output": rows_of(output),
        "grad_output": rows_of(grad_output),
        "p_lse": lse,
        "p_grad_lse": grad_lse,
        "p_delta": delta,
        "lse_strides": strides_of(lse),
        "grad_lse_strides": grad_lse.stride(),
        "tokens": tokens,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_dim(head_dim),
        "ROWS": ROWS,
        "ALIGN": align,
    }
    shared: dict[str, Any] = {
        "query": rows_of(query),
        "key": rows_of(key),
        "value": rows_of(value),
        "grad_output": rows_of(grad_output),
        "p_lse": lse,
        "p_delta": delta,
        "lse_strides": strides_of(lse),
        **factors(scale, weighted=plan.kv_log_weight is not None),
        "ALIGN": align,
    }
    q_side, q_tiles = owned_side(plan.q, plan.q_permutation, query_tiling.block_m)
    second = {
        **shared,
        "grad_query": rows_of(grad_query),
        "q": q_side,
        "kv": walked_side(plan.kv, plan.kv_permutation, plan.kv_log_weight),
        "lists": lists_of(plan.kv_num_blocks, plan.kv_indices, plan.partial, plan.tiles),
        **tile_constants(head_dim, query.dtype, query_tiling),
        "CHUNKS": walk_chunks(plan.kv, query_tiling.block_n),
    }
    kv_side, kv_tiles = owned_side(
        plan.kv, plan.kv_permutation, key_tiling.block_n, plan.kv_log_weight
    )
    third = {
        **shared,
        "grad_key": rows_of(grad_key),
        "grad_value": rows_of(grad_value),
        "q": walked_side(plan.q, plan.q_permutation),
        "kv": kv_side,
        "lists": lists_of(*transposed_lists(plan), plan.tiles),
        **tile_constants(head_dim, query.dtype, key_tiling),
        "CHUNKS": walk_chunks(plan.q, key_tiling.block_m),
    }
    steps: list[tuple[Any, int, dict[str, Any], Tiling]] = [
        (delta_bwd_kernel, triton.cdiv(tokens, ROWS), first, Tiling(ROWS, ROWS, 4, 1)),
        (attend_bwd_query_kernel, q_tiles, second, query_tiling),
        (attend_bwd_key_kernel, kv_tiles, third, key_tiling),
    ]
    return [
        Launch(kernel, (programs, heads, batch), arguments, tiling.warps, tiling.stages)
        for kernel, programs, arguments, tiling in steps
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
