# SPDX-License-Identifier: Apache-2.0
"""What Hypothesis draws, for the whole suite: odd sizes on purpose, small enough for a laptop.

A module that only one test needs stays with that test; shapes that two tests draw stand here.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st

# (frames, height, width) of latents after patchify. Images have one frame.
FRAMES = st.integers(1, 7)
SIDES = st.integers(1, 13)
latents_grids = st.tuples(FRAMES, SIDES, SIDES)
image_grids = st.tuples(st.just(1), SIDES, SIDES)
video_grids = st.tuples(st.integers(2, 7), st.integers(2, 13), st.integers(2, 13))

text_lengths = st.one_of(st.just(0), st.integers(1, 40))
seeds = st.integers(0, 2**31 - 1)

batches = st.integers(1, 3)
head_counts = st.integers(1, 4)
head_dims = st.sampled_from([8, 16, 24, 64])
block_sizes = st.sampled_from([1, 4, 7, 16, 32, 128])
densities = st.sampled_from([0.05, 0.125, 0.25, 0.5, 0.9, 1.0])


@st.composite
def valid_text_lengths(draw, text: int, batch: int) -> list[int]:
    """Draw how many of ``text`` tokens are valid in each sample; the rest is padding."""
    return draw(st.lists(st.integers(0, text), min_size=batch, max_size=batch))


def generator(seed: int) -> torch.Generator:
    """Return a CPU generator in the state that ``seed`` names."""
    return torch.Generator().manual_seed(seed)


def attention_inputs(
    seed: int,
    batch: int,
    seq_len: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make query, key and value ``[batch, seq_len, heads, head_dim]``, standard normal."""
    random = generator(seed)
    shape = (batch, seq_len, heads, head_dim)
    query, key, value = (
        torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for _ in range(3)
    )
    return query, key, value
