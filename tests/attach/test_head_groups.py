# SPDX-License-Identifier: Apache-2.0
"""Joining the plans of several heads changes no head's result."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.attach.head_groups import head_index, merge_plans
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.core.plan import BlockPlan
from dit_sparse.kernels.dispatch import Backends
from tests.strategies import attention_inputs, batches, generator, seeds


@given(
    seed=seeds,
    batch=batches,
    groups=st.lists(st.sampled_from(["shared", "own", "partial", "full"]), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    block=st.sampled_from([3, 8]),
)
def test_joint_launch_equals_one_by_one(seed, batch, groups, sizes, block):
    grid = LatentsGrid(2, 3, 4, 5, text_first=bool(seed % 2))
    layout = grid.layout(block)
    random = generator(seed)
    heads = torch.randperm(sum(sizes[: len(groups)]), generator=random).tolist()
    parts, taken = [], 0
    for kind, size in zip(groups, sizes, strict=False):
        mine = tuple(sorted(heads[taken : taken + size]))
        taken += size
        if kind == "full":
            plan = BlockPlan.full(layout, layout)
        elif kind == "partial":
            mask = torch.rand(1, size, grid.tokens, grid.tokens, generator=random) < 0.6
            plan = BlockPlan.from_token_mask(mask, layout, layout)
        else:
            shape = (1, 1) if kind == "shared" else (batch, size)
            mask = torch.rand(*shape, layout.blocks, layout.blocks, generator=random) < 0.5
            plan = BlockPlan.from_block_mask(mask, layout, layout)
        parts.append((plan, mine))
    joint, order = merge_plans(parts)
    joint.validate()
    assert order == tuple(sorted(heads[:taken]))
    query, key, value = attention_inputs(seed, batch, grid.tokens, taken, 8, torch.float32)
    ops = Backends()
    together, lse = ops.attend(query, key, value, joint, 0.4)
    for plan, mine in parts:
        at = head_index(mine, torch.device("cpu"))
        alone, own = ops.attend(query[:, :, at], key[:, :, at], value[:, :, at], plan, 0.4)
        assert torch.allclose(together[:, :, at], alone, atol=1e-5)
        assert torch.allclose(lse[:, at], own, atol=1e-5)
    densities = torch.cat([p.density().expand(batch, len(mine)) for p, mine in parts], 1)
    of_head = [head for _, mine in parts for head in mine]
    assert torch.allclose(joint.density().expand(batch, taken)[:, of_head], densities)


def test_plans_that_cannot_be_joined_are_left_alone():
    grid = LatentsGrid(2, 3, 4)
    layout, other = grid.layout(8), grid.layout(6)
    plain = BlockPlan.full(layout, layout)
    token = torch.arange(24)[None, None]
    ordered = BlockPlan(layout, layout, plain.kv_indices, plain.kv_num_blocks, q_permutation=token)
    weight = torch.zeros(1, 1, 24)
    weighted = BlockPlan(
        layout, layout, plain.kv_indices, plain.kv_num_blocks, kv_log_weight=weight
    )
    for foreign in (BlockPlan.full(other, other), ordered, weighted):
        assert merge_plans([(plain, (0,)), (foreign, (1,))]) is None
    assert merge_plans([(ordered, (0, 1))]) == (ordered, (0, 1))
