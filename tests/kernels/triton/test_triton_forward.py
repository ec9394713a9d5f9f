# SPDX-License-Identifier: Apache-2.0
"""The forward kernel against a float64 oracle, over plans that use the whole contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import KernelError, PlanError
from dit_sparse.kernels import triton_attention as kernel
from dit_sparse.kernels.triton_forward import forward_launch
from dit_sparse.kernels.triton_launch import Launch
from dit_sparse.kernels.triton_target import Tiling
from tests.kernels.triton.plans import (
    DEVICE,
    DTYPES,
    assert_close,
    calls,
    eager,
    oracle_mask,
)

HEAD_DIMS = (8, 16, 24, 32, 48, 64, 72, 80, 96, 128, 256)


def compare(call):
    """Run a call and check output and LSE."""
    batch, _, heads, _ = call.query.shape
    output, lse = kernel.attend(
        call.query, call.key, call.value, call.plan, call.scale, call.tiling
    )
    assert output.dtype == call.query.dtype
    assert lse.dtype == torch.float32
    mask, bias = oracle_mask(call.plan, batch, heads)
    inputs = (call.query, call.key, call.value, mask, bias, call.scale)
    wanted, wanted_lse = eager(*inputs, torch.float64)
    same, same_lse = eager(*inputs, call.query.dtype)
    assert_close(output, wanted, same, call.query.dtype)
    assert_close(lse, wanted_lse, same_lse, call.query.dtype)


@given(calls())
def test_any_plan(call):
    compare(call)


@given(calls(extras=False))
def test_block_lists_alone(call):
    compare(call)


def uniform(head_dim, dtype=torch.float32, block=16, blocks=3, heads=1):
    """Make a plain call: every block kept but one, a short tail."""
    layout = BlockLayout.from_lengths([block] * (blocks - 1) + [block - 3])
    mask = torch.ones(1, heads, blocks, blocks, dtype=torch.bool)
    mask[:, :, 0, 1] = False
    plan = BlockPlan.from_block_mask(mask, layout, layout).to(DEVICE)
    q, k, v = (
        torch.randn(1, layout.slots, heads, head_dim, device=DEVICE).to(dtype) for _ in range(3)
    )
    return q, k, v, plan


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_head_dim(head_dim, dtype):
    q, k, v, plan = uniform(head_dim, dtype)
    output, lse = kernel.attend(q, k, v, plan, head_dim**-0.5)
    mask, bias = oracle_mask(plan, 1, 1)
    wanted = eager(q, k, v, mask, bias, head_dim**-0.5, torch.float64)
    same = eager(q, k, v, mask, bias, head_dim**-0.5, dtype)
    assert_close(output, wanted[0], same[0], dtype)
    assert_close(lse, wanted_lse := wanted[1], same[1], dtype)
    assert wanted_lse.isfinite().all()


@pytest.mark.parametrize("scale", [0.39, 0.71, 72**-0.5, -1.42])
def test_lse_is_within_two_roundings(scale):
    """One key and scores without error: what is left is what the kernel does to them."""
    plan = BlockPlan.full(BlockLayout.from_lengths([64]), BlockLayout.from_lengths([1]))
    q = torch.randint(-40, 41, (2, 64, 1, 16), device=DEVICE).float()
    k = torch.ones(2, 1, 1, 16, device=DEVICE)
    _, lse = kernel.attend(q, k, k, plan.to(DEVICE), scale)
    wanted = q.double().sum(-1).transpose(1, 2) * scale
    rounding = torch.finfo(torch.float32).eps / 2
    # Of the sum of exponents and of the product with ln 2; and of the exponentials' sum, 1.
    assert ((lse.double() - wanted).abs() <= rounding * (2.1 * wanted.abs() + 1)).all()


def test_every_query_is_written():
    q, k, v, plan = uniform(32)
    output = torch.full_like(q, torch.nan)
    lse = torch.full((1, 1, q.shape[1]), torch.nan, device=DEVICE)
    forward_launch(q, k, v, output, lse, plan, 0.2, Tiling(16, 16)).run()
    assert output.isfinite().all()
    assert lse.isfinite().all()


def test_heads_of_different_patterns_share_one_launch(monkeypatch):
    """Sparse-vDiT's five, one a head: full, skip, diagonal, several diagonals, vertical stripe."""
    launches = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: (launches.append(launch), run(launch)))
    layout = BlockLayout.from_lengths([16] * 5 + [9])
    i, j = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    heads = [i >= 0, i < 0, (i - j).abs() <= 1, (i - j) % 3 == 0, j % 4 == 1]
    plan = BlockPlan.from_block_mask(torch.stack(heads)[None], layout, layout).to(DEVICE)
    q, k, v = (torch.randn(2, 89, 5, 32, device=DEVICE) for _ in range(3))
    output, lse = kernel.attend(q, k, v, plan, 0.2, Tiling(16, 16))
    assert len(launches) == 1
    block = torch.arange(89) // 16
    for head, pattern in enumerate(heads):
        mask = pattern[block[:, None], block].expand(2, 1, -1, -1)
        inputs = (*(x[:, :, head : head + 1] for x in (q, k, v)), mask, torch.zeros(()), 0.2)
        wanted, same = eager(*inputs, torch.float64), eager(*inputs, torch.float32)
        assert_close(output[:, :, head : head + 1], wanted[0], same[0], torch.float32)
        assert_close(lse[:, head : head + 1], wanted[1], same[1], torch.float32)
    assert (output[:, :, 1] == 0).all()
    assert (lse[:, 1] == -torch.inf).all()


def test_a_query_that_keeps_nothing_gives_zero():
    q, k, v, plan = uniform(16)
    counts = plan.kv_num_blocks.clone()
    counts[..., 1] = 0
    output, lse = kernel.attend(q, k, v, replace(plan, kv_num_blocks=counts), 0.2)
    assert (output[:, 16:32] == 0).all()
    assert (lse[..., 16:32] == -torch.inf).all()
    assert (output[:, :16] != 0).any()
    assert lse[..., :16].isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["key", "value"])
def test_what_is_not_finite_reaches_exactly_who_keeps_it(bad, where):
    q, k, v, plan = uniform(16)
    (k if where == "key" else v)[0, 20, 0, 3] = bad  # in key block 1, which query block 0 drops
    output, _ = kernel.attend(q, k, v, plan, 0.2)
    assert output[:, :16].isfinite().all()
    if where == "value":
        torch.testing.assert_close(
            output[:, 16:, :, 3],
            torch.full_like(output[:, 16:, :, 3], bad),
            equal_nan=True,
        )
    else:
        dense = torch.nn.functional.scaled_dot_product_attention(
            q[:, 16:].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=0.2
        ).transpose(1, 2)
        assert torch.equal(output[:, 16:].isnan(), dense.isnan())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_partial_block_drops_what_is_not_finite(bad):
    layout = BlockLayout.from_lengths([16, 16])
    mask = torch.rand(1, 1, 32, 32) < 0.5
    plan = BlockPlan.from_token_mask(mask, layout, layout).to(DEVICE)
    q, k, v = (torch.randn(1, 32, 1, 16, device=DEVICE) for _ in range(3))
    v[0, 20, 0, 3] = bad
    k[0, 25] = torch.nan
    output, _ = kernel.attend(q, k, v, plan, 0.2, Tiling(16, 16))
    kept, nan = mask[0, 0, :, 20], mask[0, 0, :, 25]
    rest = [i for i in range(16) if i != 3]
    assert torch.equal(output[0, :, 0, rest].isnan().all(-1).cpu(), nan)
    assert torch.equal(~output[0, :, 0, 3].isfinite().cpu(), kept | nan)


def test_scores_of_minus_infinity_are_no_reason_for_zero():
    q, k, v, plan = uniform(16)
    q.abs_()
    k.copy_(-k.abs())
    q[0, 4, 0] = torch.inf
    output, _ = kernel.attend(q, k, v, plan, 0.2)
    assert output[0, 4].isnan().all()
    assert output[0, 5:].isfinite().all()


def test_garbage_behind_the_keys_takes_no_part():
    layout = BlockLayout.from_lengths([16, 16])
    short = BlockLayout(layout.starts, torch.tensor([[[16, 5]]], dtype=torch.int32), 32, 16, True)
    plan = BlockPlan.full(layout, short).to(DEVICE)
    q, k, v = (torch.randn(1, 32, 2, 16, device=DEVICE) for _ in range(3))
    clean = kernel.attend(q, k, v, plan, 0.3)
    k[:, 21:], v[:, 21:] = torch.nan, torch.nan
    for found, wanted in zip(kernel.attend(q, k, v, plan, 0.3), clean, strict=True):
        assert torch.equal(found, wanted)


@given(st.integers(0, 1000))
def test_long_blocks_and_empty_ones_share_a_table_of_tiles(seed):
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([35, 0, 1, 18])[torch.randperm(4, generator=rng)]
    starts = (lengths.cumsum(0) - lengths).int()[None, None]
    layout = BlockLayout(starts, lengths.int()[None, None], 54, 35)
    mask = torch.rand(1, 1, 4, 4, generator=rng) < 0.6
    plan = BlockPlan.from_block_mask(mask, layout, layout).to(DEVICE)
    q, k, v = (torch.randn(1, 54, 1, 16, generator=rng).to(DEVICE) for _ in range(3))
    output, lse = kernel.attend(q, k, v, plan, 0.25, Tiling(16, 16))
    kept, bias = oracle_mask(plan, 1, 1)
    wanted = eager(q, k, v, kept, bias, 0.25, torch.float64)
    same = eager(q, k, v, kept, bias, 0.25, torch.float32)
    assert_close(output, wanted[0], same[0], torch.float32)
    assert_close(lse, wanted[1], same[1], torch.float32)


def test_reasons_are_given_before_any_launch():
    q, _, _, plan = uniform(16)
    on_gpu = DEVICE.type == "cuda"  # the interpreter is for tests: it is never chosen
    assert (kernel.reasons_against(q, plan) == []) == on_gpu
    assert on_gpu or "needs a CUDA or ROCm device" in kernel.reasons_against(q, plan)[0]
    assert "head_dim" in kernel.reasons_against(q.repeat(1, 1, 1, 17), plan)[-1]
    assert "float64" in kernel.reasons_against(q.double(), plan)[-1]


BAD_CALLS = {
    "query must be": lambda q, k, v, p: (q[0], k, v, p, 1.0),
    "head_dim must be at most 256, got 272": lambda q, k, v, p: (
        *(x.repeat(1, 1, 1, 17) for x in (q, k, v)), p, 1.0,
    ),
    "computes float16, bfloat16 and float32, got torch.float64": lambda q, k, v, p: (
        q.double(), k.double(), v.double(), p, 1.0,
    ),
    "key must be": lambda q, k, v, p: (q, k[:, :-1], v, p, 1.0),
    "value must be torch.float32 on": lambda q, k, v, p: (q, k, v.half(), p, 1.0),
    "value must be .*like query, got torch.float32 on meta": lambda q, k, v, p: (
        q, k, v.to("meta"), p, 1.0,
    ),
    "plan is for 45 query tokens": lambda q, k, v, p: (q[:, :-1], k, v, p, 1.0),
    "plan is for 2 heads, query has 3": lambda q, k, v, p: (
        *(x.repeat(1, 1, 3, 1) for x in (q, k, v)),
        replace(p, kv_num_blocks=p.kv_num_blocks.repeat(1, 2, 1),
                kv_indices=p.kv_indices.repeat(1, 2, 1, 1)), 1.0,
    ),
    "plan is for 2 samples, query has 1": lambda q, k, v, p: (
        q, k, v,
        replace(p, kv_num_blocks=p.kv_num_blocks.repeat(2, 1, 1),
                kv_indices=p.kv_indices.repeat(2, 1, 1, 1)), 1.0,
    ),
    "the plan is on meta": lambda q, k, v, p: (q, k, v, p.to("meta"), 1.0),
    "scale must be finite, got nan": lambda q, k, v, p: (q, k, v, p, float("nan")),
    "scale must be finite, got -inf": lambda q, k, v, p: (q, k, v, p, -torch.inf),
}  # fmt: skip


@pytest.mark.parametrize("words", BAD_CALLS)
def test_a_bad_call_is_named_before_any_launch(words, monkeypatch):
    monkeypatch.setattr("dit_sparse.kernels.triton_launch.Launch.run", launched)
    with pytest.raises(KernelError, match=words):
        kernel.attend(*BAD_CALLS[words](*uniform(16)))


def launched(_launch):
    raise AssertionError("launched")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the host does not wait for a plan's values")
@pytest.mark.parametrize("bad", [3, -1])
def test_indices_out_of_range_are_named_before_any_launch(bad, monkeypatch):
    monkeypatch.setattr("dit_sparse.kernels.triton_launch.Launch.run", launched)
    q, k, v, plan = uniform(16)
    indices = plan.kv_indices.clone()
    indices[0, 0, 2, 1] = bad
    with pytest.raises(PlanError, match="kv_indices"):
        kernel.attend(q, k, v, replace(plan, kv_indices=indices), 1.0)
    counts = plan.kv_num_blocks + 3
    with pytest.raises(PlanError, match="kv_num_blocks"):
        kernel.attend(q, k, v, replace(plan, kv_num_blocks=counts), 1.0)


def test_bfloat16_is_never_interpreted():
    q, _, _, plan = uniform(16, torch.bfloat16)
    interpreted = kernel.is_interpreted()
    assert interpreted == (DEVICE.type == "cpu")
    if interpreted:
        with pytest.raises(KernelError, match="computes bfloat16 wrongly"):
            kernel.attend(q, q, q, plan, 1.0)
