# SPDX-License-Identifier: Apache-2.0
"""Antidiagonal scores against loops over runs; with stride 1 they are the exact mass."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import BlockLayout
from dit_sparse.errors import KernelError
from dit_sparse.kernels import chunks, reference
from dit_sparse.kernels.antidiagonal import antidiagonal
from tests.kernels.drawn import close, layouts, spans
from tests.strategies import attention_inputs, seeds


def runs_of(span, stride):
    """Cut a block into runs of ``stride`` slots; a short one repeats its own from the start."""
    whole = list(range(span.start, span.stop))
    runs = [whole[i : i + stride] for i in range(0, len(whole), stride)]
    return [([run[j % len(run)] for j in range(stride)], len(run)) for run in runs]


def naive(query, key, q, kv, stride, scale):
    batch, _, heads, _ = query.shape
    mass = torch.zeros(batch, heads, q.blocks, kv.blocks, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            keys = [
                (j, run, size)
                for j, span in enumerate(spans(kv, b, h))
                for run, size in runs_of(span, stride)
            ]
            for i, span in enumerate(spans(q, b, h)):
                for run, size in runs_of(span, stride):
                    weights = []
                    for _, other, count in keys:
                        cell = [
                            float(query[b, x, h].double() @ key[b, y, h].double())
                            for x, y in zip(reversed(run), other, strict=True)
                        ]
                        weights.append(count * math.exp(scale * sum(cell) / stride))
                    for (j, _, _), weight in zip(keys, weights, strict=True):
                        mass[b, h, i, j] += size * weight / sum(weights)
    return mass


@given(
    data=st.data(),
    seed=seeds,
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    stride=st.integers(1, 5),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_scores_are_sums_over_cells(data, seed, batch, heads, stride, dtype):
    q = data.draw(layouts(batch, heads, slots=data.draw(st.integers(1, 24))))
    kv = data.draw(layouts(batch, heads, slots=data.draw(st.integers(1, 24))))
    query = attention_inputs(seed, batch, q.slots, heads, 3, dtype)[0]
    key = attention_inputs(seed + 1, batch, kv.slots, heads, 3, dtype)[1]
    got = antidiagonal(query, key, q, kv, stride, 0.7)
    assert got.dtype == torch.float32
    close(got, naive(query, key, q, kv, stride, 0.7), torch.float32)


@given(data=st.data(), seed=seeds, batch=st.integers(1, 2), heads=st.integers(1, 3))
def test_stride_1_is_the_exact_mass(data, seed, batch, heads):
    q, kv = data.draw(layouts(batch, heads)), data.draw(layouts(batch, heads))
    query = attention_inputs(seed, batch, q.slots, heads, 8)[0]
    key = attention_inputs(seed + 1, batch, kv.slots, heads, 8)[1]
    from dit_sparse.core.plan import BlockPlan

    dense = BlockPlan.full(q, kv)
    _, lse = reference.attend(query, key, key, dense, 0.35)
    wanted = reference.block_mass(query, key, lse, q, kv, 0.35)
    close(antidiagonal(query, key, q, kv, 1, 0.35), wanted, torch.float32)


@pytest.mark.parametrize("stride", [1, 8, 16])
def test_a_row_sums_to_its_queries_in_any_chunks(monkeypatch, stride):
    layout = BlockLayout.from_lengths([64, 64, 37])
    query, key, _ = attention_inputs(2, 2, 165, 3, 16, torch.bfloat16)
    whole = antidiagonal(query, key, layout, layout, stride, 0.25)
    torch.testing.assert_close(
        whole.sum(-1), layout.lengths.float().expand(2, 3, 3), rtol=1e-5, atol=0
    )
    monkeypatch.setattr(chunks, "BUDGET_CPU", 1)
    torch.testing.assert_close(antidiagonal(query, key, layout, layout, stride, 0.25), whole)


def test_large_scores_do_not_overflow_and_padding_is_not_read():
    layout = BlockLayout.from_lengths([8, 8])
    lengths = torch.tensor([[[8, 0]]], dtype=torch.int32)
    kv = BlockLayout(layout.starts, lengths, 16, 8, spread=True)
    query, key, _ = attention_inputs(0, 1, 16, 1, 4, torch.float32)
    key[:, 8:] = torch.inf
    got = antidiagonal(query * 1e3, key, layout, kv, 4, 1.0)
    assert got[0, 0].tolist() == [[8, 0], [8, 0]]
    with pytest.raises(KernelError, match="stride"):
        antidiagonal(query, key, layout, kv, 0, 1.0)
