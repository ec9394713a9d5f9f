# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's block-sparse attention with blocks of any length, forward.

Not yet run on a device: chosen by name only, and the canary decides whether it may be trusted.
Written from the documentation of ``VariableBlockSparseAttentionWrapper``: every (sample, head) is
one of its KV heads, with its own mask and block lengths. Its ``plan`` waits for the device and
spells every kept block out token by token, so it costs more than the lists of a plan; it is here
to be compared with (SVG2's own code uses it).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from dit_sparse.kernels.chunks import block_of_slot
from dit_sparse.kernels.permute import gather_tokens, inverse_permutation

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.grid import BlockLayout
    from dit_sparse.core.plan import BlockPlan

HAS_BACKWARD = False
HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
WORKSPACE = 128 << 20  # bytes, as its documentation recommends


def reasons_against(query: Tensor, plan: BlockPlan) -> list[str]:
    """Say why this kernel cannot run the call, a reason a line; empty: it can."""
    reasons = []
    if query.device.type != "cuda" or torch.version.hip is not None:
        reasons.append(f"needs an NVIDIA GPU, query is on {query.device}")
    else:
        major = torch.cuda.get_device_capability(query.device)[0]
        if major < 8:
            reasons.append(f"needs compute capability 8 or more, got {major}")
    try:
        from flashinfer.sparse import VariableBlockSparseAttentionWrapper  # noqa: F401
    except (ImportError, OSError) as error:
        reasons.append(f"needs flashinfer-python: {error}")
    if query.dtype not in DTYPES:
        reasons.append(f"computes float16 and bfloat16, query is {query.dtype}")
    if query.shape[-1] not in HEAD_DIMS:
        reasons.append(f"head_dim must be one of {HEAD_DIMS}, got {query.shape[-1]}")
    if plan.partial is not None:
        reasons.append("computes whole blocks only, but the plan has blocks cut by bit tiles")
    if plan.kv_log_weight is not None:
        reasons.append("does not support log weights of keys, which the plan has")
    return reasons


def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend each query to the keys that its plan keeps; see ``cpu.attend`` for the contract."""
    from flashinfer.sparse import VariableBlockSparseAttentionWrapper

    batch, tokens, heads, head_dim = query.shape
    q_order, rows = consecutive(plan.q, plan.q_permutation)
    kv_order, columns = consecutive(plan.kv, plan.kv_permutation)
    mask = torch.nn.functional.pad(plan.block_mask(), (0, 1, 0, 1))  # the rest: kept by nobody
    groups = batch * heads
    wrapper = VariableBlockSparseAttentionWrapper(
        torch.empty(WORKSPACE, dtype=torch.uint8, device=query.device)
    )
    wrapper.plan(
        mask.expand(batch, heads, -1, -1).flatten(0, 1).contiguous(),
        rows.expand(batch, heads, -1).flatten(0, 1).contiguous(),
        columns.expand(batch, heads, -1).flatten(0, 1).contiguous(),
        groups,
        groups,
        head_dim,
        sm_scale=scale,
        q_data_type=query.dtype,
    )
    q, k, v = (
        gather_tokens(x, order).transpose(1, 2).flatten(0, 1).contiguous()
        for x, order in ((query, q_order), (key, kv_order), (value, kv_order))
    )  # [batch * heads, slots, head_dim]
    output, lse = wrapper.run(q, k, v, return_lse=True)
    output = output.view(batch, heads, -1, head_dim).transpose(1, 2)
    lse = lse.view(batch, heads, -1) * math.log(2)  # FlashInfer's is to base 2
    token = inverse_permutation(q_order, tokens).expand(batch, heads, -1)
    lse = lse.gather(2, token)
    nothing = torch.isneginf(lse).transpose(1, 2)[..., None]
    return gather_tokens(output, token, padding=False).masked_fill(nothing, 0), lse


def consecutive(layout: BlockLayout, permutation: Tensor | None) -> tuple[Tensor, Tensor]:
    """Order slots by block, those in no block last.

    Returns:
        Token of every slot in that order, -1 for none, int64 ``[batch|1, heads|1, slots]``, and
        lengths of the blocks with the rest as one more, int32 ``[batch|1, heads|1, blocks + 1]``.
    """
    order = block_of_slot(layout).argsort(dim=-1, stable=True)
    rest = layout.slots - layout.lengths.sum(-1, keepdim=True, dtype=torch.int32)
    lengths = torch.cat([layout.lengths, rest], -1)
    if permutation is None:
        return order, lengths
    lead = torch.broadcast_shapes(order.shape[:2], permutation.shape[:2])
    return permutation.expand(*lead, -1).gather(-1, order.expand(*lead, -1)), lengths
