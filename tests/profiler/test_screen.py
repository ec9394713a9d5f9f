# SPDX-License-Identifier: Apache-2.0
"""Screening: levels are kept on calls, the greedy order by hand, and a search with a shortlist."""

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from dit_sparse.core.call import AttentionCall
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.core.sizes import nbytes
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.profiler import Bands, ProfileError, Store, Wish, profile
from dit_sparse.profiler.candidates import parse_candidates
from dit_sparse.profiler.capture import Enough, Measuring
from dit_sparse.profiler.screen import Screen, screened_layers
from dit_sparse.profiler.search import Cell
from dit_sparse.profiler.shortlist import finer, ranked
from dit_sparse.profiler.table import NOT_MEASURED
from dit_sparse.profiler.tuning import Tuner
from tests import tiny

TEXT = 17
GRID = LatentsGrid(4, 8, 8, TEXT)


def calls(seed, grid=GRID):
    """Two calls of one layer, with keys in clumps, so that content decides what is kept."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for step in (0, 2):
        clumps = torch.randn(12, 16, generator=random)
        member = torch.randint(12, (1, grid.tokens, 2), generator=random)
        shape = (1, grid.tokens, 2, 16)
        key, query = (clumps[member] + torch.randn(shape, generator=random) for _ in range(2))
        value = torch.randn(shape, generator=random)
        found.append(
            AttentionCall(query, key, value, grid, 0.25, heads=(0, 1), step=step, num_steps=6)
        )
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("level", [0.5, 0.25])
@pytest.mark.parametrize(
    "family",
    [
        "svg2:query_clusters=16:key_clusters=24", "xattention:block_size=8",
        "adaspa:compensate=means:block_size=8", "composed:block_size=8:tile=[2,2,2]",
        "blade:compensate=means:block_size=8", "window:block_size=8:compensate=means",
    ],
)  # fmt: skip
def test_a_candidate_keeps_its_level(family, level, seed):
    """Counted from the plan of the last call alone, of the video's pairs; all others are kept."""
    (want,) = parse_candidates(f"{family}@{level:g}")
    pair = calls(seed)
    request = Tuner(pair).request(want)
    method, ops = want.fitted(GRID, request).instance, Backends()
    for call in pair:
        plan = method.plan(call, ops)
        assert plan is not None
        if plan.complete:
            output, lse = ops.attend(call.query, call.key, call.value, plan, call.scale)
            method.finish(call, output, lse, ops)
            pair[1].state.update(call.state)
    video = GRID.video_tokens**2 / GRID.tokens**2
    wanted = 1 - video * (1 - level)
    assert float(plan.density().mean()) == pytest.approx(wanted, rel=0.13)


def table(random, heads=3, candidates=6):
    time = random.uniform(0.1, 0.9, (heads, candidates + 1))
    error = (1 - time) * random.uniform(0.1, 1.0, time.shape)
    time[:, 0], error[:, 0] = 1.0, 0.0
    return Cell(("transformer", 0, 0), 2, error, time, np.zeros(candidates + 1))


def regret(cell, columns):
    """The measure of ``ranked``, written for one set of columns."""
    error = cell.steps * cell.error
    prices = cell.time[:, 0].mean() / np.median(error[error > 0]) * np.logspace(-1.5, 2.5, 12)
    total = 0.0
    for price in prices:
        value = cell.time + price * error
        total += value[:, [0, *columns]].min(1).sum() / value.min(1).sum()
    return total / len(prices)


def test_the_greedy_order_is_near_the_best_set():
    random = np.random.default_rng(0)
    for _ in range(20):
        cell = table(random)
        found = ranked([cell], 2)
        assert len(found) == len(set(found)) == 2
        alone = [regret(cell, [column]) for column in range(1, 7)]
        assert found[0] == 1 + int(np.argmin(alone))
        best = min(regret(cell, pair) for pair in combinations(range(1, 7), 2))
        assert best - 1e-12 <= regret(cell, found) <= 1 + (min(alone) - 1) * 1.001
        assert regret(cell, found) - 1 <= 2 * (best - 1) + 0.05


def test_copies_and_what_was_not_measured_are_left_out():
    cell = table(np.random.default_rng(1))
    columns = [0, 1, 1, 2, 3, 4, 5, 6]
    error = np.hstack([cell.error[:, columns], np.full((3, 1), NOT_MEASURED)])
    time = np.hstack([cell.time[:, columns], np.full((3, 1), 0.01)])
    found = ranked([Cell(cell.key, 2, error, time, np.zeros(9))], 9)
    assert 2 not in found
    assert 8 not in found
    assert ranked([Cell(cell.key, 2, 0 * error[:, :1], time[:, :1], np.zeros(1))], 3) == []


def test_what_is_remembered_stays_within_the_limit():
    cell = table(np.random.default_rng(2))
    free = ranked([cell], 3)
    sizes = [0] * 7
    sizes[free[0]] = 5
    assert ranked([cell], 3, sizes, 5) == free
    assert free[0] not in ranked([cell], 3, sizes, 4)


def test_finer_levels_lie_beside_the_chosen_ones():
    wanted = parse_candidates("radial,pooled:density=0.25")
    quarter, fixed = wanted[1], wanted[-1]
    assert [want.text for want in finer(wanted, [quarter, fixed])] == [
        "radial@0.18",
        "radial@0.35",
    ]
    assert [want.text for want in finer(wanted, [wanted[2]])] == ["radial@0.062", "radial@0.18"]


@pytest.mark.parametrize(("layers", "wanted"), [(1, {0}), (6, {1, 4}), (40, {5, 15, 25, 35})])
def test_layers_are_spread(layers, wanted):
    assert screened_layers(layers) == wanted


def test_a_pair_is_screened_on_few_rows_after_its_first_call():
    """AdaSpa searches on the band's first call; without it every call would be dense."""
    grid = LatentsGrid(4, 16, 16, TEXT)
    wanted = parse_candidates("adaspa:block_size=8@0.3,centroid:block_size=8@0.3")
    listener = Screen(Measuring(wanted, Bands((0.0, 1.0))), layers=3)
    first, last = (replace(c, layer=1, num_layers=3, branch="cond") for c in calls(0, grid))
    for call in (first, replace(last, step=2), replace(last, step=3)):
        listener(call, None, "dense")
    with pytest.raises(Enough):  # the generation need not go on
        listener(replace(last, step=4), None, "dense")
    (seen,) = listener.observed.calls
    assert (seen["layer"], seen["step"]) == (1, 3)
    video = grid.video_tokens**2 / grid.tokens**2
    for found in seen["found"]:
        assert not found["searched"]
        assert np.mean(found["density"]) == pytest.approx(1 - 0.7 * video, abs=0.05)
        assert min(found["error"]) > 0
        assert min(found["doubt"]) > 0  # a sample of its rows was compared
    # What is remembered is counted for all three layers.
    state: dict = {}
    adaspa = wanted[0].fitted(grid, listener.observed.requested[wanted[0].text][0]).instance
    own, ops = replace(first, state=state), Backends()
    plan = adaspa.plan(own, ops)
    output, lse = ops.attend(own.query, own.key, own.value, plan, own.scale)
    adaspa.finish(own, output, lse, ops)
    assert listener.observed.bytes[wanted[0].text] == 3 * nbytes(state) > 0


@pytest.fixture(scope="module")
def wan():
    pipe, args = tiny.wan()
    pipe.set_progress_bar_config(disable=True)
    return tiny.stretch(pipe), args


def search(wan, store, **changes):
    pipe, args = wan
    how = {
        "arguments": {"num_inference_steps": 6},
        "candidates": "svg2:query_clusters=4:key_clusters=8:first_iterations=2,"
        "composed:block_size=8:tile=[2,2,2],pooled:block_size=8",
        "bands": Bands((0.0, 0.5, 1.0)),
        "wish": Wish(density=0.4),
        "costs": "assumed",
        "check": False,
        "shortlist": 4,
        "store": store,
    }
    return profile(pipe, [args], **{**how, **changes})


def test_a_search_measures_its_shortlist_and_takes_it_up_again(wan, tmp_path):
    store, seen = Store(tmp_path / "a.measured"), []
    found = search(wan, store, progress=lambda what, done, total: seen.append(what))
    assert seen[0] == "screening candidates"
    listed = json.loads((store.folder / "shortlist.json").read_text())
    names = [each["name"] for each in listed["candidates"]]
    assert names == [each.name for each in found.candidates]
    assert 1 <= len(names) == len(set(names)) <= 4
    assert len(listed["screened"]) == 9
    ranks = sorted(each["rank"] for each in listed["screened"] if each["rank"] is not None)
    assert ranks == list(range(len(ranks)))
    assert f"{len(names)} candidates of 9" in found.strategy.receipt.note
    # Everything is read back: nothing is screened or measured again, another density searches.
    seen.clear()
    again = search(wan, store, progress=lambda what, done, total: seen.append(what))
    assert again.strategy == found.strategy
    assert "screening candidates" not in seen
    assert search(wan, store, wish=Wish(density=0.6)).candidates == found.candidates


def test_nothing_is_screened_where_nothing_need_be(wan, tmp_path):
    store = Store(tmp_path / "b.measured")
    found = search(wan, store, candidates="pooled:block_size=8", shortlist=3)
    assert len(found.candidates) == 3
    assert not (store.folder / "shortlist.json").exists()
    with pytest.raises(ProfileError, match="shortlist"):
        search(wan, Store(tmp_path / "c.measured"), shortlist=-1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"candidates": []}, "candidates: "),
        ({"candidates": [{"name": "x", "method": "radail", "params": {}}]}, "radail"),
        ({"candidates": [{"name": "x", "method": "pooled", "params": {"density": 2}}]}, "density"),
    ],
)
def test_a_broken_shortlist_is_one_error(wan, tmp_path, change, words):
    store = Store(tmp_path / "d.measured")
    search(wan, store, candidates="svg2:query_clusters=4:key_clusters=8@0.5")
    path = store.folder / "shortlist.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ProfileError, match=r"shortlist\.json") as refused:
        search(wan, store, candidates="svg2:query_clusters=4:key_clusters=8@0.5")
    assert words in str(refused.value)
