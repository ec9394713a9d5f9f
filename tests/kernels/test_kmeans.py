# SPDX-License-Identifier: Apache-2.0
"""K-means against plain Lloyd iterations in float64, and the order and blocks made from it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.errors import KernelError
from dit_sparse.kernels import chunks
from dit_sparse.kernels import kmeans as kernel
from dit_sparse.kernels.chunks import seeded_order
from dit_sparse.kernels.kmeans import cluster_order, expand_clusters, kmeans
from dit_sparse.kernels.permute import gather_tokens
from tests.kernels.drawn import spans
from tests.strategies import attention_inputs, generator, seeds


def lloyd(points, centroids, iterations):
    """Iterate over one (sample, head) in plain float64."""
    centroids = centroids.clone()
    for _ in range(iterations):
        distance = (points[:, None] - centroids[None]).square().sum(-1)
        label = distance.argmin(1)
        for c in range(len(centroids)):
            if (label == c).any():
                centroids[c] = points[label == c].mean(0)
    return centroids, label


@given(
    seed=seeds,
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 60),
    clusters=st.integers(1, 12),
    iterations=st.integers(1, 4),
    warm=st.booleans(),
)
def test_kmeans_is_lloyds(seed, batch, heads, tokens, clusters, iterations, warm):
    points = attention_inputs(seed, batch, tokens, heads, 4)[0]
    start = torch.randn(batch, heads, clusters, 4, generator=generator(seed), dtype=torch.float64)
    if not warm:
        order = seeded_order(seed, (heads,), tokens, points.device)
        for b in range(batch):
            for h in range(heads):
                token = [int(order[h, c % tokens]) for c in range(clusters)]
                start[b, h] = points[b, token, h]
    centroids, labels, counts = kmeans(
        points, clusters, iterations, init=start if warm else None, seed=seed
    )
    assert (centroids.dtype, labels.dtype, counts.dtype) == (
        torch.float32,
        torch.int32,
        torch.int32,
    )
    for b in range(batch):
        for h in range(heads):
            mean, label = lloyd(points[b, :, h], start[b, h], iterations)
            assert torch.equal(labels[b, h].long(), label)
            torch.testing.assert_close(centroids[b, h].double(), mean, rtol=1e-6, atol=1e-6)
            assert counts[b, h].tolist() == label.bincount(minlength=clusters).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seed_decides_and_chunks_do_not(monkeypatch, dtype):
    points = attention_inputs(1, 2, 300, 3, 8, dtype)[0]
    first = kmeans(points, 20, 3, seed=5)
    monkeypatch.setattr(chunks, "BUDGET_CPU", 1 << 10)
    again, other = kmeans(points, 20, 3, seed=5), kmeans(points, 20, 3, seed=6)
    assert torch.equal(first[1], again[1])
    torch.testing.assert_close(first[0], again[0])
    assert not torch.equal(first[1], other[1])


def test_on_the_cpu_it_ends_once_no_label_changes(monkeypatch):
    points = attention_inputs(3, 1, 40, 2, 4)[0]
    step, steps = kernel._lloyd, []
    monkeypatch.setattr(kernel, "_lloyd", lambda *args: steps.append(1) or step(*args))
    monkeypatch.setattr(chunks, "BUDGET_CPU", 1)  # head by head
    ended = kmeans(points, 5, 1000)
    assert 4 < len(steps) < 200
    mean, label = lloyd(points[0, :, 1], ended[0][0, 1].double(), 1)
    assert torch.equal(ended[1][0, 1].long(), label)  # where it ended nothing moves
    torch.testing.assert_close(ended[0][0, 1].double(), mean, rtol=1e-6, atol=1e-6)


def test_a_sample_is_clustered_alike_in_any_batch():
    points = attention_inputs(2, 3, 80, 2, 8)[0]
    together = kmeans(points, 9, 3, seed=4)
    for b in range(3):
        for ours, alone in zip(together, kmeans(points[b : b + 1], 9, 3, seed=4), strict=True):
            torch.testing.assert_close(ours[b : b + 1], alone)


def test_more_clusters_than_tokens_and_warm_start_of_another_shape():
    points = attention_inputs(0, 1, 3, 1, 2)[0]
    _, labels, counts = kmeans(points, 7, 2)
    assert counts[0, 0].tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert sorted(labels[0, 0].tolist()) == [0, 1, 2]
    with pytest.raises(KernelError, match=r"init must be .* = \(1, 1, 4, 2\), got \(1, 1, 7, 2\)"):
        kmeans(points, 4, 1, init=torch.zeros(1, 1, 7, 2))
    with pytest.raises(KernelError, match="clusters >= 1"):
        kmeans(points, 0, 1)


@given(
    seed=seeds,
    tokens=st.integers(1, 60),
    clusters=st.integers(1, 9),
    max_length=st.one_of(st.none(), st.integers(1, 70)),
)
def test_blocks_hold_one_cluster_each_and_every_token_once(seed, tokens, clusters, max_length):
    labels = torch.randint(clusters, (2, 2, tokens), generator=generator(seed)).int()
    one = torch.ones_like(labels)
    counts = torch.zeros(2, 2, clusters, dtype=torch.int32).scatter_add_(2, labels.long(), one)
    permutation, layout, owner = cluster_order(labels, counts, max_length)
    assert layout.blocks == (clusters if max_length is None else clusters + tokens // max_length)
    assert int(layout.lengths.max()) <= layout.max_length <= max(tokens, max_length or 0)
    ordered = gather_tokens(labels.transpose(1, 2)[..., None], permutation)
    for b in range(2):
        for h in range(2):
            assert sorted(permutation[b, h].tolist()) == list(range(tokens))
            covered = []
            for span, cluster in zip(spans(layout, b, h), owner[b, h].tolist(), strict=True):
                covered += range(span.start, span.stop)
                assert (ordered[b, span, h] == cluster).all()
            assert sorted(covered) == list(range(tokens))


def test_a_mask_over_clusters_becomes_one_over_blocks():
    mask = torch.tensor([[True, False], [False, True]])[None, None]
    q_owner, kv_owner = torch.tensor([[[0, 0, 1]]]), torch.tensor([[[0, 1, 1]]])
    wanted = [[True, False, False], [True, False, False], [False, True, True]]
    assert expand_clusters(mask, q_owner, kv_owner)[0, 0].tolist() == wanted


def test_seeded_order_is_a_fair_shuffle():
    order = seeded_order(7, (3000,), 5, torch.device("cpu"))
    assert torch.equal(order.sort(-1).values, torch.arange(5).expand(3000, 5))
    for place in range(5):
        share = order[:, place].bincount(minlength=5).double() / 3000
        assert (share - 0.2).abs().max() < 0.03  # 4 standard deviations
