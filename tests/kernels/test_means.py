# SPDX-License-Identifier: Apache-2.0
"""Means of dropped blocks, against softmax over lists of keys written out token by token."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import PlanError
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.kernels.means import add_means, block_means
from tests.plans import cases, inputs_for


def pick(tensor, i_batch, i_head):
    return tensor[min(i_batch, tensor.shape[0] - 1), min(i_head, tensor.shape[1] - 1)].tolist()


def bit(plan, tile, row, column):
    return tile < 0 or (int(plan.tiles[tile, row, column // 32]) >> (column % 32)) & 1


def in_loops(query, key, value, plan, scale):
    """Every query token reads its kept keys, and of each dropped block one key; in float64."""
    output = torch.zeros_like(query, dtype=torch.float64)
    lse = torch.full((query.shape[0], query.shape[2], query.shape[1]), -math.inf).double()
    pairs = torch.zeros(query.shape[0], query.shape[2], dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            k, v = (x[b, :, h].double() for x in (key, value))
            blocks = []
            for start, length in zip(
                *(pick(x, b, h) for x in (plan.kv.starts, plan.kv.lengths)), strict=True
            ):
                slots = range(start, start + length)
                order = None if plan.kv_permutation is None else pick(plan.kv_permutation, b, h)
                blocks.append([slot if order is None else order[slot] for slot in slots])
            index, count = pick(plan.kv_indices, b, h), pick(plan.kv_num_blocks, b, h)
            partial = None if plan.partial is None else pick(plan.partial, b, h)
            rows = list(
                zip(*(pick(x, b, h) for x in (plan.q.starts, plan.q.lengths)), strict=True)
            )
            for i_q, (start, length) in enumerate(rows):
                kept = index[i_q][: count[i_q]]
                for row in range(length):
                    token = start + row
                    if plan.q_permutation is not None:
                        token = pick(plan.q_permutation, b, h)[token]
                    keys, values, weights = [], [], []
                    for entry, block in enumerate(kept):
                        tile = -1 if partial is None else partial[i_q][entry]
                        for column, other in enumerate(blocks[block]):
                            if bit(plan, tile, row, column):
                                keys.append(k[other])
                                values.append(v[other])
                                weights.append(0.0)
                    for block, tokens in enumerate(blocks):
                        if block not in kept and tokens:
                            keys.append(k[tokens].mean(0))
                            values.append(v[tokens].mean(0))
                            weights.append(math.log(len(tokens)))
                    pairs[b, h] += len(keys)
                    if keys:
                        q = query[b, token, h].double()
                        score = scale * torch.stack(keys) @ q + torch.tensor(weights).double()
                        lse[b, h, token] = score.logsumexp(0)
                        output[b, token, h] = score.softmax(0) @ torch.stack(values)
    return output, lse, pairs


@given(cases(log_weight=False))
def test_equals_one_softmax_over_kept_keys_and_means(case):
    plan, batch, heads, seed = case
    plan = plan.with_means()
    inputs = inputs_for(plan, batch, heads, 4, seed, torch.float32)
    output, lse = Backends("cpu").attend(*inputs, plan, 0.3)
    wanted, wanted_lse, pairs = in_loops(*inputs, plan, 0.3)
    torch.testing.assert_close(output.double(), wanted, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=2e-5, atol=2e-5)
    living = plan.kv.lengths.sum(-1).double() * plan.q.lengths.sum(-1)
    share = (plan.density() * living).nan_to_num()  # no key at all: 0 of 0
    torch.testing.assert_close(share.expand(batch, heads), pairs, rtol=1e-12, atol=1e-9)


@given(cases(log_weight=False))
def test_masked_products_give_the_same(case):
    plan, batch, heads, seed = case
    query, key, value = inputs_for(plan, batch, heads, 4, seed, torch.float64)
    output, lse = Backends("reference").attend(query, key, value, plan, 0.3)
    means = [block_means(x, plan) for x in (key, value)]
    output, lse = add_means(query, *means, plan.with_means(), 0.3, output, lse)
    wanted, wanted_lse, _ = in_loops(query, key, value, plan, 0.3)
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)  # the LSE came as fp32
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


@given(cases(log_weight=False, partial=False))
def test_blocks_of_equal_keys_lose_nothing(case):
    """Where all keys of a block are alike, and its values, means are dense attention."""
    plan, batch, heads, seed = case
    query, key, value = inputs_for(plan, batch, heads, 4, seed, torch.float64)
    for b in range(batch):
        for h in range(heads):
            for start, length in zip(
                *(pick(x, b, h) for x in (plan.kv.starts, plan.kv.lengths)), strict=True
            ):
                at = torch.arange(start, start + length)
                if plan.kv_permutation is not None:
                    at = torch.tensor(pick(plan.kv_permutation, b, h))[at]
                if length:
                    for x in (key, value):
                        x[b, at, h] = x[b, at[0], h].clone()
    ops = Backends("reference")
    full = BlockPlan.full(plan.q, plan.kv)
    full = replace(
        full, complete=False, q_permutation=plan.q_permutation, kv_permutation=plan.kv_permutation,
        q_tokens=plan.q_tokens, kv_tokens=plan.kv_tokens,
    )  # fmt: skip
    output, lse = ops.attend(query, key, value, plan.with_means(), 0.3)
    wanted, wanted_lse = ops.attend(query, key, value, full, 0.3)
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)


def half_kept(seed=0, tokens=96, size=16, heads=2):
    layout = BlockLayout.from_lengths([size] * (tokens // size))
    mask = torch.rand(1, heads, layout.blocks, layout.blocks) < 0.5
    return BlockPlan.from_block_mask(mask, layout, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_and_kernel_of_the_cpu(dtype):
    plan = half_kept().with_means()
    inputs = inputs_for(plan, 1, 2, 16, 3, dtype)
    wanted, wanted_lse, _ = in_loops(*inputs, plan, 0.25)
    bound = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    for kernel in (None, "cpu", "reference"):
        output, lse = Backends(kernel).attend(*inputs, plan, 0.25)
        assert output.dtype == dtype
        assert lse.dtype == torch.float32
        size = inputs[2].abs().max()  # of a rounded mean value and a rounded mean key's score
        assert (output.double() - wanted).abs().max() <= 8 * bound * size
        assert (lse.double() - wanted_lse).abs().max() <= 16 * bound


def test_gradients_are_those_of_the_one_softmax():
    plan = half_kept(tokens=48, size=8).with_means()
    inputs = [x.requires_grad_() for x in inputs_for(plan, 1, 2, 4, 5, torch.float64)]
    weight = torch.randn(inputs[0].shape, dtype=torch.float64)
    wanted, _, _ = in_loops(*inputs, plan, 0.3)
    want = torch.autograd.grad((wanted * weight).sum(), inputs)
    single = [x.detach().float().requires_grad_() for x in inputs]
    output, _ = Backends("cpu").attend(*single, plan, 0.3)
    for got, right in zip(
        torch.autograd.grad((output * weight.float()).sum(), single), want, strict=True
    ):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)
    kept, lse = Backends("cpu").attend(*single, replace(plan, means=False), 0.3)
    means = [block_means(x, plan) for x in single[1:]]
    output, _ = add_means(single[0], *means, plan, 0.3, kept, lse)
    for got, right in zip(
        torch.autograd.grad((output * weight.float()).sum(), single), want, strict=True
    ):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)


def test_nothing_dropped_is_nothing_added():
    layout = BlockLayout.from_lengths([16, 16, 5])
    full = BlockPlan.full(layout, layout)
    assert full.with_means() is full
    plan = BlockPlan.from_block_mask(torch.ones(1, 1, 3, 3, dtype=torch.bool), layout, layout)
    inputs = inputs_for(plan, 2, 3, 8, 1, torch.float32)
    output, lse = Backends().attend(*inputs, plan.with_means(), 0.3)
    wanted, wanted_lse = Backends().attend(*inputs, plan, 0.3)
    assert torch.equal(output, wanted)
    assert torch.equal(lse, wanted_lse)
    assert float(plan.with_means().density()) == 1.0


def test_weighted_keys_are_refused():
    plan = replace(half_kept(), kv_log_weight=torch.zeros(1, 1, 96))
    with pytest.raises(PlanError, match="both kv_log_weight and means"):
        plan.with_means()
    with pytest.raises(PlanError, match="both kv_log_weight and means"):
        replace(half_kept().with_means(), kv_log_weight=torch.zeros(1, 1, 96))


def test_a_file_keeps_it(tmp_path):
    plan = half_kept()
    for each in (plan, plan.with_means()):
        each.save(tmp_path / "plan.safetensors")
        assert BlockPlan.load(tmp_path / "plan.safetensors").means == each.means
    assert plan.with_means() is plan.with_means()
    assert not plan.with_means().complement().means
