# SPDX-License-Identifier: Apache-2.0
"""Judging plans by some rows: exact expectations on small strata, and masks in float64."""

from dataclasses import dataclass, field
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import BlockLayout, LatentsGrid
from dit_sparse.core.plan import BlockPlan
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.profiler.candidates import parse_candidates, resolve
from dit_sparse.profiler.capture import Measuring
from dit_sparse.profiler.errors import ProfileError
from dit_sparse.profiler.measure import Meter
from dit_sparse.profiler.sampling import Rows, block_of_token, block_sums, draw
from tests.profiler.test_measure import call_of, token_mask
from tests.strategies import seeds


@given(st.integers(1, 200), st.floats(0.001, 1), seeds)
def test_a_draw_takes_two_of_each_stratum(blocks, share, seed):
    rows = draw(blocks, share, seed)
    if rows is None:
        assert blocks <= max(2, blocks * share + 2)
        return
    assert int(rows.sizes.sum()) == blocks
    ends = rows.sizes.cumsum(0)
    for i, (pair, size) in enumerate(zip(rows.pairs.tolist(), rows.sizes.tolist(), strict=True)):
        assert len(set(pair)) == 2 <= size
        assert all(ends[i] - size <= block < ends[i] for block in pair)
    assert blocks * share - 2 <= 2 * len(rows.pairs) <= max(2, blocks * share + 1)
    assert float(rows.weights.sum()) == pytest.approx(blocks)
    again = draw(blocks, share, seed)
    assert torch.equal(again.pairs, rows.pairs)


@given(st.lists(st.integers(2, 5), min_size=1, max_size=2), seeds)
def test_sum_and_variance_are_right_on_average_over_all_draws(sizes, seed):
    """Every possible draw, each as likely: no tolerance for chance is needed."""
    blocks = sum(sizes)
    sums = torch.rand(3, blocks, generator=torch.Generator().manual_seed(seed)).double()
    draws = [[]]
    first = 0
    for size in sizes:
        pairs = list(combinations(range(first, first + size), 2))
        draws = [[*left, pair] for left in draws for pair in pairs]
        first += size
    found = [
        Rows(torch.tensor(each), torch.tensor(sizes, dtype=torch.float64), blocks).total(sums)
        for each in draws
    ]
    totals, variances = (torch.stack(each) for each in zip(*found, strict=True))
    torch.testing.assert_close(totals.mean(0), sums.sum(1))
    torch.testing.assert_close(variances.mean(0), totals.var(0, correction=0))


def test_every_block_is_drawn_as_often():
    count, blocks = 2000, 14
    drawn = torch.zeros(blocks)
    for seed in range(count):
        rows = draw(blocks, 0.3, seed)
        assert len(rows.pairs) == 2  # strata of 7
        drawn += rows.weights > 0
    expected, spread = count * 2 / 7, (count * 2 / 7 * 5 / 7) ** 0.5
    assert float((drawn - expected).abs().max()) < 4.5 * spread


def test_tokens_are_found_in_their_blocks():
    random = torch.Generator().manual_seed(0)
    q = BlockLayout.from_lengths([3, 4, 2])
    order = torch.stack([torch.randperm(9, generator=random) for _ in range(2)])[None]
    order = torch.cat([order, order.new_full((1, 2, 1), -1)], -1)  # one slot of padding
    layout = BlockLayout.from_lengths([3, 4, 2, 1])
    mask = torch.ones(1, 1, 4, 3, dtype=torch.bool)
    plan = BlockPlan.from_block_mask(mask, layout, q, q_permutation=order, q_tokens=9)
    found = block_of_token(plan)
    assert found.shape == (1, 2, 9)
    of_slot = [0, 0, 0, 1, 1, 1, 1, 2, 2]
    for head in range(2):
        for slot in range(9):
            assert found[0, head, order[0, head, slot]] == of_slot[slot]
    values = torch.rand(2, 2, 9, generator=random)
    sums = block_sums(values, found, 4)
    for head in range(2):
        for block in range(4):
            members = [t for t in range(9) if found[0, head, t] == block]
            wanted = values[:, head, members].double().sum()
            assert float(sums[head, block]) == pytest.approx(float(wanted))


def squares_of(call, mask):
    """Squared errors and recall of every token, by full matrices in float64: ``[heads, S]``."""
    q, k, v = (x[0].double().transpose(0, 1) for x in (call.query, call.key, call.value))
    scores = q @ k.transpose(1, 2) * call.scale
    weight = scores.softmax(-1)
    dense = weight @ v
    sparse = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num() @ v
    return (sparse - dense).square().sum(-1), dense.square().sum((1, 2)), (weight * mask).sum(-1)


GRID, DRAWS = LatentsGrid(6, 8, 8), 150
SAMPLED = (
    "radial:block_size=8:decay_factor=0.05:sink=false",
    "sparse_vdit:patterns=multi_diagonal:block_size=16:multi_diagonal_density=0.3",
    "svg2:block_size=16:query_clusters=20:key_clusters=20:top_p=0.3:first_iterations=2",
)


@pytest.mark.parametrize("text", SAMPLED)
def test_the_estimate_is_that_of_the_drawn_rows(text):
    (candidate,) = resolve(parse_candidates(text), GRID)
    call = call_of(GRID, 3)
    _, (found,) = Meter([candidate], sample=2).measure(call, 0)
    plan = candidate.instance.plan(call_of(GRID, 3), Backends())
    share = 2 * 64 / GRID.tokens
    rows = draw(plan.q.blocks, share, call.layer * 100_003 + call.step)
    squares, norm, kept = squares_of(call, token_mask(plan, 2))
    block = block_of_token(plan).expand(1, 2, -1)[0]
    for head in range(2):
        sums = [float(squares[head][block[head] == b].sum()) for b in range(plan.q.blocks)]
        total = variance = 0.0
        for (a, b), size in zip(rows.pairs.tolist(), rows.sizes.tolist(), strict=True):
            total += size * (sums[a] + sums[b]) / 2
            variance += size * (size - 2) * (sums[a] - sums[b]) ** 2 / 4
        assert found.error[head] ** 2 == pytest.approx(total / float(norm[head]), rel=1e-4)
        assert found.doubt[head] == pytest.approx(variance**0.5 / float(norm[head]), rel=1e-3)
        weight = rows.weights[block[head]]
        recall = float((kept[head] * weight).sum() / weight.sum())
        assert found.recall[head] == pytest.approx(recall, rel=1e-4)
    assert min(found.doubt) > 0


def test_estimates_scatter_around_the_truth_as_they_say():
    (candidate,) = resolve(parse_candidates(SAMPLED[0]), GRID)
    _, (truth,) = Meter([candidate]).measure(call_of(GRID, 3), 0)
    assert truth.doubt == [0.0, 0.0]
    found = []
    for step in range(DRAWS):  # the draw depends on the step, what Radial keeps does not
        _, (each,) = Meter([candidate], sample=2).measure(call_of(GRID, 3, step=step), step)
        assert each.density == truth.density
        assert each.computed == truth.computed
        found.append([(e**2, d) for e, d in zip(each.error, each.doubt, strict=True)])
    squares, doubts = torch.tensor(found, dtype=torch.float64).unbind(-1)  # [draws, heads]
    right = torch.tensor(truth.error, dtype=torch.float64) ** 2
    scatter = squares.std(0)
    assert ((squares.mean(0) - right).abs() < 4 * scatter / DRAWS**0.5).all()
    torch.testing.assert_close(doubts.square().mean(0).sqrt(), scatter, rtol=0.2, atol=0)


def test_a_search_is_exact_and_later_rows_are_sampled():
    (candidate,) = resolve(parse_candidates("adaspa:density=0.25:block_size=8"), GRID)
    meter = Meter([candidate], sample=2)
    _, (searched,) = meter.measure(call_of(GRID, 1, step=2), 2)
    assert searched.error == searched.doubt == [0.0, 0.0]
    _, (later,) = meter.measure(call_of(GRID, 2, step=5), 2)
    assert not later.searched
    assert min(later.doubt) > 0


@dataclass(frozen=True)
class Remembering:
    """A method that keeps what it saw in ``finish``."""

    inner: object

    def plan(self, call, ops):
        return self.inner.plan(call, ops)

    def finish(self, call, output, lse, ops):
        call.state["seen"] = output.clone()
        return output


@dataclass
class Fake:
    instance: Remembering
    name: str = "remembering"
    period: int | None = None
    params: dict = field(default_factory=dict)


def test_what_a_method_remembers_is_of_all_rows():
    """Else its next calls would work on rows that were never computed."""
    (candidate,) = resolve(parse_candidates(SAMPLED[0]), GRID)
    fake, call = Fake(Remembering(candidate.instance)), call_of(GRID, 3)
    meter = Meter([fake], sample=2)
    _, (found,) = meter.measure(call, 0)
    (state,) = meter.states.values()
    qkv = (call.query, call.key, call.value)
    whole, _ = Backends().attend(*qkv, candidate.instance.plan(call, Backends()), call.scale)
    assert torch.equal(state["seen"], whole)
    assert found.doubt == [0.0, 0.0]
    _, (truth,) = Meter([candidate]).measure(call, 0)
    assert found.error == truth.error


def test_rows_to_compare():
    small, large = LatentsGrid(9, 16, 16), LatentsGrid(21, 45, 80)
    assert [Measuring((), None).rows(grid) for grid in (small, large)] == [16, 64]
    assert Measuring((), None, sample=0).rows(large) is None
    assert Measuring((), None, sample=5).rows(large) == 5
    with pytest.raises(ProfileError, match="sample must be at least 2 rows"):
        Measuring((), None, sample=1)
