# SPDX-License-Identifier: Apache-2.0
"""Any plan as one of equal, aligned blocks: for kernels that know no other.

Each block is moved to slots of its own, ``size`` of them, and what it does not fill stays empty.
That costs a gather of query, key and value and a scatter of the output, and the empty slots; where
blocks are equal already and nothing is permuted, only the end is padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dit_sparse.kernels.permute import gather_tokens, inverse_permutation

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.grid import BlockLayout
    from dit_sparse.core.plan import BlockPlan

WASTE = 1.5  # slots per token, beyond which equal blocks are no sensible form of a plan


@dataclass(frozen=True, slots=True)
class Padded:
    """A plan's blocks in slots of ``q_size`` and ``kv_size``, cut into ``split`` parts each.

    Args:
        q_slots: Token of every query slot, -1 where empty: ``[batch|1, heads|1, slots]``.
        kv_slots: The same for keys; keys in no block stand nowhere.
        kv_lengths: Filled slots of each part of a key block, int32 ``[batch|1, heads|1, parts]``.
        kv_indices: Kept parts, ascending, int32 ``[batch|1, heads|1, q_parts, cap]``.
        kv_num_blocks: How many, int32 ``[batch|1, heads|1, q_parts]``.
        q_size: Slots of a part of a query block.
        kv_size: Slots of a part of a key block.
    """

    q_slots: Tensor
    kv_slots: Tensor
    kv_lengths: Tensor
    kv_indices: Tensor
    kv_num_blocks: Tensor
    q_size: int
    kv_size: int

    def inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put query, key and value into slots: each ``[batch, slots, heads, head_dim]``."""
        return (
            gather_tokens(query, self.q_slots),
            gather_tokens(key, self.kv_slots),
            gather_tokens(value, self.kv_slots),
        )

    def results(self, output: Tensor, lse: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Put output and LSE ``[batch, heads, slots]`` back to the tokens."""
        token = inverse_permutation(self.q_slots, tokens)
        token = token.expand(*lse.shape[:2], -1)
        return gather_tokens(output, token, padding=False), lse.float().gather(2, token)


def padded(plan: BlockPlan, q_size: int, kv_size: int) -> Padded:
    """Move the blocks of ``plan`` to parts of ``q_size`` and ``kv_size`` slots."""
    q_split, kv_split = parts(plan.q, q_size), parts(plan.kv, kv_size)
    part = torch.arange(kv_split, dtype=torch.int32, device=plan.device)
    indices = (plan.kv_indices[..., None] * kv_split + part).flatten(-2)
    lengths = (plan.kv.lengths[..., None] - part * kv_size).clamp(0, kv_size).flatten(2)
    return Padded(
        slots_of(plan.q, q_size * q_split, plan.q_permutation),
        slots_of(plan.kv, kv_size * kv_split, plan.kv_permutation),
        lengths,
        indices.repeat_interleave(q_split, 2),
        (plan.kv_num_blocks * kv_split).repeat_interleave(q_split, 2),
        q_size,
        kv_size,
    )


def parts(layout: BlockLayout, size: int) -> int:
    """Give the parts of ``size`` slots that the longest block needs."""
    return -(-layout.max_length // size)


def slots_of(layout: BlockLayout, size: int, permutation: Tensor | None) -> Tensor:
    """Give every slot's token, -1 where empty: int64 ``[batch|1, heads|1, blocks * size]``."""
    offset = torch.arange(size, dtype=torch.int32, device=layout.device)
    live = (offset < layout.lengths[..., None]).flatten(2)
    slot = (layout.starts[..., None] + offset).flatten(2).long()
    if permutation is None:
        return slot.masked_fill_(~live, -1)
    lead = torch.broadcast_shapes(slot.shape[:2], permutation.shape[:2])
    slot = slot.masked_fill_(~live, 0).expand(*lead, -1)
    token = permutation.expand(*lead, -1).gather(-1, slot)
    return token.masked_fill_(~live, -1)


def reasons_against_padding(plan: BlockPlan, q_size: int, kv_size: int) -> list[str]:
    """Say where equal blocks would be a waste: blocks of very unequal length."""
    reasons = []
    for side, layout, size in (("query", plan.q, q_size), ("key", plan.kv, kv_size)):
        slots = layout.blocks * parts(layout, size) * size
        if slots > WASTE * layout.slots + 2 * size * parts(layout, size):
            reasons.append(
                f"wants equal {side} blocks: {layout.blocks} of up to {layout.max_length} tokens "
                f"would be padded from {layout.slots} to {slots}"
            )
    return reasons
