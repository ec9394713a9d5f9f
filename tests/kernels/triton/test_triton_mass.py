# SPDX-License-Identifier: Apache-2.0
"""Exact block mass against a softmax written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import BlockLayout
from dit_sparse.errors import KernelError
from dit_sparse.kernels import triton_attention as kernel
from dit_sparse.kernels.triton_target import Tiling
from tests.kernels.triton.plans import DEVICE, DTYPES, assert_close

LAYOUTS = [[16, 16, 7], [32, 5], [20, 20, 20], [3], [40, 40, 11]]


def oracle(query, key, lse, q, kv, scale, dtype):
    """Sum the softmax, block pair by block pair."""
    score = torch.einsum("bihd,bjhd->bhij", query.cpu().to(dtype), key.cpu().to(dtype)) * scale
    lse = lse.cpu().to(dtype)[..., None]
    weight = (score - lse).exp().masked_fill(lse == -torch.inf, 0)
    spans = [
        list(zip(side.starts[0, 0].tolist(), side.lengths[0, 0].tolist(), strict=True))
        for side in (q, kv)
    ]
    rows = [
        [weight[..., i : i + m, j : j + n].sum((-1, -2)) for j, n in spans[1]] for i, m in spans[0]
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


@given(
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
    st.sampled_from([16, 72]),
    st.sampled_from(DTYPES),
    st.sampled_from([Tiling(16, 16), Tiling(32, 32), None]),
    st.integers(0, 2**31 - 1),
)
def test_mass_is_the_softmax_summed(q_lengths, kv_lengths, head_dim, dtype, tiling, seed):
    rng = torch.Generator().manual_seed(seed)
    q, kv = (BlockLayout.from_lengths(x, DEVICE) for x in (q_lengths, kv_lengths))
    query, key = (
        torch.randn(2, side.slots, 2, head_dim, generator=rng).to(dtype).to(DEVICE)
        for side in (q, kv)
    )
    score = torch.einsum("bihd,bjhd->bhij", query.double(), key.double()) * 0.2
    lse = score.logsumexp(-1).float()
    lse[:, 1, 0] = -torch.inf
    found = kernel.block_mass(query, key, lse, q, kv, 0.2, tiling)
    assert found.dtype == torch.float32
    wanted = oracle(query, key, lse, q, kv, 0.2, torch.float64)
    same = oracle(query, key, lse, q, kv, 0.2, dtype)
    assert_close(found, wanted, same, dtype)
    rows = q.lengths[0, 0].double().expand_as(wanted[..., 0]).cpu().clone()
    rows[:, 1, 0] -= 1
    torch.testing.assert_close(wanted.sum(-1), rows, atol=1e-4, rtol=1e-4)


def test_padding_counts_nowhere_and_leaks_nothing():
    q = BlockLayout.from_lengths([16, 16], DEVICE)
    kv = BlockLayout(q.starts, torch.tensor([[[16, 5]]]).int().to(DEVICE), 32, 16, True)
    query, key = (torch.randn(1, 32, 1, 16, device=DEVICE) for _ in range(2))
    key[:, 21:] = torch.nan
    lse = torch.zeros(1, 1, 32, device=DEVICE)
    found = kernel.block_mass(query, key, lse, q, kv, -0.1)
    short = BlockLayout.from_lengths([16, 5], DEVICE)
    wanted = oracle(query, key[:, :21], lse, q, short, -0.1, torch.float64)
    torch.testing.assert_close(found.cpu().double(), wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("lse must be float32", {"lse": torch.zeros(1, 16, 2)}),
        ("scale must be finite, got inf", {"scale": torch.inf}),
        ("key must be", {"key": torch.zeros(1, 15, 2, 16)}),
        ("query layout is for 8 tokens, query has 16", {"q": BlockLayout.from_lengths([8])}),
        ("key layout is on meta", {"kv": BlockLayout.from_lengths([16], "meta")}),
    ],
)
def test_a_bad_call_is_an_error(words, change):
    layout = BlockLayout.from_lengths([16], DEVICE)
    query = torch.randn(1, 16, 2, 16, device=DEVICE)
    call = {"query": query, "key": query, "lse": torch.zeros(1, 2, 16), "q": layout, "kv": layout}
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with pytest.raises(KernelError, match=words):
        kernel.block_mass(**call | {"scale": 1.0} | change)
