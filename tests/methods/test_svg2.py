# SPDX-License-Identifier: Apache-2.0
"""SVG2 against weights, sorts and means written out in float64 from the clusters it was given."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_sparse.core.call import AttentionCall
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.errors import StrategyError
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.methods.svg2 import SVG2
from tests.methods.chosen import block_sizes, runs, tokens_kept
from tests.methods.naive import NaiveOps, make_call, masked_attention, run, token_mask


class Recorder(NaiveOps):
    """Ops that remember each clustering, and attend by the definition, bit tiles included."""

    def __init__(self):
        super().__init__()
        self.given, self.made = [], []

    def kmeans(self, points, clusters, iterations, *, init=None, seed=0, heads=None):
        self.given.append((points, clusters, iterations, init, seed))
        self.made.append(
            super().kmeans(points, clusters, iterations, init=init, seed=seed, heads=heads)
        )
        return self.made[-1]

    attend = staticmethod(Backends("reference").attend)


def tokens_of(call, labels, b, h, clusters):
    """Tokens of each cluster, by their places in the sequence."""
    found = [[] for _ in range(clusters)]
    for place, label in enumerate(labels[b, h].tolist()):
        found[label].append(call.grid.video_start + place)
    return found


def kept_clusters(method, call, queries, keys, sizes):
    """Key clusters of each query cluster, from centroids and sizes as lists of numbers."""
    rows = []
    for query in queries:
        score = [sum(x * y for x, y in zip(query, key, strict=True)) * call.scale for key in keys]
        top = max(s for s, n in zip(score, sizes, strict=True) if n)
        weight = [n * math.exp(s - top) for s, n in zip(score, sizes, strict=True)]
        order = sorted((j for j in range(len(keys)) if sizes[j]), key=lambda j: (-weight[j], j))
        floor = int(method.floor * len(keys) + 1e-9)
        kept, held = set(), 0.0
        for place, j in enumerate(order):
            if place >= floor and held >= method.top_p * sum(weight):
                break
            kept.add(j)
            held += weight[j]
        rows.append(kept)
    return rows


def oracle(method, call, q_made, k_made):
    """Which tokens each token reads; also the clusters dropped by each video token."""
    batch, _, heads, _ = call.query.shape
    mask = tokens_kept(call, [], [[[] for _ in range(heads)] for _ in range(batch)])
    start, stop = call.grid.video_start, call.grid.video_start + call.grid.video_tokens
    text_only = mask.clone()
    text_only[..., start:stop] = False
    mask[:, :, start:stop] = text_only[:, :, start:stop]
    dropped = {}
    for b in range(batch):
        for h in range(heads):
            queries, keys = (made[0][b, h].double().tolist() for made in (q_made, k_made))
            groups = tokens_of(call, k_made[1], b, h, len(keys))
            rows = kept_clusters(method, call, queries, keys, [len(g) for g in groups])
            for i, own in enumerate(tokens_of(call, q_made[1], b, h, len(queries))):
                for t in own:
                    for j, group in enumerate(groups):
                        if j in rows[i]:
                            mask[b, h, t, group] = True
                        elif group:
                            dropped.setdefault((b, h, t), []).append(group)
    return mask, dropped


counts = st.integers(1, 12)
shares = st.sampled_from([0.05, 0.3, 0.7, 0.9, 0.999])


@given(
    runs(num_steps=3), block_sizes, counts, counts, shares,
    st.sampled_from([0.0, 0.3, 0.8]), st.integers(1, 2),
)  # fmt: skip
def test_a_run_keeps_what_the_naive_one_keeps(
    calls, block_size, q_clusters, k_clusters, top_p, floor, refresh
):
    method = SVG2(q_clusters, k_clusters, top_p, floor, 3, 1, refresh=refresh,
                  block_size=block_size)  # fmt: skip
    ops, wanted = Recorder(), None
    for call in calls:
        plan, output = run(method, call, ops)
        plan.validate()
        assert max(plan.q.max_length, plan.kv.max_length) <= block_size
        assert len(ops.made) == 2 * (call.step // refresh + 1)
        if call.step % refresh == 0:
            wanted, _ = oracle(method, call, *ops.made[-2:])
        batch, tokens, heads, _ = call.query.shape
        assert torch.equal(token_mask(plan, batch, heads, tokens, tokens), wanted)
        right, _ = masked_attention(call.query, call.key, call.value, wanted, call.scale)
        torch.testing.assert_close(output, right)


@given(
    runs(num_steps=2), block_sizes, counts, counts, st.sampled_from([0.05, 0.5, 0.9]),
    st.integers(1, 2),
)  # fmt: skip
def test_dropped_clusters_are_read_as_their_means(
    calls, block_size, q_clusters, k_clusters, top_p, refresh
):
    method = SVG2(q_clusters, k_clusters, top_p, 0.0, 2, 1, "means", refresh=refresh,
                  block_size=block_size)  # fmt: skip
    ops = Recorder()
    for call in calls:
        plan, output = run(method, call, ops)
        plan.validate()
        if call.step % refresh == 0:
            mask, dropped = oracle(method, call, *ops.made[-2:])
        q, k, v = (x.double().transpose(1, 2) for x in (call.query, call.key, call.value))
        wanted, _ = masked_attention(call.query, call.key, call.value, mask, call.scale)
        for (b, h, t), clusters in dropped.items():
            groups = [
                g[i : i + block_size] for g in clusters for i in range(0, len(g), block_size)
            ]
            own = mask[b, h, t]
            keys = torch.stack([*k[b, h, own], *(k[b, h, g].mean(0) for g in groups)])
            values = torch.stack([*v[b, h, own], *(v[b, h, g].mean(0) for g in groups)])
            size = torch.tensor([1.0] * int(own.sum()) + [float(len(g)) for g in groups])
            weight = size.double() * (keys @ q[b, h, t] * call.scale).exp()
            wanted[b, t, h] = weight @ values / weight.sum()
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)
        if refresh == 1:
            assert set(call.state) == {"q_centroids", "kv_centroids", "for", "made"}


def test_clusters_of_one_token_make_the_compensation_exact():
    """Means of single keys are the keys: whatever is dropped, the result is dense."""
    call = make_call(LatentsGrid(2, 3, 4, 5), 3, heads=2)
    method = SVG2(24, 24, 0.1, 0.0, 1, 1, "means", block_size=2)
    plan, output = run(method, call, Recorder())
    assert replace(plan, means=False).density().max() < 0.7
    everything = torch.ones(1, 1, 29, 29, dtype=torch.bool)
    dense, _ = masked_attention(call.query, call.key, call.value, everything, call.scale)
    torch.testing.assert_close(output, dense, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("compensate", ["none", "means"])
@pytest.mark.parametrize("place", range(3))
def test_gradients_are_central_differences(compensate, place):
    """Of query, key and value, in float64, the clusters held as they are."""
    grid = LatentsGrid(2, 4, 6, 5)
    method = SVG2(3, 4, first_iterations=2, top_p=0.3, compensate=compensate, block_size=8)
    random = torch.Generator().manual_seed(place)
    shape = (1, grid.tokens, 2, 8)
    tensors = [torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(3)]
    start = AttentionCall(*tensors, grid, 8**-0.5, heads=(0, 1), num_steps=4)
    plan = method.plan(start, Backends("cpu"))
    assert plan.density().max() < 1

    def loss(tensors):
        call = replace(start, **dict(zip(("query", "key", "value"), tensors, strict=True)))
        call.state.update(start.state)
        ops = Backends("cpu")
        output, lse = ops.attend(*tensors, plan, call.scale)
        return method.finish(call, output, lse, ops).square().sum()

    state = dict(start.state)
    wanted = torch.randn(shape, generator=random, dtype=torch.float64)

    def moved(by):
        start.state.update(state)
        return loss([x + by * wanted if i == place else x for i, x in enumerate(tensors)])

    with torch.no_grad():
        slope = (moved(1e-3) - moved(-1e-3)) / 2e-3  # shares are fp32: no finer
    start.state.update(state)
    (gradient,) = torch.autograd.grad(
        loss([x.requires_grad_(i == place) for i, x in enumerate(tensors)]), tensors[place]
    )
    torch.testing.assert_close((gradient * wanted).sum(), slope, rtol=1e-4, atol=1e-4)


def test_clusters_are_of_video_tokens_and_start_warm():
    grid, state, ops = LatentsGrid(2, 4, 4, 6, text_first=True), {}, Recorder()
    method = SVG2(3, 5, 0.5, 0.0, 7, 2, block_size=8)
    for step in range(3):
        call = make_call(grid, step, 2, step=step, num_steps=4, layer=1, state=state)
        run(method, call, ops)
        for i, x in enumerate((call.query, call.key)):
            points, clusters, iterations, init, _ = ops.given[2 * step + i]
            assert torch.equal(points, x[:, 6:])
            assert (clusters, iterations) == ((3, 5)[i], 2 if step else 7)
            if step:
                last = ops.made[2 * step - 2 + i][0]
                assert torch.equal(init, last.to(x.dtype))
            else:
                assert init is None
    assert {name: state[name].shape for name in ("q_centroids", "kv_centroids")} == {
        "q_centroids": (2, 2, 3, 8),
        "kv_centroids": (2, 2, 5, 8),
    }
    assert set(state) == {"q_centroids", "kv_centroids", "for", "made"}
    # An earlier step, another batch: a new run, from new centroids.
    run(method, make_call(grid, 9, 2, step=0, num_steps=4, state=state), ops)
    run(method, make_call(grid, 9, 1, step=1, num_steps=4, state=state), ops)
    assert [given[3] is None for given in ops.given[-4:]] == [True] * 4


def test_seed_and_layer_and_side_decide_the_draw():
    grid = LatentsGrid(2, 4, 4)

    def seeds(seed, layer):
        ops = Recorder()
        run(SVG2(2, 2, 0.5, seed=seed, block_size=8), make_call(grid, layer=layer), ops)
        return [given[-1] for given in ops.given]

    drawn = [*seeds(0, 0), *seeds(1, 0), *seeds(0, 1)]
    assert len(set(drawn)) == 6
    assert seeds(1, 0) == drawn[2:4]


def test_a_sample_is_planned_alike_in_any_batch():
    grid = LatentsGrid(2, 4, 6, 3)
    method = SVG2(4, 9, 0.6, 0.0, 3, block_size=8)
    both = make_call(grid, 5, 2)
    together = token_mask(run(method, both, NaiveOps())[0], 2, 2, 51, 51)
    for b in range(2):
        alone = make_call(grid, 5, 2)
        for name in ("query", "key", "value"):
            setattr(alone, name, getattr(alone, name)[b : b + 1])
        assert torch.equal(
            token_mask(run(method, alone, NaiveOps())[0], 1, 2, 51, 51), together[b : b + 1]
        )


def test_empty_clusters_are_never_kept():
    call = make_call(LatentsGrid(1, 4, 4), heads=1)
    call.key = call.key[:, :2].repeat(1, 8, 1, 1)  # two different keys, eight clusters
    plan, _ = run(SVG2(4, 8, 0.999, 0.9, 4, refresh=2, block_size=8), call, NaiveOps())
    assert plan.density().item() == 1.0
    sizes = call.state["kv"].counts
    assert (sizes == 0).sum() == 6
    assert torch.equal(call.state["mask"], (sizes > 0)[:, :, None].expand(-1, -1, 4, -1))


def test_no_work_is_listed_for_blocks_without_tokens():
    plan, _ = run(SVG2(3, 7, 0.5, block_size=4), make_call(LatentsGrid(3, 5, 4, 6), 1, 2, 3,
                  text_valid=torch.tensor([3, 6])), NaiveOps())  # fmt: skip
    assert (plan.kv.lengths == 0).any()  # heads differ in how many blocks they need
    assert (plan.q.lengths == 0).any()
    mask = plan.block_mask()
    assert not mask[(plan.q.lengths == 0)[..., None] | (plan.kv.lengths == 0)[:, :, None]].any()


def test_published_counts_stand_on_published_grids():
    assert SVG2().clusters(21 * 3600) == (300, 1000)  # Wan 720p
    assert SVG2(200).clusters(21 * 1560) == (200, 1000)  # Wan 480p
    assert SVG2(400).clusters(33 * 3600) == (400, 1000)  # HunyuanVideo 720p
    assert SVG2().clusters(72) == (2, 3)
    assert SVG2(block_size=1).clusters(5) == (5, 5)
    assert SVG2(block_size=1024).clusters(1) == (1, 1)


def test_clusters_grow_with_the_grid_up_to_the_most_that_may_be():
    small, large = LatentsGrid(2, 10, 10), LatentsGrid(20, 100, 100)
    assert SVG2(100, 1000).rescaled(small, LatentsGrid(4, 10, 10)).key_clusters == 2000
    assert SVG2(100, 1000).rescaled(small, large).key_clusters == 4096


@pytest.mark.parametrize("compensate", ["none", "means"])
def test_planning_at_hunyuan_720p_never_reads_the_device(compensate):
    class Meta(NaiveOps):
        def attend(self, query, key, value, plan, scale):
            shape = (query.shape[0], query.shape[2], query.shape[1])
            return torch.empty_like(query), torch.empty(shape, device="meta")

    grid = LatentsGrid(33, 45, 80, 256)
    call = make_call(LatentsGrid(1, 1, 1), heads=24, num_steps=50)
    call.grid, call.text_valid = grid, torch.empty(1, dtype=torch.int64, device="meta")
    for name in ("query", "key", "value"):  # a tensor without values: reading one raises
        empty = torch.empty(1, grid.tokens, 24, 128, dtype=torch.bfloat16, device="meta")
        setattr(call, name, empty)
    for call.step in range(2):
        plan, _ = run(SVG2(400, first_iterations=1, compensate=compensate), call, Meta())
    assert plan.q.blocks == 400 + 118800 // 128 + 2
    kept = sum(x.nbytes for name, x in call.state.items() if name.endswith("centroids"))
    assert kept == 1400 * 24 * 128 * 2


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.slow
def test_32k_tokens_are_planned_and_compensated_in_little_memory():
    call = make_call(LatentsGrid(21, 30, 52), heads=2, scale=64**-0.5)
    shape = (1, 32760, 2, 64)
    call.query, call.key, call.value = (torch.randn(shape) for _ in range(3))
    method = SVG2(200, first_iterations=1, compensate="means")
    with Largest() as largest:
        plan = method.plan(call, Backends())
        output, _ = Backends().attend(call.query, call.key, call.value, plan, call.scale)
    assert 0.1 < plan.density().mean() < 0.95
    assert output.abs().sum() > 0
    # The inputs have 16 MB; scores of all tokens by 1000 clusters would have 131 MB a head.
    assert largest.nbytes <= 32 * 2**20


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"query_clusters": 0},
            "query_clusters must be a whole number in .1, 4096., got 0; try 300",
        ),
        (
            {"key_clusters": -1},
            "key_clusters must be a whole number in .1, 4096., got -1; try 1000",
        ),
        (
            {"first_iterations": 0},
            "first_iterations must be a whole number in .1, 1000., got 0; try 50",
        ),
        ({"iterations": 0}, "iterations must be a whole number in .1, 1000., got 0; try 2"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0; try 0.9"),
        ({"floor": 1.5}, r"floor must lie in \[0, 1\], got 1.5; try 0.1"),
        ({"compensate": "mean"}, "compensate must be 'none' or 'means', got 'mean'"),
        ({"refresh": 0}, "refresh must be a whole number in .1, 1000000., got 0"),
        ({"seed": -1}, r"seed must lie in \[0, 2 \*\* 31\), got -1"),
        ({"block_size": 0}, r"block_size must be a token count in \[1, 1024\], got 0"),
    ],
)
def test_out_of_range(params, message):
    with pytest.raises(StrategyError, match=message):
        SVG2(**params)
