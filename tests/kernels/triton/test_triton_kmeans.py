# SPDX-License-Identifier: Apache-2.0
"""K-means in Triton: labels and means against float64, ties, empty clusters, the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.errors import KernelError
from dit_sparse.kernels import triton_kmeans as kernel
from dit_sparse.kernels.kmeans import kmeans
from dit_sparse.kernels.triton_target import Tiling
from tests.kernels.triton.plans import DEVICE, DTYPES, assert_close

TILINGS = [Tiling(16, 16), Tiling(32, 16), Tiling(64, 32), None]


def drawn(seed, shape, clusters, dtype, order=(0, 1, 2, 3)):
    """Draw points with strides of a fused projection, in any order of dimensions; centroids."""
    rng = torch.Generator().manual_seed(seed)
    batch, tokens, heads, dim = shape
    whole = [(batch, tokens, heads + 2, dim)[axis] for axis in order]
    points = torch.randn(whole, generator=rng).to(dtype).to(DEVICE)
    points = points.permute([order.index(i) for i in range(4)])[:, :, 2:]
    return points, torch.randn(batch, heads, clusters, dim, generator=rng).to(DEVICE)


problems = {
    "seed": st.integers(0, 2**31 - 1),
    "batch": st.integers(1, 2),
    "heads": st.integers(1, 3),
    "tokens": st.sampled_from([1, 15, 40, 77]),
    "clusters": st.integers(1, 40),
    "dim": st.sampled_from([8, 16, 40, 64, 72]),
    "dtype": st.sampled_from(DTYPES),
    "order": st.sampled_from([(0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 2, 1)]),
}


@given(**problems, tiling=st.sampled_from(TILINGS))
def test_labels_are_the_nearest(seed, batch, heads, tokens, clusters, dim, dtype, order, tiling):
    points, centroids = drawn(seed, (batch, tokens, heads, dim), clusters, dtype, order)
    labels = kernel.assign(points, centroids, tiling)
    assert labels.dtype == torch.int32
    x = points.cpu().double().transpose(1, 2)[..., None, :]
    c = centroids.cpu().to(dtype).double()[:, :, None]
    distance = (x - c).square().sum(-1)
    chosen = distance.gather(-1, labels.cpu().long()[..., None])[..., 0]
    # Two roundings of every product of the dot that decides (Higham 2002, section 3.1).
    size = (x * c).abs().sum(-1).amax(-1) + c.square().sum(-1).amax(-1)
    unsure = 2 * (dim + 2) * torch.finfo(torch.float32).eps * size
    assert (chosen <= distance.amin(-1) + unsure).all()


@given(**{**problems, "dtype": st.sampled_from([torch.float32, torch.float16])})
def test_a_tie_goes_to_the_lower_number(seed, batch, heads, tokens, clusters, dim, dtype, order):
    """Small integers: no rounding, many ties."""
    points, centroids = drawn(seed, (batch, tokens, heads, dim), clusters, dtype, order)
    points, centroids = points.round().clamp(-1, 1), centroids.round().clamp(-1, 1)
    points[..., 1:], centroids[..., 1:] = 0, 0
    distance = (points.transpose(1, 2)[..., None, :] - centroids[:, :, None]).double()
    wanted = [
        [[row.index(min(row)) for row in head] for head in sample]
        for sample in distance.square().sum(-1).tolist()
    ]
    assert kernel.assign(points, centroids, Tiling(16, 16)).tolist() == wanted


@given(**problems)
def test_means_are_the_means(seed, batch, heads, tokens, clusters, dim, dtype, order):
    points, centroids = drawn(seed, (batch, tokens, heads, dim), clusters, dtype, order)
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(clusters, (batch, heads, tokens), generator=rng).int().to(DEVICE)
    before = centroids.clone()
    means, counts = kernel.update(points, labels, centroids)
    assert torch.equal(centroids, before)
    assert (means.dtype, counts.dtype) == (torch.float32, torch.int32)
    wanted, same = (centroids.cpu().to(dtype) for dtype in (torch.float64, torch.float32))
    for b in range(batch):
        for h in range(heads):
            label = labels[b, h].cpu()
            assert counts[b, h].tolist() == label.bincount(minlength=clusters).tolist()
            for cluster in label.unique().tolist():
                x = points[b, :, h].cpu()[label == cluster]
                wanted[b, h, cluster] = x.double().mean(0)
                same[b, h, cluster] = x.float().mean(0)
    assert_close(means, wanted, same, torch.float32)


def test_long_clusters_take_several_runs_and_give_the_same_bits():
    tokens = 2 * kernel.RUN + 90
    points, centroids = drawn(3, (1, tokens, 2, 16), 3, torch.float32)
    labels = torch.zeros(1, 2, tokens, dtype=torch.int32, device=DEVICE)
    labels[0, 1, ::3] = 2
    (means, counts), (again, _) = (kernel.update(points, labels, centroids) for _ in range(2))
    assert torch.equal(means, again)
    assert counts[0].tolist() == [[tokens, 0, 0], [tokens - 201, 0, 201]]
    assert torch.equal(means[0, :, 1], centroids[0, :, 1])
    wanted = points[0, :, 0].double().mean(0)
    torch.testing.assert_close(means[0, 0, 0].double(), wanted, rtol=1e-6, atol=1e-6)


@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 60),
    clusters=st.integers(1, 12),
    iterations=st.integers(1, 3),
)
def test_it_is_the_torch_k_means(seed, tokens, clusters, iterations):
    """Quarters of small integers: the first assignments have ties and no rounding."""
    points, start = drawn(seed, (2, tokens, 2, 8), clusters, torch.float32)
    points, start = (points * 4).round() / 4, (start * 4).round() / 4
    wanted = kmeans(points, clusters, iterations, init=start)
    found = kernel.lloyd(points, start, iterations)
    for mine, other in zip(found, wanted, strict=True):
        assert mine.dtype == other.dtype
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[2], wanted[2])
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-6)


def test_points_that_are_not_finite_harm_their_own_cluster_only():
    points, centroids = drawn(1, (1, 40, 1, 16), 4, torch.float32)
    labels = torch.arange(40, device=DEVICE).int()[None, None] % 4
    points[0, 6] = torch.nan
    means, _ = kernel.update(points, labels, centroids)
    assert means[0, 0].isnan().any(-1).tolist() == [False, False, True, False]
    assert kernel.assign(points, centroids)[0, 0, 6] == 0


def test_wrong_calls_are_named():
    points, centroids = drawn(0, (1, 9, 2, 16), 3, torch.float32)
    with pytest.raises(KernelError, match="float64"):
        kernel.lloyd(points.double(), centroids, 1)
    with pytest.raises(KernelError, match=r"centroids must be .* got \(1, 1, 3, 16\)"):
        kernel.lloyd(points, centroids[:, :1], 1)
    with pytest.raises(KernelError, match="iterations >= 1, got 0"):
        kernel.lloyd(points, centroids, 0)
