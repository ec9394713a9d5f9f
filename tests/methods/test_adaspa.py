# SPDX-License-Identifier: Apache-2.0
"""AdaSpa against a search written out naively in float64, over whole generations."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.errors import StrategyError
from dit_sparse.methods.adaspa import AdaSpa
from tests.methods.naive import NaiveOps, make_call, masked_attention, run, token_mask
from tests.strategies import batches, head_counts, seeds, valid_text_lengths

grids = st.builds(
    LatentsGrid,
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from([0, 0, 1, 5, 9]),
    st.booleans(),
)
densities = st.sampled_from([0.01, 0.1, 0.2, 0.34, 0.5, 0.7, 0.9, 1.0])
block_sizes = st.sampled_from([2, 3, 4, 7])


def blocks_of(grid, block_size):
    """Tokens of each block, and whether it is text, in sequence order."""

    def cut(start, count):
        return [
            list(range(start + first, start + min(first + block_size, count)))
            for first in range(0, count, block_size)
        ]

    text = cut(grid.text_start, grid.text_length)
    video = cut(grid.video_start, grid.video_tokens)
    order = [text, video] if grid.text_first else [video, text]
    return [tokens for part in order for tokens in part], [
        part is text for part in order for _ in part
    ]


def oracle(method, call, lse, levels=None):
    """Kept (query block, key block) pairs of each sample and head, as a list of sets.

    Levels are those of the first search where they are given; they are returned as well.
    """
    blocks, is_text = blocks_of(call.grid, method.block_size)
    batch, _, heads, _ = call.query.shape
    valid = call.text_valid.tolist() if call.text_valid is not None else None
    video = [i for i, text in enumerate(is_text) if not text]
    base = min(max(math.floor(method.density * len(video) + 0.5), 1), len(video))
    spread = min(base // 2, len(video) - base) if method.recall_threshold < 1 else 0
    kept, own = [], []
    for b in range(batch):
        living = [
            [
                t
                for t in tokens
                if valid is None or not is_text[i] or t - call.grid.text_start < valid[b]
            ]
            for i, tokens in enumerate(blocks)
        ]
        order, recalls = [], []
        for h in range(heads):
            scores = call.query[b, :, h].double() @ call.key[b, :, h].double().T * call.scale
            weight = (scores - lse[b, h][:, None]).exp()
            seen = held = 0.0
            rows = {}
            for i in video:
                mass = {
                    j: float(weight[blocks[i]][:, living[j]].sum()) for j in range(len(blocks))
                }
                rows[i] = sorted(video, key=lambda j, mass=mass: -mass[j])
                seen += sum(mass.values())
                held += sum(mass[j] for j in rows[i][:base])
                held += sum(m for j, m in mass.items() if is_text[j])
            order.append(rows)
            recalls.append(held / seen)
        able = min(sum(r > method.recall_threshold for r in recalls), heads // 2)
        worst_first = sorted(range(heads), key=lambda h: recalls[h])
        for h in range(heads):
            place = worst_first.index(h)
            level = (place < able) - (place >= heads - able)
            if levels is not None:
                level = levels[b * heads + h]
            own.append(level)
            kept.append(
                {
                    (i, j)
                    for i in range(len(blocks))
                    for j in range(len(blocks))
                    if is_text[i] or is_text[j] or j in order[h][i][: base + spread * level]
                }
            )
    return kept, own


def pairs(plan, batch, heads):
    mask = plan.block_mask().expand(batch, heads, -1, -1)
    return [
        {tuple(p) for p in mask[b, h].nonzero().tolist()}
        for b in range(batch)
        for h in range(heads)
    ]


def dense_lse(call):
    mask = torch.ones(call.query.shape[0], 1, 1, call.grid.tokens, dtype=torch.bool)
    if call.text_valid is not None:
        place = torch.arange(call.grid.tokens) - call.grid.text_start
        padding = (place >= call.text_valid[:, None]) & (place < call.grid.text_length)
        mask &= ~padding[:, None, None]
    return masked_attention(call.query, call.key, call.value, mask, call.scale)


@given(
    grids, densities, block_sizes, batches, head_counts, seeds,
    st.sampled_from([0.3, 0.5, 0.8, 1.0]), st.integers(1, 12), st.data(),
)  # fmt: skip
def test_a_generation_searches_and_keeps_as_the_naive_one(
    grid, density, block_size, batch, heads, seed, threshold, num_steps, data
):
    method = AdaSpa(density, recall_threshold=threshold, block_size=block_size)
    valid = None
    if grid.text_length and data.draw(st.booleans()):
        valid = torch.tensor(data.draw(valid_text_lengths(grid.text_length, batch)))
    searches = sorted({math.floor(f * num_steps + 0.5) for f in (0.18, 0.58)})
    searches = [s for s in searches if s < num_steps - 1]
    ops, state, shared, kept, levels, first_lse = NaiveOps(), {}, {}, None, None, None
    for step in range(num_steps):
        call = make_call(
            grid, seed % 10**6 + step, batch, heads, text_valid=valid, step=step,
            num_steps=num_steps, state=state, shared=shared,
        )  # fmt: skip
        plan, output = run(method, call, ops)
        if not searches or step < searches[0]:
            assert plan is None
            continue
        plan.validate()
        if step == searches[0]:
            dense, first_lse = dense_lse(call)
            assert plan.complete
            torch.testing.assert_close(output, dense)
        if step in searches:
            kept, levels = oracle(method, call, first_lse, levels)
        if step > searches[0]:
            assert pairs(plan, batch, heads) == kept
            full = plan.density()
            assert bool(((full > 0) & (full <= 1)).all())
            assert bool(plan.block_mask().any(-1).all())
    assert ops.searches == len(searches)


@given(st.integers(1, 9), densities, seeds)
def test_levels_keep_the_mean_and_text_comes_on_top(heads, density, seed):
    grid = LatentsGrid(4, 4, 4, 8)
    method = AdaSpa(density, block_size=4, recall_threshold=0.0)  # every head can do with less
    call = make_call(grid, seed % 10**6, 2, heads, step=1, num_steps=4)
    run(method, call, NaiveOps())
    call.step = 2
    plan, _ = run(method, call, NaiveOps())
    base, spread = method.budgets(16)
    rows = plan.kv_num_blocks[:, :, :16] - 2  # two text blocks
    assert torch.equal(rows, rows[..., :1].expand_as(rows))  # equal budgets in all rows
    budget = rows[..., 0]
    assert set(budget.flatten().tolist()) <= {base - spread, base, base + spread}
    assert (budget.sum(1) == heads * base).all()
    assert ((budget < base).sum(1) == (heads // 2 if spread else 0)).all()
    assert bool(plan.block_mask()[..., 16:].all())
    assert bool(plan.block_mask()[..., 16:, :].all())


@pytest.mark.parametrize(
    ("density", "blocks", "budget"),
    [
        (0.2, 100, (20, 10)),
        (0.1, 100, (10, 5)),
        (0.8, 10, (8, 2)),
        (1.0, 9, (9, 0)),
        (0.01, 9, (1, 0)),
    ],
)
def test_budgets(density, blocks, budget):
    assert AdaSpa(density).budgets(blocks) == budget


@pytest.mark.parametrize(
    ("num_steps", "searches"),
    [(50, (9, 29)), (40, (7, 23)), (8, (1, 5)), (4, (1, 2)), (3, (1,)), (2, (0,)), (1, ())],
)
def test_search_steps_of_short_runs(num_steps, searches):
    assert AdaSpa().searches(num_steps) == searches


def walk(method, steps, num_steps, **fields):
    """Kinds of the plans at ``steps``: "dense", "search" (all kept) or "sparse"."""
    state, shared, ops, kinds = {}, {}, NaiveOps(), []
    for step in steps:
        call = make_call(
            LatentsGrid(3, 4, 4),
            step=step,
            num_steps=num_steps,
            state=state,
            shared=shared,
            **fields,
        )
        plan, _ = run(method, call, ops)
        kinds.append("dense" if plan is None else "search" if plan.complete else "sparse")
    return kinds, ops, state


def test_attached_in_mid_generation_the_first_call_searches():
    kinds, ops, _ = walk(AdaSpa(block_size=4), range(33, 50), 50)
    assert kinds == ["search"] + ["sparse"] * 16
    assert ops.searches == 1
    assert walk(AdaSpa(block_size=4), [49], 50)[0] == ["dense"]  # no step left to use it


def test_a_skipped_search_step_is_made_up_for():
    kinds, ops, _ = walk(AdaSpa(block_size=4), [9, 10, 35, 36, 36], 50)
    assert kinds == ["search"] + ["sparse"] * 4
    assert ops.searches == 2


def test_a_step_called_twice_searches_once():
    kinds, ops, _ = walk(AdaSpa(block_size=4), [8, 9, 9, 29, 29], 50)
    assert kinds == ["dense", "search", "sparse", "sparse", "sparse"]
    assert ops.searches == 2


def test_another_batch_or_a_new_run_starts_a_new_search():
    method, ops, state = AdaSpa(block_size=4), NaiveOps(), {}
    grid = LatentsGrid(3, 4, 4)
    for batch, heads, step, whole in (
        (1, 2, 9, True), (1, 2, 10, False), (2, 2, 11, True), (2, 2, 12, False),
        (2, 3, 13, True), (2, 3, 14, False), (2, 3, 9, True),
    ):  # fmt: skip
        call = make_call(grid, 0, batch, heads, step=step, num_steps=50, state=state)
        plan, _ = run(method, call, ops)
        assert plan.complete == whole


def test_state_is_lists_and_an_lse_that_goes_when_no_search_needs_it():
    method = AdaSpa(0.2, block_size=4)
    _, _, state = walk(method, range(12), 50)
    assert state["lse"].dtype == torch.float32
    assert state["lists"].dtype == torch.int16
    assert state["lists"].shape == (1, 2, 12, 3)  # base 2, spread 1
    _, _, state = walk(method, range(40), 50)
    assert not {"lse", "levels"} & set(state)


@pytest.mark.parametrize("text_first", [False, True])
def test_heads_searched_in_chunks_are_the_same(text_first, monkeypatch):
    from dit_sparse.methods import adaspa

    def plans():
        ops, state = NaiveOps(), {}
        for step in (9, 10):
            call = make_call(
                LatentsGrid(3, 4, 4, 6, text_first), 3, 2, 5, step=step, num_steps=50, state=state
            )
            plan, _ = run(AdaSpa(0.4, recall_threshold=0.3, block_size=4), call, ops)
        return plan.block_mask()

    whole = plans()
    monkeypatch.setattr(adaspa, "_SCRATCH", 1)
    assert torch.equal(plans(), whole)


def test_lists_keep_the_heaviest_so_more_density_keeps_more_mass():
    grid = LatentsGrid(4, 4, 4)
    recalls = []
    for density in (0.1, 0.3, 0.6, 1.0):
        state, ops = {}, NaiveOps()
        for step in (1, 2):
            call = make_call(grid, 5, step=step, num_steps=4, state=state)
            method = AdaSpa(density, recall_threshold=1.0, search_steps=(0.25,), block_size=4)
            plan, _ = run(method, call, ops)
        _, lse = dense_lse(call)
        mask = token_mask(plan, 1, 2, grid.tokens, grid.tokens)
        _, kept = masked_attention(call.query, call.key, call.value, mask, call.scale)
        recalls.append(float((kept - lse).exp().mean()))
    assert all(a < b for a, b in pairwise(recalls))
    assert recalls[-1] == pytest.approx(1)


def test_recall_is_the_share_of_the_mass_really_seen():
    # With the LSE of an earlier step a row's mass is not 1; levels do not depend on by how much.
    counts = []
    for offset in (-1.0, 0.0, 1.0):
        call = make_call(LatentsGrid(4, 4, 4), 1, 1, 6, step=1, num_steps=4)
        call.query *= torch.tensor([0.1, 1, 2, 4, 8, 16])[:, None]  # from flat to sharp
        _, lse = dense_lse(call)
        method = AdaSpa(0.4, block_size=4)
        method.finish(call, call.query, lse + offset, NaiveOps())
        counts.append(call.state["counts"].tolist())
    base, spread = method.budgets(16)
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][0][0] == base + spread
    assert counts[0][0][5] == base - spread
    assert base in counts[0][0]


def true_recall(call, block_size, count):
    """Share of the softmax mass that each head's ``count`` heaviest blocks of a row hold."""
    q, k = (x.transpose(1, 2).double() for x in (call.query, call.key))
    weight = (q @ k.transpose(-1, -2) * call.scale).softmax(-1)
    blocks = call.grid.tokens // block_size
    mass = weight.unflatten(2, (blocks, -1)).unflatten(4, (blocks, -1)).sum((3, 5))
    return mass.topk(count, dim=-1).values.sum((-1, -2)) / call.grid.tokens


def test_later_searches_keep_the_first_levels():
    # Heads from flat to sharp. Later the flattest head's rows look elsewhere, some of them harder:
    # by the old LSE those rows hold nearly all mass, and the worst head would look best.
    grid, state, ops = LatentsGrid(4, 4, 4), {}, NaiveOps()
    method = AdaSpa(0.25, search_steps=(0.2, 0.5), recall_threshold=0.3, block_size=4)
    counts = []
    for step in (2, 5):
        call = make_call(grid, step, 1, 4, step=step, num_steps=10, state=state)
        call.query *= torch.tensor([0.1, 1.5, 3, 6])[:, None]
        if step == 5:
            call.query[:, ::16, 0] *= 200
        assert true_recall(call, 4, 4)[0].argmin() == 0
        run(method, call, ops)
        counts.append(state["counts"].tolist()[0])
    assert ops.searches == 2
    base, spread = method.budgets(16)
    assert counts[0] == counts[1]
    assert counts[1][0] == base + spread
    assert counts[1][3] == base - spread


def test_nan_in_the_queries_does_not_crash():
    state, ops = {}, NaiveOps()
    for step in (9, 10, 29):
        call = make_call(LatentsGrid(3, 4, 4, 3), step=step, num_steps=50, state=state)
        call.query[0, 5] = math.nan
        plan, _ = run(AdaSpa(block_size=4), call, ops)
        plan.validate()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"density": 0.0}, "density must lie in"),
        ({"density": math.nan}, "density must lie in"),
        ({"density": 1.5}, "density must lie in"),
        ({"search_steps": ()}, "search_steps must hold ascending fractions"),
        ({"search_steps": (0.5, 0.1)}, "search_steps must hold ascending fractions"),
        ({"search_steps": (0.5, 0.5)}, "search_steps must hold ascending fractions"),
        ({"search_steps": (10.0, 30.0)}, "search_steps must hold ascending fractions"),
        ({"search_steps": (math.nan,)}, "search_steps must hold ascending fractions"),
        ({"recall_threshold": 2.0}, "recall_threshold must lie in"),
        ({"block_size": 0}, "block_size must be a whole number in .1, 1024."),
    ],
)
def test_bad_params(params, message):
    with pytest.raises(StrategyError, match=message):
        AdaSpa(**params)
