# SPDX-License-Identifier: Apache-2.0
"""Naive blocks, scores and selections in float64 for methods that choose video blocks."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from dit_sparse.core.grid import LatentsGrid
from tests.methods.naive import make_call
from tests.strategies import seeds, valid_text_lengths

grids = st.builds(
    LatentsGrid,
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 7),
    st.sampled_from([0, 0, 1, 5, 9]),
    st.booleans(),
)
block_sizes = st.sampled_from([2, 3, 4, 7])


@st.composite
def runs(draw, num_steps=4):
    """Draw the calls of one layer over a run."""
    grid = draw(grids)
    batch, heads, seed = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(seeds) % 10**6
    valid = None
    if grid.text_length and draw(st.booleans()):
        valid = torch.tensor(draw(valid_text_lengths(grid.text_length, batch)))
    state, shared = {}, {}
    return [
        make_call(
            grid,
            seed + step,
            batch,
            heads,
            step=step,
            num_steps=num_steps,
            state=state,
            shared=shared,
            text_valid=valid,
        )
        for step in range(num_steps)
    ]


def blocks_of(grid, block_size):
    """Tokens of each video block, and of each text block, in sequence order."""

    def cut(start, count):
        return [
            list(range(start + first, start + min(first + block_size, count)))
            for first in range(0, count, block_size)
        ]

    return cut(grid.video_start, grid.video_tokens), cut(grid.text_start, grid.text_length)


def valid_keys(call, i_batch):
    """Tokens of one sample that are not padding."""
    valid = None if call.text_valid is None else int(call.text_valid[i_batch])
    start, end = call.grid.text_start, call.grid.text_start + call.grid.text_length
    return [
        t
        for t in range(call.grid.tokens)
        if valid is None or not start <= t < end or t - start < valid
    ]


def best(row, count):
    """Numbers of the ``count`` highest values; the lower number wins a tie."""
    return set(sorted(range(len(row)), key=lambda j: -row[j])[:count])


def heaviest(row, share, floor):
    """Fewest numbers, heaviest first, whose weight reaches ``share`` of all."""
    order = sorted(range(len(row)), key=lambda j: -row[j])
    found, held = set(), 0.0
    for place, j in enumerate(order):
        if place >= floor and share < 1 and held >= share * sum(row):
            break
        found.add(j)
        held += row[j]
    return found


def tokens_kept(call, blocks, kept):
    """Spell video block pairs ``kept[b][h][p] = {r, ...}`` out over tokens, text kept whole."""
    batch, tokens, heads, _ = call.query.shape
    mask = torch.zeros(batch, heads, tokens, tokens, dtype=torch.bool)
    video = {t for block in blocks for t in block}
    for b in range(batch):
        living = valid_keys(call, b)
        text_keys = [t for t in living if t not in video]
        for h in range(heads):
            for t in range(tokens):
                mask[b, h, t, living if t not in video else text_keys] = True
            for p, row in enumerate(kept[b][h]):
                for r in row:
                    for t in blocks[p]:
                        mask[b, h, t, blocks[r]] = True
    return mask
