# SPDX-License-Identifier: Apache-2.0
"""Predicted times: by hand on small numbers, ranks against scipy, and against measured ones."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.profiler.candidates import parse_candidates, resolve
from dit_sparse.profiler.cost import CostModel, agreement, block_of
from dit_sparse.profiler.micro import Size, _fit, measure_costs

GRID = LatentsGrid(6, 16, 16)


def model(**changes):
    numbers = {
        "source": "by hand",
        "unit": "ms",
        "heads": 2,
        "dense": 10.0,
        "launch": 1.0,
        "head": {"64": 0.5, "128": 0.25},
        "pair": {"64": 8.0, "128": 6.0},
        "order": 0.125,
        "cut": 0.5,
        "planning": {"radial": (0.0, 0.0), "adaspa:density=0.25": (6.0, 0.5)},
    }
    return CostModel(**{**numbers, **changes})


def one(text, grid=GRID):
    return resolve(parse_candidates(text), grid)[0]


def test_a_launch_by_hand():
    costs = model()
    assert costs.attend(64, 0.25) == 0.5 + 2.0
    assert costs.attend(64, 0.25, ordered=True, partial=0.5) == 0.5 + 2.0 * 1.25 + 0.125
    assert costs.attend(120, 0.5) == 0.25 + 3.0  # the nearest known size
    assert costs.launch_time(64, [0.25, 0.5]) == 1.0 + 2.5 + 4.5


def test_a_band_by_hand():
    costs, search = model(), one("adaspa:density=0.25")
    assert block_of(search) == 64
    # One full step, three sparse ones, and planning shared by two heads.
    assert costs.band(search, 4, 0.25) == 8.5 + 3 * 2.5 + (6.0 + 3 * 0.5) / 2
    assert costs.band(one("radial:block_size=64"), 4, 0.25) == 4 * 2.5
    assert costs.band(one("sparse_vdit:patterns=full"), 4, 1.0) == costs.dense_band(4) == 20.0
    refresh = one('rettention:refresh=2:mask_params={"block_size":64}')
    assert costs.band(refresh, 5, 0.25) == 3 * 8.5 + 2 * 2.5  # refreshed on steps 0, 2 and 4


def test_longer_bands_amortise_a_search():
    costs, search = CostModel.assumed([one("adaspa:density=0.25")], 4), one("adaspa:density=0.25")
    per_step = [costs.band(search, steps, 0.25) / steps for steps in (2, 4, 8, 16)]
    assert per_step == sorted(per_step, reverse=True)
    assert costs.dense_band(1) == 0.25
    assert costs.source.startswith("assumed")


def test_assumed_planning_follows_from_how_a_method_chooses():
    found = [one(name) for name in ("radial", "pooled", "adaspa", "rettention")]
    planning = CostModel.assumed(found, 4).planning
    assert list(planning.values()) == [(0.0, 0.0), (0.01, 0.01), (1.0, 0.0), (1.0, 0.0)]
    assert block_of(one("gna:tile=[2,2,4]")) == 16


def test_quantisation_counts_whole_blocks():
    from dit_sparse.core.grid import BlockLayout
    from dit_sparse.core.plan import BlockPlan
    from dit_sparse.profiler.measure import computed_share

    layout = BlockLayout.from_lengths([8, 8, 3])
    plan = BlockPlan.from_block_mask(torch.eye(3, dtype=torch.bool)[None, None], layout, layout)
    assert computed_share(plan, 1, 8).tolist() == pytest.approx([3 * 64 / 19**2])
    assert computed_share(plan, 2, 4).tolist() == pytest.approx([(64 + 64 + 16) / 19**2] * 2)
    assert computed_share(plan, 1, 1).item() == pytest.approx(plan.density().item())
    assert plan.density().item() == (64 + 64 + 9) / 19**2


values = st.lists(st.integers(1, 9).map(float), min_size=2, max_size=12)


@given(st.data())
def test_ranks_are_scipys(data):
    predicted = data.draw(values)
    measured = data.draw(
        st.lists(st.integers(1, 9).map(float), min_size=len(predicted), max_size=len(predicted))
    )
    rank, error = agreement(predicted, measured)
    if len(set(predicted)) > 1 and len(set(measured)) > 1:
        assert rank == pytest.approx(spearmanr(predicted, measured).statistic)
    else:
        assert rank == 0
    relative = sorted(abs(p - m) / m for p, m in zip(predicted, measured, strict=True))
    middle = len(relative) // 2
    wanted = (
        relative[middle] if len(relative) % 2 else (relative[middle - 1] + relative[middle]) / 2
    )
    assert error == pytest.approx(wanted)


@pytest.mark.parametrize(("one", "other"), [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1, 2], [0, 1])])
def test_agreement_refuses_what_cannot_be_compared(one, other):
    with pytest.raises(ValueError, match=r"two lists of equal|above 0"):
        agreement(one, other)


@given(st.tuples(*[st.floats(0.1, 10)] * 3))
def test_the_fit_finds_exact_weights(weights):
    rows = [[1.0, h, h * d] for h in (1.0, 4.0) for d in (0.125, 0.25, 0.5)]
    times = [sum(w * x for w, x in zip(weights, row, strict=True)) for row in rows]
    assert _fit(rows, times) == pytest.approx(list(weights), rel=1e-6)


def test_the_fit_is_never_negative():
    rows = [[1.0, h, h * d] for h in (1.0, 4.0) for d in (0.125, 0.25, 0.5)]
    times = [max(0.01, 3 * row[2] - 0.2) for row in rows]
    assert min(_fit(rows, times)) >= 0


@pytest.mark.slow
def test_predicted_times_follow_measured_ones():
    """Times vary on a shared machine: the order must hold, the size only roughly."""
    grid = LatentsGrid(9, 16, 16)
    candidates = resolve(
        parse_candidates(
            "pooled,adaspa,blade,svg2:top_p=0.6:first_iterations=2,sparse_vdit:patterns=multi_diagonal"
        ),
        grid,
    )
    size = Size(grid, 1, 2, 48, 2, 20, torch.device("cpu"), torch.float32)
    timed = measure_costs(candidates, size)
    assert timed.rank_correlation is not None
    assert timed.median_error is not None
    assert timed.rank_correlation > 0.6
    assert timed.median_error < 0.6
    again = CostModel.from_dict(json.loads(json.dumps(timed.model.to_dict())))
    assert again == timed.model
    assert set(again.planning) == {candidate.name for candidate in candidates}
