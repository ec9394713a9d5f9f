# SPDX-License-Identifier: Apache-2.0
"""Attention as one differentiable operation, from a kernel's forward and backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from dit_sparse.core.plan import BlockPlan

    Forward = Callable[[Tensor, Tensor, Tensor, BlockPlan, float], tuple[Tensor, Tensor]]
    Backward = Callable[..., tuple[Tensor | None, ...]]


def differentiable(
    forward: Forward,
    backward: Backward,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Run ``forward`` so that output and LSE pass gradients to its inputs.

    Args:
        forward: Computes output and LSE from ``query, key, value, plan, scale``.
        backward: Computes the gradients of query, key, value and the plan's log weights (None:
            it has none) from ``query, key, value, output, lse, grad_output, grad_lse, plan,
            scale``.
        query: ``[batch, seq_len, heads, head_dim]``.
        key: ``[batch, kv_seq_len, heads, head_dim]``.
        value: Like ``key``.
        plan: Which keys each query reads; its log weights get a gradient too.
        scale: Multiplies the scores.
    """
    result: tuple[Tensor, Tensor] = _Attend.apply(
        query, key, value, plan.kv_log_weight, plan, scale, forward, backward
    )
    return result


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_weight: Tensor | None,  # noqa: ARG004 (stands in the plan; here for its gradient)
        plan: BlockPlan,
        scale: float,
        forward: Forward,
        backward: Backward,
    ) -> tuple[Tensor, Tensor]:
        output, lse = forward(query, key, value, plan, scale)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.plan, ctx.scale, ctx.gradients = plan, scale, backward
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.gradients(*ctx.saved_tensors, grad_output, grad_lse, ctx.plan, ctx.scale)
        weight = found[3] if ctx.needs_input_grad[3] else None
        return *found[:3], weight, None, None, None, None
