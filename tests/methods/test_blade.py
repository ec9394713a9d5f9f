# SPDX-License-Identifier: Apache-2.0
"""BLADE against maxima, sorts and pooled keys written out in float64, along the curve."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.errors import StrategyError
from dit_sparse.methods import blade, lists
from dit_sparse.methods.blade import Blade
from dit_sparse.methods.gilbert import curve, gilbert_order
from dit_sparse.methods.lists import select_by_two
from tests.methods.chosen import block_sizes, runs, tokens_kept, valid_keys
from tests.methods.naive import NaiveOps, make_call, masked_attention, run, token_mask
from tests.strategies import seeds

sides = st.integers(1, 9)


class PooledOps(NaiveOps):
    """``attend`` with weighted keys as well."""

    def attend(self, query, key, value, plan, scale):
        if plan.kv_log_weight is None:
            return super().attend(query, key, value, plan, scale)
        q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
        scores = q @ k.transpose(-1, -2) * scale + plan.kv_log_weight.double()[:, :, None]
        kept = token_mask(plan, query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        scores = scores.masked_fill(~kept, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


@given(sides, sides, sides)
def test_the_curve_visits_every_token_once_and_steps_to_neighbours(width, height, depth):
    path = [tuple(place) for place in curve(width, height, depth).tolist()]
    assert sorted(path) == list(product(range(width), range(height), range(depth)))
    steps = [sum(abs(a - b) for a, b in zip(p, q, strict=True)) for p, q in pairwise(path)]
    if all(side % 2 == 0 for side in (width, height, depth)):
        assert all(step == 1 for step in steps)
    # Odd extents need a few longer steps, as the reference has them.
    assert all(step <= 4 for step in steps)


def sign(number):
    return (number > 0) - (number < 0)


def add(*vectors):
    return tuple(map(sum, zip(*vectors, strict=True)))


def minus(vector):
    return tuple(-number for number in vector)


def walk(at, a, b, c):
    """Yield the reference curve's places of a box one by one: from ``at``, on the whole along a.

    Vectors carry their direction as a sign, and every halving rounds the signed number down.
    """
    sides = width, height, depth = [abs(sum(axis)) for axis in (a, b, c)]
    if 0 in sides:
        return
    step_a, step_b, step_c = (tuple(map(sign, axis)) for axis in (a, b, c))
    for axis, step, others in (
        (a, step_a, (height, depth)), (b, step_b, (width, depth)), (c, step_c, (width, height)),
    ):  # fmt: skip
        if others == (1, 1):
            for _ in range(abs(sum(axis))):
                yield at
                at = add(at, step)
            return
    halves = []
    for axis, step, side in zip((a, b, c), (step_a, step_b, step_c), sides, strict=True):
        half = tuple(number // 2 for number in axis)
        if abs(sum(half)) % 2 == 1 and side > 2:
            half = add(half, step)
        halves.append(half)
    a2, b2, c2 = halves
    a_rest, b_rest, c_rest = (add(x, minus(y)) for x, y in zip((a, b, c), halves, strict=True))
    a_last = add(a, minus(step_a))
    if 2 * width > 3 * height and 2 * width > 3 * depth:
        yield from walk(at, a2, b, c)
        yield from walk(add(at, a2), a_rest, b, c)
    elif 3 * height > 4 * depth:
        yield from walk(at, b2, c, a2)
        yield from walk(add(at, b2), a, b_rest, c)
        yield from walk(add(at, a_last, b2, minus(step_b)), minus(b2), c, minus(a_rest))
    elif 3 * depth > 4 * height:
        yield from walk(at, c2, a2, b)
        yield from walk(add(at, c2), a, b, c_rest)
        yield from walk(add(at, a_last, c2, minus(step_c)), minus(c2), minus(a_rest), b)
    else:
        c_last = add(c, minus(step_c))
        yield from walk(at, b2, c2, a2)
        yield from walk(add(at, b2), c, a2, b_rest)
        yield from walk(add(at, b2, minus(step_b), c_last), a, minus(b2), minus(c_rest))
        yield from walk(add(at, a_last, b2, c_last), minus(c), minus(a_rest), b_rest)
        yield from walk(add(at, a_last, b2, minus(step_b)), minus(b2), c2, minus(a_rest))


def reference_curve(width, height, depth):
    """All places in the reference's order; the longest side leads, the first of equals."""
    axes = [(width, 0, 0), (0, height, 0), (0, 0, depth)]
    longest = max(range(3), key=lambda i: (sum(axes[i]), -i))
    lead = axes.pop(longest)
    return list(walk((0, 0, 0), lead, *axes))


@given(st.integers(1, 13), st.integers(1, 13), st.integers(1, 13))
def test_the_curve_is_the_references(width, height, depth):
    found = [tuple(place) for place in curve(width, height, depth).tolist()]
    assert found == reference_curve(width, height, depth)


@pytest.mark.parametrize("size", [(52, 30, 21), (45, 30, 13)])  # BLADE's Wan and CogVideoX
def test_the_curve_is_the_references_on_the_released_grids(size):
    assert [tuple(place) for place in curve(*size).tolist()] == reference_curve(*size)


def test_the_order_leaves_text_alone():
    grid = LatentsGrid(2, 3, 4, 5, text_first=True)
    order = gilbert_order(grid)[0, 0]
    assert order[:5].tolist() == [0, 1, 2, 3, 4]
    assert sorted(order[5:].tolist()) == list(range(5, 29))
    x, y, z = curve(4, 3, 2)[7].tolist()
    assert order[5 + 7] == 5 + x + 4 * (y + 3 * z)


def along(grid, block_size):
    """Tokens of the video's and the text's blocks, in the curve's order."""
    order = gilbert_order(grid)[0, 0].tolist()

    def cut(start, count):
        return [
            order[start + i : start + min(i + block_size, count)]
            for i in range(0, count, block_size)
        ]

    return cut(grid.video_start, grid.video_tokens), cut(grid.text_start, grid.text_length)


def full_scores(method, call, b, h):
    """Largest and mean weight of each pair of video blocks where every token is drawn.

    Rounded to fp32, as scores are: weights that round to 1 are ties.
    """
    video, text = along(call.grid, method.block_size)
    living = set(valid_keys(call, b))
    blocks = [[t for t in block if t in living] for block in [*video, *text]]
    scores = call.query[b, :, h].double() @ call.key[b, :, h].double().T * call.scale
    found = []
    for block in video:
        row, mean = [0.0] * len(video), [0.0] * len(video)
        for t in block:
            every = [float(scores[t, j]) for other in blocks for j in other]
            base = max(every)
            if method.form == "paper":
                base = float(torch.tensor(every, dtype=torch.float64).logsumexp(0))
            for r, other in enumerate(video):
                best = max(float(scores[t, j]) for j in other)
                weight = math.exp(best - base)
                row[r] = max(row[r], weight)
                mean[r] += weight / len(block)
        found.append([torch.tensor(x, dtype=torch.float32).tolist() for x in (row, mean)])
    return found


def kept_of(method, row, mean):
    blocks = len(row)
    least = max(1, int(method.floor * blocks + 1e-9))
    most = max(1, int(method.density * blocks + 1e-9))
    order = sorted(range(blocks), key=lambda j: (-row[j], -mean[j], j))
    found, held = set(), 0.0
    for place, j in enumerate(order[:most]):
        if place >= least and method.threshold < 1 and held >= method.threshold * sum(row):
            break
        found.add(j)
        held += row[j]
    return found


@given(
    runs(num_steps=3), block_sizes, st.sampled_from(["code", "paper"]),
    st.sampled_from([0.3, 0.5, 1.0]), st.sampled_from([0.4, 0.83, 1.0]), st.integers(1, 2),
)  # fmt: skip
def test_with_every_token_drawn_it_keeps_what_the_naive_one_keeps(
    calls, block_size, form, density, threshold, refresh
):
    method = Blade(density, threshold, 0.1, block_size, form, refresh=refresh,
                   block_size=block_size)  # fmt: skip
    video, _ = along(calls[0].grid, block_size)
    for call in calls:
        plan, output = run(method, call, NaiveOps())
        plan.validate()
        batch, tokens, heads, _ = call.query.shape
        mask = token_mask(plan, batch, heads, tokens, tokens)
        if call.step % refresh == 0:
            kept = [
                [
                    [kept_of(method, *row) for row in full_scores(method, call, b, h)]
                    for h in range(heads)
                ]
                for b in range(batch)
            ]
            wanted = tokens_kept(call, video, kept)
        assert torch.equal(mask, wanted)
        right, _ = masked_attention(call.query, call.key, call.value, mask, call.scale)
        torch.testing.assert_close(output, right)


@given(runs(num_steps=1), st.integers(1, 6), st.sampled_from([0.3, 1.0]))
def test_text_is_pooled_and_read_by_all_on_request(calls, n, density):
    call = calls[0]
    grid = call.grid
    method = Blade(density, 1.0, 0.0, 4, pooled=n, pool_text=True, block_size=4)
    plan, output = run(method, call, PooledOps())
    batch, tokens, heads, _ = call.query.shape
    mask = token_mask(plan, batch, heads, tokens, tokens)
    curve_order = gilbert_order(grid)[0, 0].tolist()
    video = curve_order[grid.video_start :][: grid.video_tokens]
    words = list(range(grid.text_start, grid.text_start + grid.text_length))
    wanted = torch.empty(batch, tokens, heads, 8, dtype=torch.float64)
    for b in range(batch):
        words_read = words if call.text_valid is None else words[: int(call.text_valid[b])]
        line = video + words_read
        groups = [line[i : i + n] for i in range(0, len(line), n)]
        for h in range(heads):
            q, k, v = (x[b, :, h].double() for x in (call.query, call.key, call.value))
            for t in range(tokens):
                kept = mask[b, h, t].nonzero().flatten().tolist()
                scores = [float(q[t] @ k[j]) * call.scale for j in kept]
                read = [v[j] for j in kept]
                for group in groups:
                    mean = sum(k[j] for j in group) / len(group)
                    scores.append(float(q[t] @ mean) * call.scale + math.log(len(group)))
                    read.append(sum(v[j] for j in group) / len(group))
                weight = torch.tensor(scores, dtype=torch.float64).softmax(0)
                wanted[b, t, h] = sum(w * x for w, x in zip(weight, read, strict=True))
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)


@given(runs(num_steps=1), st.integers(1, 6), st.sampled_from([0.3, 1.0]))
def test_pooled_keys_count_as_many_and_text_rows_stay(calls, n, density):
    call = calls[0]
    grid = call.grid
    method = Blade(density, 1.0, 0.0, 4, pooled=n, block_size=4)
    plan, output = run(method, call, PooledOps())
    batch, tokens, heads, _ = call.query.shape
    mask = token_mask(plan, batch, heads, tokens, tokens)
    order = gilbert_order(grid)[0, 0, grid.video_start :][: grid.video_tokens].tolist()
    groups = [order[i : i + n] for i in range(0, len(order), n)]
    q, k, v = (x.double().transpose(1, 2) for x in (call.query, call.key, call.value))
    mean_k, mean_v = (torch.stack([x[:, :, g].mean(2) for g in groups], 2) for x in (k, v))
    size = torch.tensor([len(g) for g in groups], dtype=torch.float64)
    fine = (q @ k.transpose(-1, -2) * call.scale).masked_fill(~mask, -torch.inf)
    coarse = q @ mean_k.transpose(-1, -2) * call.scale + size.log()
    is_text = torch.ones(tokens, dtype=torch.bool)
    is_text[order] = False
    coarse[:, :, is_text] = -torch.inf
    weights = torch.cat([fine, coarse], -1).softmax(-1)
    wanted = (weights @ torch.cat([v, mean_v], 2)).transpose(1, 2)
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)
    if n == 1 and density == 1 and not grid.text_length:  # every key twice: dense again
        dense, _ = masked_attention(call.query, call.key, call.value, mask, call.scale)
        torch.testing.assert_close(output, dense, rtol=1e-5, atol=1e-6)


def kept_mass(call, plan):
    """Share of the softmax mass that a plan keeps."""
    batch, tokens, heads, _ = call.query.shape
    mask = token_mask(plan, batch, heads, tokens, tokens)
    everything = torch.ones_like(mask)
    lse = [
        masked_attention(call.query, call.key, call.value, kept, call.scale)[1]
        for kept in (mask, everything)
    ]
    return float((lse[0] - lse[1]).exp().mean())


def lowest_number_wins(scores, ties, select):
    """Select without a second key, as it was before."""
    return select(scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_are_broken_by_the_mean_which_keeps_more_mass(dtype, monkeypatch):
    # Each token of a block looks mostly at one block of its own, all of them a little at the
    # sixth: every such block is some query's best, so that seven tie at exactly 1.
    grid, directions = LatentsGrid(4, 8, 8), torch.eye(8)
    order = gilbert_order(grid)[0, 0]
    call = make_call(grid, 3, heads=1, num_steps=4)
    block = torch.arange(grid.tokens) // 32  # eight blocks along the curve
    query, key = torch.zeros(1, grid.tokens, 1, 8), torch.zeros(1, grid.tokens, 1, 8)
    looks_at = torch.arange(grid.tokens) % 7  # 0 ... 5, and 6 twice as often
    looks_at[looks_at == 4] = 6
    key[0, order, 0] = directions[block] * 4
    query[0, order, 0] = directions[looks_at] * 4 + 3 * directions[5]
    call.query, call.key = query.to(dtype), key.to(dtype)
    method = Blade(0.25, 1.0, 0.0, samples=32, block_size=32)
    ours = method.plan(call, NaiveOps())
    scores, means = NaiveOps().tile_maximum(
        call.query[:, order], call.key[:, order], ours.q, ours.kv, 32, call.scale
    )
    assert bool((scores == 1).sum(-1).ge(5).all())
    monkeypatch.setattr(blade, "select_by_two", lowest_number_wins)
    before = method.plan(call, NaiveOps())
    assert kept_mass(call, ours) > kept_mass(call, before) + 0.05
    assert torch.equal(ours.kv_num_blocks, before.kv_num_blocks)
    best = means.masked_fill(scores < 1, -1).topk(2).indices.sort().values
    assert torch.equal(ours.kv_indices.long(), best)


@given(seeds, st.integers(1, 9), st.integers(0, 9), st.booleans(), st.data())
def test_unequal_scores_keep_their_order(seed, blocks, count, keep_all, data):
    value = st.sampled_from([0.0, 0.25, 1.0, 1 + 2**-23])
    drawn = data.draw(st.lists(value, min_size=2 * blocks, max_size=2 * blocks))
    scores = torch.tensor(drawn).view(1, 1, 2, blocks)
    ties = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed % 10**6))
    ties = (ties * 3).floor()

    def select(x):
        if keep_all:
            return NaiveOps().select_top_p(x, 1.0, 0, ceiling=max(1, count))
        return NaiveOps().select_top_k(x, count)

    mask, lists, counts = select_by_two(scores, ties, select)
    for row in range(2):
        first = [float(x) for x in scores[0, 0, row]]
        second = [float(x) for x in ties[0, 0, row]]
        order = sorted(range(blocks), key=lambda j: (-first[j], -second[j], j))
        wanted = sorted(order[: max(1, count) if keep_all else count])
        assert mask[0, 0, row].nonzero().flatten().tolist() == wanted
        number = int(counts[0, 0, row])
        assert lists[0, 0, row, :number].tolist() == wanted
        assert bool(((lists[0, 0, row] >= 0) & (lists[0, 0, row] < blocks)).all())


@given(runs(num_steps=1), st.sampled_from([3, 5]), st.data())
def test_a_head_draws_alike_whoever_else_is_in_the_call(calls, block_size, data):
    method = Blade(0.4, samples=2, block_size=block_size)
    call = calls[0]
    numbers = data.draw(st.permutations(range(7)))[: call.query.shape[2]]
    call = dataclasses.replace(call, heads=tuple(numbers), layer=2)
    whole = method.plan(call, NaiveOps()).block_mask()
    batch, _, heads, _ = call.query.shape
    whole = whole.expand(batch, heads, -1, -1)
    for b in range(batch):
        for h in range(heads):
            alone = dataclasses.replace(
                call, query=call.query[b : b + 1, :, h : h + 1],
                key=call.key[b : b + 1, :, h : h + 1], value=call.value[b : b + 1, :, h : h + 1],
                heads=(numbers[h],), state={}, shared={},
                text_valid=None if call.text_valid is None else call.text_valid[b : b + 1],
            )  # fmt: skip
            assert torch.equal(method.plan(alone, NaiveOps()).block_mask()[0, 0], whole[b, h])


def test_heads_in_chunks_are_the_same(monkeypatch):
    method = Blade(0.4, samples=2, block_size=8)

    def mask():
        return method.plan(make_call(LatentsGrid(3, 4, 6), 5, 2, 5), NaiveOps()).block_mask()

    whole = mask()
    monkeypatch.setattr(lists, "_SCRATCH", 1)
    assert torch.equal(mask(), whole)


def test_the_draw_is_seeded_and_alike_for_every_sample():
    grid = LatentsGrid(3, 4, 6, 13)

    def mask(seed, step=0, batch=1):
        method = Blade(0.4, samples=2, seed=seed, block_size=8)
        call = make_call(grid, 5, 1, step=step, num_steps=9)
        for name in ("query", "key", "value"):
            setattr(call, name, getattr(call, name).repeat(batch, 1, 1, 1))
        return run(method, call, NaiveOps())[0].block_mask()

    assert torch.equal(mask(0), mask(0))
    assert torch.equal(mask(0, batch=3), mask(0).expand(3, -1, -1, -1))
    assert not torch.equal(mask(0), mask(1))
    assert mask(2**31 - 1).any()
    assert not torch.equal(mask(0), mask(0, step=1))


def test_the_published_shares_give_the_published_counts():
    assert Blade(0.17).limits(256) == (12, 43)  # Wan 2.1 1.3B at 480p
    assert Blade(0.1).limits(139) == (6, 13)  # CogVideoX 5B


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"density": 0.0}, r"density must lie in \(0, 1\], got 0.0; try 0.17"),
        ({"threshold": 1.5}, r"threshold must lie in \(0, 1\], got 1.5"),
        ({"floor": 0.3}, r"floor must lie in \[0, density = 0.17\], got 0.3; try 0"),
        ({"samples": 0}, "samples must be a whole number in .1, 1024., got 0; try 32"),
        ({"form": "x"}, "form must be 'code' or 'paper', got 'x'"),
        ({"pooled": -1}, "pooled must be a whole number in .0, 1000000., got -1; try 30"),
        ({"seed": -1}, r"seed must lie in \[0, 2 \*\* 31\), got -1"),
        ({"refresh": 0}, "refresh must be a whole number in .1, 1000000., got 0"),
        ({"block_size": 0}, r"block_size must be a token count in \[1, 1024\], got 0"),
    ],
)
def test_out_of_range(params, message):
    with pytest.raises(StrategyError, match=message):
        Blade(**params)


@pytest.mark.parametrize("pooled", [0, 3])
def test_with_pooled_keys_a_plan_that_keeps_all_is_not_dense_attention(pooled):
    call = make_call(LatentsGrid(2, 3, 4))
    plan = Blade(density=1.0, threshold=1.0, pooled=pooled, block_size=16).plan(call, PooledOps())
    assert plan.density().min() == 1
    assert plan.complete == (pooled == 0)
