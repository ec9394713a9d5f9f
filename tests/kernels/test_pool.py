# SPDX-License-Identifier: Apache-2.0
"""Block means against a loop over tokens; padding takes no part."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.kernels import chunks
from dit_sparse.kernels.chunks import block_of_slot, indexed_sums, sorted_sums
from dit_sparse.kernels.pool import moments, pool, pooled_scores
from tests.kernels.drawn import close, layouts, spans
from tests.strategies import attention_inputs, generator, seeds

DTYPES = st.sampled_from([torch.float64, torch.float32])


def means(x, layout):
    batch, _, heads, dim = x.shape
    out = torch.zeros(batch, heads, layout.blocks, dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i, span in enumerate(spans(layout, b, h)):
                if span.stop > span.start:
                    out[b, h, i] = x[b, span, h].double().mean(0)
    return out


@given(data=st.data(), seed=seeds, batch=st.integers(1, 3), heads=st.integers(1, 3), dtype=DTYPES)
def test_pool_is_the_mean_of_each_block(data, seed, batch, heads, dtype):
    layout = data.draw(layouts(batch, heads))
    x, _, _ = attention_inputs(seed, batch, layout.slots, heads, 5, dtype)
    covered = block_of_slot(layout).expand(batch, heads, -1) < layout.blocks
    x = x.masked_fill(~covered.transpose(1, 2)[..., None], torch.nan)  # padding is never read
    got = pool(x, layout)
    assert got.shape == (batch, heads, layout.blocks, 5)
    close(got, means(x, layout), dtype)


@given(data=st.data(), seed=seeds, batch=st.integers(1, 3), heads=st.integers(1, 3), dtype=DTYPES)
def test_moments_are_mean_and_variance_of_each_block(data, seed, batch, heads, dtype):
    layout = data.draw(layouts(batch, heads))
    x, _, _ = attention_inputs(seed, batch, layout.slots, heads, 5, dtype)
    x = x + 1000  # variances of fp32 squares would be noise
    covered = block_of_slot(layout).expand(batch, heads, -1) < layout.blocks
    x = x.masked_fill(~covered.transpose(1, 2)[..., None], torch.nan)
    weight = torch.rand(batch, heads, 5, generator=generator(seed)).to(dtype)
    mean, variance = moments(x, layout, weight=weight)
    close(mean, means(x, layout), dtype)
    wanted = torch.zeros_like(variance, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i, span in enumerate(spans(layout, b, h)):
                if span.stop > span.start:
                    wanted[b, h, i] = (
                        x[b, span, h].double().var(0, correction=0) @ weight[b, h].double()
                    )
    known = moments(x, layout, weight=weight, mean=mean)
    assert torch.equal(known[0], mean)
    assert torch.equal(known[1], variance)
    # Of fp32 the mean's rounding remains: eps * 1000 on a difference of some units.
    torch.testing.assert_close(variance.double(), wanted, rtol=1e-3, atol=2e-3)


@given(data=st.data(), seed=seeds)
def test_moments_follow_a_permutation(data, seed):
    layout = data.draw(layouts(2, 2))
    x, _, _ = attention_inputs(seed, 2, layout.slots, 2, 3)
    order = torch.rand(2, 2, layout.slots, generator=generator(seed)).argsort(-1)
    index = order.transpose(1, 2)[..., None].expand_as(x)
    for one, other in zip(
        moments(x, layout, order), moments(x.gather(1, index), layout), strict=True
    ):
        torch.testing.assert_close(one, other)


@given(data=st.data(), seed=seeds, batch=st.integers(1, 2), heads=st.integers(1, 3))
def test_pooled_scores_are_products_of_means(data, seed, batch, heads):
    q, kv = data.draw(layouts(batch, heads)), data.draw(layouts(batch, heads))
    query = attention_inputs(seed, batch, q.slots, heads, 6)[0]
    key = attention_inputs(seed + 1, batch, kv.slots, heads, 6)[1]
    wanted = means(query, q) @ means(key, kv).transpose(-1, -2) * 0.3
    for b in range(batch):
        for h in range(heads):
            for j, span in enumerate(spans(kv, b, h)):
                if span.stop == span.start:
                    wanted[b, h, :, j] = -torch.inf
    got = pooled_scores(query, key, q, kv, 0.3)
    assert got.dtype == torch.float32
    close(got, wanted, torch.float32)


@given(data=st.data(), seed=seeds)
def test_pool_passes_gradients(data, seed):
    layout = data.draw(layouts(2, 2))
    x, weight, _ = attention_inputs(seed, 2, layout.slots, 2, 3)
    x.requires_grad_()
    weight = torch.randn(2, 2, layout.blocks, 3, generator=generator(seed), dtype=torch.float64)
    (pool(x, layout) * weight).sum().backward()
    wanted = torch.zeros_like(x)
    for b in range(2):
        for h in range(2):
            for i, span in enumerate(spans(layout, b, h)):
                wanted[b, span, h] = weight[b, h, i] / max(1, span.stop - span.start)
    torch.testing.assert_close(x.grad, wanted)


@given(seed=seeds, groups=st.integers(1, 3), n=st.integers(1, 50), segments=st.integers(1, 9))
def test_sorted_and_indexed_sums_agree(seed, groups, n, segments):
    random = generator(seed)
    x = torch.randn(groups, n, 4, generator=random, dtype=torch.float64)
    segment = torch.randint(segments, (groups, n), generator=random)
    torch.testing.assert_close(
        sorted_sums(x, segment, segments), indexed_sums(x, segment, segments)
    )


def test_pool_in_many_chunks_is_the_same(monkeypatch):
    from dit_sparse.core.grid import BlockLayout

    x = attention_inputs(3, 2, 93, 3, 8, torch.bfloat16)[0]
    uniform = BlockLayout.from_lengths([16] * 5 + [13])
    uneven = BlockLayout.from_lengths([7, 40, 1, 45])
    wanted = [pool(x, layout) for layout in (uniform, uneven)]
    monkeypatch.setattr(chunks, "BUDGET_CPU", 1)
    for layout, one in zip((uniform, uneven), wanted, strict=True):
        assert torch.equal(pool(x, layout), one)
        close(one, means(x, layout), torch.float32)


@pytest.mark.parametrize("order", [[2, 0, 1], [0, 1, 2]])
def test_block_of_slot_finds_unsorted_blocks_and_gaps(order):
    from dit_sparse.core.grid import BlockLayout

    starts = torch.tensor([0, 3, 3], dtype=torch.int32)[order][None, None]
    lengths = torch.tensor([2, 0, 3], dtype=torch.int32)[order][None, None]
    found = block_of_slot(BlockLayout(starts, lengths, 8, 3))
    names = {order.index(0): 0, order.index(2): 2, 3: 3}
    assert [names[i] for i in found[0, 0].tolist()] == [0, 0, 3, 2, 2, 2, 3, 3]
