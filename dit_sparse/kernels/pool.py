# SPDX-License-Identifier: Apache-2.0
"""Block means, and the scores of block pairs that they give (SpargeAttn's and VSA's selector)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dit_sparse.kernels.chunks import (
    block_of_slot,
    block_of_token,
    budget,
    head_parts,
    of_heads,
    scores,
    segment_sums,
    work_dtype,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.grid import BlockLayout

_SCRATCH_CPU = 2**17  # bytes of squares; larger ones leave the cache and come as new pages


def pool(x: Tensor, layout: BlockLayout, permutation: Tensor | None = None) -> Tensor:
    """Average the tokens of each block; gradients flow back to them.

    Args:
        x: ``[batch, seq_len, heads, head_dim]``, any strides.
        layout: The blocks, in slots; tokens in no block (padding) count nowhere.
        permutation: Token of each slot, integer ``[batch|1, heads|1, slots]``, -1 on padding
            slots; None: slots are tokens.

    Returns:
        fp32 ``[batch, heads, blocks, head_dim]`` (fp64 for fp64); 0 for a block without tokens.
    """
    if permutation is not None:
        total = _listed_sums(x, layout, block_of_token(layout, permutation, x.shape[1]))
    elif layout.spread:
        total = _spread_sums(x, layout)
    else:
        total = _listed_sums(x, layout, block_of_slot(layout))
    return total / layout.lengths.clamp(min=1)[..., None]


@torch.no_grad()
def moments(
    x: Tensor,
    layout: BlockLayout,
    permutation: Tensor | None = None,
    weight: Tensor | None = None,
    mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Give the mean of each block's tokens, and their variance summed over channels.

    Args:
        x: ``[batch, seq_len, heads, head_dim]``, any strides.
        layout: As ``pool`` has it.
        permutation: As ``pool`` has it.
        weight: Of each channel in the sum, ``[batch, heads, head_dim]``; None: 1.
        mean: The means where they are known, which saves half of the time.

    Returns:
        The means as ``pool`` gives them, and the variances (divided by the number of tokens) in
        the same dtype, ``[batch, heads, blocks]``, at least 0. Both are 0 for a block without
        tokens.
    """
    batch, tokens, heads, dim = x.shape
    work = work_dtype(x.dtype)
    mean = pool(x, layout, permutation) if mean is None else mean.to(work)
    share = layout.lengths[..., None].to(work)
    # Squares of centred values: those of keys that share an offset would cancel.
    centre = (mean * share).sum(2) / share.sum(2).clamp(min=1)
    channel = torch.ones_like(centre) if weight is None else weight.to(work)
    scratch = _SCRATCH_CPU if x.device.type == "cpu" else budget(x.device)
    step = max(1, scratch // (batch * heads * dim * work.itemsize))
    squares = []
    for first in range(0, tokens, step):
        away = (x[:, first : first + step].to(work) - centre[:, None]).square_()
        squares.append(torch.einsum("bshd,bhd->bsh", away, channel))
    square = pool(torch.cat(squares, 1)[..., None], layout, permutation)[..., 0]
    off = torch.einsum("bhnd,bhd->bhn", (mean - centre[:, :, None]).square(), channel)
    return mean, (square - off).clamp(min=0)


@torch.no_grad()
def pooled_scores(
    query: Tensor, key: Tensor, q: BlockLayout, kv: BlockLayout, scale: float
) -> Tensor:
    """Score block pairs by their mean query and mean key.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``; slots are tokens.
        key: ``[batch, kv_seq_len, heads, head_dim]``.
        q: Query blocks.
        kv: Key blocks.
        scale: Multiplies the scores.

    Returns:
        fp32 ``[batch, heads, q_blocks, kv_blocks]``, -inf for a key block without tokens. Their
        softmax is a weight for each block; add ``kv.lengths.log()`` before it where a block
        should count as many keys as it has.
    """
    score = scores(pool(query, q), pool(key, kv)) * scale
    return score.float().masked_fill((kv.lengths == 0)[:, :, None], -torch.inf)


def _spread_sums(x: Tensor, layout: BlockLayout) -> Tensor:
    """Sum blocks that start every ``max_length`` slots: views, no index."""
    batch, _, heads, dim = x.shape
    size = layout.max_length
    work = work_dtype(x.dtype)
    offset = torch.arange(size, device=x.device)
    step = max(1, budget(x.device) // (batch * heads * size * dim * work.itemsize))
    sums = []
    for first in range(0, layout.blocks, step):
        count = min(step, layout.blocks - first)
        part = x[:, first * size : (first + count) * size]
        short = count * size - part.shape[1]
        if short:
            part = torch.nn.functional.pad(part, (0, 0, 0, 0, 0, short))
        part = part.unflatten(1, (count, size))  # [batch, count, size, heads, dim]
        live = offset < layout.lengths[..., first : first + count, None]
        live = live.permute(0, 2, 3, 1)[..., None]
        sums.append(torch.where(live, part, 0).sum(2, dtype=work))
    return torch.cat(sums, 1).transpose(1, 2)


def _listed_sums(x: Tensor, layout: BlockLayout, block: Tensor) -> Tensor:
    """Sum tokens by their ``block`` ``[batch|1, heads|1, seq_len]``, some heads at a time."""
    batch, tokens, heads, dim = x.shape
    per_head = 2 * batch * tokens * dim * work_dtype(x.dtype).itemsize
    sums = []
    for part in head_parts(heads, per_head, x.device):
        rows = x[:, :, part].transpose(1, 2)  # [batch, part, tokens, dim]
        label = of_heads(block, part).expand(*rows.shape[:3])
        total = segment_sums(rows.flatten(0, 1), label.flatten(0, 1), layout.blocks + 1)
        sums.append(total.unflatten(0, rows.shape[:2])[:, :, :-1])
    return torch.cat(sums, 1)
