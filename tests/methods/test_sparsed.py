# SPDX-License-Identifier: Apache-2.0
"""SparseD against one search written out in float64, over whole runs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.errors import StrategyError
from dit_sparse.methods.sparsed import SparseD
from tests.methods.chosen import best, block_sizes, blocks_of, runs, tokens_kept, valid_keys
from tests.methods.naive import NaiveOps, masked_attention, run, token_mask


def search(method, call):
    """Tokens that the blocks found on this call keep."""
    blocks, _ = blocks_of(call.grid, method.block_size)
    count = min(math.floor(method.density * len(blocks) + 1e-9) + 1, len(blocks))
    batch, _, heads, _ = call.query.shape
    kept = []
    for b in range(batch):
        keys = valid_keys(call, b)
        at = {token: column for column, token in enumerate(keys)}
        kept.append([])
        for h in range(heads):
            scores = call.query[b, :, h].double() @ call.key[b, keys, h].double().T * call.scale
            weights = scores.softmax(-1)
            rows = [
                [float(weights[p][:, [at[t] for t in r]].sum()) for r in blocks] for p in blocks
            ]
            kept[-1].append([best(row, count) for row in rows])
    return tokens_kept(call, blocks, kept)


@given(
    runs(num_steps=5), block_sizes, st.sampled_from([0.05, 0.3, 0.5, 1.0]),
    st.sampled_from([0.0, 0.2, 0.5, 0.9]), st.integers(0, 3),
)  # fmt: skip
def test_a_run_searches_once_and_keeps_what_the_naive_one_keeps(
    calls, block_size, density, fraction, warmup
):
    method, ops = SparseD(density, fraction, block_size), NaiveOps()
    at = max(math.floor(fraction * 5 + 1e-9) + 1 if fraction else 0, warmup)
    wanted = None
    for call in calls[warmup:]:
        plan, output = run(method, call, ops)
        if call.step < at or at >= 4:
            assert plan is None
            continue
        batch, tokens, heads, _ = call.query.shape
        mask = token_mask(plan.validate(), batch, heads, tokens, tokens)
        if call.step == at:
            assert plan.complete
            wanted = search(method, call)
        else:
            assert torch.equal(mask, wanted)
        right, _ = masked_attention(call.query, call.key, call.value, mask, call.scale)
        torch.testing.assert_close(output, right)
    assert ops.searches == (at < 4)


@pytest.mark.parametrize(
    ("fraction", "num_steps", "step"),
    # The released code is dense up to int(skip * steps) + 1, which it builds its mask on.
    [(0.2, 50, 11), (0.2, 1024, 205), (0.2, 128, 26), (0.2, 8, 2), (0.2, 4, 1), (0.29, 100, 30),
     (0.0, 50, 0)],
)  # fmt: skip
def test_the_search_is_on_the_released_codes_step(fraction, num_steps, step):
    assert SparseD(search_step=fraction).search(num_steps) == step


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"density": 0.0}, r"density must lie in \(0, 1\], got 0.0; try 0.3"),
        ({"search_step": 1.0}, r"search_step must be a fraction of the run in \[0, 1\), got 1.0"),
        ({"block_size": 0}, r"block_size must be a token count in \[1, 1024\], got 0"),
    ],
)
def test_out_of_range(params, message):
    with pytest.raises(StrategyError, match=message):
        SparseD(**params)
