# SPDX-License-Identifier: Apache-2.0
"""A one-dimensional window over a frame's tokens in raster order, at the same place in all frames.

Source: the mask in the released code of Chen et al. 2025, "Re-ttention: Ultra Sparse Visual
Generation via Attention Statistical Reshape", arXiv:2505.22918.
Static: the same for every layer, head and step; made once per geometry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from dit_sparse.core.call import Method
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import StrategyError
from dit_sparse.methods.levels import largest
from dit_sparse.methods.lists import (
    check_block_size,
    check_compensate,
    compensated,
)
from dit_sparse.methods.windows import AxisRule, product_plan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from dit_sparse.core.call import AttentionCall, Ops
    from dit_sparse.core.traits import Params
    from dit_sparse.methods.order import Ordered

_SLACK = 1e-9  # 0.29 * 100 is 28.999999999999996 in binary


@dataclass(frozen=True, slots=True)
class Window(Method):
    """Keep the keys whose place in their frame is near to the query's, in every frame.

    A token's place is its raster index within its frame. With L tokens in a frame and
    r = int(share * L) // 2, a query at place k sees the places k - r to k + r of all frames: up
    to 2 r + 1 of L. At the ends of a frame the window is cut, not shifted. Neighbours in raster
    order are those of the same row, and of the rows above and below only where r reaches a row's
    width: ``gna`` has windows in two and three dimensions. Text queries and text keys are kept
    whole; padding takes no part.

    Tokens are ordered place by place, the frames of a place together, so that a window is one run
    of blocks. A block that the window's border cuts is cut there by a bit tile, so the kept pairs
    are the rule's own.

    Args:
        share: Width of the window over the tokens of a frame, in (0, 2]; Re-ttention has 1 / 32.
            Higher is closer to dense and slower; at 2 every query sees all.
        exact: Cut blocks at the window's border. False keeps whole every block that the window
            touches: denser, but open to kernels without bit tiles.
        block_size: Tokens in a block at most, 1 to 1024.
        compensate: "none", or "means": each dropped key block is read as one key, its mean.
    """

    summary: ClassVar[str] = (
        "static window in a frame's raster order, identical in all frames (Re-ttention's mask, "
        "2505.22918)"
    )
    static: ClassVar[bool] = True
    everything: ClassVar[Params] = {"share": 2.0}
    example: ClassVar[Params] = {"share": 0.25, "block_size": 8}
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": ("", "compensate=means")}
    density_params: ClassVar[tuple[str, ...]] = ("share",)
    stays: ClassVar[str] = "share is a fraction of a frame's tokens"

    share: float = 0.03125
    exact: bool = True
    block_size: int = 128
    compensate: Literal["none", "means"] = "none"

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.share <= 2:
            raise StrategyError(f"share must lie in (0, 2], got {self.share}; try 0.03125")
        check_compensate(self.compensate)
        check_block_size(self.block_size)

    @classmethod
    def at_density(cls, density: float, grid: LatentsGrid, block_size: int) -> Params:
        """Bisect the share; blocks are kept whole, as cut ones would be computed all the same."""

        def params(share: float) -> Params:
            return {"share": share, "exact": False, "block_size": block_size}

        return params(largest(lambda share: cls(**params(share)), density, grid, 1e-6, 2))

    @classmethod
    def knobs(cls, share: float, grid: LatentsGrid, block_size: int) -> tuple[Params, ...]:  # noqa: ARG003
        """Turn the share, exact to the token."""
        return ({"share": 2 * share},)

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:  # noqa: ARG002
        """Look up (or build, once per geometry) the plan; leave padded text keys out."""
        grid, device = call.grid, call.query.device
        plan, ordered = call.once((self, grid, device), lambda: self._build(grid, device))
        by_text = call.key_layout(self.block_size)
        plan = plan.with_keys(by_text if ordered is None else ordered.key_layout(call.text_valid))
        return compensated(plan, self.compensate)

    def reach(self, frame_tokens: int) -> int:
        """Give r, the places that a query sees on each side of its own."""
        return min(int(self.share * frame_tokens + _SLACK) // 2, frame_tokens - 1)

    def _build(self, grid: LatentsGrid, device: torch.device) -> tuple[BlockPlan, Ordered | None]:
        grid.check_blocks(self.block_size)
        frames, places = grid.frames, grid.frame_tokens
        # The same tokens as one row per frame: places take the part of columns.
        lines = LatentsGrid(frames, 1, places, grid.text_length, grid.text_first)
        rules = (
            AxisRule(frames, frames, 1, 1),
            AxisRule(1, 1, 1, 1),
            _CutRule(places, 2 * self.reach(places) + 1, 1, 1),
        )
        tile = (min(frames, self.block_size), 1, max(1, self.block_size // frames))
        found = product_plan(lines, rules, tile, self.block_size, exact=self.exact)
        if found is None:
            layout = grid.layout(self.block_size)
            return BlockPlan.full(layout, layout).to(device), None
        plan, ordered = found
        return plan.to(device), ordered.to(device)


class _CutRule(AxisRule):
    """A window that ends where the axis does, instead of being shifted inwards."""

    __slots__ = ()

    def windows(self) -> tuple[Tensor, Tensor]:
        """Give the first and the last place that each coordinate sees: int64 ``[extent]``."""
        at, reach = torch.arange(self.extent), self.window // 2
        return (at - reach).clamp(min=0), (at + reach).clamp(max=self.extent - 1)
