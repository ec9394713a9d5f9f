# SPDX-License-Identifier: Apache-2.0
"""Radial attention: the window within a frame halves as frames stand further apart.

Source: Li et al. 2025, "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long
Video Generation", arXiv:2506.19852, and its released code (mit-han-lab/radial-attention).
Static: the same for every layer, head and step; made once per geometry.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, isqrt
from typing import TYPE_CHECKING, ClassVar, Literal

from dit_sparse.core.call import Method
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import StrategyError
from dit_sparse.methods.bands import (
    paper_half_widths,
    released_half_widths,
    round_to_blocks,
    round_to_tiles,
)
from dit_sparse.methods.levels import largest
from dit_sparse.methods.lists import (
    check_block_size,
    check_compensate,
    compensated,
)
from dit_sparse.methods.order import ImageTiles, image_tiles

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from dit_sparse.core.call import AttentionCall, Ops
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.core.traits import Params

RELEASED_DECIMATION = 128  # fixed in the released code, whatever the block size


@dataclass(frozen=True, slots=True)
class Radial(Method):
    """Keep a window that halves with each doubling of the distance between frames.

    A query at offset k of frame i sees a key at offset l of frame j where |k - l| is within the
    half width for |i - j|; frames at most one apart see each other whole. ``bands.py`` has both
    formulas. Text queries and text keys are kept whole.

    An image (one frame) is read by the same rule with its rows for frames. Its tokens are then
    ordered in tiles (8 x 16 for block size 128, 8 x 8 for 64), else a block would span whole rows
    and nothing could be dropped; a tile pair is kept where the rule keeps any token pair in it.
    The released code has no images: for them its two block-sized constants are a tile's width.

    Frames shorter than 128 tokens, as in small models, are not what the released code is for: it
    keeps a pair of a frame and a block only by more than a third of 128 rows, so that a frame of
    42 tokens or fewer keeps nothing but the sink and text. Here such a frame is judged by its own
    rows, and keeps more. With blocks of 128 the released windows are whole frames then, and frames
    are thinned out from distance 2 on.

    Args:
        form: "paper": a block pair is kept where the token rule keeps any pair in it, so nothing
            that the rule keeps is lost. The rule's cost grows as n log n; blocks add about
            2 * block_size / (tokens of a frame) to the density of long videos. "released": about
            half as wide, blocks kept by the majority of their columns, far frames thinned out
            where the window would be narrower than 128: n log n in blocks too. Without the code's
            edge loss: a block is judged by the part it has of each frame, so any frames x height
            x width runs.
        decay_factor: Multiplies the window at distances above 1; > 0. Higher is closer to dense
            and slower. The paper's formula has 1; its code used 0.2 (Wan 2.1) to 1.
        block_size: Tokens in a block, 1 to 1024; kernels are fastest at 128 and 64.
        sink: Every query keeps the first frame's keys (videos only). The released code does so
            for Wan, not for HunyuanVideo.
        compensate: "none", or "means": each dropped key block is read as one key, its mean.
    """

    summary: ClassVar[str] = (
        "static window that halves with temporal distance (Radial Attention, 2506.19852)"
    )
    static: ClassVar[bool] = True
    everything: ClassVar[Params] = {"decay_factor": 1e9}
    example: ClassVar[Params] = {"decay_factor": 0.3, "block_size": 8}
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "default": ("", "compensate=means"),
        "quick": ("",),
    }
    density_params: ClassVar[tuple[str, ...]] = ("decay_factor",)
    stays: ClassVar[str] = "windows are fractions of a frame that halve with temporal distance"

    form: Literal["paper", "released"] = "paper"
    decay_factor: float = 1.0
    block_size: int = 128
    sink: bool = True
    compensate: Literal["none", "means"] = "none"

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.form not in {"paper", "released"}:
            raise StrategyError(f"form must be 'paper' or 'released', got {self.form!r}")
        if not (isfinite(self.decay_factor) and self.decay_factor > 0):
            raise StrategyError(
                f"decay_factor must be a number above 0, got {self.decay_factor}; the paper uses "
                "1, the released code 0.2 for Wan 2.1"
            )
        check_compensate(self.compensate)
        check_block_size(self.block_size)

    @classmethod
    def at_density(cls, density: float, grid: LatentsGrid, block_size: int) -> Params:
        """Bisect the logarithm of ``decay_factor``; the sink, 1 / frames, only from 0.5 on."""
        sink = density >= 0.5
        power = largest(
            lambda x: cls(decay_factor=2**x, block_size=block_size, sink=sink),
            density,
            grid,
            -10,
            4,
        )
        return {"decay_factor": float(f"{2**power:.3g}"), "block_size": block_size, "sink": sink}

    @classmethod
    def knobs(cls, share: float, grid: LatentsGrid, block_size: int) -> tuple[Params, ...]:  # noqa: ARG003
        """Turn ``decay_factor`` from 2**-10 to 2**6.

        Band widths are powers of two: on a small grid the density has few values, and the first
        frame kept for all gives others.
        """
        factor = float(2 ** (16 * share - 10))
        return tuple({"decay_factor": factor, "sink": sink} for sink in (False, True))

    def drifts(self, old: LatentsGrid, new: LatentsGrid) -> tuple[str, ...]:
        """Warn that density falls with the number of frames, and of fixed widths."""
        found = []
        if old.frames != new.frames:
            found.append(
                "keeps a smaller fraction of longer videos and a larger fraction of shorter ones"
            )
        if self.form == "released":
            found.append("the narrowest window of the released form keeps its size in tokens")
        return tuple(found)

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:  # noqa: ARG002
        """Look up (or build, once per geometry) the plan; leave padded text keys out."""
        grid, device = call.grid, call.query.device
        build = self._video if grid.frames > 1 else self._image
        plan, tiles = call.once((self, grid, device), lambda: build(grid, device))
        by_text = call.key_layout(self.block_size)
        plan = plan.with_keys(by_text if tiles is None else tiles.key_layout(call.text_valid))
        return compensated(plan, self.compensate)

    def _video(self, grid: LatentsGrid, device: torch.device) -> tuple[BlockPlan, None]:
        layout = grid.layout(self.block_size)  # first: it refuses what is too large to plan
        kept = round_to_blocks(
            grid.frames,
            grid.frame_tokens,
            self.block_size,
            self._half_widths(grid.frames, grid.frame_tokens, self.block_size),
            majority=self.form == "released",
            sink=self.sink,
        )
        mask = _with_text(kept, grid.text_blocks(self.block_size))
        if bool(mask.all()):
            return BlockPlan.full(layout, layout).to(device), None
        return BlockPlan.from_block_mask(mask, layout, layout).to(device), None

    def _image(
        self, grid: LatentsGrid, device: torch.device
    ) -> tuple[BlockPlan, ImageTiles | None]:
        tiles = image_tiles(grid, self.tile)
        width = self.tile[1]
        kept = round_to_tiles(
            tiles.rows, tiles.columns, self._half_widths(grid.height, grid.width, width, width)
        )
        mask = _with_text(kept, tiles.is_text)
        if bool(mask.all()):
            layout = grid.layout(self.block_size)
            return BlockPlan.full(layout, layout).to(device), None
        plan = BlockPlan.from_block_mask(
            mask,
            tiles.layout,
            tiles.layout,
            q_permutation=tiles.permutation,
            kv_permutation=tiles.permutation,
        )
        return plan.to(device), tiles.to(device)

    @property
    def tile(self) -> tuple[int, int]:
        """Height and width of an image's tile: the most even factors of the block size."""
        height = max(n for n in range(1, isqrt(self.block_size) + 1) if self.block_size % n == 0)
        return height, self.block_size // height

    def _half_widths(
        self, units: int, length: int, floor: int, decimate_below: int = RELEASED_DECIMATION
    ) -> Tensor:
        if self.form == "paper":
            return paper_half_widths(units, length, self.decay_factor)
        return released_half_widths(units, length, self.decay_factor, floor, decimate_below)


def _with_text(kept: Tensor, is_text: Tensor) -> Tensor:
    """Put the video's block pairs among the text's, all kept: ``[1, 1, blocks, blocks]``."""
    mask = is_text[:, None] | is_text
    video = ~is_text
    mask[video[:, None] & video] = kept.flatten()
    return mask[None, None]
