# SPDX-License-Identifier: Apache-2.0
"""Mean-pooled selection against means and sorts written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.errors import StrategyError
from dit_sparse.methods.pooled import Pooled
from tests.methods.chosen import best, block_sizes, blocks_of, heaviest, runs, tokens_kept
from tests.methods.naive import NaiveOps, make_call, masked_attention, run, token_mask


def naive_scores(call, blocks, b, h):
    """Mean query times mean key of each pair of video blocks, as lists."""
    q, k = call.query[b, :, h].double(), call.key[b, :, h].double()
    means = [(q[block].mean(0), k[block].mean(0)) for block in blocks]
    return [[float(mean @ other) * call.scale for _, other in means] for mean, _ in means]


def oracle(method, call):
    blocks, _ = blocks_of(call.grid, method.block_size)
    batch, _, heads, _ = call.query.shape

    def choose(row):
        if method.select == "top_k":
            count = min(max(math.floor(method.density * len(row) + 0.5), 1), len(row))
            return best(row, count)
        weights = [math.exp(value - max(row)) for value in row]
        floor = min(max(math.floor(method.floor * len(row) + 0.5), 1), len(row))
        return heaviest(weights, method.top_p, floor)

    kept = [
        [[choose(row) for row in naive_scores(call, blocks, b, h)] for h in range(heads)]
        for b in range(batch)
    ]
    return tokens_kept(call, blocks, kept)


@given(
    runs(), block_sizes, st.sampled_from(["top_k", "top_p"]),
    st.sampled_from([0.05, 0.3, 0.5, 0.77, 1.0]), st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(1, 5),
)  # fmt: skip
def test_a_run_keeps_what_the_naive_one_keeps(calls, block_size, select, share, floor, refresh):
    method = Pooled(
        select, density=share, top_p=share, floor=floor, refresh=refresh, block_size=block_size
    )
    wanted = None
    for call in calls:
        plan, output = run(method, call, NaiveOps())
        plan.validate()
        if call.step % refresh == 0:
            wanted = oracle(method, call)
        batch, tokens, heads, _ = call.query.shape
        mask = token_mask(plan, batch, heads, tokens, tokens)
        assert torch.equal(mask, wanted)
        right, _ = masked_attention(call.query, call.key, call.value, mask, call.scale)
        torch.testing.assert_close(output, right)


def test_lists_are_remembered_only_where_they_will_be_asked_for():
    once, kept = {}, {}
    for state, refresh in ((once, 1), (kept, 3)):
        run(Pooled(refresh=refresh, block_size=4), make_call(LatentsGrid(2, 4, 4), state=state),
            NaiveOps())  # fmt: skip
    assert not once
    assert kept["lists"].dtype == torch.int16
    assert kept["lists"].shape == (1, 2, 8, 4)


def test_another_shape_or_an_earlier_step_chooses_anew():
    method, state = Pooled(refresh=9, block_size=4), {}
    for step, seed, batch in ((3, 0, 1), (4, 1, 2), (1, 2, 2)):
        call = make_call(LatentsGrid(2, 4, 4), seed, batch, step=step, num_steps=9, state=state)
        plan, _ = run(method, call, NaiveOps())
        assert state["made"] == step
        assert torch.equal(token_mask(plan, batch, 2, 32, 32), oracle(method, call))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"select": "best"}, "select must be 'top_k' or 'top_p', got 'best'"),
        ({"density": 0.0}, r"density must lie in \(0, 1\], got 0.0; try 0.5"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5; try 0.9"),
        ({"floor": -0.1}, r"floor must lie in \[0, 1\], got -0.1"),
        ({"floor": math.nan}, r"floor must lie in \[0, 1\], got nan"),
        ({"refresh": 0}, "refresh must be a whole number in .1, 1000000., got 0; try 1"),
        ({"block_size": 0}, r"block_size must be a token count in \[1, 1024\], got 0; try 128"),
    ],
)
def test_out_of_range(params, message):
    with pytest.raises(StrategyError, match=message):
        Pooled(**params)
