# SPDX-License-Identifier: Apache-2.0
"""From scores of block pairs to lists of kept blocks, on the device, with no host waiting.

Ranks come from a stable sort: among equal scores the block with the lower number wins, on every
device and in every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.core.machine import widest_float
from dit_sparse.errors import KernelError
from dit_sparse.kernels.chunks import head_parts


class Kept(NamedTuple):
    """Kept key blocks: a mask, and the lists that a ``BlockPlan`` takes as they are.

    Args:
        block_mask: bool ``[batch, heads, q_blocks, kv_blocks]``.
        kv_indices: Ascending, int32 ``[batch, heads, q_blocks, cap]``.
        kv_num_blocks: int32 ``[batch, heads, q_blocks]``.
    """

    block_mask: Tensor
    kv_indices: Tensor
    kv_num_blocks: Tensor


@torch.no_grad()
def select_top_k(
    scores: Tensor, counts: int | Tensor, keep: Tensor | None = None, *, keep_inside: bool = False
) -> Kept:
    """Keep the ``counts`` key blocks of each row that score highest.

    Args:
        scores: ``[batch, heads, q_blocks, kv_blocks]``; -inf is never kept, nan goes first, so
            that a fault upstream shows as it does in dense attention.
        counts: Blocks to keep: one number, or integers that broadcast to ``[batch, heads,
            q_blocks]``. A row with fewer candidates keeps those.
        keep: bool that broadcasts to the scores' shape: kept whatever they score.
        keep_inside: Whether forced blocks use up the count. False: they come on top of it.

    Returns:
        The blocks; the lists' width is ``counts`` where that is one number and nothing is
        forced, else all key blocks.
    """
    blocks = scores.shape[-1]
    if isinstance(counts, int):
        if counts < 0:
            raise KernelError(f"counts must be at least 0, got {counts}")
        cap = blocks if keep is not None else max(1, min(counts, blocks))
        limit = torch.full((1, 1, 1), counts, device=scores.device)
    else:
        cap, limit = blocks, counts
    limit = limit.expand(scores.shape[:-1])[..., None]
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for part in _parts(scores):
        score = scores[:, part]
        if keep is not None:
            forced = keep.expand(scores.shape)[:, part]
            score = score.masked_fill(forced, torch.inf if keep_inside else -torch.inf)
        value, order = score.sort(dim=-1, descending=True, stable=True)
        place = torch.arange(blocks, device=scores.device)
        chosen = (place < limit[:, part]) & ~(value == -torch.inf)
        found = torch.empty_like(chosen).scatter_(-1, order, chosen)
        mask[:, part] = found if keep is None else found | forced
    return Kept(mask, *listed(mask, cap))


@torch.no_grad()
def select_top_p(
    scores: Tensor,
    p: float,
    floor: int = 0,
    keep: Tensor | None = None,
    *,
    ceiling: int | None = None,
    keep_inside: bool = False,
) -> Kept:
    """Keep the fewest key blocks of each row that hold the share ``p`` of its weight.

    Blocks are taken heaviest first while the weight before them is below ``p`` of the row's: the
    one that crosses the line is kept. A row whose weight is not finite keeps all its blocks, so
    that a fault upstream shows as it does in dense attention.

    Args:
        scores: Weights ``[batch, heads, q_blocks, kv_blocks]``, not normalised; a negative one
            marks a block that is no candidate.
        p: Share in [0, 1]; 1 keeps every candidate.
        floor: Blocks that a row keeps at least, those of weight 0 included.
        keep: bool that broadcasts to the scores' shape: kept whatever they weigh.
        ceiling: Blocks that a row keeps at most, ``floor`` or more; None: no limit.
        keep_inside: Whether forced blocks are taken first and count as weight and as blocks.
            False: they come on top, and ``p`` is a share of the other blocks' weight.

    Returns:
        The blocks; the lists' width is ``ceiling`` where it is given and nothing is forced, else
        all key blocks.
    """
    blocks = scores.shape[-1]
    most = blocks if ceiling is None else min(ceiling, blocks)
    if not 0 <= p <= 1:
        raise KernelError(f"p must lie in [0, 1], got {p}")
    if not 0 <= min(floor, blocks) <= most:
        raise KernelError(f"floor must lie in [0, ceiling = {most}], got {floor}")
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    place = torch.arange(blocks, device=scores.device)
    for part in _parts(scores):
        score = scores[:, part].float()
        rank_by = score
        if keep is not None:
            forced = keep.expand(scores.shape)[:, part]
            if keep_inside:
                rank_by = score.masked_fill(forced, torch.inf)
            else:
                rank_by = score = score.masked_fill(forced, -1)
        order = rank_by.sort(dim=-1, descending=True, stable=True).indices
        weight = score.gather(-1, order)
        share = weight.clamp(min=0)
        upto = share.cumsum(-1)
        line = p * upto[..., -1:]
        # Written with "not": a comparison with nan is false, and the block is kept.
        chosen = ~(upto - share >= line) if p < 1 else torch.ones_like(weight, dtype=torch.bool)
        chosen |= (place < floor) | ~upto[..., -1:].isfinite()
        chosen &= (place < most) & ~(weight < 0)
        found = torch.empty_like(chosen).scatter_(-1, order, chosen)
        mask[:, part] = found if keep is None else found | forced
    return Kept(mask, *listed(mask, blocks if keep is not None else max(1, most)))


@torch.no_grad()
def select_budget(value: Tensor, cost: Tensor, budget: Tensor) -> Tensor:
    """Keep the block pairs of a head that are worth most, while their costs fit one budget.

    Args:
        value: What a pair is worth, ``[batch, heads, q_blocks, kv_blocks]``; -inf is never kept,
            +inf goes first. nan is kept whatever the budget, so that a fault upstream shows as it
            does in dense attention.
        cost: Of each pair, at least 0, broadcasts to ``value``.
        budget: Of each head, broadcasts to ``[batch, heads]``.

    Returns:
        Kept pairs, bool like ``value``: those above the highest value that the budget cannot pay
        together with all above it. Pairs worth the same are kept or dropped together.
    """
    wide = widest_float(value.device)
    limit = budget.expand(value.shape[:2]).to(wide)[..., None]
    price = cost.expand(value.shape)
    mask = torch.empty(value.shape, dtype=torch.bool, device=value.device)
    for part in _parts(value):
        worth = value[:, part].nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        flat = worth.flatten(2)
        order = _falling(flat)
        spent = price[:, part].flatten(2).gather(-1, order).cumsum(-1, dtype=wide)
        paid = (spent <= limit[:, part]).sum(-1, keepdim=True)
        following = order.gather(-1, paid.clamp(max=order.shape[-1] - 1))
        border = flat.gather(-1, following).masked_fill(paid == order.shape[-1], -torch.inf)
        mask[:, part] = (worth > border[..., None]) | value[:, part].isnan()
    return mask


def _falling(value: Tensor) -> Tensor:
    """Order each row by falling value, equal ones in any order."""
    if value.device.type == "cpu" and value.dtype in {torch.float32, torch.float64}:
        return torch.from_numpy((-value).numpy().argsort(-1))  # vectorised, torch's is not
    return value.argsort(dim=-1, descending=True)


def _parts(scores: Tensor) -> list[slice]:
    batch, heads, rows, blocks = scores.shape
    return list(head_parts(heads, 32 * batch * rows * blocks, scores.device))


def listed(mask: Tensor, cap: int) -> tuple[Tensor, Tensor]:
    """Pack a mask into ascending lists of width ``cap``, which no row exceeds, and counts."""
    blocks = mask.shape[-1]
    counts = mask.sum(-1, dtype=torch.int32)
    indices = torch.empty((*mask.shape[:-1], cap), dtype=torch.int32, device=mask.device)
    column = torch.arange(blocks, dtype=torch.int32, device=mask.device)
    for part in _parts(mask):
        rows = mask[:, part]
        # Each kept column goes to its running count, every dropped one to a spare last column.
        slot = torch.where(rows, rows.cumsum(-1) - 1, cap)
        packed = torch.zeros((*rows.shape[:-1], cap + 1), dtype=torch.int32, device=mask.device)
        packed.scatter_(-1, slot, column.expand_as(slot))
        indices[:, part] = packed[..., :cap]
    return indices, counts
