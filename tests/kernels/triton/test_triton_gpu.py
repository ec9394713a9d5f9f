# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: every head_dim and dtype at real tile sizes, bfloat16, determinism."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.kernels import reference
from dit_sparse.kernels import triton_attention as kernel
from dit_sparse.kernels.triton_hopper import hopper_reasons_against, hopper_tiling
from tests.kernels.triton.plans import DEVICE, assert_close, carried_roundings, eager, oracle_mask

pytestmark = pytest.mark.gpu

HEAD_DIMS = (16, 32, 48, 64, 72, 80, 96, 128, 256)


def problem(head_dim, dtype, block, *, tokens=1500, heads=3):
    """Make a call with a ragged tail, random kept blocks, and strides of a fused projection."""
    full, rest = divmod(tokens, block)
    layout = BlockLayout.from_lengths([block] * full + [rest])
    mask = torch.rand(1, heads, layout.blocks, layout.blocks) < 0.4
    mask[:, 0, 1] = False
    plan = BlockPlan.from_block_mask(mask, layout, layout).to(DEVICE)
    fused = torch.randn(2, tokens, heads, 3 * head_dim, device=DEVICE).to(dtype)
    return plan, *fused.chunk(3, -1)


def check(plan, q, k, v, tiling=None):
    scale = q.shape[-1] ** -0.5
    output, lse = kernel.attend(q, k, v, plan, scale, tiling)
    exact = reference.attend(q, k, v, plan, scale)
    same = reference.attend(q, k, v, plan, scale, dtype=q.dtype)
    assert_close(output, exact[0], same[0], q.dtype)
    assert_close(lse, exact[1], same[1], q.dtype)


@pytest.mark.parametrize("block", [64, 128, 100])
@pytest.mark.parametrize("dtype", kernel.DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_forward(head_dim, dtype, block):
    check(*problem(head_dim, dtype, block))


@pytest.mark.parametrize("specialize", [False, True])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper(head_dim, dtype, block, specialize):
    plan, q, k, v = problem(head_dim, dtype, block)
    if reasons := hopper_reasons_against(q, k, v, plan):
        pytest.skip("; ".join(reasons))
    check(plan, q, k, v, hopper_tiling(head_dim, block, block, specialize=specialize))


@pytest.mark.parametrize("dtype", kernel.DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_backward(head_dim, dtype):
    plan, *tensors = problem(head_dim, dtype, 64, tokens=500, heads=2)
    tensors = [x.detach().requires_grad_() for x in tensors]
    scale = head_dim**-0.5
    output, lse = kernel.attend(*tensors, plan, scale)
    weight = torch.randn_like(output)
    found = torch.autograd.grad((output * weight).sum(), tensors)
    mask, bias = oracle_mask(plan, 2, 2)
    grads = []
    for precision in (torch.float64, dtype):
        inputs = [x.detach().cpu().to(precision).requires_grad_() for x in tensors]
        loss = (eager(*inputs, mask, bias, scale, precision)[0] * weight.cpu().to(precision)).sum()
        grads.append([g.nan_to_num() for g in torch.autograd.grad(loss, inputs)])
    carried = carried_roundings(
        tensors, weight, torch.zeros_like(lse), output, lse, mask, bias, scale
    )
    for allowance, *triple in zip(carried, found, *grads, strict=True):
        assert_close(*triple, dtype, allowance)


def test_tokens_beyond_32_bits_of_elements():
    """The last sample starts behind 2**31 elements."""
    layout = BlockLayout.from_lengths([64, 64])
    plan = BlockPlan.full(layout, layout).to(DEVICE)
    whole = torch.empty(3, 128, 2**16, 128, dtype=torch.bfloat16, device=DEVICE)
    q = whole[:, :, -2:].normal_()
    check(plan, q, q, q)
