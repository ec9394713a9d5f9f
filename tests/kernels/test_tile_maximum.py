# SPDX-License-Identifier: Apache-2.0
"""Sampled tile maxima against loops over the places that were drawn."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import BlockLayout
from dit_sparse.errors import KernelError
from dit_sparse.kernels import chunks
from dit_sparse.kernels.tile_maximum import sampled_slots, tile_maximum
from tests.kernels.drawn import close, layouts, spans
from tests.strategies import attention_inputs, seeds


def naive(query, key, q_slots, kv_slots, scale, form):
    batch, heads = q_slots.shape[:2]
    best = torch.zeros(batch, heads, q_slots.shape[2], kv_slots.shape[2], dtype=torch.float64)
    mean = torch.zeros_like(best)
    for b in range(batch):
        for h in range(heads):
            tiles = [[t for t in row if t >= 0] for row in kv_slots[b, h].tolist()]
            for i, row in enumerate(q_slots[b, h].tolist()):
                for token in (t for t in row if t >= 0):
                    score = [
                        [scale * float(query[b, token, h] @ key[b, t, h]) for t in tile]
                        for tile in tiles
                    ]
                    flat = [value for tile in score for value in tile]
                    if not flat:
                        continue
                    base = max(flat)
                    if form == "paper":
                        base += math.log(sum(math.exp(value - base) for value in flat))
                    for j, tile in enumerate(score):
                        weight = math.exp(max(tile) - base) if tile else 0.0
                        best[b, h, i, j] = max(float(best[b, h, i, j]), weight)
                        mean[b, h, i, j] += weight / sum(t >= 0 for t in row)
    return best, mean


@given(
    data=st.data(),
    seed=seeds,
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    samples=st.integers(1, 7),
    form=st.sampled_from(["code", "paper"]),
)
def test_scores_are_maxima_and_means_over_the_drawn_places(
    data, seed, batch, heads, samples, form
):
    q = data.draw(layouts(batch, heads, slots=data.draw(st.integers(1, 40))))
    kv = data.draw(layouts(batch, heads, slots=data.draw(st.integers(1, 40))))
    query = attention_inputs(seed, batch, q.slots, heads, 3)[0]
    key = attention_inputs(seed + 1, batch, kv.slots, heads, 3)[1]
    got = tile_maximum(query, key, q, kv, samples, 0.6, seed=seed, form=form)
    number = torch.arange(heads)
    q_slots = sampled_slots(q, number, samples, 2 * seed).expand(batch, -1, -1, -1)
    kv_slots = sampled_slots(kv, number, samples, 2 * seed + 1).expand(batch, -1, -1, -1)
    for one, right in zip(got, naive(query, key, q_slots, kv_slots, 0.6, form), strict=True):
        close(one, right, torch.float32)


@given(data=st.data(), seed=seeds, samples=st.integers(1, 24))
def test_places_are_drawn_without_replacement_and_shared_by_blocks(data, seed, samples):
    layout = data.draw(layouts(2, 2))
    drawn = sampled_slots(layout, torch.tensor([0, 1]), samples, seed).expand(2, -1, -1, -1)
    for b in range(2):
        for h in range(2):
            offsets = set()
            for span, row in zip(spans(layout, b, h), drawn[b, h].tolist(), strict=True):
                found = [slot for slot in row if slot >= 0]
                assert len(set(found)) == len(found) == min(samples, span.stop - span.start)
                assert all(span.start <= slot < span.stop for slot in found)
                if span.stop - span.start == layout.max_length:
                    offsets.add(tuple(slot - span.start for slot in found))
            assert len(offsets) <= 1


def test_all_places_give_the_true_maximum_and_seeds_differ(monkeypatch):
    layout = BlockLayout.from_lengths([32, 32, 19])
    query, key, _ = attention_inputs(4, 2, 83, 2, 16, torch.bfloat16)
    whole, _ = tile_maximum(query, key, layout, layout, 32, 0.25, form="paper")
    weight = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()).mul(0.25).softmax(-1)
    for i, rows in enumerate(spans(layout, 0, 0)):
        for j, cols in enumerate(spans(layout, 0, 0)):
            close(whole[:, :, i, j], weight[:, :, rows, cols].amax((-1, -2)), torch.float32)
    one, two = (tile_maximum(query, key, layout, layout, 5, 0.25, seed=s) for s in (1, 2))
    assert not torch.equal(one[0], two[0])
    monkeypatch.setattr(chunks, "BUDGET_CPU", 1)
    torch.testing.assert_close(tile_maximum(query, key, layout, layout, 5, 0.25, seed=1), one)


@given(seeds, st.lists(st.integers(0, 200), min_size=2, max_size=5, unique=True))
def test_a_heads_draw_goes_by_its_number_whoever_else_is_there(seed, numbers):
    layout = BlockLayout.from_lengths([16, 16, 9])
    query, key, _ = attention_inputs(seed, 2, 41, len(numbers), 4)
    number = torch.tensor(numbers)
    arguments = {"samples": 3, "scale": 0.5, "seed": seed}
    both = tile_maximum(query, key, layout, layout, heads=number, **arguments)
    slots = sampled_slots(layout, number, 3, seed)
    for i in range(len(numbers)):
        alone = tile_maximum(
            query[1:, :, i : i + 1], key[1:, :, i : i + 1], layout, layout,
            heads=number[i : i + 1], **arguments,
        )  # fmt: skip
        for one, other in zip(alone, both, strict=True):
            torch.testing.assert_close(one, other[1:, i : i + 1])
        assert torch.equal(sampled_slots(layout, number[i : i + 1], 3, seed)[0, 0], slots[0, i])
    assert len({tuple(row) for row in slots[0, :, 0].tolist()}) > 1 or len(numbers) < 4


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"form": "sum"}])
def test_wrong_arguments_are_named(wrong):
    layout = BlockLayout.from_lengths([4])
    x = torch.zeros(1, 4, 1, 2)
    with pytest.raises(KernelError, match=next(iter(wrong))):
        tile_maximum(x, x, layout, layout, **{"samples": 1, "scale": 1.0, **wrong})
