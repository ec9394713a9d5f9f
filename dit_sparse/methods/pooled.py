# SPDX-License-Identifier: Apache-2.0
"""Mean-pooled selection: a block pair is worth what its mean query and mean key say.

Source: Zhang et al. 2025, "SpargeAttn: Accurate Sparse Attention Accelerating Any Model
Inference", arXiv:2502.18137, first stage, as its authors advise to call it (pure mean-pooled
top-k: their self-similarity threshold then passes nearly every block). Its second stage and its
quantised kernels are no part of a plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dit_sparse.core.call import Method
from dit_sparse.errors import StrategyError
from dit_sparse.methods.lists import (
    check_block_size,
    check_compensate,
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
    from dit_sparse.core.plan import BlockPlan
    from dit_sparse.core.traits import Params


@dataclass(frozen=True, slots=True)
class Pooled(Method):
    """Keep, in every row of blocks, the key blocks whose mean key suits the mean query best.

    The score of query block p and key block r is mean(q in p) . mean(k in r) * scale; for top-p
    its softmax over the video's key blocks is taken. Samples, heads and CFG branches choose
    apart. Text queries and text keys are kept whole, on top; padding takes no part. The first
    sparse call chooses; there is no dense step.

    Args:
        select: "top_k": a fixed share of blocks in every row. "top_p": the fewest blocks that
            hold a fixed share of the row's weight, so that rows differ.
        density: For top_k: share of video key blocks that a row keeps, in (0, 1]; SpargeAttn's
            advice is 0.5. Higher is closer to dense and slower.
        top_p: For top_p: share of the weight to hold, in (0, 1]; 1 keeps everything.
        floor: For top_p: share of video key blocks that a row keeps at least, in [0, 1]; one
            block is always kept.
        refresh: Steps for which a choice lives, >= 1. 1 chooses on every step; higher is cheaper
            and staler, and keeps the lists in memory.
        block_size: Tokens in a block, 1 to 1024.
        compensate: "none", or "means": each dropped key block is read as one key, its mean.
    """

    summary: ClassVar[str] = (
        "dynamic: top-k or top-p blocks by mean query and mean key (SpargeAttn's selector, "
        "2502.18137)"
    )
    example: ClassVar[Params] = {"density": 0.4, "block_size": 8, "refresh": 2}
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": ("",), "quick": ("",)}
    density_params: ClassVar[tuple[str, ...]] = ("density", "select", "top_p")
    stays: ClassVar[str] = "density, top_p and floor are fractions"

    select: Literal["top_k", "top_p"] = "top_k"
    density: float = 0.5
    top_p: float = 0.9
    floor: float = 0.0
    refresh: int = 1
    block_size: int = 128
    compensate: Literal["none", "means"] = "none"

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.select not in {"top_k", "top_p"}:
            raise StrategyError(f"select must be 'top_k' or 'top_p', got {self.select!r}")
        check_share("density", self.density, zero=False, hint=0.5)
        check_share("top_p", self.top_p, zero=False, hint=0.9)
        check_share("floor", self.floor, zero=True, hint=0.0)
        check_compensate(self.compensate)
        check_refresh(self.refresh)
        check_block_size(self.block_size)

    @property
    def asked_density(self) -> float | None:
        """The density of top-k; what top-p keeps depends on the content."""
        return self.density if self.select == "top_k" else None

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:
        """Choose by pooled scores, or reuse the last choice."""
        q, kv = call.layout(self.block_size), call.key_layout(self.block_size)
        video = video_blocks(call, self.block_size)

        def choose(heads: slice) -> tuple[Tensor, Tensor, Tensor]:
            query, key = call.query[:, :, heads], call.key[:, :, heads]
            scores = ops.pooled_scores(query, key, q, kv, call.scale)[:, :, video, video]
            blocks = scores.shape[-1]
            if self.select == "top_k":
                return ops.select_top_k(scores, share_of(self.density, blocks))
            floor = share_of(self.floor, blocks)
            return ops.select_top_p(scores.softmax(-1), self.top_p, floor)

        plan = reused_plan(call, self.block_size, self.refresh, choose)
        return compensated(plan, self.compensate)
