# SPDX-License-Identifier: Apache-2.0
"""Gradients of torch's kernels against autograd through a plain masked softmax in float64."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.core.grid import BlockLayout, cut
from dit_sparse.core.plan import BlockPlan
from dit_sparse.kernels import cpu, cpu_backward, portable, reference
from dit_sparse.kernels.dispatch import Backends
from tests.plans import cases, inputs_for
from tests.strategies import generator

SCALE = 0.4


def naive(query, key, value, plan, log_weight, dtype):
    """Attend by token masks, with every step open to autograd."""
    output, lse = [], []
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            mask, bias = reference.token_mask(plan, b, h)
            score = query[b, :, h].to(dtype) @ key[b, :, h].to(dtype).T * SCALE
            if log_weight is not None:
                weight = log_weight[b % log_weight.shape[0], h % log_weight.shape[1]]
                slot = torch.arange(plan.kv.slots)
                if plan.kv_permutation is not None:
                    permutation = plan.kv_permutation
                    token = permutation[b % permutation.shape[0], h % permutation.shape[1]]
                    slot = torch.zeros(plan.key_length, dtype=torch.int64)
                    slot[token[token >= 0]] = (token >= 0).nonzero().flatten()
                mask = mask & (bias != -torch.inf)
                score = score + torch.where(mask, weight.to(dtype)[slot], 0)
            score = score.masked_fill(~mask, -torch.inf)
            some = mask.any(-1, keepdim=True)
            e = torch.where(some, score, 0).logsumexp(-1, keepdim=True)
            p = torch.where(mask, (score - e).exp(), 0)
            output.append(p @ value[b, :, h].to(dtype))
            lse.append(torch.where(some, e, 0)[:, 0])
    shape = (query.shape[0], query.shape[2])
    return (
        torch.stack(output).unflatten(0, shape).transpose(1, 2),
        torch.stack(lse).unflatten(0, shape),
    )


def gradients(attend, tensors, plan, dtype, seed):
    """Give the gradients of a random sum over output and LSE."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    weight = plan.kv_log_weight
    if weight is not None:
        weight = weight.clone().requires_grad_()
        plan = replace(plan, kv_log_weight=weight)
        leaves.append(weight)
    output, lse = attend(*leaves[:3], plan, weight)
    random = generator(seed)
    into_o = torch.randn(output.shape, generator=random).to(output.dtype)
    into_e = torch.randn(lse.shape, generator=random).to(dtype)
    finite = torch.where(lse == -torch.inf, 0, lse.to(dtype))
    loss = (output * into_o).sum().to(dtype) + (finite * into_e).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [
        torch.zeros_like(x) if grad is None else grad
        for x, grad in zip(leaves, found, strict=True)
    ]


def by_backends(query, key, value, plan, log_weight, kernel="cpu"):
    return Backends(kernel).attend(query, key, value, plan, SCALE)


kernels = st.sampled_from(["cpu", "portable"])


@given(case=cases(), small=st.booleans(), kernel=kernels)
@settings(max_examples=40)
def test_float64_gradients_are_exact(case, small, kernel):
    plan, batch, heads, seed = case
    tensors = inputs_for(plan, batch, heads, 6, seed, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(cpu_backward, "Q_ROWS", 8)
            patch.setattr(portable, "Q_ROWS", 8)
        attend = partial(by_backends, kernel=kernel)
        got = gradients(attend, tensors, plan, torch.float64, seed)
    wanted = gradients(
        lambda q, k, v, p, w: naive(q, k, v, p, w, torch.float64),
        tensors,
        plan,
        torch.float64,
        seed,
    )
    for name, one, other in zip("qkvw", got, wanted, strict=False):
        # Inside, log weights and LSE are fp32 numbers.
        eps = 1e-5 if name == "w" else 1e-9
        torch.testing.assert_close(one, other, rtol=eps, atol=eps, msg=lambda m, n=name: n + m)


def check(got, tensors, plan, dtype, seed):
    """Demand errors within twice those of plain autograd in the same dtype."""
    exact = gradients(
        lambda q, k, v, p, w: naive(q, k, v, p, w, torch.float64),
        [x.double() for x in tensors],
        plan,
        torch.float64,
        seed,
    )
    exact = [x.double() for x in exact]
    plain = gradients(
        lambda q, k, v, p, w: naive(q, k, v, p, w, dtype), tensors, plan, torch.float32, seed
    )
    for name, one, other, eager in zip("qkvw", got, exact, plain, strict=False):
        eps = torch.finfo(dtype).eps
        allowed = 2 * ((eager.double() - other).abs().max() + eps * other.abs().max())
        # Weights are recomputed from the LSE of torch's fused forward.
        allowed += cpu.EXP_ERROR * other.abs().max()
        assert (one.double() - other).abs().max() <= allowed + 1e-6, name


@given(
    case=cases(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kernel=kernels,
)
@settings(max_examples=40)
def test_error_is_within_twice_that_of_plain_autograd(case, dtype, kernel):
    plan, batch, heads, seed = case
    tensors = inputs_for(plan, batch, heads, 16, seed, dtype)
    attend = partial(by_backends, kernel=kernel)
    check(gradients(attend, tensors, plan, torch.float32, seed), tensors, plan, dtype, seed)


def test_threads_and_memory_pieces_change_nothing(monkeypatch):
    layout = BlockLayout.from_lengths(cut(900, 32))  # rows longer than the least piece, 256 keys
    mask = torch.rand(1, 4, layout.blocks, layout.blocks, generator=generator(0)) < 0.5
    plan = BlockPlan.from_block_mask(mask, layout, layout)
    tensors = inputs_for(plan, 2, 4, 32, 1, torch.float32)
    whole = gradients(by_backends, tensors, plan, torch.float32, 2)
    monkeypatch.setattr(cpu_backward, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    threads = torch.get_num_threads
    spread = gradients(by_backends, tensors, plan, torch.float32, 2)
    assert torch.get_num_threads is threads
    monkeypatch.setattr(cpu_backward, "SCORES", 1 << 10)
    cut_small = gradients(by_backends, tensors, plan, torch.float32, 2)
    torch.set_num_threads(1)
    for one, other in zip(whole, spread, strict=True):
        assert torch.equal(one, other)
    check(whole, tensors, plan, torch.float32, 2)
    check(cut_small, tensors, plan, torch.float32, 2)


def test_gradients_flow_through_a_merge_by_lse():
    """Two halves of the keys, merged by their LSEs, have the gradients of the whole."""
    layout = BlockLayout.from_lengths([16] * 4)
    halves = []
    for first in (True, False):
        mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
        mask[..., :2] = first
        mask[..., 2:] = not first
        halves.append(BlockPlan.from_block_mask(mask, layout, layout))
    whole = BlockPlan.full(layout, layout)
    tensors = inputs_for(whole, 1, 2, 8, 3, torch.float64)

    def merged(query, key, value, plan, log_weight):
        parts = [Backends("cpu").attend(query, key, value, half, SCALE) for half in halves]
        lse = torch.logaddexp(parts[0][1], parts[1][1])
        output = sum(o * (e - lse).exp().transpose(1, 2)[..., None] for o, e in parts)
        return output, lse

    got = gradients(merged, tensors, whole, torch.float64, 4)
    wanted = gradients(by_backends, tensors, whole, torch.float64, 4)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_without_a_wanted_gradient_nothing_is_kept():
    layout = BlockLayout.from_lengths([16, 5])
    plan = BlockPlan.full(layout, layout)
    query, key, value = inputs_for(plan, 1, 1, 8, 0, torch.float32)
    assert cpu.attend(query, key, value, plan, 1.0)[0].grad_fn is None
    query.requires_grad_()
    with torch.no_grad():
        assert cpu.attend(query, key, value, plan, 1.0)[0].grad_fn is None
    output, lse = cpu.attend(query, key, value, plan, 1.0)
    assert output.grad_fn is not None
    assert lse.grad_fn is not None


def test_the_plain_function_is_what_autograd_calls():
    layout = BlockLayout.from_lengths([16, 5])
    plan = BlockPlan.full(layout, layout)
    leaves = [x.requires_grad_() for x in inputs_for(plan, 1, 2, 8, 0, torch.float32)]
    output, lse = cpu.attend(*leaves, plan, 1.0)
    into_o, into_e = torch.ones_like(output), torch.ones_like(lse)
    wanted = torch.autograd.grad((output, lse), leaves, (into_o, into_e))
    got = cpu.attend_backward(
        *(x.detach() for x in (*leaves, output, lse)), into_o, into_e, plan, 1.0
    )
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
