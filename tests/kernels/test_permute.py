# SPDX-License-Identifier: Apache-2.0
"""Gather and scatter: exact there and back, padding slots are 0."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.kernels.permute import gather_tokens, inverse_permutation, scatter_tokens
from tests.strategies import attention_inputs, batches, generator, head_counts, seeds


@given(
    seed=seeds,
    batch=batches,
    heads=head_counts,
    tokens=st.integers(1, 40),
    padding=st.integers(0, 9),
    dropped=st.integers(0, 9),
    shared=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
)
def test_there_and_back_is_exact(seed, batch, heads, tokens, padding, dropped, shared, dtype):
    lead = (1 if shared[0] else batch, 1 if shared[1] else heads)
    dropped = min(dropped, tokens - 1)
    random = generator(seed)
    permutation = torch.empty(*lead, tokens - dropped + padding, dtype=torch.int64)
    for b in range(lead[0]):
        for h in range(lead[1]):
            kept = torch.randperm(tokens, generator=random)[dropped:]
            filled = torch.cat([kept, torch.full((padding,), -1)])
            permutation[b, h] = filled[torch.randperm(len(filled), generator=random)]
    x = attention_inputs(seed, batch, tokens, heads, 3, dtype)[0]

    slots = gather_tokens(x, permutation)
    back = scatter_tokens(slots, permutation, tokens)

    for b in range(batch):
        for h in range(heads):
            own = permutation[b % lead[0], h % lead[1]].tolist()
            for slot, token in enumerate(own):
                wanted = torch.zeros(3, dtype=dtype) if token < 0 else x[b, token, h]
                assert torch.equal(slots[b, slot, h], wanted)
            for token in range(tokens):
                wanted = x[b, token, h] if token in own else torch.zeros(3, dtype=dtype)
                assert torch.equal(back[b, token, h], wanted)


def test_without_padding_the_second_pass_is_saved():
    x = attention_inputs(0, 2, 9, 2, 4)[0].transpose(1, 2).contiguous().transpose(1, 2)
    permutation = torch.stack([torch.randperm(9) for _ in range(4)]).view(2, 2, 9)
    assert torch.equal(gather_tokens(x, permutation, padding=False), gather_tokens(x, permutation))
    inverse = inverse_permutation(permutation, 9)
    assert torch.equal(permutation.gather(-1, inverse), torch.arange(9).expand(2, 2, 9))


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_flow_back(shared):
    x = attention_inputs(0, 2, 6, 2, 3)[0].requires_grad_()
    permutation = torch.tensor([4, -1, 0, 2]).expand(1 if shared else 2, 1 if shared else 2, 4)
    gather_tokens(x, permutation).sum().backward()
    assert x.grad.sum(-1)[0, :, 0].tolist() == [3, 0, 3, 0, 3, 0]
