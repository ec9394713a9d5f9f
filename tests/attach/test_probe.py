# SPDX-License-Identifier: Apache-2.0
"""Recall on probed rows against the mass of kept keys, counted one by one in float64."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.attach.probe import dense_lse, probe_rows, recall
from tests.strategies import attention_inputs, batches, generator, head_counts, seeds


@given(
    seed=seeds,
    batch=batches,
    heads=head_counts,
    video=st.integers(1, 20),
    text=st.integers(0, 9),
    count=st.integers(1, 30),
    data=st.data(),
)
def test_recall_is_the_kept_share_of_mass(seed, batch, heads, video, text, count, data):
    tokens = video + text
    valid = data.draw(st.lists(st.integers(0, text), min_size=batch, max_size=batch))
    query, key, _ = attention_inputs(seed, batch, tokens, heads, 8)
    kept = torch.rand(tokens, tokens, generator=generator(seed)) < 0.5
    scale = 0.3
    mass = torch.zeros(batch, heads, tokens, 2, dtype=torch.float64)
    for i_batch in range(batch):
        for i_head in range(heads):
            for row in range(tokens):
                for column in range(video + valid[i_batch]):
                    score = scale * float(
                        query[i_batch, row, i_head] @ key[i_batch, column, i_head]
                    )
                    mass[i_batch, i_head, row, 0] += math.exp(score)
                    mass[i_batch, i_head, row, 1] += math.exp(score) * bool(kept[row, column])
    rows = probe_rows(tokens, count, seed)
    assert len(rows) == min(count, tokens) == len(set(rows.tolist()))
    full = dense_lse(
        query.float(), key.float(), rows, scale, video, torch.tensor(valid) if text else None
    )
    assert torch.allclose(full.double(), mass[..., 0].log()[..., rows], atol=1e-4)
    share = (mass[..., 1] / mass[..., 0])[..., rows].mean((0, 2))
    assert torch.allclose(recall(mass[..., 1].log(), full, rows).double(), share, atol=1e-4)


def test_a_row_that_keeps_everything_counts_one_although_its_lse_is_rounded():
    full = torch.tensor([[[5.0, 6.0], [7.0, 8.0]]])
    above = full * (1 + torch.finfo(torch.float32).eps)
    assert recall(above, full, torch.arange(2)).tolist() == [1, 1]


def test_the_rows_of_a_seed_are_always_the_same():
    assert torch.equal(probe_rows(100, 8, 3), probe_rows(100, 8, 3))
    assert not torch.equal(probe_rows(100, 8, 3), probe_rows(100, 8, 4))
