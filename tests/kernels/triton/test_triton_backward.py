# SPDX-License-Identifier: Apache-2.0
"""Gradients against float64 autograd through the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.kernels import triton_attention as kernel
from dit_sparse.kernels.triton_backward import backward, transposed_lists
from dit_sparse.kernels.triton_target import Tiling
from tests.kernels.triton.plans import (
    DEVICE,
    DTYPES,
    assert_close,
    calls,
    carried_roundings,
    eager,
    oracle_mask,
)


def gradients(call, dtype, weights):
    """Differentiate the oracle in ``dtype``: dQ, dK, dV of a weighted sum of output and LSE."""
    batch, _, heads, _ = call.query.shape
    mask, bias = oracle_mask(call.plan, batch, heads)
    inputs = [
        x.detach().cpu().to(dtype).requires_grad_() for x in (call.query, call.key, call.value)
    ]
    output, lse = eager(*inputs, mask, bias, call.scale, dtype)
    loss = (output * weights[0].cpu().to(dtype)).sum()
    kept = lse.isfinite()
    if kept.any():
        loss = loss + (lse[kept] * weights[1].cpu().to(dtype)[kept]).sum()
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    # softmax of a row that keeps nothing: 0, in the oracle NaN * 0
    return [
        torch.zeros_like(x) if grad is None else grad.nan_to_num()
        for x, grad in zip(inputs, grads, strict=True)
    ]


@given(calls(small=True))
def test_gradients_of_any_plan(call):
    inputs = [x.requires_grad_() for x in (call.query, call.key, call.value)]
    output, lse = kernel.attend(*inputs, call.plan, call.scale, call.tiling)
    weights = torch.randn_like(output), torch.randn_like(lse)
    signed = call.query.detach() * (1 if call.scale > 0 else -1)
    found = backward(
        signed, call.key.detach(), call.value.detach(), output.detach(), lse.detach(), *weights,
        call.plan, abs(call.scale), (call.tiling, call.tiling),
    )  # fmt: skip
    found = [found[0] * (1 if call.scale > 0 else -1), *found[1:]]
    wanted, same = (gradients(call, x, weights) for x in (torch.float64, call.query.dtype))
    mask, bias = oracle_mask(call.plan, *call.query.shape[::2])
    carried = carried_roundings(
        [x.detach() for x in inputs], *weights, output, lse, mask, bias, call.scale
    )
    names = ("query", "key", "value")
    for name, allowance, *triple in zip(names, carried, found, wanted, same, strict=True):
        assert_close(*triple, call.query.dtype, allowance, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
def test_autograd(dtype, scale):
    layout = BlockLayout.from_lengths([16, 16, 5])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)[None, None]
    plan = BlockPlan.from_block_mask(mask, layout, layout).to(DEVICE)
    inputs = [
        torch.randn(1, 37, 2, 16, device=DEVICE).to(dtype).requires_grad_() for _ in range(3)
    ]
    output, _lse = kernel.attend(*inputs, plan, scale)
    weight = torch.randn_like(output)
    found = torch.autograd.grad((output * weight).sum(), inputs)
    kept, bias = oracle_mask(plan, 1, 2)
    doubles = [x.detach().cpu().double().requires_grad_() for x in inputs]
    loss = (eager(*doubles, kept, bias, scale, torch.float64)[0] * weight.cpu().double()).sum()
    atol = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, wanted in zip(found, torch.autograd.grad(loss, doubles), strict=True):
        torch.testing.assert_close(
            mine.cpu().double(), wanted.nan_to_num(), atol=atol, rtol=10 * atol
        )
    assert (found[0][:, 16:32] == 0).all()
    assert (found[1][:, 32:] != 0).any() == (scale != 0)


def test_gradients_are_the_same_every_time():
    layout = BlockLayout.from_lengths([16, 16])
    plan = BlockPlan.full(layout, layout).to(DEVICE)
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        inputs = [torch.randn(1, 32, 1, 16, device=DEVICE).requires_grad_() for _ in range(3)]
        output, lse = kernel.attend(*inputs, plan, 0.25, Tiling(16, 16))
        runs.append(torch.autograd.grad(output.square().sum() + lse.sum(), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_transposed_lists_name_the_same_pairs():
    layout, other = BlockLayout.from_lengths([8] * 5), BlockLayout.from_lengths([4] * 3)
    mask = torch.rand(2, 3, 40, 12) < 0.4
    plan = BlockPlan.from_token_mask(mask, layout, other)
    counts, indices, partial = transposed_lists(plan)
    pairs = plan.block_mask()
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3)).tolist():
        i_batch, i_head, i_kv = place
        listed = indices[i_batch, i_head, i_kv, : counts[i_batch, i_head, i_kv]].tolist()
        assert listed == pairs[i_batch, i_head, :, i_kv].nonzero().flatten().tolist()
        for entry, i_q in enumerate(listed):
            row = plan.kv_indices[i_batch, i_head, i_q].tolist()
            live = row[: plan.kv_num_blocks[i_batch, i_head, i_q]]
            assert (
                partial[i_batch, i_head, i_kv, entry]
                == plan.partial[i_batch, i_head, i_q, live.index(i_kv)]
            )
