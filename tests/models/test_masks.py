# SPDX-License-Identifier: Apache-2.0
"""Masks that hide the padding of the text, against a count pair by pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.pipelines import masks


def hides_only_padding(mask, grid):
    """Look at every pair: nobody sees text that the video does not see, and all else is seen."""
    batch, heads, rows, tokens = mask.shape
    first, last = grid.text_start, grid.text_start + grid.text_length
    text = range(first, last) if grid.text_length else range(0)
    for i_batch in range(batch):
        row = mask[i_batch, 0, 0 if rows == 1 else grid.video_start]
        padding = {key for key in text if not row[key]}
        for i_head in range(heads):
            for query in range(rows):
                if rows > 1 and query in padding:
                    continue
                for key in range(tokens):
                    if bool(mask[i_batch, i_head, query, key]) == (key in padding):
                        return False
    return True


@st.composite
def drawn(draw):
    """Draw a grid and a mask of its padding, which is then perhaps damaged in one place."""
    sides = [draw(st.integers(1, 3)) for _ in range(2)]
    grid = LatentsGrid(1, *sides, draw(st.integers(0, 4)), draw(st.booleans()))
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    keys = torch.ones(batch, grid.tokens, dtype=torch.bool)
    for i_batch in range(batch):
        for key in range(grid.text_length):
            keys[i_batch, grid.text_start + key] = draw(st.booleans())
    kind = draw(st.sampled_from(["one row", "every row", "both sides"]))
    mask = keys[:, None, None]
    if kind == "every row":
        mask = mask.expand(-1, heads, grid.tokens, -1)
    elif kind == "both sides":
        mask = mask & mask.transpose(2, 3)
    if draw(st.booleans()):
        mask = mask.clone()
        place = [draw(st.integers(0, size - 1)) for size in mask.shape]
        mask[tuple(place)] = ~mask[tuple(place)]
    return grid, mask


@given(drawn())
def test_only_masks_of_padding_are_taken(drawn_):
    grid, mask = drawn_
    row = masks.video_row(mask, grid, mask.shape[0])
    assert masks.only_padding(mask, row, grid) == hides_only_padding(mask, grid)


@given(drawn(), st.integers(0, 2**31 - 1))
def test_valid_text_is_brought_together(drawn_, seed):
    grid, mask = drawn_
    row = masks.video_row(mask, grid, mask.shape[0])
    order = masks.valid_first(row, grid)
    for keys, places in zip(row.tolist(), order.tolist(), strict=True):
        text = range(grid.text_start, grid.text_start + grid.text_length * bool(grid.text_length))
        valid = [key for key in text if keys[key]]
        assert [places[key] for key in text] == valid + [key for key in text if not keys[key]]
        assert all(places[key] == key for key in range(grid.tokens) if key not in text)
    seen = [[keys[key] for key in text] for keys in row.tolist()]
    assert masks.at_the_end(row, grid) == all(s == sorted(s, reverse=True) for s in seen)
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randn(mask.shape[0], grid.tokens, 2, 3, generator=draw)
    assert torch.equal(masks.back(masks.take(tokens, order), order), tokens)


def test_a_prompt_that_is_all_padding_is_read_off_the_video():
    """Where padding sees nothing itself, its row says nothing of the video's."""
    grid = LatentsGrid(1, 2, 2, 3, text_first=True)
    keys = torch.arange(7) >= 3
    mask = (keys[:, None] & keys)[None, None]
    row = masks.video_row(mask, grid, 1)
    assert row.tolist() == [keys.tolist()]
    assert masks.only_padding(mask, row, grid)


def test_long_masks_are_compared_to_the_last_row(monkeypatch):
    """A mask of [tokens, tokens] is looked at in parts."""
    monkeypatch.setattr(masks, "ROWS", 4)
    grid = LatentsGrid(1, 3, 5, 3)
    mask = torch.ones(1, 1, 18, 18, dtype=torch.bool)
    mask[..., 17] = False
    row = masks.video_row(mask, grid, 1)
    assert masks.only_padding(mask, row, grid)
    mask[0, 0, 16, 0] = False  # the last row that is not padding itself
    assert not masks.only_padding(mask, row, grid)


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(1, 1, 1, 18),
        torch.ones(1, 18, dtype=torch.bool),
        torch.ones(1, 1, 1, 17, dtype=torch.bool),
        torch.ones(1, 1, 3, 18, dtype=torch.bool),
    ],
)
def test_other_masks_are_not_read(mask):
    assert masks.video_row(mask, LatentsGrid(1, 3, 5, 3), 1) is None
