# SPDX-License-Identifier: Apache-2.0
"""BLADE's adaptive block-sparse attention: ASA, and with pooled keys ASA_G.

Source: Gu et al. 2025, "Video-BLADE: Block-Sparse Attention Meets Step Distillation for Efficient
Video Generation", arXiv:2508.10774. Where paper and released code differ, both are offered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from dit_sparse.core.call import Method
from dit_sparse.core.grid import BlockLayout, cut
from dit_sparse.core.merge import merge, writable
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import StrategyError
from dit_sparse.methods.gilbert import gilbert_order
from dit_sparse.methods.lists import (
    MAX_COUNT,
    check_block_size,
    check_compensate,
    check_count,
    check_refresh,
    check_seed,
    check_share,
    compensated,
    head_numbers,
    reused_plan,
    select_by_two,
    video_blocks,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from dit_sparse.core.call import AttentionCall, Ops
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.core.traits import Params

_SLACK = 1e-9  # 0.29 * 100 is 28.999999999999996 in binary
_SEEDS = 2**61  # the draw doubles it, and a generator takes 64 bits


@dataclass(frozen=True, slots=True)
class Blade(Method):
    """Order the video along a Hilbert curve, keep the blocks that sampled tokens look at most.

    Tokens stand along a generalised Hilbert curve through frames, rows and columns. ``samples``
    tokens of each block are drawn; a block pair scores the largest weight among its drawn queries
    and keys. In the form "code" each drawn query gives 1 to its best block, so that many blocks of
    a row score exactly 1: among equal scores the mean over the drawn queries decides, where the
    released code takes whichever its sort puts first.

    Each row keeps the fewest blocks whose scores reach ``threshold`` of the row's, but no fewer
    than ``floor`` and no more than ``density`` of the video's blocks: the published settings act
    as a plain top-k of ``density``. (The released code stops one block short of the threshold.)

    ASA_G (``pooled`` above 0): all video queries also read the means of n = ``pooled`` keys and
    values that follow each other on the curve, each counting as n keys by + ln n: the two results
    are merged by their log-sum-exps in fp32. Kept keys so count twice, as in the released code.
    The plan's density does not count the pooled keys; they add 1 / n.

    Text queries and text keys are kept whole; padding takes no part. Whether text takes part in
    the pooled branch is ``pool_text``. The released CogVideoX code puts text behind the video,
    forms groups of n over both, a group across their border included, and merges the branch into
    text rows too: its LoRA expects ``pool_text``. Two things differ from it still: its last two
    blocks, kept whole for the text's sake, hold some of the curve's last video tokens too (14 of
    them at 480 x 720 x 49 frames); and here the last, shorter group counts as the keys it has.
    Wan has no text in this attention, so there it makes no difference. Samples,
    heads and CFG branches choose apart. The draw depends on the seed and the model's own numbers
    of layer, step and head alone: not on the batch, nor on which heads share a rule or a GPU.

    Args:
        density: Largest share of video key blocks that a row keeps, in (0, 1]; rounded down, one
            at least. BLADE has 0.17 (Wan) and 0.1 (CogVideoX). Higher is closer to dense.
        threshold: Share of a row's scores to hold, in (0, 1]; BLADE has 0.95. 1 is plain top-k.
        floor: Smallest share of video key blocks that a row keeps, in [0, density].
        samples: Tokens drawn of each block, 1 to 1024; the code has 32, the paper 16. More is
            truer and costs its square.
        form: "code", which the released weights were trained with: exp(score - the query's best
            score). "paper": softmax weight among the drawn keys.
        pooled: Tokens in a pooled key, up to a million; 0 for none (ASA). BLADE has 30 (Wan) and
            15 (CogVideoX) for its distilled models. Larger is cheaper and coarser.
        pool_text: Pool text keys too, and let text queries read the pooled keys, as BLADE's
            CogVideoX code does. False: text is exact.
        seed: For the draw, from 0.
        refresh: Steps for which a choice lives, >= 1; BLADE chooses on every step.
        block_size: Tokens in a block, 1 to 1024; BLADE has 128.
        compensate: "none", or "means": each dropped key block is read as one key, its mean.
    """

    summary: ClassVar[str] = (
        "dynamic: Hilbert-ordered blocks by their largest sampled weight, optional pooled keys "
        "(BLADE's ASA and ASA_G, 2508.10774)"
    )
    everything: ClassVar[Params] = {"density": 1.0, "threshold": 1.0}
    example: ClassVar[Params] = {"density": 0.4, "samples": 4, "pooled": 6, "block_size": 8}
    cheap_planning: ClassVar[Params] = {"refresh": 4}
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": ("", "compensate=means")}
    stays: ClassVar[str] = (
        "density, floor and threshold are fractions, and a pooled key represents the same "
        "number of tokens"
    )

    density: float = 0.17
    threshold: float = 0.95
    floor: float = 0.05
    samples: int = 32
    form: Literal["code", "paper"] = "code"
    pooled: int = 0
    pool_text: bool = False
    seed: int = 0
    refresh: int = 1
    block_size: int = 128
    compensate: Literal["none", "means"] = "none"

    def __post_init__(self) -> None:
        """Check ranges."""
        check_share("density", self.density, zero=False, hint=0.17)
        check_share("threshold", self.threshold, zero=False, hint=0.95)
        if not 0 <= self.floor <= self.density:
            raise StrategyError(
                f"floor must lie in [0, density = {self.density}], got {self.floor}; try 0"
            )
        check_count("samples", self.samples, (1, 1024), 32)
        if self.form not in {"code", "paper"}:
            raise StrategyError(f"form must be 'code' or 'paper', got {self.form!r}")
        check_count("pooled", self.pooled, (0, MAX_COUNT), 30)
        check_compensate(self.compensate)
        if self.pooled and self.compensate != "none":
            raise StrategyError(
                f"pooled keys (pooled {self.pooled}) already compensate for dropped keys, so "
                f"compensate must be 'none', got {self.compensate!r}; try pooled 0"
            )
        check_seed(self.seed)
        check_refresh(self.refresh)
        check_block_size(self.block_size)

    @classmethod
    def at_density(cls, density: float, grid: LatentsGrid, block_size: int) -> Params:  # noqa: ARG003
        """Lower the floor with the density."""
        return {"density": density, "floor": min(0.05, density)}

    @property
    def extra_density(self) -> float:
        """Share of the pooled keys, at most: one for n keys."""
        return 1 / self.pooled if self.pooled else 0.0

    def drifts(self, old: LatentsGrid, new: LatentsGrid) -> tuple[str, ...]:  # noqa: ARG002
        """Warn that the number of samples does not grow with the grid."""
        return ("the number of tokens sampled per block does not depend on the number of blocks",)

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:
        """Choose by sampled maxima along the curve, or reuse the last choice."""
        q, kv = call.layout(self.block_size), call.key_layout(self.block_size)
        if self.density == 1 and (self.threshold == 1 or self.floor == 1):
            # Nothing to choose: scores and order would not matter. Pooled keys still add to it.
            return replace(BlockPlan.full(q, kv), complete=not self.pooled)
        order = _order(call)
        video = video_blocks(call, self.block_size)
        draw = (self.seed * 1009 + call.layer) * 1009 + call.step
        numbers = head_numbers(call)

        def choose(heads: slice) -> tuple[Tensor, Tensor, Tensor]:
            query = ops.gather_tokens(call.query[:, :, heads], order, padding=False)
            key = ops.gather_tokens(call.key[:, :, heads], order, padding=False)
            scores, means = (
                x[:, :, video, video]
                for x in ops.tile_maximum(
                    query,
                    key,
                    q,
                    kv,
                    self.samples,
                    call.scale,
                    seed=draw % _SEEDS,
                    form=self.form,
                    heads=numbers[heads],
                )
            )
            least, most = self.limits(scores.shape[-1])
            return select_by_two(
                scores, means, lambda x: ops.select_top_p(x, self.threshold, least, ceiling=most)
            )

        plan = reused_plan(call, self.block_size, self.refresh, choose)
        plan = replace(plan, q_permutation=order, kv_permutation=order)
        return compensated(plan, self.compensate)

    def limits(self, video_blocks: int) -> tuple[int, int]:
        """Give the least and the most blocks that a row keeps."""
        least, most = (
            max(1, int(share * video_blocks + _SLACK)) for share in (self.floor, self.density)
        )
        return least, most

    def finish(self, call: AttentionCall, output: Tensor, lse: Tensor, ops: Ops) -> Tensor:
        """Merge the pooled keys' attention, each key with + ln n, into the rows (ASA_G)."""
        if not self.pooled:
            return output
        grid, device = call.grid, call.query.device
        video = slice(grid.video_start, grid.video_start + grid.video_tokens)
        along = _order(call)[..., video]
        valid = None
        if self.pool_text:
            rows, valid = slice(None), call.text_valid
            text = slice(grid.text_start, grid.text_start + grid.text_length)
            along = torch.cat([along, _order(call)[..., text]], -1)
        else:
            rows = video
        if valid is None:
            place = (self, "pooled", grid, device)
            plan, groups = call.once(place, lambda: self._pooled_plan(along.shape[-1], device))
        else:
            plan, groups = self._pooled_plan(along.shape[-1], device, grid.video_tokens + valid)
        key, value = (
            ops.pool(ops.gather_tokens(x, along, padding=False), groups)
            .transpose(1, 2)
            .to(x.dtype)
            for x in (call.key, call.value)
        )
        coarse, coarse_lse = ops.attend(call.query[:, rows], key, value, plan, call.scale)
        merged = writable(output)
        merged[:, rows] = merge(output[:, rows], lse[..., rows], coarse, coarse_lse)
        return merged

    def _pooled_plan(
        self, tokens: int, device: torch.device, living: Tensor | None = None
    ) -> tuple[BlockPlan, BlockLayout]:
        """Plan queries against all pooled keys, a group of n counting as n keys.

        Args:
            tokens: How many are pooled; as many queries read the pooled keys.
            device: Of the plan.
            living: How many of them are not padding, int ``[batch]``; None: all.
        """
        groups = BlockLayout.from_lengths(cut(tokens, self.pooled), device)
        q = BlockLayout.from_lengths(cut(tokens, self.block_size), device)
        kv = BlockLayout.from_lengths(cut(groups.blocks, self.block_size), device)
        if living is not None:
            groups = _shortened(groups, living.to(device))
            kv = _shortened(kv, (groups.lengths > 0).sum((1, 2)))
        weight = (
            groups.lengths.clamp(min=1).float().log()
        )  # a key of an empty group is in no block
        return replace(BlockPlan.full(q, kv), complete=False, kv_log_weight=weight), groups


def _order(call: AttentionCall) -> Tensor:
    """Look up (or make, once per geometry) the curve's order of the tokens."""
    grid, device = call.grid, call.query.device
    return call.once(("gilbert", grid, device), lambda: gilbert_order(grid).to(device))


def _shortened(layout: BlockLayout, slots: Tensor) -> BlockLayout:
    """End each sample's blocks after so many slots, int ``[batch]``."""
    room = slots[:, None, None].to(torch.int32) - layout.starts
    lengths = torch.minimum(layout.lengths, room.clamp(min=0))
    return replace(layout, starts=layout.starts.expand_as(lengths).contiguous(), lengths=lengths)
