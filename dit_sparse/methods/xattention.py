# SPDX-License-Identifier: Apache-2.0
"""XAttention: a block pair is worth what the antidiagonals in it hold.

Source: Xu et al. 2025, "XAttention: Block Sparse Attention with Antidiagonal Scoring",
arXiv:2503.16428, in its non-causal form for video models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from dit_sparse.core.call import Method
from dit_sparse.methods.levels import threshold_at
from dit_sparse.methods.lists import (
    check_block_size,
    check_compensate,
    check_count,
    check_refresh,
    check_share,
    compensated,
    reused_plan,
    share_of,
    video_blocks,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from dit_sparse.core.call import AttentionCall, Ops
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.core.plan import BlockPlan
    from dit_sparse.core.traits import Params


@dataclass(frozen=True, slots=True)
class XAttention(Method):
    """Keep, in every row, the fewest key blocks whose estimated softmax mass reaches a threshold.

    Runs of ``stride`` = S tokens are folded into one, the queries' in reverse: their product is
    the sum over the antidiagonal of an S x S cell, and its softmax over all runs of keys (mean
    score, fp32) estimates the cell's mass at 1 / S of the products. Blocks are taken heaviest
    first while the mass before them is below threshold * mass of the row's video blocks. With
    stride 1 the mass is exact.

    The released code, in its form for video, also keeps the first key block in every row, whatever
    it holds: it comes on top of the blocks that reach the threshold. ``sink`` does so.

    Unlike the released code: text queries and text keys are kept whole, on top, so that at least
    the threshold's share of the row's whole estimated mass is kept; padding takes no part; any
    batch and block size. Samples, heads and CFG branches choose apart.

    Args:
        threshold: Share of the mass to hold, in (0, 1]; the paper has 0.9 and 0.95 for video
            models. Higher is closer to dense and slower; 1 keeps everything.
        stride: Tokens in a run, 1 to 1024; the paper has 8 for video. Higher is cheaper and
            coarser.
        floor: Share of video key blocks that a row keeps at least, in [0, 1]; one block is
            always kept.
        sink: Keep the first video key block in every row, on top, as the released code does.
        refresh: Steps for which a choice lives, >= 1; the paper chooses on every step. Higher is
            cheaper and staler, and keeps the lists in memory.
        block_size: Tokens in a block, 1 to 1024; the paper has 128.
        compensate: "none", or "means": each dropped key block is read as one key, its mean.
    """

    summary: ClassVar[str] = (
        "dynamic: the fewest blocks that reach a share of the antidiagonal mass (XAttention, "
        "2503.16428)"
    )
    everything: ClassVar[Params] = {"threshold": 1.0}
    example: ClassVar[Params] = {"threshold": 0.6, "stride": 4, "block_size": 8}
    cheap_planning: ClassVar[Params] = {"refresh": 4}
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": ("", "compensate=means")}
    density_params: ClassVar[tuple[str, ...]] = ("threshold",)
    stays: ClassVar[str] = "threshold and floor are fractions, and antidiagonals keep their "
    "length"

    threshold: float = 0.9
    stride: int = 8
    floor: float = 0.0
    sink: bool = False
    refresh: int = 1
    block_size: int = 128
    compensate: Literal["none", "means"] = "none"

    def __post_init__(self) -> None:
        """Check ranges."""
        check_share("threshold", self.threshold, zero=False, hint=0.9)
        check_count("stride", self.stride, (1, 1024), 8)
        check_share("floor", self.floor, zero=True, hint=0.0)
        check_compensate(self.compensate)
        check_refresh(self.refresh)
        check_block_size(self.block_size)

    @classmethod
    def at_density(cls, density: float, grid: LatentsGrid, block_size: int) -> Params:  # noqa: ARG003
        """Guess the threshold."""
        return {"threshold": threshold_at(density)}

    @classmethod
    def knobs(cls, share: float, grid: LatentsGrid, block_size: int) -> tuple[Params, ...]:  # noqa: ARG003
        """Turn the threshold."""
        return ({"threshold": share},)

    def drifts(self, old: LatentsGrid, new: LatentsGrid) -> tuple[str, ...]:  # noqa: ARG002
        """Warn that the threshold keeps another share."""
        return ("its threshold keeps another fraction if attention spreads over more tokens",)

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:
        """Choose by antidiagonal mass, or reuse the last choice."""
        q, kv = call.layout(self.block_size), call.key_layout(self.block_size)
        video = video_blocks(call, self.block_size)
        # A run is never longer than a block; a longer one would only be padded.
        stride = min(self.stride, self.block_size)

        def choose(heads: slice) -> tuple[Tensor, Tensor, Tensor]:
            query, key = call.query[:, :, heads], call.key[:, :, heads]
            mass = ops.antidiagonal(query, key, q, kv, stride, call.scale)[:, :, video, video]
            floor = share_of(self.floor, mass.shape[-1])
            kept = ops.select_top_p(mass, self.threshold, floor)
            return _with_first(*kept) if self.sink else kept

        plan = reused_plan(call, self.block_size, self.refresh, choose)
        return compensated(plan, self.compensate)


def _with_first(mask: Tensor, lists: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add block 0 to every row that lacks it; the lists stay ascending."""
    missing = ~mask[..., :1]
    room = torch.nn.functional.pad
    lists = torch.where(missing, room(lists, (1, 0)), room(lists, (0, 1)))[..., : mask.shape[-1]]
    mask = torch.cat([torch.ones_like(missing), mask[..., 1:]], -1)
    return mask, lists, counts + missing[..., 0].to(counts.dtype)
