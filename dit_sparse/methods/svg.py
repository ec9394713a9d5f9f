# SPDX-License-Identifier: Apache-2.0
"""SVG: each head is spatial or temporal, found online on some rows.

Source: Xi et al. 2025, "Sparse VideoGen: Accelerating Video Diffusion Transformers with
Spatial-Temporal Sparsity", arXiv:2502.01776, and its released code, with the faults of that code
mended.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from dit_sparse.core.call import Method
from dit_sparse.core.plan import BlockPlan
from dit_sparse.methods.head_bands import (
    SPATIAL,
    TEMPORAL,
    HeadBands,
    band_errors,
    band_width,
    head_bands,
)
from dit_sparse.methods.lists import (
    check_block_size,
    check_compensate,
    check_count,
    check_refresh,
    check_seed,
    check_share,
    compensated,
    identity,
    listed_plan,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.call import AttentionCall, Ops
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.core.traits import Params


@dataclass(frozen=True, slots=True)
class SVG(Method):
    """Give every head the band that changes its output less: along frames, or along patches.

    A spatial head sees tokens near to it frame by frame (raster order), a temporal head tokens
    near to it patch by patch (all frames of a patch side by side), both within W tokens. On
    ``rows`` video tokens, drawn over the whole video, the outputs by either band and by all keys
    are computed in fp32; the band with the smaller mean squared error is the head's. Temporal
    heads are reordered patch by patch, so that their band is of whole blocks too. Samples, heads
    and CFG branches choose apart; the rows depend on seed, layer and step alone.

    W = N - S sqrt(1 - density) for N video tokens of S tokens in all: the band and the rows and
    columns of text then are ``density`` of all pairs. The released code has
    W = S (1 - sqrt(1 - (density - 2 text / S))), the same without text, and with text narrower by
    about text (1 / sqrt(1 - density) - 1) tokens: 40 of 15,694 for HunyuanVideo at 720p. It then
    rounds W to blocks of 128, down for HunyuanVideo and CogVideoX, up for Wan; here a block pair
    is kept where the band keeps any pair in it. Text queries and text keys are kept whole; padding
    takes no part.

    Mended: the rows are judged by the very blocks that are computed (the released code judges by
    a fixed narrower band, without text columns for CogVideoX), they are drawn from all frames
    instead of the first 10,000 tokens, and the sink is the first frame in both orders.

    An image (one frame) is read with its rows for frames, and without a sink.

    Args:
        density: Share of all pairs that the band and the text keep, in (0, 1]; the released
            scripts have 0.3 (Wan), 0.25 (HunyuanVideo 720p, CogVideoX 1.5), 0.2 (HunyuanVideo
            480p). Higher is closer to dense and slower.
        sink: Every query keeps the first frame's keys, on top of ``density`` (videos only). The
            released code has it for Wan, not for HunyuanVideo and CogVideoX.
        rows: Rows to judge by, 1 to 4096; 64 in the released scripts (CogVideoX 32). More is surer
            and costs as many dense rows, three times.
        refresh: Steps for which a choice lives, >= 1; SVG chooses on every step.
        seed: For the draw, from 0.
        block_size: Tokens in a block, 1 to 1024; SVG has 128.
        compensate: "none", or "means": each dropped key block is read as one key, its mean.
    """

    summary: ClassVar[str] = (
        "dynamic: a spatial or temporal band per head, selected from sampled rows (SVG, "
        "2502.01776)"
    )
    example: ClassVar[Params] = {"density": 0.4, "rows": 16, "sink": False, "block_size": 8}
    stays: ClassVar[str] = "density is a fraction of pairs, and the number of sampled rows "
    "stays the same"

    density: float = 0.3
    sink: bool = True
    rows: int = 64
    refresh: int = 1
    seed: int = 0
    block_size: int = 128
    compensate: Literal["none", "means"] = "none"

    def __post_init__(self) -> None:
        """Check ranges."""
        check_share("density", self.density, zero=False, hint=0.3)
        check_count("rows", self.rows, (1, 4096), 64)
        check_refresh(self.refresh)
        check_seed(self.seed)
        check_compensate(self.compensate)
        check_block_size(self.block_size)

    def drifts(self, old: LatentsGrid, new: LatentsGrid) -> tuple[str, ...]:  # noqa: ARG002
        """Warn that the number of rows does not grow with the grid."""
        return ("the same number of sampled rows represents more tokens",)

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:  # noqa: ARG002
        """Choose each head's band by sampled rows, or reuse the last choice."""
        if self.density == 1:  # nothing to choose
            return BlockPlan.full(call.layout(self.block_size), call.key_layout(self.block_size))
        bands = self.bands(call)
        state = call.state
        age = call.step - state["made"] if state.get("for") == identity(call) else -1
        if not 0 <= age < self.refresh:
            state["kinds"] = self._kinds(call, bands)
            state["for"], state["made"] = identity(call), call.step
        kinds = state["kinds"]
        order = bands.order[kinds]
        plan = listed_plan(call, self.block_size, bands.lists[kinds], bands.counts[kinds])
        plan = replace(plan, q_permutation=order, kv_permutation=order)
        return compensated(plan, self.compensate)

    def bands(self, call: AttentionCall) -> HeadBands:
        """Look up (or build, once per geometry) both bands."""
        grid, device = call.grid, call.query.device

        def build() -> HeadBands:
            grid.check_blocks(self.block_size)
            width = band_width(grid, self.density)
            sink = self.sink and grid.frames > 1
            return head_bands(grid, self.block_size, width, sink=sink).to(device)

        return call.once(("svg", self.density, self.sink, self.block_size, grid, device), build)

    def sampled_rows(self, layer: int, step: int, video_tokens: int) -> Tensor:
        """Draw the rows to judge by, with replacement; all where there are no more: int64, CPU."""
        if self.rows >= video_tokens:
            return torch.arange(video_tokens)
        random = torch.Generator().manual_seed((self.seed * 1009 + layer) * 1009 + step)
        return torch.randint(video_tokens, (self.rows,), generator=random)

    def _kinds(self, call: AttentionCall, bands: HeadBands) -> Tensor:
        """Choose: int64 ``[batch, heads]``, SPATIAL where neither is better."""
        rows = self.sampled_rows(call.layer, call.step, call.grid.video_tokens)
        errors = band_errors(call, bands, rows.to(call.query.device, non_blocking=True))
        errors = errors.masked_fill(errors.isnan(), torch.inf)  # nan is the worst, not the best
        return torch.where(errors[TEMPORAL] < errors[SPATIAL], TEMPORAL, SPATIAL)
