# SPDX-License-Identifier: Apache-2.0
"""Means in one launch, against one softmax over kept keys and means, spelled out in float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import KernelError
from dit_sparse.kernels import triton_attention as kernel
from dit_sparse.kernels.canary import Kind, check_kernel
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.kernels.means import block_means
from tests.kernels.triton.plans import DEVICE, assert_close, calls, eager, oracle_mask


def with_means(plan, mask, bias):
    """Append a column for each key block: whether a query token reads its mean, and ln n."""
    batch, heads, tokens, _ = mask.shape
    read = torch.zeros(batch, heads, tokens, plan.kv.blocks, dtype=torch.bool)
    more = torch.zeros(batch, heads, 1, plan.kv.blocks, dtype=torch.float64)

    def pick(tensor, b, h):
        return tensor[min(b, tensor.shape[0] - 1), min(h, tensor.shape[1] - 1)].tolist()

    for b in range(batch):
        for h in range(heads):
            sizes = pick(plan.kv.lengths, b, h)
            more[b, h, 0] = torch.tensor(sizes).clamp(min=1).double().log()
            lists, counts = pick(plan.kv_indices, b, h), pick(plan.kv_num_blocks, b, h)
            rows = zip(pick(plan.q.starts, b, h), pick(plan.q.lengths, b, h), strict=True)
            for i, (start, length) in enumerate(rows):
                away = [j for j, n in enumerate(sizes) if n and j not in lists[i][: counts[i]]]
                for slot in range(start, start + length):
                    order = plan.q_permutation
                    token = slot if order is None else pick(order, b, h)[slot]
                    read[b, h, token, away] = True
    bias = bias.expand(batch, heads, 1, mask.shape[-1])
    return torch.cat([mask, read], -1), torch.cat([bias, more], -1)


@given(calls())
def test_any_plan(call):
    plan = replace(call.plan.to("cpu"), kv_log_weight=None).to(DEVICE)
    batch, _, heads, _ = call.query.shape
    inputs = call.query, call.key, call.value
    kept = kernel.attend(*inputs, plan, call.scale, call.tiling)
    means = [block_means(x, plan) for x in inputs[1:]]
    output, lse = kernel.add_means(
        call.query, *means, plan, call.scale, *(x.clone() for x in kept), call.tiling
    )
    mask, bias = with_means(plan.to("cpu"), *oracle_mask(plan, batch, heads))
    key, value = (torch.cat(x, 1) for x in zip(inputs[1:], means, strict=True))
    whole = (call.query, key, value, mask, bias, call.scale)
    wanted, wanted_lse = eager(*whole, torch.float64)
    same, same_lse = eager(*whole, call.query.dtype)
    # The kept part comes as an output and an LSE that are rounded already.
    largest = float(kept[1].nan_to_num(neginf=0.0).abs().max())
    handed = torch.finfo(call.query.dtype).eps / 2 * float(kept[0].abs().max())
    handed += torch.finfo(torch.float32).eps * largest * float(value.abs().max())
    assert_close(output, wanted, same, call.query.dtype, handed)
    assert_close(
        lse, wanted_lse, same_lse, torch.float32, torch.finfo(torch.float32).eps * largest
    )


def plain(dropped):
    layout = BlockLayout.from_lengths([16, 16, 9])
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[:, :, dropped[0], dropped[1]] = False
    return BlockPlan.from_block_mask(mask, layout, layout).to(DEVICE)


def test_a_mean_that_is_not_finite_reaches_only_rows_that_drop_its_block():
    plan = plain((0, 2))
    query, key, value = (torch.randn(1, 41, 1, 16, device=DEVICE) for _ in range(3))
    kept = kernel.attend(query, key, value, plan, 0.25)
    means = [block_means(x, plan) for x in (key, value)]
    means[1][0, 2] = torch.nan
    output, _ = kernel.add_means(query, *means, plan, 0.25, *(x.clone() for x in kept))
    assert bool(output[:, :16].isnan().all())
    assert torch.equal(output[:, 16:], kept[0][:, 16:])


def test_rows_that_drop_nothing_keep_their_result():
    plan = plain((1, 0))
    query, key, value = (torch.randn(1, 41, 1, 32, device=DEVICE) for _ in range(3))
    kept = kernel.attend(query, key, value, plan, 0.25)
    means = [block_means(x, plan) for x in (key, value)]
    output, lse = kernel.add_means(query, *means, plan, 0.25, *(x.clone() for x in kept))
    assert not torch.allclose(output[:, 16:32], kept[0][:, 16:32])
    for rows in (slice(0, 16), slice(32, 41)):
        torch.testing.assert_close(output[:, rows], kept[0][:, rows])
        torch.testing.assert_close(lse[..., rows], kept[1][..., rows])


def test_shapes_are_checked():
    plan = plain((0, 1))
    query, key, value = (torch.randn(1, 41, 1, 16, device=DEVICE) for _ in range(3))
    kept = kernel.attend(query, key, value, plan, 0.25)
    with pytest.raises(KernelError, match=r"key must be \(1, 3, 1, 16\), got \(1, 41, 1, 16\)"):
        kernel.add_means(query, key, value, plan, 0.25, *kept)


def test_the_backends_use_it(monkeypatch):
    """Where no gradient is wanted; else masked products in torch, which have one."""
    plan = plain((0, 1)).with_means()
    inputs = [torch.randn(1, 41, 1, 16, device=DEVICE) for _ in range(3)]
    used = []

    def counted(*args):
        used.append(args[3])
        return kernel.add_means(*args)

    module = SimpleNamespace(attend=kernel.attend, add_means=counted, HAS_BACKWARD=True)
    ops = Backends()
    monkeypatch.setattr(ops, "_choose", lambda *_, **__: ("triton", module))
    monkeypatch.setattr(ops, "_canary", lambda *_: None)
    found = ops.attend(*inputs, plan, 0.25)
    assert used == [plan]
    wanted = Backends("reference").attend(*inputs, plan, 0.25)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("extras", [{}, {"own": True, "kv_permuted": True, "cut": True}])
def test_the_canary_checks_it(extras):
    kind = Kind(means=True, **extras)
    assert check_kernel(kernel, DEVICE, torch.float32, 16, kind) is None

    def wrong(query, key, value, *rest):
        return kernel.add_means(query, key, 1.01 * value, *rest)

    broken = SimpleNamespace(attend=kernel.attend, add_means=wrong)
    assert check_kernel(broken, DEVICE, torch.float32, 16, Kind(**extras)) is None
    assert "with means, output differs" in check_kernel(broken, DEVICE, torch.float32, 16, kind)
