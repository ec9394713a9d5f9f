# SPDX-License-Identifier: Apache-2.0
"""Select key groups for query groups: a budget for each head, and a threshold in a row's spread.

Groups may be of unequal size and may be empty. Scores are ``[batch, heads, q_groups, kv_groups]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dit_sparse.core.machine import widest_float

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.call import AttentionCall, Ops
    from dit_sparse.methods.sides import Side


def within_budget(
    value: Tensor, q: Side, kv: Side, density: float, ops: Ops, *, means: bool
) -> Tensor:
    """Keep the pairs of groups that are worth most per key, until a head's budget is used up.

    Args:
        value: Of a key in each pair of groups, fp32.
        q: The query groups.
        kv: The key groups.
        density: Share of a head's pairs of tokens that may be computed, in (0, 1].
        ops: The kernels' operations.
        means: Every group is read at least as its mean, one key for each block of it, which the
            budget pays first. Otherwise each query group keeps its best key group, whatever the
            budget.

    Returns:
        bool, like ``value``.
    """
    wide = widest_float(value.device)
    rows, keys = q.counts.to(wide)[..., None], kv.counts.to(wide)[:, :, None]
    value = value.masked_fill(keys == 0, -torch.inf)
    budget = density * rows.sum((-1, -2)) * keys.sum((-1, -2))
    if means:
        read = (keys / kv.block_size).ceil()
        budget = budget - rows.sum((-1, -2)) * read.sum((-1, -2))
        return ops.select_budget(value, rows * (keys - read), budget)
    first = best(value, keys > 0)
    return ops.select_budget(value.masked_fill(first, torch.inf), rows * keys, budget) | first


def worst_means(
    call: AttentionCall,
    weight: Tensor,
    centres: Tensor | None,
    q: Side,
    kv: Side,
    density: float,
    ops: Ops,
) -> Tensor:
    """Keep the pairs of groups that their means would represent worst, within a head's budget.

    Args:
        call: The call.
        weight: The share of each key group in the attention of a query group, fp32 ``[batch,
            heads, q_groups, kv_groups]``.
        centres: Means of the key groups, ``[batch, heads, kv_groups, head_dim]``; None: not known.
        q: The query groups.
        kv: The key groups.
        density: Share of a head's pairs of tokens that may be computed, in (0, 1].
        ops: The kernels' operations.

    Returns:
        bool, like ``weight``.
    """
    grid = call.grid
    query, key, value = (
        x[:, grid.video_start : grid.video_start + grid.video_tokens]
        for x in (call.query, call.key, call.value)
    )
    # An estimate: channels vary independently, and a head's queries are alike in all groups.
    squares = torch.cat([head.float().square().mean(1) for head in query.split(1, 2)], 1)
    _, spread = ops.moments(key, kv.groups, kv.order, squares * call.scale**2, centres)
    mean, variance = ops.moments(value, kv.groups, kv.order)
    error = error_of_means(
        weight, spread[:, :, None].float(), (mean.float(), variance.float()), kv.counts
    )
    return within_budget(error, q, kv, density, ops, means=True)


@torch.no_grad()
def error_of_means(
    weight: Tensor, spread: Tensor, value: tuple[Tensor, Tensor], keys: Tensor
) -> Tensor:
    """Estimate, for each pair of groups, the error per key of reading the key group as its mean.

    Ours. Take the scores x of a query with the n keys of a group, of variance s, and expand the
    softmax over them around their mean. The weights follow x - mean(x), so the mean value is off
    by the covariance of x and the values, at most sqrt(s var(v)), where they vary alike. By
    Jensen's inequality the group's weight is too small by a factor of 1 + s / 2, which moves the
    output o by (s / 2) (mean(v) - o). With the group's weight p the square of the error is
    p^2 s (var(v) + (s / 4) |mean(v) - o|^2).

    Args:
        weight: p, the share of a query group's attention, rows sum to 1, fp32 ``[batch, heads,
            q_groups, kv_groups]``; 0 for empty groups.
        spread: s, fp32, expandable to ``weight``.
        value: Mean of the values of each key group, fp32 ``[batch, heads, kv_groups, head_dim]``,
            and their variance, summed over channels, ``[batch, heads, kv_groups]``.
        keys: Keys in each group, ``[batch|1, heads|1, kv_groups]``.

    Returns:
        Natural logarithm of error / n, shaped like ``weight``; -inf where there is no error.
    """
    mean, variance = value
    output = weight @ mean
    distance = output.square().sum(-1)[..., None] + mean.square().sum(-1)[:, :, None]
    distance = (distance - 2 * output @ mean.transpose(-1, -2)).clamp(min=0)  # squared
    of_values = variance[:, :, None] + spread / 4 * distance
    sizes = keys.clamp(min=1)[:, :, None].to(weight.dtype)
    # A sum of logarithms, because the product overflows fp32 for values of 1e4.
    return weight.log() - sizes.log() + (spread.log() + of_values.log()) / 2


def above_spread(score: Tensor, living: Tensor, spreads: float) -> Tensor:
    """Keep what lies above its row's mean by more than ``spreads`` standard deviations.

    Args:
        score: fp32.
        living: Groups that have keys, bool, expandable to ``score``.
        spreads: Any sign. Sol-Attn (arXiv:2607.24027) has 0.8 to 1.5.
    """
    living = living.expand_as(score)
    many = living.sum(-1, keepdim=True)
    finite = score.masked_fill(~living, 0)
    above = (finite - finite.sum(-1, keepdim=True) / many).masked_fill(~living, 0)
    spread = (above.square().sum(-1, keepdim=True) / many).sqrt()
    return living & (above > spreads * spread)


def best(score: Tensor, living: Tensor) -> Tensor:
    """Mark the best group of each row that has keys."""
    found = score.masked_fill(~living, -torch.inf).argmax(-1, keepdim=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, found, value=True)
