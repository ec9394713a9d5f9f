# SPDX-License-Identifier: Apache-2.0
"""BLADE's block scores: the largest weight among a few sampled queries and keys of a block pair.

Source: Gu et al. 2025, "Video-BLADE", arXiv:2508.10774, section on adaptive sparse attention. The
paper and its released code differ, and so do the two forms here; see ``tile_maximum``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dit_sparse.errors import KernelError
from dit_sparse.kernels.chunks import (
    budget,
    head_parts,
    of_heads,
    scores,
    seeded_order,
    work_dtype,
)
from dit_sparse.kernels.permute import gather_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.grid import BlockLayout

FORMS = ("code", "paper")


@torch.no_grad()
def tile_maximum(
    query: Tensor,
    key: Tensor,
    q: BlockLayout,
    kv: BlockLayout,
    samples: int,
    scale: float,
    *,
    seed: int = 0,
    form: str = "code",
    heads: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score block pairs by the maximum over sampled queries and keys.

    In each block ``samples`` places are drawn without replacement; the same places in every block
    and every sample of a head, others for queries and for keys. A shorter block takes the first of
    the drawn places that it has, and all its tokens where it has fewer than ``samples``.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``; slots are tokens.
        key: ``[batch, kv_seq_len, heads, head_dim]``.
        q: Query blocks.
        kv: Key blocks; keys in no block are never drawn.
        samples: Places a block, at least 1; more is truer, and dearer by its square.
        scale: Multiplies the scores.
        seed: For the draw; the same seed draws the same places on any device.
        form: "code", what the released weights were trained with: for every query the block's
            largest score relative to the largest of all blocks, exp(m - max m). "paper": the
            largest softmax weight over all sampled keys. Either is the maximum over the queries.
        heads: Number of each head, which its draw goes by, int64 ``[heads]``; None: 0, 1, ...

    Returns:
        Scores, fp32 ``[batch, heads, q_blocks, kv_blocks]`` in [0, 1], 0 where a block has no
        tokens; and the means over the block's sampled queries instead of their maxima, likewise:
        many maxima are exactly 1, and the means tell those apart.
    """
    if samples < 1:
        raise KernelError(f"samples must be at least 1, got {samples}")
    if form not in FORMS:
        raise KernelError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    batch, _, count, dim = query.shape
    work = work_dtype(query.dtype)
    if heads is None:
        heads = torch.arange(count, device=query.device)
    q_slot = sampled_slots(q, heads, samples, 2 * seed)
    kv_slot = sampled_slots(kv, heads, samples, 2 * seed + 1)
    best = torch.zeros(batch, count, q.blocks, kv.blocks, dtype=torch.float32, device=query.device)
    mean = torch.zeros_like(best)
    drawn = (q_slot >= 0).sum(-1).clamp(min=1)[..., None]  # [batch|1, heads, q_blocks, 1]
    q_count, kv_count = q_slot.shape[-1], kv_slot.shape[-1]
    rows_held = max(q.blocks * q_count, kv.blocks * kv_count)
    for part in head_parts(count, 4 * batch * rows_held * dim * work.itemsize, query.device):
        q_part = of_heads(q_slot, part).flatten(2)
        kv_part = of_heads(kv_slot, part).transpose(2, 3).flatten(2)  # place-major
        rows = gather_tokens(query[:, :, part], q_part).transpose(1, 2)
        keys = gather_tokens(key[:, :, part], kv_part).transpose(1, 2)
        bias = torch.zeros(kv_part.shape, dtype=work, device=query.device)
        bias = bias.masked_fill_(kv_part < 0, -torch.inf)[:, :, None]  # no key
        no_query = (q_part < 0)[..., None]
        per_block = batch * rows.shape[1] * q_count * keys.shape[2] * work.itemsize
        step = max(1, budget(query.device) // per_block)
        for first in range(0, q.blocks, step):
            span = slice(first * q_count, (first + step) * q_count)
            score = scores(rows[:, :, span], keys)
            torch.add(bias, score, alpha=scale, out=score)
            most = score.unflatten(-1, (kv_count, kv.blocks)).amax(-2)
            if form == "code":
                base = most.amax(-1, keepdim=True)
            else:
                base = score.logsumexp(-1, keepdim=True)
            base.clamp_(min=torch.finfo(work).min)  # no key at all: weight 0, not nan
            weight = most.sub_(base).exp_().masked_fill_(no_query[:, :, span], 0)
            of_queries = weight.unflatten(2, (-1, q_count))
            best[:, part, first : first + step] = of_queries.amax(3)
            mean[:, part, first : first + step] = of_queries.sum(3)
    return best, mean.div_(drawn)


def sampled_slots(layout: BlockLayout, heads: Tensor, samples: int, seed: int) -> Tensor:
    """Draw slots of each block: int64 ``[batch|1, heads, blocks, min(samples, max_length)]``.

    The places depend on the seed and the head's number alone. -1 stands where a block has no
    further token.
    """
    count = min(samples, layout.max_length)
    device = layout.device
    order = seeded_order(seed, heads[None], layout.max_length, device)[:, :, None]
    lengths = layout.lengths[..., None]
    has = order < lengths  # [batch, heads, blocks, max_length]
    rank = torch.where(has, has.cumsum(-1) - 1, count).clamp_(max=count)
    place = order.new_full((*has.shape[:3], count + 1), -1)
    place.scatter_(-1, rank, order.expand_as(has))
    place = place[..., :count]
    found = torch.arange(count, device=device) < lengths
    return torch.where(found, place + layout.starts[..., None], -1)
