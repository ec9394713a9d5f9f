# SPDX-License-Identifier: Apache-2.0
"""Random numbers by name: the same for the same name, and for no other."""

import itertools

import torch

from dit_sparse.distill.draw import Draw, epoch_order


def test_a_sample_draws_the_same_in_any_group_and_process():
    whole = Draw(7, 3).normal("noise", [0, 1, 2, 3], (2, 5))
    parts = [Draw(7, 3).normal("noise", [i], (2, 5)) for i in range(4)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(Draw(7, 3).uniform("t", [2]), Draw(7, 3).uniform("t", [0, 2])[1:])


def test_every_part_of_a_name_counts():
    seeds, iterations, parts, purposes, samples = (1, 2), (1, 2), (0, 1), ("a", "b"), (0, 1)
    drawn = [
        tuple(Draw(s, i, p).normal(what, [k], (3,)).flatten().tolist())
        for s, i, p, what, k in itertools.product(seeds, iterations, parts, purposes, samples)
    ]
    assert len(set(drawn)) == 32


def test_ranges():
    draws = [Draw(0, i).integer("step", 0, 3) for i in range(60)]
    assert set(draws) == {0, 1, 2}
    u = Draw(0, 0).uniform("t", list(range(200)))
    assert 0 <= float(u.min()) < 0.05
    assert 0.95 < float(u.max()) < 1


def test_an_epoch_has_every_item_once_in_another_order():
    first, second = (epoch_order(5, epoch, 20) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first == epoch_order(5, 0, 20)
