# SPDX-License-Identifier: Apache-2.0
"""SparseD: one exact search early in the run, its blocks reused to the end.

Source: Wang et al. 2025, "SparseD: Sparse Attention for Diffusion Language Models",
arXiv:2509.24014, carried over to latents: text stands for the prompt, video for what is generated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dit_sparse.core.call import Method
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import StrategyError
from dit_sparse.methods.lists import (
    check_block_size,
    check_compensate,
    check_share,
    compensated,
    identity,
    listed_plan,
    remember,
    video_blocks,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.call import AttentionCall, Ops
    from dit_sparse.core.traits import Params

_SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class SparseD(Method):
    """Keep, in every row of blocks, the key blocks that held most mass on one early step.

    The search is on step int(search_step * steps) + 1, counted from 0, as in the released code:
    steps before it are dense. On it the call is dense too, and its LSE gives the
    exact mass of each block, sum exp(score - LSE) (SparseD averages it over the block, which
    ranks whole blocks alike); each video row keeps int(density * blocks) + 1 blocks, as the
    released code does. These are used on all later steps. Text queries and text keys, SparseD's
    prompt, are kept whole instead of being selected apart; padding takes no part. Samples, heads
    and CFG branches are searched apart.

    Where the first sparse call comes later than the search step (dense warm-up, attached in
    mid-generation, other batch or heads than before) it is the search. A run too short for a step
    after the search stays dense.

    Args:
        density: Share of video key blocks that a row keeps, in (0, 1]; SparseD has 0.3 for long
            sequences. Higher is closer to dense and slower.
        search_step: When to search, as a fraction of the run in [0, 1); SparseD has 0.2, which of
            50 steps searches on step 11 and is sparse from step 12, counted from 0. 0 searches on
            the first step. Earlier saves more and costs fidelity.
        block_size: Tokens in a block, 1 to 1024; SparseD has 128 for long sequences, 32 for
            short ones.
        compensate: "none", or "means": each dropped key block is read as one key, its mean.
    """

    summary: ClassVar[str] = (
        "dynamic: blocks with the largest exact softmax mass, searched once and reused "
        "(SparseD, 2509.24014)"
    )
    example: ClassVar[Params] = {"density": 0.4, "search_step": 0.0, "block_size": 8}
    at_start: ClassVar[Params] = {"search_step": 0.0}
    untrainable: ClassVar[str] = "its search is a dense call, so only later steps are sparse"
    stays: ClassVar[str] = "density is a fraction of blocks, and the search step a fraction of "
    "the run"

    density: float = 0.3
    search_step: float = 0.2
    block_size: int = 128
    compensate: Literal["none", "means"] = "none"

    def __post_init__(self) -> None:
        """Check ranges."""
        check_share("density", self.density, zero=False, hint=0.3)
        if not 0 <= self.search_step < 1:
            raise StrategyError(
                "search_step must be a fraction of the run in [0, 1), got "
                f"{self.search_step}; try 0.2"
            )
        check_compensate(self.compensate)
        check_block_size(self.block_size)

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:  # noqa: ARG002
        """Decline (dense), keep all (the search), or reuse its lists."""
        state = call.state
        if state.get("for") == identity(call) and call.step >= state["made"]:
            plan = listed_plan(call, self.block_size, state["lists"], state["counts"])
            return compensated(plan, self.compensate)
        state.clear()
        if not self.search(call.num_steps) <= call.step < call.num_steps - 1:
            return None
        q, kv = call.layout(self.block_size), call.key_layout(self.block_size)
        return BlockPlan.full(q, kv, measured=True)

    def search(self, num_steps: int) -> int:
        """Give the step of a run on which this method searches, unless it is attached later."""
        return int(self.search_step * num_steps + _SLACK) + 1 if self.search_step else 0

    def finish(self, call: AttentionCall, output: Tensor, lse: Tensor, ops: Ops) -> Tensor:
        """Search after the search step's dense attention; returns ``output`` as it is."""
        if call.state.get("for") == identity(call):
            return output
        q, kv = call.layout(self.block_size), call.key_layout(self.block_size)
        video = video_blocks(call, self.block_size)

        def choose(heads: slice) -> tuple[Tensor, Tensor, Tensor]:
            query, key = call.query[:, :, heads], call.key[:, :, heads]
            mass = ops.block_mass(query, key, lse[:, heads].float(), q, kv, call.scale)
            mass = mass[:, :, video, video]
            count = min(int(self.density * mass.shape[-1] + _SLACK) + 1, mass.shape[-1])
            return ops.select_top_k(mass, count)

        remember(call, self.block_size, choose)
        return output
