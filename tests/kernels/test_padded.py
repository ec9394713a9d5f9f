# SPDX-License-Identifier: Apache-2.0
"""A plan as equal blocks is the same plan: computed naively over its slots."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.kernels import reference
from dit_sparse.kernels.canary import small_plan
from dit_sparse.kernels.padded import padded, reasons_against_padding
from tests.plans import cases, inputs_for


def naive(q, k, v, form, scale):
    """Attend over equal blocks ``[batch, slots, heads, head_dim]`` as such a kernel would."""
    batch, slots, heads, _ = q.shape
    output, lse = torch.zeros_like(q), q.new_full((batch, heads, slots), -torch.inf)
    for b in range(batch):
        for h in range(heads):
            lead = b % form.kv_indices.shape[0], h % form.kv_indices.shape[1]
            size = form.kv_lengths[b % form.kv_lengths.shape[0], h % form.kv_lengths.shape[1]]
            for i in range(slots // form.q_size):
                count = int(form.kv_num_blocks[lead][i])
                keys = [
                    j * form.kv_size + place
                    for j in form.kv_indices[lead][i, :count].tolist()
                    for place in range(int(size[j]))
                ]
                if not keys:
                    continue
                rows = slice(i * form.q_size, (i + 1) * form.q_size)
                score = q[b, rows, h] @ k[b, keys, h].T * scale
                lse[b, h, rows] = score.logsumexp(-1)
                output[b, rows, h] = score.softmax(-1) @ v[b, keys, h]
    return output, lse


@given(
    case=cases(partial=False, log_weight=False),
    sizes=st.tuples(st.sampled_from([3, 8, 32]), st.sampled_from([3, 8, 32])),
)
def test_equal_blocks_give_the_same_result(case, sizes):
    plan, batch, heads, seed = case
    tensors = inputs_for(plan, batch, heads, 4, seed, torch.float64)
    form = padded(plan, *sizes)
    result = form.results(*naive(*form.inputs(*tensors), form, 0.5), tensors[0].shape[1])
    wanted = reference.attend(*tensors, plan, 0.5)
    torch.testing.assert_close(result[0], wanted[0])
    torch.testing.assert_close(result[1].double(), wanted[1], rtol=1e-6, atol=1e-6)


def test_blocks_of_very_unequal_length_are_refused():
    tokens = [1] * 40 + [60]
    layout = BlockLayout.from_lengths(tokens)
    plan = BlockPlan.full(layout, layout)
    (q, kv) = reasons_against_padding(plan, 64, 64)
    assert "41 of up to 60 tokens would be padded from 100 to 2624" in q
    assert "key blocks" in kv
    assert reasons_against_padding(small_plan(torch.device("cpu")), 64, 64) == []
