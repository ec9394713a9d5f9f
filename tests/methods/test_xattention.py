# SPDX-License-Identifier: Apache-2.0
"""XAttention against folded runs and sorts written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.errors import StrategyError
from dit_sparse.methods.xattention import XAttention
from tests.methods.chosen import block_sizes, blocks_of, heaviest, runs, tokens_kept, valid_keys
from tests.methods.naive import NaiveOps, masked_attention, run, token_mask


def exact_mass(call, blocks, b, h):
    """Softmax mass of each pair of video blocks, over all keys that are not padding."""
    keys = valid_keys(call, b)
    scores = call.query[b, :, h].double() @ call.key[b, keys, h].double().T * call.scale
    weights = scores.softmax(-1)
    at = {token: column for column, token in enumerate(keys)}
    return [[float(weights[p][:, [at[t] for t in r]].sum()) for r in blocks] for p in blocks]


def folded_mass(call, blocks, text, stride, b, h):
    """Likewise by antidiagonals of whole cells; every block must be a multiple of the stride."""
    q, k = call.query[b, :, h].double(), call.key[b, :, h].double()

    def cells(block):
        return [block[i : i + stride] for i in range(0, len(block), stride)]

    runs_of = [(r, cell) for r, block in enumerate([*blocks, *text]) for cell in cells(block)]
    found = []
    for block in blocks:
        row = [0.0] * len(blocks)
        for cell in cells(block):
            sums = [
                sum(float(q[i] @ k[j]) for i, j in zip(reversed(cell), other, strict=True))
                for _, other in runs_of
            ]
            weight = torch.tensor(sums, dtype=torch.float64) * call.scale / stride
            for (r, _), share in zip(runs_of, weight.softmax(0).tolist(), strict=True):
                if r < len(blocks):
                    row[r] += share
        found.append(row)
    return found


def kept_by(method, call, mass):
    blocks, _ = blocks_of(call.grid, method.block_size)
    floor = min(max(math.floor(method.floor * len(blocks) + 0.5), 1), len(blocks))
    first = {0} if method.sink else set()
    batch, _, heads, _ = call.query.shape
    kept = [
        [
            [heaviest(row, method.threshold, floor) | first for row in mass(b, h)]
            for h in range(heads)
        ]
        for b in range(batch)
    ]
    return tokens_kept(call, blocks, kept)


def check(plan, output, call, wanted):
    plan.validate()
    batch, tokens, heads, _ = call.query.shape
    mask = token_mask(plan, batch, heads, tokens, tokens)
    assert torch.equal(mask, wanted)
    right, _ = masked_attention(call.query, call.key, call.value, mask, call.scale)
    torch.testing.assert_close(output, right)


thresholds = st.sampled_from([0.01, 0.37, 0.6, 0.9, 1.0])
floors = st.sampled_from([0.0, 0.4, 1.0])


@given(runs(num_steps=3), block_sizes, thresholds, floors, st.booleans(), st.integers(1, 3))
def test_stride_one_is_exact_mass(calls, block_size, threshold, floor, sink, refresh):
    method = XAttention(threshold, 1, floor, sink, refresh, block_size)
    blocks, _ = blocks_of(calls[0].grid, block_size)
    wanted = None
    for call in calls:
        plan, output = run(method, call, NaiveOps())
        if call.step % refresh == 0:
            wanted = kept_by(method, call, lambda b, h, call=call: exact_mass(call, blocks, b, h))
        check(plan, output, call, wanted)


@given(
    runs(num_steps=1).filter(
        lambda calls: (
            calls[0].text_valid is None
            and calls[0].grid.video_tokens % 2 == calls[0].grid.text_length % 2 == 0
        )
    ),
    thresholds,
    floors,
)
def test_whole_cells_are_folded_in_reverse(calls, threshold, floor):
    method, call = XAttention(threshold, 2, floor, block_size=4), calls[0]
    blocks, text = blocks_of(call.grid, 4)
    plan, output = run(method, call, NaiveOps())
    wanted = kept_by(method, call, lambda b, h: folded_mass(call, blocks, text, 2, b, h))
    check(plan, output, call, wanted)


@given(runs(num_steps=1), block_sizes, st.integers(1, 9))
def test_any_stride_runs_and_keeps_all_at_threshold_one(calls, block_size, stride):
    method = XAttention(1.0, stride, block_size=block_size)
    plan, _ = run(method, calls[0], NaiveOps())
    assert plan.validate().density().eq(1).all()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"threshold": 0.0}, r"threshold must lie in \(0, 1\], got 0.0; try 0.9"),
        ({"stride": 0}, "stride must be a whole number in .1, 1024., got 0; try 8"),
        ({"floor": 1.1}, r"floor must lie in \[0, 1\], got 1.1"),
        ({"refresh": 0}, "refresh must be a whole number in .1, 1000000., got 0; try 1"),
        ({"block_size": 2000}, r"block_size must be a token count in \[1, 1024\], got 2000"),
    ],
)
def test_out_of_range(params, message):
    with pytest.raises(StrategyError, match=message):
        XAttention(**params)
