# SPDX-License-Identifier: Apache-2.0
"""Orders, budgets and thresholds against loops over tokens; named methods from their pieces."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.errors import StrategyError
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.kernels.select import select_budget
from dit_sparse.methods.centroid import Centroid
from dit_sparse.methods.composed import Composed
from dit_sparse.methods.lists import share_of
from dit_sparse.methods.order import fitted_tile, morton_order, tile_order
from dit_sparse.methods.params import build_method
from dit_sparse.methods.selection import error_of_means
from dit_sparse.methods.sides import cluster_side
from dit_sparse.methods.svg2 import SVG2
from tests.methods.chosen import block_sizes, runs
from tests.methods.naive import NaiveOps, make_call, masked_attention, run, token_mask
from tests.strategies import latents_grids

ORDERS = ["raster", "tiles", "hilbert", "morton"]
TILES = st.sampled_from([(1, 2, 2), (2, 2, 2), (1, 3, 4), (3, 1, 2)])
PRESETS = [  # pieces, and the method that they are
    ({"score": "mean", "select": "top_k", "density": 0.4}, "pooled", {"density": 0.4}),
    ({"score": "mean", "select": "top_p", "top_p": 0.6}, "pooled",
     {"select": "top_p", "top_p": 0.6}),
    ({"score": "antidiagonal", "select": "top_p", "top_p": 0.6, "stride": 2}, "xattention",
     {"threshold": 0.6, "stride": 2}),
    ({"query_order": "hilbert", "key_order": "hilbert", "score": "maximum", "select": "top_k",
      "density": 0.4, "samples": 2}, "blade",
     {"density": 0.4, "threshold": 1.0, "floor": 0.0, "samples": 2}),
]  # fmt: skip


def masks(method, calls):
    found = []
    for call in calls:
        call.state.clear()
        call.shared.clear()
    for call in calls:
        plan = run(method, call, NaiveOps())[0]
        batch, tokens, heads, _ = call.query.shape
        found.append(token_mask(plan, batch, heads, tokens, tokens))
    return found


@pytest.mark.parametrize(("pieces", "name", "params"), PRESETS)
@given(calls=runs(num_steps=2), block_size=block_sizes)
def test_a_methods_pieces_are_the_method(pieces, name, params, calls, block_size):
    grid = calls[0].grid
    # These two weigh video blocks among all keys, text too: other shares, other maxima.
    assume(name not in {"xattention", "blade"} or not grid.text_length)
    blocks = -(-grid.video_tokens // block_size)
    assume(name != "blade" or max(1, int(0.4 * blocks)) == share_of(0.4, blocks))  # rounds down
    raster = {"query_order": "raster", "key_order": "raster"}
    composed = Composed(**(raster | pieces), compensate="none", block_size=block_size)
    method = build_method(name, params | {"block_size": block_size})
    for one, other in zip(masks(composed, calls), masks(method, calls), strict=True):
        assert torch.equal(one, other)


@given(runs(num_steps=2), block_sizes, st.integers(1, 9), st.integers(1, 9))
def test_svg2_is_a_preset(calls, block_size, q, k):
    svg2 = SVG2(q, k, 0.6, 0.2, 3, 1, refresh=2, block_size=block_size)
    for call in calls:
        call.state.clear()
    wanted = masks(svg2, calls)
    most = svg2.clusters(calls[0].grid.video_tokens)
    pieces = Composed(
        "clusters", "clusters", "centroid", "top_p", "none", top_p=0.6, floor=0.2,
        query_clusters=most[0], key_clusters=most[1], first_iterations=3, iterations=1, refresh=2,
        block_size=block_size,
    )  # fmt: skip
    for one, other in zip(masks(pieces, calls), wanted, strict=True):
        assert torch.equal(one, other)


@given(latents_grids, TILES)
def test_tiles_are_boxes(size, tile):
    grid = LatentsGrid(*size)
    order, lengths = tile_order(grid, tile)
    sides = fitted_tile(tile, size)
    assert math.prod(sides) <= math.prod(tile)
    assert sorted(order.tolist()) == list(range(grid.video_tokens))
    for block in order.split(lengths):
        at = [(t // grid.frame_tokens, t // grid.width % grid.height, t % grid.width)
              for t in block.tolist()]  # fmt: skip
        box = math.prod(max(a) - min(a) + 1 for a in zip(*at, strict=True))
        assert box == len(at)
        for axis, side in zip(zip(*at, strict=True), sides, strict=True):
            assert min(axis) % side == 0
            assert max(axis) < min(axis) + side


@given(latents_grids)
def test_morton_order_is_by_interleaved_bits(size):
    grid = LatentsGrid(*size)

    def place(token):
        frame, rest = divmod(token, grid.frame_tokens)
        row, column = divmod(rest, grid.width)
        digits = [format(x, "016b") for x in (frame, row, column)]
        return int("".join(f + r + c for f, r, c in zip(*digits, strict=True)), 2)

    assert morton_order(grid).tolist() == sorted(range(grid.video_tokens), key=place)


def groups_of(plan, b, h, is_query):
    """Tokens of each block of one side."""
    side = plan.q if is_query else plan.kv
    order = plan.q_permutation if is_query else plan.kv_permutation

    def pick(x):
        return x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)].tolist()

    place = list(range(side.slots)) if order is None else pick(order)
    return [
        place[start : start + length]
        for start, length in zip(pick(side.starts), pick(side.lengths), strict=True)
    ]


def errors_of_means(call, b, h, rows, columns):
    """What each pair would lose per key if its keys were read as their mean, in float64."""
    q, k, v = (x[b, :, h].double() for x in (call.query, call.key, call.value))
    start, stop = call.grid.video_start, call.grid.video_start + call.grid.video_tokens
    length = (q[start:stop] ** 2).mean(0) * call.scale**2
    found = {}
    for i, row in enumerate(rows):
        centre = q[row].mean(0)
        mass = [len(c) * math.exp(float(centre @ k[c].mean(0)) * call.scale) for c in columns]
        shares = [m / sum(mass) for m in mass]
        output = sum(p * v[c].mean(0) for p, c in zip(shares, columns, strict=True))
        for j, c in enumerate(columns):
            s = float(length @ k[c].var(0, correction=0))
            vary = float(v[c].var(0, correction=0).sum())
            apart = float((v[c].mean(0) - output).square().sum())
            found[i, j] = shares[j] * math.sqrt(s * (vary + s / 4 * apart)) / len(c)
    return found


def test_the_error_of_means_is_the_true_one_for_small_spreads():
    """One query of one channel, three groups of two keys; the first group is read as its mean."""
    query, far = 1.3, torch.tensor([0.2, 0.2, -0.9, -0.9], dtype=torch.float64)
    values = torch.tensor([1.0, 1.0, -2.0, 0.5], dtype=torch.float64)
    for width, vary in ((1e-3, 0.4), (1e-2, 0.0)):
        away = torch.tensor([1.0, -1.0], dtype=torch.float64)
        key = torch.cat([0.7 + width * away, far])
        value = torch.cat([2.0 + vary * away, values])
        exact = (query * key).softmax(0) @ value
        mean_key, mean_value = key.view(3, 2).mean(1), value.view(3, 2).mean(1)
        score = torch.cat([(query * mean_key[:1] + math.log(2)), query * far])
        wanted = score.softmax(0) @ torch.cat([mean_value[:1], values]) - exact
        weight = (query * mean_key + math.log(2)).softmax(0)
        spread = query**2 * key.view(3, 2).var(1, correction=0)[None, None, None]
        grouped = value.view(3, 2)
        moments = grouped.mean(1)[None, None, :, None], grouped.var(1, correction=0)[None, None]
        told = error_of_means(weight[None, None, None], spread, moments, torch.full((1, 1, 3), 2))
        assert 2 * float(told[0, 0, 0, 0].exp()) == pytest.approx(abs(float(wanted)), rel=0.02)


@pytest.mark.parametrize("compensate", ["none", "means"])
@given(
    calls=runs(num_steps=1), orders=st.tuples(*[st.sampled_from(ORDERS)] * 2), tile=TILES,
    density=st.sampled_from([0.1, 0.3, 0.6, 0.9]), score=st.sampled_from(["mean", "centroid"]),
    block_size=block_sizes,
)  # fmt: skip
def test_a_budget_goes_to_the_best_pairs(
    compensate, calls, orders, tile, density, score, block_size
):
    call = calls[0]
    method = Composed(
        *orders, score, "budget", compensate, density=density, tile=tile, block_size=block_size
    )
    plan, output = run(method, call, NaiveOps())
    plan.validate()
    batch, tokens, heads, _ = call.query.shape
    mask = token_mask(plan, batch, heads, tokens, tokens)
    start, stop = call.grid.video_start, call.grid.video_start + call.grid.video_tokens
    q, k = (x.double() for x in (call.query, call.key))
    for b in range(batch):
        for h in range(heads):
            rows, columns = (
                [g for g in groups_of(plan, b, h, side) if g and start <= g[0] < stop]
                for side in (True, False)
            )
            pairs, weight = [], {}
            for i, row in enumerate(rows):
                scores = [
                    float(q[b, row, h].mean(0) @ k[b, c, h].mean(0)) * call.scale
                    + (math.log(len(c)) if score == "centroid" else 0.0)
                    for c in columns
                ]
                top = max(scores)
                total = sum(math.exp(s - top) for s in scores)
                for j, c in enumerate(columns):
                    size = len(c) if score == "centroid" else 1
                    weight[i, j] = math.exp(scores[j] - top) / total / size
                    pairs.append((i, j))
            kept = {
                (i, j) for i, j in pairs if bool(mask[b, h, rows[i][0], columns[j][0]])
            }  # fmt: skip
            free = compensate == "means"
            used = sum(len(rows[i]) * (len(columns[j]) if (i, j) in kept else free)
                       for i, j in pairs)  # fmt: skip
            budget = density * call.grid.video_tokens**2
            forced = set()
            if not free:
                for i in range(len(rows)):
                    best = max(range(len(columns)), key=lambda j: (weight[i, j], -j))
                    assert any(
                        (i, j) in kept and weight[i, j] >= weight[i, best] * (1 - 1e-5)
                        for j in range(len(columns))
                    )
                    forced |= {(i, j) for j in range(len(columns))
                               if weight[i, j] >= weight[i, best] * (1 - 1e-5)}  # fmt: skip
            near = 1e-5
            if free:
                weight = errors_of_means(call, b, h, rows, columns)
                near = 1e-4  # of a sum of logarithms in fp32, each up to some tens
            if kept - forced:
                assert used <= budget + 1e-6
                lightest = min(weight[p] for p in kept - forced)
                assert all(weight[p] <= lightest * (1 + near) for p in pairs if p not in kept)
            left = [p for p in pairs if p not in kept]
            if left and used < budget:  # the next pairs would not have fitted
                heaviest = max(weight[p] for p in left)
                costs = [len(rows[i]) * (len(columns[j]) - free) for i, j in left
                         if weight[i, j] >= heaviest * (1 - near)]  # fmt: skip
                assert used + sum(costs) > budget
    assert bool(output.isfinite().all())


@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99)
)
def test_select_budget_in_loops(batch, heads, rows, blocks, seed):
    random = torch.Generator().manual_seed(seed)
    value = torch.randint(-3, 4, (batch, heads, rows, blocks), generator=random).float()
    value[value == -3] = -torch.inf
    cost = torch.randint(0, 5, (1, heads, rows, blocks), generator=random).double()
    budget = torch.randint(0, 40, (batch, 1), generator=random)
    mask = select_budget(value, cost, budget)
    for b in range(batch):
        for h in range(heads):
            pairs = [(i, j) for i in range(rows) for j in range(blocks)]
            kept = set()
            for level in sorted({float(value[b, h][p]) for p in pairs}, reverse=True):
                above = {p for p in pairs if float(value[b, h][p]) >= level}
                spent = sum(float(cost[0, h][p]) for p in above)
                if level == -math.inf or spent > float(budget[b, 0]):
                    break
                kept = above
            assert {tuple(p) for p in mask[b, h].nonzero().tolist()} == kept


@pytest.mark.parametrize("compensate", ["none", "means"])
@pytest.mark.parametrize("select", ["budget", "top_k", "top_p", "threshold"])
@pytest.mark.parametrize("order", ["tiles", "clusters"])
def test_nan_in_a_key_is_not_dropped(order, select, compensate):
    """A fault upstream shows as in dense attention, however small the budget is."""
    call = make_call(LatentsGrid(4, 4, 4), 3, heads=2)
    call.key[0, 60, 0] = math.nan
    method = Composed(
        order, order, "centroid", select, compensate, density=0.2, tile=(2, 2, 2), block_size=8
    )
    _, output = run(method, call, Backends("reference"))
    assert bool(output[0, :, 0].isnan().all())
    assert bool(output[0, :, 1].isfinite().all())


@given(runs(num_steps=1), block_sizes, st.sampled_from([-0.5, 0.0, 0.8, 1.5]))
def test_a_threshold_counts_standard_deviations_of_a_row(calls, block_size, threshold):
    call = calls[0]
    method = Composed(
        "raster", "raster", "mean", "threshold", "none", threshold=threshold, block_size=block_size
    )
    plan = run(method, call, NaiveOps())[0]
    batch, tokens, heads, _ = call.query.shape
    mask = token_mask(plan, batch, heads, tokens, tokens)
    start, stop = call.grid.video_start, call.grid.video_start + call.grid.video_tokens
    for b in range(batch):
        for h in range(heads):
            rows, columns = (
                [g for g in groups_of(plan, b, h, side) if g and start <= g[0] < stop]
                for side in (True, False)
            )
            for row in rows:
                scores = torch.stack([
                    call.query[b, row, h].mean(0) @ call.key[b, c, h].mean(0) * call.scale
                    for c in columns
                ])  # fmt: skip
                spread = scores.std(unbiased=False)
                line = scores.mean() + threshold * spread
                for j, c in enumerate(columns):
                    kept = bool(mask[b, h, row[0], c[0]])
                    if abs(scores[j] - line) > 1e-5 * (1 + spread) and j != int(scores.argmax()):
                        assert kept == bool(scores[j] > line)
                assert bool(mask[b, h, row[0], columns[int(scores.argmax())][0]])


@pytest.mark.parametrize("order", ORDERS)
def test_mass_is_chosen_on_a_dense_call(order):
    grid, state = LatentsGrid(3, 4, 4, 5), {}
    method = Composed(
        order, order, "mass", "top_k", "none", density=0.3, tile=(1, 2, 4), refresh=3, block_size=8
    )
    for step in range(7):
        call = make_call(grid, 7 + step // 3, heads=2, step=step, num_steps=8, state=state)
        plan, output = run(method, call, NaiveOps())
        if step % 3 == 0:
            assert plan.complete
            full = torch.ones(1, 2, 53, 53, dtype=torch.bool)
            dense, lse = masked_attention(call.query, call.key, call.value, full, call.scale)
            torch.testing.assert_close(output, dense)
            scores = torch.einsum("bqhd,bkhd->bhqk", call.query, call.key) * call.scale
            weights = (scores - lse[..., None]).exp()
            continue
        mask = token_mask(plan, 1, 2, 53, 53)
        for h in range(2):
            rows = [g for g in groups_of(plan, 0, h, is_query=True) if g and g[0] < 48]
            for row in rows:
                mass = {tuple(c): float(weights[0, h][row][:, c].sum()) for c in rows}
                best = sorted(mass, key=lambda c: -mass[c])[: round(0.3 * len(rows))]
                kept = {c for c in mass if bool(mask[0, h, row[0], c[0]])}
                assert kept == set(best)


def test_a_choice_lives_and_means_are_of_every_steps_keys():
    grid, state = LatentsGrid(3, 4, 4, 5), {}
    method = Centroid(0.3, key_clusters=12, query_clusters=6, refresh=2, block_size=8)
    kept = []
    for step in range(4):
        call = make_call(grid, step, heads=2, step=step, num_steps=5, state=state)
        plan, output = run(method, call, Backends("reference"))
        kept.append(token_mask(plan, 1, 2, 53, 53))
        wanted, _ = NaiveOps().attend(call.query, call.key, call.value, plan, call.scale)
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[2], kept[3])
    assert not torch.equal(kept[1], kept[2])


@pytest.mark.parametrize("queries", ["clusters", "tiles"])
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_the_budget_is_what_was_asked_for(queries, density):
    call = make_call(LatentsGrid(5, 12, 10), 3, heads=2)
    plan, _ = run(Centroid(density, queries), call, Backends("reference"))
    assert plan.means
    assert density - 0.01 <= plan.density().min() <= plan.density().max() <= density


def test_groups_are_whole_clusters():
    """However many blocks a cluster is cut into; its mean is its centroid."""
    points = torch.randn(2, 60, 3, 4, generator=torch.Generator().manual_seed(5)).double()
    ops = Backends()
    side, centroids = cluster_side(points, 5, 3, 4, ops, init=None, seed=1, heads=torch.arange(3))
    assert side.owner.shape[-1] > 5
    mean, variance = ops.moments(points, side.groups, side.order)
    torch.testing.assert_close(mean, centroids.double(), rtol=1e-5, atol=1e-6)
    for b in range(2):
        for h in range(3):
            tokens = [[] for _ in range(5)]
            blocks = zip(
                *(x[b, h].tolist() for x in (side.starts, side.lengths, side.owner)), strict=True
            )
            for start, length, owner in blocks:
                tokens[owner] += side.order[b, h, start : start + length].tolist()
            for i, own in enumerate(tokens):
                wanted = points[b, own, h].var(0, correction=0).sum() if own else 0.0
                assert float(variance[b, h, i]) == pytest.approx(float(wanted), abs=1e-9)


def test_means_take_at_most_half_of_a_budget():
    method = Centroid(0.1)
    call = make_call(LatentsGrid(2, 10, 10), 3, heads=2)
    plan, _ = run(method, call, Backends("reference"))
    assert plan.kv.blocks <= 10  # 4 sqrt(200) are 57, more than the whole budget of 20
    assert plan.density().max() <= 0.1
    assert (plan.kv_num_blocks > 0).any()


def test_means_come_closer_than_dropping_at_equal_density():
    """On keys in clumps: the case that means are for."""
    random = torch.Generator().manual_seed(1)
    call = make_call(LatentsGrid(4, 8, 8), 3, heads=2)
    clump = torch.randint(0, 16, (256,), generator=random)
    for name in ("key", "value"):
        centres = 2 * torch.randn(1, 16, 2, 8, generator=random, dtype=torch.float64)
        noise = torch.randn(1, 256, 2, 8, generator=random, dtype=torch.float64)
        setattr(call, name, centres[:, clump] + 0.3 * noise)
    full = torch.ones(1, 1, 256, 256, dtype=torch.bool)
    dense, _ = masked_attention(call.query, call.key, call.value, full, call.scale)

    def error(method):
        call.state.clear()
        call.shared.clear()
        return float((run(method, call, Backends("reference"))[1] - dense).norm() / dense.norm())

    shape = {"density": 0.3, "key_clusters": 32, "query_clusters": 16}
    bare = Composed("clusters", "clusters", "centroid", compensate="none", **shape)
    assert error(Centroid(**shape)) < 0.3 * error(bare)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"query_order": "spiral"}, "query_order must be one of raster, tiles, .*, got 'spiral'"),
        (
            {"score": "maximum", "key_order": "clusters"},
            "score 'maximum' requires a fixed order",
        ),
        ({"score": "maximum"}, "only ranks blocks within a row, .* select 'budget'; try 'top_k'"),
        ({"score": "mass"}, "refresh must be at least 2 with score 'mass'.* got 1; try 4"),
        ({"threshold": 11.0}, r"threshold must lie in \[-10, 10\] standard deviations, got 11.0"),
        ({"tile": (16, 16, 16)}, "tile must contain three counts .* got .16, 16, 16."),
        ({"key_clusters": 5000}, r"key_clusters must be a whole number in \[0, 4096\], got 5000"),
        ({"density": 0.0}, r"density must lie in \(0, 1\], got 0.0; try 0.25"),
    ],
)
def test_out_of_range(params, message):
    with pytest.raises(StrategyError, match=message):
        Composed(**params)


def test_out_of_range_of_centroid():
    with pytest.raises(StrategyError, match="queries must be 'clusters' or 'tiles', got 'raster'"):
        Centroid(queries="raster")
    with pytest.raises(StrategyError, match="iterations must be a whole number"):
        Centroid(iterations=0)
