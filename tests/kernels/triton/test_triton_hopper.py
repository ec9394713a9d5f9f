# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel: the same answers as the pointer kernel's, for the plans that it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import KernelError
from dit_sparse.kernels import triton_attention as kernel
from dit_sparse.kernels.triton_hopper import hopper_tiling
from tests.kernels.triton.plans import DEVICE, assert_close, eager, oracle_mask

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper"
)


def problem(lengths, head_dim=64, heads=2):
    layout = BlockLayout.from_lengths(lengths)
    mask = torch.rand(1, heads, len(lengths), len(lengths)) < 0.7
    mask[:, 0, 0] = False  # a query block that keeps nothing
    mask[:, 1, 0] = True
    plan = BlockPlan.from_block_mask(mask, layout, layout).to(DEVICE)
    fused = torch.randn(1, layout.slots, heads, 3 * head_dim).half().to(DEVICE)
    return plan, *fused.chunk(3, -1)


@pytest.mark.parametrize("specialize", [False, True])
@pytest.mark.parametrize("lengths", [[64, 64, 33], [64, 5, 64, 40]])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_block_lists(lengths, head_dim, specialize):
    plan, q, k, v = problem(lengths, head_dim)
    tiling = hopper_tiling(head_dim, 64, 64, specialize=specialize)
    output, lse = kernel.attend(q, k, v, plan, 0.2, tiling)
    mask, bias = oracle_mask(plan, 1, 2)
    wanted = eager(q, k, v, mask, bias, 0.2, torch.float64)
    same = eager(q, k, v, mask, bias, 0.2, torch.float16)
    assert_close(output, wanted[0], same[0], torch.float16)
    assert_close(lse, wanted[1], same[1], torch.float16)


def test_long_blocks_take_several_tiles():
    plan, q, k, v = problem([150, 150, 20])
    tiling = replace(hopper_tiling(64, 64, 64, specialize=False))
    mask, bias = oracle_mask(plan, 1, 2)
    output, _ = kernel.attend(q, k, v, plan, 0.2, tiling)
    wanted = eager(q, k, v, mask, bias, 0.2, torch.float64)[0]
    same = eager(q, k, v, mask, bias, 0.2, torch.float16)[0]
    assert_close(output, wanted, same, torch.float16)


def test_what_stands_behind_a_short_block_is_repaired():
    layout = BlockLayout.from_lengths([64, 64])
    short = BlockLayout(layout.starts, torch.tensor([[[64, 20]]]).int(), 128, 64, True)
    plan = BlockPlan.full(layout, short).to(DEVICE)
    q, k, v = (torch.randn(1, 128, 1, 64, device=DEVICE).half() for _ in range(3))
    tiling = hopper_tiling(64, 64, 64, specialize=True)
    clean = kernel.attend(q, k, v, plan, 0.3, tiling)
    k[:, 84:], v[:, 84:] = torch.nan, torch.inf
    for found, wanted in zip(kernel.attend(q, k, v, plan, 0.3, tiling), clean, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)


def test_it_says_what_it_does_not_take():
    plan, q, k, v = problem([64, 64])
    tiling = hopper_tiling(64, 64, 64, specialize=True)
    with pytest.raises(KernelError, match="computes float16 and bfloat16"):
        kernel.attend(q.float(), k.float(), v.float(), plan, 0.2, tiling)
    weights = replace(plan, kv_log_weight=torch.zeros(1, 1, 128, device=DEVICE))
    with pytest.raises(KernelError, match="permutations, bit tiles or weights"):
        kernel.attend(q, k, v, weights, 0.2, tiling)


def test_it_is_the_default_on_hopper_where_it_takes_the_call(monkeypatch):
    monkeypatch.setattr("dit_sparse.kernels.triton_target.target_of", lambda _: "sm_90")
    plan, q, k, v = problem([64, 64, 33])
    assert kernel.default_tiling(q, k, v, plan).specialize
    permuted = replace(plan, kv_permutation=torch.arange(plan.kv.slots, device=DEVICE)[None, None])
    assert not kernel.default_tiling(q, k, v, permuted).copy_engine
    assert not kernel.default_tiling(q.float(), k.float(), v.float(), plan).copy_engine
    monkeypatch.setattr("dit_sparse.kernels.triton_target.target_of", lambda _: "sm_100")
    assert not kernel.default_tiling(q, k, v, plan).copy_engine
