# SPDX-License-Identifier: Apache-2.0
"""Tokens into slots and back, per head or shared; -1 marks a padding slot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def gather_tokens(x: Tensor, permutation: Tensor, *, padding: bool = True) -> Tensor:
    """Put the token ``permutation[slot]`` into every slot; 0 where it is -1.

    Args:
        x: ``[batch, seq_len, heads, head_dim]``, any strides.
        permutation: int64 ``[batch|1, heads|1, slots]``; a token may stand in several slots.
        padding: Whether there may be -1; False saves one pass over the result.

    Returns:
        ``[batch, slots, heads, head_dim]``, contiguous, the dtype of ``x``.
    """
    token = permutation.clamp(min=0) if padding else permutation
    if permutation.shape[:2] == (1, 1):
        found = x.index_select(1, token[0, 0])
    else:
        batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
        head = torch.arange(x.shape[2], device=x.device)
        found = x[batch, token.transpose(1, 2), head]
    if not padding:
        return found
    return found.masked_fill((permutation < 0).transpose(1, 2)[..., None], 0)


def scatter_tokens(x: Tensor, permutation: Tensor, tokens: int) -> Tensor:
    """Undo ``gather_tokens``: put every slot back to its token; tokens in no slot get 0.

    Args:
        x: ``[batch, slots, heads, head_dim]``.
        permutation: int64 ``[batch|1, heads|1, slots]``; no token stands in two slots.
        tokens: Length of the sequence.

    Returns:
        ``[batch, tokens, heads, head_dim]``.
    """
    return gather_tokens(x, inverse_permutation(permutation, tokens))


def inverse_permutation(permutation: Tensor, tokens: int) -> Tensor:
    """Give the slot of every token, -1 where it has none: int64 ``[batch|1, heads|1, tokens]``."""
    lead, slots = permutation.shape[:2], permutation.shape[-1]
    slot = torch.arange(slots, device=permutation.device).expand_as(permutation)
    inverse = permutation.new_full((*lead, tokens + 1), -1)
    # Padding slots all land in the spare last column.
    inverse.scatter_(-1, torch.where(permutation < 0, tokens, permutation), slot)
    return inverse[..., :tokens]
