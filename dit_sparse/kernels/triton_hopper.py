# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention, forward, for Hopper: keys and values come through its copy engine.

For plans that are block lists and nothing else. The copy engine (tensor descriptors, made on the
device, one per program) fetches whole tiles: rows behind a short block's end come along and are
masked out of the scores. Values that are not finite among them would still reach the output
(0 * NaN is NaN), so the pointer kernel looks through the output and repairs such tiles.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from dit_sparse.errors import KernelError
from dit_sparse.kernels.triton_blocks import (
    block_span,
    head_rows,
    own_list,
    own_rows,
    row_pointers,
    side_offsets,
)
from dit_sparse.kernels.triton_forward import forward_launch
from dit_sparse.kernels.triton_launch import Launch
from dit_sparse.kernels.triton_scores import row_lse, soften
from dit_sparse.kernels.triton_target import Tiling, repair_tiling, target_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from dit_sparse.core.plan import BlockPlan

UNUSED = ("scale", "BLOCK_D", "PRECISION", "ALIGN", "REPAIR", "PEEL")


@triton.jit
def attend_hopper_fwd_kernel(
    query,
    key,
    value,
    output,
    p_lse,
    lse_strides,
    q,
    kv,
    lists,
    q_tokens,
    kv_tokens,
    factor,
    drift,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """Compute ``BLOCK_M`` query rows of one (sample, head); every key block takes CHUNKS tiles."""
    i_head = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    q_at = side_offsets(q, i_batch, i_head)
    # No early return: the compiler cannot specialise warps behind one. Idle programs do nothing.
    i_q, q_start, q_length, first = own_rows(q, q_at, i_batch, i_head, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_rows = rows < q_length  # [BLOCK_M]
    # The queries too: the compiler does not specialise warps behind a load by pointers. Rows
    # behind the block's end come along and are not stored.
    queries = tl.make_tensor_descriptor(
        head_rows(query, i_batch, i_head, 8),
        [q_tokens, HEAD_DIM], [query.seq, 1], [BLOCK_M, HEAD_DIM],
    )  # fmt: skip
    b_q = queries.load([q_start + first, 0])  # [BLOCK_M, HEAD_DIM]
    keys = tl.make_tensor_descriptor(
        head_rows(key, i_batch, i_head, 8),
        [kv_tokens, HEAD_DIM], [key.seq, 1], [BLOCK_N, HEAD_DIM],
    )  # fmt: skip
    values = tl.make_tensor_descriptor(
        head_rows(value, i_batch, i_head, 8),
        [kv_tokens, HEAD_DIM], [value.seq, 1], [BLOCK_N, HEAD_DIM],
    )  # fmt: skip
    at = side_offsets(kv, i_batch, i_head)
    count, p_list, _ = own_list(lists, i_batch, i_head, i_q)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    columns = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    count = tl.where(first < q_length, count, 0)
    for i in tl.range(0, count * CHUNKS, num_stages=STAGES, warp_specialize=SPECIALIZE):
        start, length = block_span(kv, at, tl.load(p_list + i // CHUNKS))
        done = i % CHUNKS * BLOCK_N
        b_k = keys.load([start + done, 0])  # [BLOCK_N, HEAD_DIM]
        score = tl.dot(b_q, tl.trans(b_k))  # [BLOCK_M, BLOCK_N]
        score = tl.where((columns < length - done)[None, :], score, float("-inf"))
        b_p, shrink, peak, total = soften(score, peak, total, factor)
        b_out = b_out * shrink[:, None]
        b_v = values.load([start + done, 0])  # [BLOCK_N, HEAD_DIM]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out)
    # 0 / 0 where nothing is kept is repaired with what else is not finite.
    p_block = row_pointers(
        head_rows(output, i_batch, i_head, 8), output, None, 0, q_start, rows, m_rows,
        HEAD_DIM, 8,
    )  # fmt: skip
    b_out = (b_out / total[:, None]).to(p_block.dtype.element_ty)
    tl.store(p_block, b_out, mask=m_rows[:, None])
    p_lse += i_batch * lse_strides[0] + i_head * lse_strides[1] + q_start
    tl.store(p_lse + rows, row_lse(peak, total, drift), mask=m_rows)


def hopper_reasons_against(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan
) -> list[str]:
    """Say why this kernel cannot run the call, a reason a line; the pointer kernel can.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``.
        key: ``[batch, kv_seq_len, heads, head_dim]``.
        value: Like ``key``.
        plan: What to compute.
    """
    reasons = []
    if query.device.type == "cuda" and target_of(query.device) != "sm_90":
        reasons.append("needs compute capability 9.0 (H100, H200)")
    if query.dtype not in {torch.float16, torch.bfloat16}:
        reasons.append(f"computes float16 and bfloat16, got {query.dtype}")
    if query.shape[-1] not in {64, 128}:
        reasons.append(f"head_dim must be 64 or 128, got {query.shape[-1]}")
    extras = (plan.partial, plan.q_permutation, plan.kv_permutation, plan.kv_log_weight)
    if any(extra is not None for extra in extras):
        reasons.append("the plan has permutations, bit tiles or weights")
    if min(plan.q.max_length, plan.kv.max_length) < 64:
        reasons.append("blocks are shorter than 64")
    if not plan.kv.spread and plan.kv.max_length > 256:
        reasons.append("key blocks are very unequal")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.stride(3) != 1 or any(stride % 8 for stride in tensor.stride()[:3]):
            reasons.append(f"{name}'s strides must be multiples of 8, {tensor.stride()}")
        if tensor.data_ptr() % 16:
            reasons.append(f"{name} must start at a multiple of 16 bytes")
    return reasons


def hopper_tiling(head_dim: int, q_max: int, kv_max: int, *, specialize: bool) -> Tiling:
    """Return the tiling that the compiler was seen to specialise without a spill."""
    block_m = 128 if q_max >= 128 else 64
    block_n = 128 if kv_max >= 128 and not (head_dim == 128 and specialize) else 64
    warps = 4 if specialize or block_m < 128 else 8
    return Tiling(block_m, block_n, warps, 2, copy_engine=True, specialize=specialize)


def hopper_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    plan: BlockPlan,
    scale: float,
    tiling: Tiling,
) -> Launch:
    """Say with which grid and arguments the kernel runs; see ``forward_launch``.

    ``hopper_reasons_against`` says which calls it takes.
    """
    plain = forward_launch(query, key, value, output, lse, plan, scale, tiling)
    arguments = {name: value for name, value in plain.arguments.items() if name not in UNUSED}
    arguments["CHUNKS"] = -(-plan.kv.max_length // tiling.block_n)
    arguments["q_tokens"], arguments["kv_tokens"] = query.shape[1], key.shape[1]
    arguments["STAGES"], arguments["SPECIALIZE"] = tiling.stages, tiling.specialize
    return Launch(attend_hopper_fwd_kernel, plain.grid, arguments, tiling.warps, tiling.stages)


@contextmanager
def scratch_memory(device: torch.device) -> Iterator[None]:
    """Lend Triton memory for the descriptors that are made on the device, for one launch."""
    from triton.runtime import _allocation

    def allocate(size: int, _alignment: int, _stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    before = _allocation._allocator.get()  # noqa: SLF001  (there is no public way to ask)
    triton.set_allocator(allocate)
    try:
        yield
    finally:
        triton.set_allocator(before)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    scale: float,
    tiling: Tiling,
) -> tuple[Tensor, Tensor]:
    """Attend by ``plan``; raises ``KernelError`` where ``hopper_reasons_against`` has any."""
    if reasons := hopper_reasons_against(query, key, value, plan):
        raise KernelError("triton's Hopper kernel cannot run this call:\n" + "\n".join(reasons))
    batch, tokens, heads, _ = query.shape
    output = torch.empty_like(query)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=query.device)
    tensors = (query, key, value, output, lse)
    with scratch_memory(query.device):
        hopper_launch(*tensors, plan, scale, tiling).run()
    forward_launch(*tensors, plan, scale, repair_tiling(tiling), repair=True).run()
    return output, lse
