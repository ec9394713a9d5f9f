# SPDX-License-Identifier: Apache-2.0
"""Neighborhood attention: each token sees a window around it, shared by runs of tokens on request.

Source: Hassani et al. 2025, "Generalized Neighborhood Attention", arXiv:2504.16922, and NATTEN.
Static: the same for every layer, head and step; made once per geometry.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, floor, prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dit_sparse.core.call import Method
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import StrategyError
from dit_sparse.methods.levels import largest
from dit_sparse.methods.lists import (
    MAX_COUNT,
    check_compensate,
    compensated,
)
from dit_sparse.methods.order import fitted_tile
from dit_sparse.methods.windows import AxisRule, product_plan

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from dit_sparse.core.call import AttentionCall, Ops
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.core.traits import Params
    from dit_sparse.methods.order import Ordered

    Three = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class GNA(Method):
    """Keep, for every video token, a window of frames x rows x columns around it.

    The rule holds on each axis for itself (``windows.AxisRule`` has it in full); a key is kept
    where all three allow it. At the grid's borders the window is shifted inwards, never cut: each
    query keeps exactly the product of the window's extents. Text queries and text keys are kept
    whole; padding takes no part.

    Tokens are ordered in 3-D tiles, one block each, so that kept keys share blocks; with a
    dilation the tokens of one group stand together. A block that a window's border cuts is cut
    there by a bit tile, so the kept pairs are the rule's own. Fewest blocks are cut where the
    stride is the tile, the window an odd number of tiles and the grid a whole number.

    With the tile as stride it is sliding tile attention (STA, arXiv:2502.04507) where the window
    is an odd number of tiles on each axis, or the whole axis. With an even number it is not: the
    window is centred on the middle of the query's tile and so begins half a tile off, in the
    middle of a tile, where STA keeps whole tiles, one more before than after. Density is the same.

    Where the grid is small, an image being one frame: dilation is cut to the axis's length, then
    the window to (length // dilation), the stride to the window. A window as large as the grid is
    dense attention. On an axis shorter than the tile, the tile is as long as the axis, and its
    other sides are doubled while the block holds no more tokens than ``tile``.

    Args:
        window: Tokens that a query sees along frames, rows and columns, each >= 1. Larger is
            closer to dense and slower. The default is the paper's for HunyuanVideo.
        stride: Neighbours that share one window, each in [1, window]; 1 is neighborhood
            attention, ``window`` is blocked attention. Larger is faster, at the same density.
        dilation: Steps from one token of a window to the next, each >= 1; 1 is a solid window.
        tile: Frames, rows and columns of a block; at most 1024 tokens. Kernels are fastest at
            128; 3 x 5 x 8 = 120 divides Wan's 21 x 45 x 80.
        exact: Cut blocks at the window's border. False keeps whole every block that the window
            touches: denser, but open to kernels without bit tiles.
        compensate: "none", or "means": each dropped key block is read as one key, its mean.
    """

    summary: ClassVar[str] = (
        "static window of frames x rows x columns with stride and dilation (GNA, 2504.16922)"
    )
    static: ClassVar[bool] = True
    everything: ClassVar[Params] = {"window": [MAX_COUNT] * 3}
    example: ClassVar[Params] = {"window": [2, 3, 3], "tile": [2, 2, 2]}
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": ("", "compensate=means")}
    density_params: ClassVar[tuple[str, ...]] = ("window",)
    stays: ClassVar[str] = "stride, dilation and tile are counted in tokens within a block"

    window: tuple[int, int, int] = (18, 24, 24)
    stride: tuple[int, int, int] = (1, 1, 1)
    dilation: tuple[int, int, int] = (1, 1, 1)
    tile: tuple[int, int, int] = (4, 4, 8)
    exact: bool = True
    compensate: Literal["none", "means"] = "none"

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, example in (
            ("window", [18, 24, 24]), ("stride", [1, 1, 1]), ("dilation", [1, 1, 1]),
            ("tile", [4, 4, 8]),
        ):  # fmt: skip
            value = getattr(self, name)
            if len(value) != 3 or min(value) < 1 or max(value) > MAX_COUNT:
                raise StrategyError(
                    f"{name} must contain three counts from 1 to {MAX_COUNT} (frames, rows, "
                    f"columns), got {list(value)!r:.80}; try {example}"
                )
        check_compensate(self.compensate)
        if any(s > w for s, w in zip(self.stride, self.window, strict=True)):
            raise StrategyError(
                f"stride must not exceed window on any axis, got {list(self.stride)} for "
                f"{list(self.window)}"
            )
        if prod(self.tile) > 1024:
            raise StrategyError(
                f"tile must contain at most 1024 tokens, got {list(self.tile)} = "
                f"{prod(self.tile)}; try [4, 4, 8]"
            )

    @classmethod
    def at_density(cls, density: float, grid: LatentsGrid, block_size: int) -> Params:
        """Bisect the window, as one share of all sides.

        Blocks are kept whole: cut to the token, the same blocks are computed, with masks on top,
        and what they leave out is missed (``test_whole_tiles_err_less_for_the_same_blocks``).
        """
        tile = (4, 4, 4) if block_size == 64 else (4, 4, 8)

        def params(share: float) -> dict[str, Any]:
            window = _window(share, grid)
            stride = tuple(map(min, tile, window))
            return {"window": window, "stride": stride, "tile": tile, "exact": False}

        return params(largest(lambda share: cls(**params(share)), density, grid, 0, 1))

    @classmethod
    def knobs(cls, share: float, grid: LatentsGrid, block_size: int) -> tuple[Params, ...]:  # noqa: ARG003
        """Turn the window, exact to the token."""
        tile = (1, 8, 8) if grid.frames == 1 else (4, 4, 4)
        return ({"window": _window(share, grid), "tile": tile},)

    def rescaled(self, old: LatentsGrid, new: LatentsGrid) -> GNA:
        """Scale each extent of the window with its axis, in whole strides where it had them."""
        axes = zip(_sides(old), _sides(new), self.window, self.stride, strict=True)
        frames, rows, columns = (_grown(*axis) for axis in axes)
        return replace(self, window=(frames, rows, columns))

    @property
    def block_tokens(self) -> int:
        """Tokens in a tile."""
        return prod(self.tile)

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:  # noqa: ARG002
        """Look up (or build, once per geometry) the plan; leave padded text keys out."""
        grid, device = call.grid, call.query.device
        plan, ordered = call.once((self, grid, device), lambda: self._build(grid, device))
        by_text = call.key_layout(prod(self.tile))
        plan = plan.with_keys(by_text if ordered is None else ordered.key_layout(call.text_valid))
        return compensated(plan, self.compensate)

    def fitted(self, grid: LatentsGrid) -> tuple[Three, Three, Three, Three]:
        """Give window, stride, dilation and tile as they are on this grid."""
        extents = _sides(grid)
        dilation = tuple(map(min, self.dilation, extents))
        groups = tuple(n // d for n, d in zip(extents, dilation, strict=True))
        window = tuple(map(min, self.window, groups))
        stride = tuple(map(min, self.stride, window))
        room = tuple(-(-n // d) for n, d in zip(extents, dilation, strict=True))
        tile = fitted_tile(self.tile, room)
        return window, stride, dilation, tile  # type: ignore[return-value]

    def _build(self, grid: LatentsGrid, device: torch.device) -> tuple[BlockPlan, Ordered | None]:
        window, stride, dilation, tile = self.fitted(grid)
        rules = tuple(map(AxisRule, _sides(grid), window, stride, dilation))
        block = prod(self.tile)
        found = product_plan(grid, rules, tile, block, exact=self.exact)
        if found is None:
            layout = grid.layout(block)
            return BlockPlan.full(layout, layout).to(device), None
        plan, ordered = found
        return plan.to(device), ordered.to(device)


def _sides(grid: LatentsGrid) -> Three:
    return grid.frames, grid.height, grid.width


def _window(share: float, grid: LatentsGrid) -> Three:
    """Take a share of the grid by the same factor on every axis."""
    sides = _sides(grid)
    axes = sum(side > 1 for side in sides) or 1
    return tuple(max(1, round(side * share ** (1 / axes))) for side in sides)


def _grown(old: int, new: int, extent: int, stride: int) -> int:
    """Scale an extent of the window with its axis."""
    if old == new:
        return extent
    unit = stride if extent % stride == 0 else 1
    steps = extent * new / old / unit
    # An axis that was seen whole is seen whole: rounding must not cut its ends off.
    grown = ceil(steps - 1e-9) if extent >= old else floor(steps + 0.5)
    return max(stride, grown * unit)
