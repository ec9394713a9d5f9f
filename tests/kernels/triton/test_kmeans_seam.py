# SPDX-License-Identifier: Apache-2.0
"""How k-means in Triton is reached, and that it is checked before it is used."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.errors import KernelError
from dit_sparse.kernels import dispatch, triton_kmeans
from dit_sparse.kernels.canary import check_lloyd
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.kernels.kmeans import kmeans
from tests.kernels.triton.plans import DEVICE, DTYPES

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 72])
def test_the_kernel_passes_its_check(dtype, head_dim):
    assert check_lloyd(triton_kmeans.lloyd, torch.device(DEVICE), dtype, head_dim) is None


def test_a_wrong_kernel_is_told(monkeypatch):
    def late(points, centroids, iterations):
        found, labels, counts = kmeans(points, centroids.shape[2], iterations, init=centroids)
        return found, labels.roll(1, -1), counts

    assert (
        check_lloyd(late, CPU, torch.float32, 16) == "labels differ from the torch implementation"
    )


def test_iterations_are_handed_on_with_the_draw():
    seen = []

    def lloyd(points, init, iterations):
        seen.append((points, init, iterations))
        return kmeans(points, init.shape[2], iterations, init=init)

    points = torch.randn(1, 40, 2, 8, generator=torch.Generator().manual_seed(0))
    found = kmeans(points, 5, 3, seed=7, lloyd=lloyd)
    wanted = kmeans(points, 5, 3, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert seen[0][0] is points
    assert seen[0][2] == 3


def test_on_a_cpu_torch_answers():
    ops = Backends()
    points = torch.randn(1, 40, 2, 16)
    assert ops._lloyd(points) is None
    found, wanted = ops.kmeans(points, 4, 2, seed=1), kmeans(points, 4, 2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu_triton_answers_once_checked(dtype, monkeypatch):
    points = torch.randn(1, 500, 2, 64, device="cuda", dtype=dtype)
    ops = Backends()
    assert ops._lloyd(points) is triton_kmeans.lloyd
    assert Backends("reference")._lloyd(points) is None
    monkeypatch.setattr(dispatch, "check_lloyd", lambda *_: "labels differ")
    with pytest.raises(KernelError, match="k-means in Triton failed its check"):
        Backends().kmeans(points, 4, 2)
