# SPDX-License-Identifier: Apache-2.0
"""Sliding-tile attention: a query tile reads the key tiles in a window around it.

Source: Zhang et al. 2025, "Fast Video Generation with Sliding Tile Attention", arXiv:2502.04507.
The window shifts inwards at the borders, so every query tile keeps as many key tiles. Static.

A method of somebody else's: it stands outside the package and is added by one line,
``register_method("sliding_tiles", "tests.outside.sliding_tiles:SlidingTiles")``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import torch

from dit_sparse.core.call import Method
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import StrategyError
from dit_sparse.methods.levels import largest
from dit_sparse.methods.order import boxes


@dataclass(frozen=True, slots=True)
class SlidingTiles(Method):
    """Keep a window of whole tiles, the same for every layer, head and step.

    Args:
        window: Tiles along frames, rows and columns, each from 1 to 1000; larger is closer to
            dense. Cut to the grid.
        tile: Frames, rows and columns of a tile, at most 1024 tokens. Those at the far border
            may be smaller.
    """

    summary: ClassVar[str] = "static window of whole tiles around each tile (STA, 2502.04507)"
    static: ClassVar[bool] = True
    everything: ClassVar = {"window": [1000, 1000, 1000]}
    example: ClassVar = {"window": [1, 2, 3], "tile": [2, 2, 2]}
    stays: ClassVar[str] = "tile is tokens of a block"

    window: tuple[int, int, int] = (3, 3, 3)
    tile: tuple[int, int, int] = (4, 4, 8)

    def __post_init__(self) -> None:
        for name in ("window", "tile"):
            counts = getattr(self, name)
            if min(counts) < 1 or max(counts) > 1000:
                raise StrategyError(f"{name} must hold counts from 1 to 1000, got {counts!r:.80}")
        if prod(self.tile) > 1024:
            raise StrategyError(f"tile must hold at most 1024 tokens, got {self.tile}")

    @classmethod
    def at_density(cls, density, grid, block_size):
        tile = (4, 4, max(1, block_size // 16))
        tiles = [-(-side // size) for side, size in zip(sides(grid), tile, strict=True)]

        def build(share):
            window = tuple(max(1, round(count * share ** (1 / 3))) for count in tiles)
            return cls(window, tile)

        return {"window": build(largest(build, density, grid, 0, 1)).window, "tile": tile}

    @property
    def block_tokens(self):
        return prod(self.tile)

    def rescaled(self, old, new):
        axes = zip(self.window, sides(old), sides(new), strict=True)
        return replace(self, window=tuple(max(1, round(w * n / o)) for w, o, n in axes))

    def plan(self, call, ops):
        plan, order = call.once((self, call.grid, call.query.device), lambda: self.build(call))
        return plan.with_keys(order.key_layout(call.text_valid))

    def build(self, call):
        grid = call.grid
        cuts = [
            list(map(list, torch.arange(side).split(size)))
            for side, size in zip(sides(grid), self.tile, strict=True)
        ]
        order = boxes(grid, tuple(cuts), prod(self.tile))
        kept = torch.ones(1, 1, dtype=torch.bool)
        for count, wanted in zip(map(len, cuts), self.window, strict=True):
            extent, tile = min(wanted, count), torch.arange(count)
            first = (tile - extent // 2).clamp(0, count - extent)[:, None]
            kept = torch.kron(kept, (tile >= first) & (tile < first + extent))
        mask = order.is_text[:, None] | order.is_text
        mask[~order.is_text[:, None] & ~order.is_text] = kept.flatten()
        plan = BlockPlan.from_block_mask(
            mask[None, None],
            order.layout,
            order.layout,
            q_permutation=order.permutation,
            kv_permutation=order.permutation,
        )
        return plan.to(call.query.device), order.to(call.query.device)


def sides(grid):
    return grid.frames, grid.height, grid.width
