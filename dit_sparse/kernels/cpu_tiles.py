# SPDX-License-Identifier: Apache-2.0
"""Bit tiles as the CPU kernel wants them: what they add to the scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dit_sparse.core.tiles import unpack_tiles

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.plan import BlockPlan

TILES_HELD = 16 << 20  # bytes of unpacked bit tiles


def tile_bias(plan: BlockPlan, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Unpack all tiles of a plan, where they are few: most rows of a window share them.

    Returns:
        What they add to the scores, ``[count, queries, keys]``, and which of their queries keep
        a key, ``[count, queries]``; None where they are many, or log weights are added too.
    """
    tiles, keys = plan.tiles, plan.kv.max_length
    if tiles is None or plan.kv_log_weight is not None:
        return None
    if tiles.shape[0] * tiles.shape[1] * keys * dtype.itemsize > TILES_HELD:
        return None
    keep = unpack_tiles(tiles, keys)
    bias = torch.zeros(keep.shape, dtype=dtype).masked_fill_(~keep, -torch.inf)
    return bias, keep.any(-1)


def unpack(tiles: Tensor, part: list[tuple[int, int, int]], queries: int) -> Tensor:
    """Lay the bit tiles of ``part`` side by side: bool ``[queries, keys]``."""
    shift = torch.arange(32, dtype=torch.int32)
    words = tiles[[tile for _, _, tile in part], :queries]  # [part, queries, words]
    bits = ((words[..., None] >> shift) & 1).flatten(-2).bool()
    return torch.cat([bits[i, :, : stop - start] for i, (start, stop, _) in enumerate(part)], 1)
