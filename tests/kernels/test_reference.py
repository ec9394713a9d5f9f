# SPDX-License-Identifier: Apache-2.0
"""The oracle against a plainer one: Python loops over tokens, no mask, no tensor arithmetic."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.kernels import reference
from tests.plans import cases, inputs_for, sides
from tests.strategies import batches, generator, head_counts, seeds


def shared(tensor, i_batch, i_head):
    return tensor[min(i_batch, tensor.shape[0] - 1), min(i_head, tensor.shape[1] - 1)].tolist()


def kept_keys(plan, i_batch, i_head):
    """For every query token the list of (key token, log weight) that the plan keeps."""
    q_start, q_length = (shared(t, i_batch, i_head) for t in (plan.q.starts, plan.q.lengths))
    kv_start, kv_length = (shared(t, i_batch, i_head) for t in (plan.kv.starts, plan.kv.lengths))
    index, count = (shared(t, i_batch, i_head) for t in (plan.kv_indices, plan.kv_num_blocks))
    partial = None if plan.partial is None else shared(plan.partial, i_batch, i_head)
    weight = None if plan.kv_log_weight is None else shared(plan.kv_log_weight, i_batch, i_head)
    q_token, kv_token = (
        list(range(slots)) if p is None else shared(p, i_batch, i_head)
        for p, slots in ((plan.q_permutation, plan.q.slots), (plan.kv_permutation, plan.kv.slots))
    )
    kept = {}
    for i_q in range(len(q_start)):
        for row in range(q_length[i_q]):
            found = []
            for entry in range(count[i_q]):
                block = index[i_q][entry]
                tile = -1 if partial is None else partial[i_q][entry]
                for column in range(kv_length[block]):
                    if tile >= 0:
                        word = int(plan.tiles[tile, row, column // 32])
                        if not (word >> (column % 32)) & 1:
                            continue
                    slot = kv_start[block] + column
                    found.append((kv_token[slot], 0.0 if weight is None else weight[slot]))
            kept[q_token[q_start[i_q] + row]] = found
    return kept


def attend_in_loops(query, key, value, plan, scale):
    batch, _, heads, head_dim = query.shape
    output = torch.full_like(query, math.nan)
    lse = torch.full((batch, heads, query.shape[1]), math.nan, dtype=torch.float64)
    for i_batch in range(batch):
        for i_head in range(heads):
            q, k, v = (x[i_batch, :, i_head].tolist() for x in (query, key, value))
            for token, found in kept_keys(plan, i_batch, i_head).items():
                terms = []
                for other, weight in found:
                    dot = math.fsum(a * b for a, b in zip(q[token], k[other], strict=True))
                    terms.append((math.exp(scale * dot + weight), v[other]))
                total = math.fsum(term for term, _ in terms)
                row = [0.0] * head_dim
                if total > 0:
                    row = [math.fsum(t * u[d] for t, u in terms) / total for d in range(head_dim)]
                output[i_batch, token, i_head] = torch.tensor(row, dtype=torch.float64)
                lse[i_batch, i_head, token] = math.log(total) if total > 0 else -math.inf
    return output, lse


@given(cases())
def test_equals_loops_over_tokens(case):
    plan, batch, heads, seed = case
    query, key, value = inputs_for(plan, batch, heads, 3, seed, torch.float64)
    output, lse = reference.attend(query, key, value, plan, 0.3)
    wanted, wanted_lse = attend_in_loops(query, key, value, plan, 0.3)
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 90), st.integers(1, 90), seeds)
def test_a_full_plan_is_dense_attention(queries, keys, seed):
    q, kv = BlockLayout.from_lengths([queries]), BlockLayout.from_lengths([keys])
    plan = BlockPlan.full(q, kv)
    query, key, value = inputs_for(plan, 2, 3, 8, seed, torch.float64)
    output, lse = reference.attend(query, key, value, plan, 0.2)
    score = torch.einsum("bqhd,bkhd->bhqk", query, key) * 0.2
    dense = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=0.2
    )
    torch.testing.assert_close(output.transpose(1, 2), dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, score.logsumexp(-1), rtol=1e-12, atol=1e-12)


def test_rows_in_pieces_equal_rows_at_once(monkeypatch):
    plan = BlockPlan.full(BlockLayout.from_lengths([50]), BlockLayout.from_lengths([20]))
    tensors = inputs_for(plan, 1, 2, 4, 0, torch.float64)
    whole = reference.attend(*tensors, plan, 0.5)
    monkeypatch.setattr(reference, "ROWS", 7)
    for got, wanted in zip(reference.attend(*tensors, plan, 0.5), whole, strict=True):
        torch.testing.assert_close(got, wanted)


def test_tiles_wider_than_a_word_equal_loops():
    q, kv = BlockLayout.from_lengths([3, 2]), BlockLayout.from_lengths([70, 33])
    plan = BlockPlan.from_token_mask(torch.rand(1, 2, 5, 103) < 0.5, q, kv)
    tensors = inputs_for(plan, 1, 2, 3, 0, torch.float64)
    for got, wanted in zip(
        reference.attend(*tensors, plan, 0.3), attend_in_loops(*tensors, plan, 0.3), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["key", "value"])
def test_nan_reaches_exactly_the_queries_that_keep_it(bad, which):
    layout = BlockLayout.from_lengths([3, 3])
    mask = torch.tensor([[[[True, False], [True, True]]]])
    plan = BlockPlan.from_block_mask(mask, layout, layout)
    query, key, value = inputs_for(plan, 1, 1, 4, 1, torch.float64)
    query, key = query.abs(), key.abs()
    (key if which == "key" else value)[0, 4] = bad
    output, _ = reference.attend(query, key, value, plan, 0.5)
    assert output[0, :3].isfinite().all()
    assert not output[0, 3:].isfinite().any()
    if which == "value" and bad == math.inf:
        assert (output[0, 3:] == math.inf).all()


@given(st.data(), batches, head_counts, seeds)
def test_block_mass_equals_loops(data, batch, heads, seed):
    blocks = [data.draw(sides(batch, heads, is_query=side)) for side in (True, False)]
    (q, kv), random = (side[0] for side in blocks), generator(seed)
    query = torch.randn(batch, q.slots, heads, 4, generator=random, dtype=torch.float64)
    key = torch.randn(batch, kv.slots, heads, 4, generator=random, dtype=torch.float64)
    lse = torch.randn(batch, heads, q.slots, generator=random)
    lse[..., 0] = -math.inf
    mass = reference.block_mass(query, key, lse, q, kv, 0.5)
    for b in range(batch):
        for h in range(heads):
            q_start, q_length, kv_start, kv_length = (
                shared(t, b, h) for t in (q.starts, q.lengths, kv.starts, kv.lengths)
            )
            for i, (q0, qn) in enumerate(zip(q_start, q_length, strict=True)):
                for j, (k0, kn) in enumerate(zip(kv_start, kv_length, strict=True)):
                    wanted = 0.0
                    for row in range(q0, q0 + qn):
                        if row:
                            score = 0.5 * (key[b, k0 : k0 + kn, h] @ query[b, row, h])
                            wanted += float((score - lse[b, h, row].double()).exp().sum())
                    assert math.isclose(float(mass[b, h, i, j]), wanted, rel_tol=1e-9)
