# SPDX-License-Identifier: Apache-2.0
"""Every planning operation is reachable through the backends, as the protocol has it."""

import inspect

import pytest
import torch

from dit_sparse.core.call import Ops
from dit_sparse.core.plan import BlockPlan
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.kernels.planning import Planning
from tests.strategies import attention_inputs

NAMES = [name for name in vars(Planning) if not name.startswith("_")]


@pytest.mark.parametrize("name", NAMES)
def test_the_protocol_has_the_same_arguments(name):
    declared = list(inspect.signature(getattr(Ops, name)).parameters.values())[1:]
    defined = list(inspect.signature(getattr(Backends(), name)).parameters.values())
    assert [(p.name, p.kind, p.default) for p in declared] == [
        (p.name, p.kind, p.default) for p in defined
    ]


def test_nothing_of_the_protocol_is_missing():
    declared = {name for name in vars(Ops) if not name.startswith("_")}
    assert declared == {*NAMES, "attend", "block_mass"}


def test_clusters_make_a_plan_that_runs():
    """SVG2's way through the operations: cluster, score centroids, top-p, expand, attend."""
    ops = Backends()
    query, key, value = attention_inputs(0, 2, 150, 2, 8, torch.float32)
    q_mean, q_label, q_count = ops.kmeans(query, 5, 3)
    k_mean, k_label, k_count = ops.kmeans(key, 9, 3)
    score = q_mean @ k_mean.transpose(-1, -2) / 8**0.5 + k_count[:, :, None].log()
    mask = ops.select_top_p(score.softmax(-1), 0.9, 1)[0]
    for longest in (None, 32):
        q_slots, q, q_owner = ops.cluster_order(q_label, q_count, longest)
        kv_slots, kv, kv_owner = ops.cluster_order(k_label, k_count, longest)
        plan = BlockPlan.from_block_mask(
            ops.expand_clusters(mask, q_owner, kv_owner),
            q,
            kv,
            q_permutation=q_slots,
            kv_permutation=kv_slots,
        ).validate()
        output, _ = ops.attend(query, key, value, plan, 8**-0.5)
        keep = mask.gather(2, q_label.long()[..., None].expand(-1, -1, -1, 9))
        keep = keep.gather(3, k_label.long()[:, :, None].expand(-1, -1, 150, -1))
        dense = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=keep
        )
        torch.testing.assert_close(output, dense.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_an_operation_never_reads_values_back():
    """On the meta device there is nothing to read: what asks for a value raises."""
    from dit_sparse.core.grid import BlockLayout, cut

    ops, layout = Backends(), BlockLayout.from_lengths(cut(200, 64)).to("meta")
    x = torch.empty(2, 200, 3, 16, device="meta")
    score = ops.pooled_scores(x, x, layout, layout, 0.25)
    assert score.shape == (2, 3, 4, 4)
    assert ops.moments(x, layout)[1].shape == (2, 3, 4)
    assert ops.antidiagonal(x, x, layout, layout, 8, 0.25).shape == score.shape
    assert ops.tile_maximum(x, x, layout, layout, 16, 0.25)[0].shape == score.shape
    _, labels, counts = ops.kmeans(x, 6, 2)
    permutation, blocks, _ = ops.cluster_order(labels, counts, 32)
    assert blocks.blocks == 6 + 200 // 32
    assert ops.cluster_order(labels, counts)[1].max_length == 200
    slots = ops.gather_tokens(x, permutation)
    assert ops.scatter_tokens(slots, permutation, 200).shape == x.shape
    _, indices, counts = ops.select_top_k(score, 2)
    assert BlockPlan(layout, layout, indices, counts).kv_indices.shape == (2, 3, 4, 2)
    _, indices, counts = ops.select_top_p(score, 0.5, 1, ceiling=3)
    assert BlockPlan(layout, layout, indices, counts).kv_indices.shape == (2, 3, 4, 3)
