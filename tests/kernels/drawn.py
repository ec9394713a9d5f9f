# SPDX-License-Identifier: Apache-2.0
"""Layouts that Hypothesis draws for the planning operations, and how naive oracles read them."""

import torch
from hypothesis import strategies as st

from dit_sparse.core.grid import BlockLayout


@st.composite
def layouts(draw, batch=1, heads=1, slots=None):
    """Draw blocks: uniform with a ragged tail and cut padding, or of any length, with gaps."""
    slots = draw(st.integers(1, 70)) if slots is None else slots
    lead = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])))
    size = draw(st.integers(1, min(slots, 20)))
    if draw(st.booleans()):
        blocks = -(-slots // size)
        start = torch.arange(0, slots, size, dtype=torch.int32).expand(*lead, blocks)
        length = torch.minimum(torch.tensor(size), slots - start).int()
        cut = st.integers(0, size)
        rows = [draw(st.lists(cut, min_size=blocks, max_size=blocks)) for _ in range(lead[0])]
        if draw(st.booleans()):
            length = torch.minimum(length, torch.tensor(rows).int()[:, None])
        return BlockLayout(start, length.contiguous(), slots, size, spread=True)
    blocks = draw(st.integers(1, 6))
    starts, lengths = [], []
    for _ in range(lead[0] * lead[1]):
        edges = sorted(draw(st.integers(0, slots)) for _ in range(2 * blocks))
        pairs = draw(st.permutations(list(zip(edges[::2], edges[1::2], strict=True))))
        starts.append([min(a, slots - 1) for a, _ in pairs])
        lengths.append([b - a for a, b in pairs])
    length = torch.tensor(lengths, dtype=torch.int32).view(*lead, blocks)
    start = torch.tensor(starts, dtype=torch.int32).view(*lead, blocks)
    return BlockLayout(start, length, slots, max(1, int(length.max())))


def spans(layout, i_batch, i_head):
    """List one (sample, head)'s blocks as slices."""
    b, h = i_batch % layout.starts.shape[0], i_head % layout.starts.shape[1]
    pairs = zip(layout.starts[b, h].tolist(), layout.lengths[b, h].tolist(), strict=True)
    return [slice(start, start + length) for start, length in pairs]


def close(got, wanted, dtype):
    """Assert that ``got`` is ``wanted`` up to a few roundings of ``dtype``, fp32 at best."""
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(got.double(), wanted, rtol=64 * eps, atol=64 * eps)
