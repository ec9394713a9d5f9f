# SPDX-License-Identifier: Apache-2.0
"""Where a head looks: the softmax mass of its blocks, and how much of it a few blocks hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dit_sparse.core.plan import BlockPlan

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.call import AttentionCall
    from dit_sparse.kernels.dispatch import Backends

BLOCK = 64  # tokens
SIDE = 48  # rows and columns of a map at most
SHARES = (0.125, 0.25, 0.5)  # of the key blocks


@dataclass(frozen=True)
class HeadMass:
    """What one head looks at in one call.

    Args:
        map: Share of a query's softmax mass in each bin of keys, mean over the bin's queries:
            ``[queries, keys]``, rows sum to 1.
        heaviest: Share of the mass that each query block finds in the heaviest ``SHARES`` of its
            key blocks, mean over query blocks.
        text: Share of the video queries' mass on text; None where there is no text.
    """

    map: Tensor
    heaviest: tuple[float, ...]
    text: float | None


def attention_mass(call: AttentionCall, ops: Backends) -> list[HeadMass]:
    """Compute the exact mass of every head, samples averaged; nothing of S x S is made.

    Mass of a block pair: the sum of exp(score - LSE) over it, LSE of the dense attention.

    Args:
        call: All heads of one layer.
        ops: The kernels.
    """
    with torch.no_grad():
        layout, keys = call.layout(BLOCK), call.key_layout(BLOCK)
        everything = BlockPlan.full(layout, keys)
        _, lse = ops.attend(call.query, call.key, call.value, everything, call.scale)
        mass = ops.block_mass(call.query, call.key, lse, layout, keys, call.scale)
    mass = mass.double().mean(0).cpu()  # [heads, blocks, blocks]
    size = layout.lengths[0, 0].double().cpu()
    share = mass / size[:, None]
    blocks = share.shape[-1]
    ranked = share.sort(-1, descending=True).values.cumsum(-1).clamp(max=1)  # above by rounding
    text = call.grid.text_blocks(BLOCK)
    video = ~text
    side = min(SIDE, blocks)
    bin_of = torch.arange(blocks) * side // blocks
    rows = torch.zeros(side).double().index_add_(0, bin_of, size)
    found = []
    for head in range(share.shape[0]):
        pooled = torch.zeros(side, blocks).double().index_add_(0, bin_of, mass[head])
        pooled = torch.zeros(side, side).double().index_add_(1, bin_of, pooled)
        heaviest = tuple(
            float(ranked[head, :, max(1, round(part * blocks)) - 1].mean()) for part in SHARES
        )
        on_text = None
        if text.any():
            on_text = float(share[head][video][:, text].sum(-1).clamp(max=1).mean())
        found.append(HeadMass(pooled / rows[:, None], heaviest, on_text))
    return found
