# SPDX-License-Identifier: Apache-2.0
"""The raster window against its rule, written out from each token's place in its frame."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.call import AttentionCall
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.errors import StrategyError
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.methods.window import Window
from tests.methods.chosen import block_sizes, runs, valid_keys
from tests.methods.naive import NaiveOps, make_call, masked_attention, token_mask


def oracle(call, share):
    """Which pairs are kept: bool ``[batch, heads, tokens, tokens]``."""
    grid = call.grid
    batch, tokens, heads, _ = call.query.shape
    a_frame = grid.height * grid.width
    half = int(share * a_frame) // 2
    mask = torch.zeros(batch, heads, tokens, tokens, dtype=torch.bool)
    for b in range(batch):
        for i in range(tokens):
            for j in valid_keys(call, b):
                x, y = i - grid.video_start, j - grid.video_start
                video = 0 <= x < grid.video_tokens and 0 <= y < grid.video_tokens
                mask[b, :, i, j] = not video or abs(x % a_frame - y % a_frame) <= half
    return mask


@given(runs(num_steps=1), st.sampled_from([0.03125, 0.2, 0.5, 1.0, 1.7, 2.0]), block_sizes)
def test_kept_pairs_are_those_of_the_rule(calls, share, block_size):
    call = calls[0]
    batch, tokens, heads, _ = call.query.shape
    plan = Window(share, block_size=block_size).plan(call, NaiveOps()).validate()
    wanted = oracle(call, share)
    assert torch.equal(token_mask(plan, batch, heads, tokens, tokens), wanted)
    whole = Window(share, exact=False, block_size=block_size).plan(call, NaiveOps()).validate()
    assert whole.partial is None
    assert bool((token_mask(whole, batch, heads, tokens, tokens) | ~wanted).all())
    assert bool((whole.density() >= plan.density()).all())
    if share == 2:
        assert plan.complete
    output, _ = Backends("cpu").attend(call.query, call.key, call.value, plan, call.scale)
    right, _ = masked_attention(call.query, call.key, call.value, wanted, call.scale)
    torch.testing.assert_close(output, right)


@pytest.mark.parametrize(
    ("grid", "half", "density"),
    [
        (LatentsGrid(1, 64, 64), 64, 0.0312),  # PixArt at 1024: 129 of 4096 keys
        (LatentsGrid(13, 30, 45, 226, True), 21, 0.0561),  # CogVideoX: 43 of 1350, text whole
    ],
)
def test_the_released_masks_have_their_width_and_density(grid, half, density):
    method = Window()
    assert method.reach(grid.frame_tokens) == half
    blank = torch.zeros(1, grid.tokens, 1, 1)
    plan = method.plan(AttentionCall(blank, blank, blank, grid, 1.0, heads=(0,)), None)
    places = grid.frame_tokens
    kept = sum(min(k + half, places - 1) - max(k - half, 0) + 1 for k in range(places))
    pairs = kept * grid.frames**2 + grid.tokens**2 - grid.video_tokens**2
    assert float(plan.density()) == pytest.approx(pairs / grid.tokens**2, abs=1e-12)
    assert float(plan.density()) == pytest.approx(density, abs=3e-4)
    blocks = plan.block_mask().float().mean()
    assert float(blocks) < 3.1 * density  # what a kernel touches


def test_a_wider_window_keeps_a_superset():
    call = make_call(LatentsGrid(3, 4, 6, 5))
    masks = [
        token_mask(Window(share, block_size=4).plan(call, None), 1, 2, 77, 77)
        for share in (0.1, 0.3, 0.8, 1.4)
    ]
    for narrow, wide in pairwise(masks):
        assert bool((wide | ~narrow).all())
        assert wide.sum() > narrow.sum()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"share": 0.0}, r"share must lie in \(0, 2\], got 0.0; try 0.03125"),
        ({"share": math.nan}, r"share must lie in \(0, 2\], got nan"),
        ({"share": 2.5}, r"share must lie in \(0, 2\], got 2.5"),
        ({"block_size": 0}, r"block_size must be a token count in \[1, 1024\], got 0"),
    ],
)
def test_out_of_range(params, message):
    with pytest.raises(StrategyError, match=message):
        Window(**params)
