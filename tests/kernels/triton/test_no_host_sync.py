# SPDX-License-Identifier: Apache-2.0
"""From scores to a launch nothing is read back from the device: the host never waits.

Tensors of the meta device have shapes and no values, so whatever needs a value on the host
(``item``, ``bool``, ``nonzero``, a mask as an index) raises on them; and they take the same
branches as those of a GPU, not those of a CPU, where reading is free.
"""

from __future__ import annotations

import pytest
import torch

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.kernels.kmeans import cluster_order, expand_clusters
from dit_sparse.kernels.select import select_top_k, select_top_p
from dit_sparse.kernels.triton_backward import backward_launches
from dit_sparse.kernels.triton_forward import forward_launch
from dit_sparse.kernels.triton_kmeans import assign_launch, update_launches
from dit_sparse.kernels.triton_launch import tile_table
from dit_sparse.kernels.triton_mass import block_mass_launch
from dit_sparse.kernels.triton_target import Tiling

BATCH, HEADS, BLOCKS, TOKENS, CLUSTERS = 2, 3, 4, 64, 5
WAITS = (RuntimeError, NotImplementedError)


def made(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        torch.Tensor.nonzero,
        torch.Tensor.tolist,
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        torch.Tensor.cpu,
    ],
)
def test_what_makes_the_host_wait_raises(read):
    """The guard itself: without this the tests below would prove nothing."""
    with pytest.raises(WAITS):
        read(made(3, 4))


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_selection(forced, inside):
    score = made(BATCH, HEADS, BLOCKS, BLOCKS)
    keep = made(1, HEADS, BLOCKS, BLOCKS, dtype=torch.bool) if forced else None
    per_head = made(1, HEADS, 1, dtype=torch.int64)
    for kept, cap in (
        (select_top_k(score, 2, keep, keep_inside=inside), BLOCKS if forced else 2),
        (select_top_k(score, per_head, keep, keep_inside=inside), BLOCKS),
        (select_top_p(score, 0.9, 1, keep, keep_inside=inside), BLOCKS),
        (
            select_top_p(score, 0.9, 1, keep, ceiling=3, keep_inside=inside),
            BLOCKS if forced else 3,
        ),
    ):
        assert kept.kv_indices.shape == (BATCH, HEADS, BLOCKS, cap)
        layout = BlockLayout.from_lengths([16] * BLOCKS, "meta")
        plan = BlockPlan(layout, layout, kept.kv_indices, kept.kv_num_blocks)
        assert plan.density().shape == (BATCH, HEADS)


def clustered():
    """Lay blocks of unequal length over clusters, as SVG2 does, both sides permuted."""
    labels = made(BATCH, HEADS, TOKENS, dtype=torch.int32)
    counts = made(BATCH, HEADS, CLUSTERS, dtype=torch.int32)
    return cluster_order(labels, counts, 16)


def test_clusters_to_a_plan():
    permutation, layout, owner = clustered()
    mask = expand_clusters(made(BATCH, HEADS, CLUSTERS, CLUSTERS, dtype=torch.bool), owner, owner)
    plan = BlockPlan.from_block_mask(
        mask, layout, layout, q_permutation=permutation, kv_permutation=permutation
    )
    assert tile_table(layout, 4).shape[2] == TOKENS // 4 + layout.blocks
    q = made(BATCH, TOKENS, HEADS, 32)
    lse = made(BATCH, HEADS, TOKENS)
    tiling = Tiling(4, 16)  # four parts a block: the table of tiles is made
    assert forward_launch(q, q, q, q, lse, plan, 1.0, tiling).arguments["q"].tiles is not None
    tensors = (q, q, q, q, lse, q, lse, (q, q, q))
    assert len(backward_launches(*tensors, plan, 1.0, tiling, tiling)) == 3


def test_block_mass():
    layout = BlockLayout.from_lengths([16] * BLOCKS, "meta")
    q, lse = made(BATCH, TOKENS, HEADS, 32), made(BATCH, HEADS, TOKENS)
    mass = made(BATCH, HEADS, BLOCKS, 1, BLOCKS)
    block_mass_launch(q, q, lse, mass, layout, layout, 1.0, Tiling(16, 16))


def test_k_means():
    points = made(BATCH, TOKENS, HEADS, 32)
    centroids = made(BATCH, HEADS, CLUSTERS, 32)
    labels = made(BATCH, HEADS, TOKENS, dtype=torch.int32)
    assign_launch(points, centroids, made(BATCH, HEADS, CLUSTERS), labels, Tiling(16, 16))
    counts = made(BATCH, HEADS, CLUSTERS, dtype=torch.int32)
    order = made(BATCH, HEADS, TOKENS, dtype=torch.int64)
    assert len(update_launches(points, order, counts, centroids)) == 2
