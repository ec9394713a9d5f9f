# SPDX-License-Identifier: Apache-2.0
"""Sharing work between candidates of a call changes no number."""

from dataclasses import replace

import pytest
import torch

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.profiler.candidates import parse_candidates, resolve
from dit_sparse.profiler.measure import Meter
from dit_sparse.profiler.shared import SharedOps
from tests.profiler.test_measure import call_of


class Alone(SharedOps):
    """Shares nothing."""

    def begin(self, call, exact, lse):
        pass


@pytest.mark.parametrize(
    ("grid", "valid"), [(LatentsGrid(4, 8, 12), None), (LatentsGrid(4, 8, 8, 9), 5)]
)
def test_every_candidate_gets_what_it_would_get_alone(grid, valid):
    candidates = resolve(parse_candidates("default"), grid)
    shared, alone = Meter(candidates, sample=4), Meter(candidates, ops=Alone(), sample=4)
    for i in range(2):
        call = call_of(grid, seed=i, step=3 * i, valid=valid)
        one, other = (meter.measure(call, 0) for meter in (shared, alone))
        assert one[0] == other[0]
        for a, b in zip(one[1], other[1], strict=True):
            if a.searched:  # the dense result by other blocks: the same up to rounding
                assert a.error == [0.0, 0.0]
                assert max(b.error) < 1e-5
                a = replace(a, error=b.error, recall=b.recall)  # noqa: PLW2901
            assert a == b
    assert shared.ops.answered >= 10
    assert shared.ops.answered < shared.ops.asked
    assert alone.ops.answered == 0


def begun(call):
    ops = SharedOps()
    layout = call.layout(8)
    exact = call.query.clone()
    lse = torch.zeros(1, 2, call.grid.tokens)
    ops.begin(call, exact, lse)
    return ops, layout


def test_only_the_same_question_is_answered():
    grid = LatentsGrid(4, 4, 4)
    call = call_of(grid)
    ops, layout = begun(call)
    q, k = call.query, call.key
    first = ops.pooled_scores(q, k, layout, layout, 1.0)
    assert torch.equal(ops.pooled_scores(q[:, :, :], k, layout, layout, 1.0), first)
    assert (ops.asked, ops.answered) == (2, 1)
    for args in (
        (k, q, layout, layout, 1.0),
        (q[:, :, :1], k[:, :, :1], layout, layout, 1.0),
        (q[:, :, 1:], k[:, :, 1:], layout, layout, 1.0),
        (q, k, layout, layout, 0.5),
        (q, k, call.layout(16), layout, 1.0),
    ):
        torch.testing.assert_close(
            ops.pooled_scores(*args), Backends().pooled_scores(*args), rtol=0, atol=0
        )
    assert ops.answered == 1
    copy = q.clone()  # not the call's own: neither shared nor remembered
    for factor in (1.0, 2.0):
        copy.mul_(factor)
        found = ops.pooled_scores(copy, k, layout, layout, 1.0)
        assert torch.equal(found, Backends().pooled_scores(copy, k, layout, layout, 1.0))
    assert ops.answered == 1


def test_what_is_given_may_be_changed():
    call = call_of(LatentsGrid(4, 4, 4))
    ops, layout = begun(call)
    first = ops.pooled_scores(call.query, call.key, layout, layout, 1.0)
    kept = first.clone()
    first.zero_()
    second = ops.pooled_scores(call.query, call.key, layout, layout, 1.0)
    assert torch.equal(second, kept)
    second.zero_()
    assert torch.equal(ops.pooled_scores(call.query, call.key, layout, layout, 1.0), kept)


def test_clusters_start_where_they_are_told():
    call = call_of(LatentsGrid(4, 4, 4))
    ops, _ = begun(call)
    first = ops.kmeans(call.query, 5, 2, seed=1)
    assert torch.equal(ops.kmeans(call.query, 5, 2, seed=1)[0], first[0])
    assert ops.answered == 1
    start = first[0].clone()
    for init in (start, start + 1.0):
        found = ops.kmeans(call.query, 5, 2, init=init, seed=1)
        assert torch.equal(found[0], Backends().kmeans(call.query, 5, 2, init=init, seed=1)[0])
    assert ops.answered == 1
    assert torch.equal(ops.kmeans(call.query, 5, 2, init=start.clone(), seed=1)[0],
                       Backends().kmeans(call.query, 5, 2, init=start, seed=1)[0])  # fmt: skip
    assert ops.answered == 2


def test_nothing_outlives_a_call():
    call = call_of(LatentsGrid(4, 4, 4))
    ops, layout = begun(call)
    ops.pooled_scores(call.query, call.key, layout, layout, 1.0)
    ops.end()
    ops.pooled_scores(call.query, call.key, layout, layout, 1.0)
    assert (ops.asked, ops.answered) == (1, 0)
    assert not ops._known
