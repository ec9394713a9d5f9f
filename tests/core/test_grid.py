# SPDX-License-Identifier: Apache-2.0
"""Grids and block layouts: blocks cover every token once and never mix video with text."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import BlockLayout, LatentsGrid, cut
from dit_sparse.errors import GeometryError
from tests.strategies import block_sizes, latents_grids, text_lengths


@st.composite
def grids(draw):
    return LatentsGrid(*draw(latents_grids), draw(text_lengths), draw(st.booleans()))


@given(grids(), block_sizes)
def test_blocks_cover_every_token_once_and_never_mix(grid, block_size):
    layout = grid.layout(block_size)
    owner = [-1] * grid.tokens
    for block, (start, length) in enumerate(
        zip(layout.starts[0, 0].tolist(), layout.lengths[0, 0].tolist(), strict=True)
    ):
        assert 1 <= length <= min(block_size, layout.max_length)
        for token in range(start, start + length):
            assert owner[token] == -1
            owner[token] = block
    assert min(owner) >= 0
    is_text = grid.text_blocks(block_size)
    assert len(is_text) == layout.blocks
    for token, block in enumerate(owner):
        in_text = grid.text_start <= token < grid.text_start + grid.text_length
        assert bool(is_text[block]) == in_text
        assert in_text != (grid.video_start <= token < grid.video_start + grid.video_tokens)


@given(grids(), block_sizes)
def test_spread_says_what_the_starts_say(grid, block_size):
    layout = grid.layout(block_size)
    even = torch.arange(layout.blocks, dtype=torch.int32) * layout.max_length
    assert layout.spread == torch.equal(layout.starts[0, 0], even)


@given(grids(), block_sizes, st.data())
def test_padded_text_is_left_out_for_each_sample(grid, block_size, data):
    valid = data.draw(st.lists(st.integers(0, grid.text_length), min_size=1, max_size=3))
    whole = grid.layout(block_size)
    layout = grid.layout(block_size, text_valid=torch.tensor(valid))
    assert layout.blocks == whole.blocks
    if not grid.text_length:
        return
    for sample, length in enumerate(valid):
        kept = set()
        for start, size in zip(
            layout.starts[sample, 0].tolist(), layout.lengths[sample, 0].tolist(), strict=True
        ):
            kept |= set(range(start, start + size))
        dropped = set(range(grid.text_start + length, grid.text_start + grid.text_length))
        assert kept == set(range(grid.tokens)) - dropped


@given(st.integers(0, 200), block_sizes)
def test_cut_leaves_one_shorter_run_at_most(tokens, size):
    runs = cut(tokens, size)
    assert sum(runs) == tokens
    assert all(run == size for run in runs[:-1])
    assert all(0 < run <= size for run in runs)


def test_numbers_of_a_known_grid():
    grid = LatentsGrid(21, 30, 52, 512)
    assert (grid.frame_tokens, grid.video_tokens, grid.tokens) == (1560, 32760, 33272)
    assert (grid.video_start, grid.text_start) == (0, 32760)
    assert str(grid) == "21 x 30 x 52 + 512 text"
    first = LatentsGrid(1, 64, 64, 77, text_first=True)
    assert (first.video_start, first.text_start) == (77, 0)
    assert str(LatentsGrid(1, 2, 3)) == "1 x 2 x 3"


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, -2), (1, 1, 1, -1)])
def test_a_grid_of_nothing_is_refused(sizes):
    with pytest.raises(GeometryError, match=">= 1"):
        LatentsGrid(*sizes)


def test_blocks_of_nothing_are_refused():
    with pytest.raises(GeometryError, match="block_size must be at least 1, got 0"):
        cut(5, 0)
    with pytest.raises(GeometryError, match=r"at least 1, got \[3, 0\]"):
        BlockLayout.from_lengths([3, 0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"starts": torch.zeros(1, 1, 3, dtype=torch.int32)}, "must both be"),
        ({"starts": torch.zeros(1, 1, 2)}, "must be int32"),
        ({"lengths": torch.ones(1, 1, 2, dtype=torch.int64)}, "must be int32"),
        ({"slots": 0}, "at least 1, got 0, 4"),
        ({"max_length": 0}, "at least 1, got 8, 0"),
    ],
)
def test_a_malformed_layout_is_refused(change, words):
    good = {
        "starts": torch.tensor([[[0, 4]]], dtype=torch.int32),
        "lengths": torch.tensor([[[4, 4]]], dtype=torch.int32),
        "slots": 8,
        "max_length": 4,
    }
    BlockLayout(**good)
    with pytest.raises(GeometryError, match=words):
        BlockLayout(**good | change)
