# SPDX-License-Identifier: Apache-2.0
"""One softmax over two sets of keys, from the attention to each."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """Combine two results for the same queries over disjoint keys.

    The mean of both, weighted by exp of their log-sum-exps, in fp32 as the LSEs are. Gradients
    pass through outputs and LSEs, so it has the gradient of one softmax over all keys.

    Args:
        output: ``[batch, queries, heads, head_dim]``.
        lse: fp32 ``[batch, heads, queries]``.
        other: Like ``output``.
        other_lse: Like ``lse``.
    """
    ahead = (other_lse - lse).masked_fill(other_lse == -torch.inf, -torch.inf)  # both may be -inf
    share = torch.sigmoid(ahead).transpose(1, 2)[..., None]
    return torch.lerp(output.to(share.dtype), other.to(share.dtype), share).to(output.dtype)


def writable(output: Tensor) -> Tensor:
    """Give a tensor to write results into: a copy where the backward pass needs this one."""
    return output.clone() if output.requires_grad else output
