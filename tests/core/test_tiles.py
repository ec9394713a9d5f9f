# SPDX-License-Identifier: Apache-2.0
"""Bit tiles: exact there and back, deduplicated, and only for blocks that are cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.tiles import pack_bits, pack_tiles, unpack_tiles
from dit_sparse.errors import PlanError
from tests.plans import lengths
from tests.strategies import generator, seeds


@given(st.integers(1, 100), st.integers(1, 5), st.floats(0, 1), seeds)
def test_bits_come_back(keys, rows, share, seed):
    mask = torch.rand(2, rows, keys, generator=generator(seed)) < share
    words = pack_bits(mask)
    assert words.dtype == torch.int32
    assert words.shape == (2, rows, -(-keys // 32))
    assert torch.equal(unpack_tiles(words, keys), mask)


@pytest.mark.parametrize("key", [0, 1, 30, 31, 32, 63])
def test_a_bit_stands_where_the_contract_says(key):
    mask = torch.zeros(1, 64, dtype=torch.bool)
    mask[0, key] = True
    word = int(pack_bits(mask)[0, key // 32]) & 0xFFFFFFFF
    assert word == 1 << (key % 32)


@given(lengths, lengths, st.sampled_from([0.0, 0.5, 0.98, 1.0]), seeds)
def test_tiles_rebuild_the_mask(q_lengths, kv_lengths, share, seed):
    q, kv = BlockLayout.from_lengths(q_lengths), BlockLayout.from_lengths(kv_lengths)
    mask = torch.rand(2, 3, q.slots, kv.slots, generator=generator(seed)) < share
    tiles, index = pack_tiles(mask, q, kv)
    bits = unpack_tiles(tiles, kv.max_length)
    built = torch.zeros_like(mask)
    q_start = 0
    for i_q, rows in enumerate(q_lengths):
        kv_start = 0
        for i_kv, keys in enumerate(kv_lengths):
            for b in range(2):
                for h in range(3):
                    number = int(index[b, h, i_q, i_kv])
                    part = built[b, h, q_start : q_start + rows, kv_start : kv_start + keys]
                    part[:] = number == -1 if number < 0 else bits[number, :rows, :keys]
                    if number >= 0:
                        assert not bits[number, rows:].any()
                        assert not bits[number, :, keys:].any()
            kv_start += keys
        q_start += rows
    assert torch.equal(built, mask)
    assert len({tile.numpy().tobytes() for tile in tiles}) == len(tiles)


def test_equal_tiles_are_kept_once():
    layout = BlockLayout.from_lengths([8] * 10)
    place = torch.arange(80)
    band = ((place[:, None] - place).abs() <= 3)[None, None]
    tiles, index = pack_tiles(band, layout, layout)
    assert len(tiles) == 3  # on the diagonal, right of it, left of it
    assert (index == -2).sum() == 100 - 10 - 9 - 9


def test_layouts_of_single_heads_are_refused():
    one = BlockLayout.from_lengths([4])
    two = BlockLayout(one.starts.expand(1, 2, 1), one.lengths.expand(1, 2, 1), 4, 4)
    with pytest.raises(PlanError, match="shared by all samples and heads"):
        pack_tiles(torch.ones(1, 2, 4, 4, dtype=torch.bool), two, one)
