# SPDX-License-Identifier: Apache-2.0
"""cuDNN's block-sparse attention (``nvidia-cudnn-frontend``), forward.

Not yet run on a device: chosen by name only, and the canary decides whether it may be trusted.
Written from NVIDIA's documentation of ``cudnn.BSA.block_sparse_attention_forward`` (marked there
as experimental): int32 lists of key blocks per query block, as in a plan, ``block_sizes`` for
short key blocks, blocks of 64 or 128 slots by architecture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from dit_sparse.errors import KernelError
from dit_sparse.kernels.padded import padded, reasons_against_padding

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.plan import BlockPlan

HAS_BACKWARD = False
HEAD_DIMS = (64, 96, 128)
DTYPES = (torch.float16, torch.bfloat16)


def reasons_against(query: Tensor, plan: BlockPlan) -> list[str]:
    """Say why this kernel cannot run the call, a reason a line; empty: it can."""
    reasons = []
    if query.device.type != "cuda" or torch.version.hip is not None:
        reasons.append(f"needs an NVIDIA GPU, query is on {query.device}")
    try:
        from cudnn import BSA  # noqa: F401 (imported to see whether it can be)
    except (ImportError, OSError) as error:
        reasons.append(f"needs nvidia-cudnn-frontend with block-sparse attention: {error}")
    if query.dtype not in DTYPES:
        reasons.append(f"computes float16 and bfloat16, query is {query.dtype}")
    if query.shape[-1] not in HEAD_DIMS:
        reasons.append(f"head_dim must be one of {HEAD_DIMS}, got {query.shape[-1]}")
    if plan.partial is not None:
        reasons.append("computes whole blocks only, but the plan has blocks cut by bit tiles")
    if plan.kv_log_weight is not None:
        reasons.append("does not support log weights of keys, which the plan has")
    if query.device.type != "cuda" or torch.version.hip is not None:
        return reasons
    major = torch.cuda.get_device_capability(query.device)[0]
    if major not in {9, 10, 11, 12}:
        return [*reasons, f"needs compute capability 9 to 12 (Hopper, Blackwell), got {major}"]
    if major == 12 and query.shape[-1] != 128:
        reasons.append(f"on compute capability 12 head_dim must be 128, got {query.shape[-1]}")
    if major in {10, 11} and tuple(plan.kv.lengths.shape[:2]) != (1, 1):
        reasons.append("on compute capability 10 key blocks must be the same for every head")
    size = _block_size(major)
    return reasons + reasons_against_padding(plan, size, size)


def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend each query to the keys that its plan keeps; see ``cpu.attend`` for the contract."""
    from cudnn import BSA

    size = _block_size(torch.cuda.get_device_capability(query.device)[0])
    form = padded(plan, size, size)
    q, k, v = form.inputs(query, key, value)
    batch, _, heads, _ = query.shape
    sizes = form.kv_lengths
    sizes = sizes[0, 0] if sizes.shape[:2] == (1, 1) else sizes.expand(batch, heads, -1)
    indices, counts = form.kv_indices, form.kv_num_blocks
    indices = pad(indices, (0, indices.shape[-1] % 2))  # an even capacity, as some paths want
    result = BSA.block_sparse_attention_forward(
        q,
        k,
        v,
        indices.expand(batch, heads, -1, -1).contiguous(),
        None,
        sizes.contiguous(),
        counts.expand(batch, heads, -1).contiguous(),
        sparse_block_size=size,
        allow_empty_block_nums=True,
        softmax_scale=scale,
        layout="bshd",
    )
    output, lse = result[0], result[1]
    if tuple(lse.shape) != (batch, heads, q.shape[1]):
        raise KernelError(
            f"cuDNN's LSE is {tuple(lse.shape)}, wanted {(batch, heads, q.shape[1])}: this "
            "version of nvidia-cudnn-frontend is not the one that was written for"
        )
    return form.results(output, lse, query.shape[1])


def _block_size(major: int) -> int:
    return 128 if major in {10, 11} else 64
