# SPDX-License-Identifier: Apache-2.0
"""AdaSpa: search the heaviest blocks exactly on a few steps, run sparse on them in between.

Source: Xia et al. 2025, "Training-free and Adaptive Sparse Attention for Efficient Long Video
Generation", arXiv:2502.21079. No public code exists; what the paper leaves open is decided here
and said so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from dit_sparse.core.call import Method
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import StrategyError
from dit_sparse.methods.lists import (
    MAX_ENTRIES,
    check_compensate,
    check_count,
    compensated,
)
from dit_sparse.methods.steps import step_at

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from dit_sparse.core.call import AttentionCall, Ops
    from dit_sparse.core.traits import Params

_SCRATCH = 32 * 2**20  # bytes of block mass held at a time; heads are taken in chunks
_LARGEST = 2**15 - 1


@dataclass(frozen=True, slots=True)
class AdaSpa(Method):
    """Keep, in every row of blocks, the key blocks that hold most of the softmax mass.

    Until the first search step a call is dense. On that step it is dense too, and its LSE gives
    the exact mass of each block, sum exp(score - LSE); each video row keeps the k blocks that
    hold most. A later search step measures the mass anew with the first search's LSE, and runs
    sparse at once. Heads are searched apart, and so are samples and CFG branches.

    Head levels: a head whose k blocks hold more than ``recall_threshold`` of its mass can do with
    less. The n best of these get k - d, the n worst of all heads get k + d, d = min(k // 2,
    blocks - k), n at most half of the heads: the mean stays k exactly. (The paper's levels of
    sparsity s, (1 + s) / 2 and (3 s - 1) / 2, wherever those exist.) Text queries do not count in
    recall. A later search keeps the first one's levels: the paper measures recall anew, but with
    an old LSE, exp(score - LSE) is no share. Rows whose scores have grown since outweigh all the
    others, so that recall nears 1 and the heads that changed most look best.

    Text queries and text keys are kept whole, on top of the k blocks; padding takes no part.

    A run with fewer steps than the schedule: the search steps are fractions, so they move together
    and those that meet become one; a search that would fall on the last step or later is left out,
    as no step could use it. A run too short for any search stays dense. Where the first sparse
    call comes late (dense warm-up, attached in mid-generation, other batch or heads than before),
    it is the first search.

    Args:
        density: Share of video key blocks that a row keeps on average, in (0, 1]; the paper has
            0.2. Higher is closer to dense and slower.
        search_steps: Steps on which to search, as fractions of the run in [0, 1), ascending, at
            least one. The default is the paper's steps 10 and 30 of 50, counted from 1. An
            earlier first search saves more and costs fidelity.
        recall_threshold: In [0, 1]; 1 switches the head levels off, as no head can exceed it.
        block_size: Tokens in a block, 1 to 1024; the paper has 64.
        compensate: "none", or "means": each dropped key block is read as one key, its mean.
    """

    summary: ClassVar[str] = (
        "dynamic: blocks with the largest exact softmax mass, searched on two steps (AdaSpa, "
        "2502.21079)"
    )
    example: ClassVar[Params] = {"density": 0.4, "search_steps": [0.0, 0.5], "block_size": 8}
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "default": ("", "compensate=means"),
        "quick": ("",),
    }
    at_start: ClassVar[Params] = {"search_steps": [0.0]}
    alone: ClassVar[Params] = {"recall_threshold": 1.0}  # levels compare the heads of a launch
    untrainable: ClassVar[str] = "its choices depend on log-sum-exps from an earlier step"
    stays: ClassVar[str] = "density is a fraction of blocks, and search steps are fractions of "
    "the run"

    density: float = 0.2
    search_steps: tuple[float, ...] = (0.18, 0.58)
    recall_threshold: float = 0.8
    block_size: int = 64
    compensate: Literal["none", "means"] = "none"

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.density <= 1:
            raise StrategyError(f"density must lie in (0, 1], got {self.density}; try 0.2")
        steps = self.search_steps
        check_count("search_steps: its length", len(steps), (0, MAX_ENTRIES), 2)
        if not steps or sorted(set(steps)) != list(steps) or not 0 <= steps[0] <= steps[-1] < 1:
            raise StrategyError(
                "search_steps must hold ascending fractions of the run in [0, 1), got "
                f"{list(steps)}; try [0.18, 0.58]"
            )
        if not 0 <= self.recall_threshold <= 1:
            raise StrategyError(
                f"recall_threshold must lie in [0, 1], got {self.recall_threshold}; try 0.8"
            )
        check_compensate(self.compensate)
        check_count("block_size", self.block_size, (1, 1024), 64)

    @property
    def heads_tied(self) -> str:
        """Head levels rank the heads of a call against each other."""
        tied = "it ranks all heads of a rule together, and each process ranks only its own"
        return tied if self.recall_threshold < 1 else ""

    def searches(self, num_steps: int) -> tuple[int, ...]:
        """Give the steps of a run on which this method searches; may be empty."""
        found = {step_at(fraction, num_steps) for fraction in self.search_steps}
        return tuple(sorted(step for step in found if step < num_steps - 1))

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:
        """Decline (dense), keep all (first search), search again, or reuse the lists."""
        state, searches = call.state, self.searches(call.num_steps)
        if state.get("for") != _identity(call) or call.step < state["searched"]:
            state.clear()
            if not searches or not searches[0] <= call.step < call.num_steps - 1:
                return None
            q, kv = call.layout(self.block_size), call.key_layout(self.block_size)
            return BlockPlan.full(q, kv, measured=True)
        due = [step for step in searches if state["searched"] < step <= call.step]
        if due:
            self._search(call, state["lse"], ops)
        return compensated(self._listed_plan(call), self.compensate)

    def finish(self, call: AttentionCall, output: Tensor, lse: Tensor, ops: Ops) -> Tensor:
        """Search after the first search step's dense attention; returns ``output`` as it is."""
        if call.state.get("for") != _identity(call):
            self._search(call, lse.float(), ops)
            call.state["for"] = _identity(call)
        return output

    def _search(self, call: AttentionCall, lse: Tensor, ops: Ops) -> None:
        """Put the lists of the heaviest blocks into the state, and what later searches need."""
        q, kv = call.layout(self.block_size), call.key_layout(self.block_size)
        video, text = (len(part) for part in call.grid.block_lengths(self.block_size))
        first = text if call.grid.text_first else 0  # the first video block
        base, spread = self.budgets(video)
        batch, heads = lse.shape[:2]
        chunk = max(1, _SCRATCH // (4 * batch * q.blocks * kv.blocks))
        levels = call.state.get("levels")
        ranked, recalls = [], []
        for start in range(0, heads, chunk):
            part = slice(start, min(start + chunk, heads))
            mass = ops.block_mass(
                call.query[:, :, part], call.key[:, :, part], lse[:, part], q, kv, call.scale
            )[:, :, first : first + video]  # rows of video: [batch, chunk, video, kv_blocks]
            heaviest = mass[..., first : first + video].topk(base + spread, dim=-1)
            if levels is None:
                dropped = mass[..., first : first + video].sum((-1, -2)) - heaviest.values[
                    ..., :base
                ].sum((-1, -2))
                recalls.append(1 - dropped / mass.sum((-1, -2)))
            ranked.append(heaviest.indices.to(_list_dtype(video)))
        if levels is None:
            levels = self._levels(torch.cat(recalls, 1))  # [batch, heads]
        counts = base + spread * levels
        lists = torch.cat(ranked, 1)
        rank = torch.arange(base + spread, dtype=torch.int32, device=lists.device)
        # Beyond a head's count stands a number above all blocks, so that sorting puts it last.
        lists.masked_fill_(rank >= counts[..., None, None], video)
        for part in lists.split(chunk, dim=1):
            part.copy_(part.sort(dim=-1).values)
        state = call.state
        state.update(lists=lists, counts=counts, searched=call.step)
        if call.step < max(self.searches(call.num_steps)):
            state.update(lse=lse, levels=levels)
        else:
            state.pop("lse", None)
            state.pop("levels", None)

    def budgets(self, video_blocks: int) -> tuple[int, int]:
        """Give k, the blocks that a row keeps on average, and d, by which head levels differ."""
        base = min(max(int(self.density * video_blocks + 0.5), 1), video_blocks)
        if self.recall_threshold >= 1:
            return base, 0
        return base, min(base // 2, video_blocks - base)

    def _levels(self, recall: Tensor) -> Tensor:
        """Give each head -1 (sparser), 0 or 1 (denser), int32 ``[batch, heads]``, no sync."""
        heads = recall.shape[1]
        able = (recall > self.recall_threshold).sum(1, keepdim=True).clamp(max=heads // 2)
        order = recall.argsort(dim=1, stable=True)  # worst first
        place = torch.empty_like(order)
        place.scatter_(1, order, torch.arange(heads, device=order.device).expand_as(order))
        return (place < able).int() - (place >= heads - able).int()

    def _listed_plan(self, call: AttentionCall) -> BlockPlan:
        """Unfold the lists: add text blocks to every row, and whole rows for text queries."""
        q, kv = call.layout(self.block_size), call.key_layout(self.block_size)
        lists, counts = call.state["lists"], call.state["counts"]
        video, text = (len(part) for part in call.grid.block_lengths(self.block_size))
        rows = counts[..., None].expand(*counts.shape, video)
        if not text:
            return BlockPlan(q, kv, lists.int().clamp_(max=video - 1), rows.contiguous())
        batch, heads = counts.shape
        device = lists.device
        indices = torch.arange(kv.blocks, dtype=torch.int32, device=device)
        indices = indices.expand(batch, heads, q.blocks, -1).contiguous()
        width = lists.shape[-1]
        if call.grid.text_first:  # text blocks 0 ... text - 1 stand there already
            indices[:, :, text:, text : text + width] = lists.int().clamp_(max=video - 1) + text
        else:  # text blocks follow the kept video blocks, whose number differs by head
            entry = torch.arange(width + text, dtype=torch.int32, device=device)
            after = (video + entry - counts[..., None]).clamp_(video, kv.blocks - 1)
            kept = torch.nn.functional.pad(lists, (0, text)).int()
            live = (entry < counts[..., None])[:, :, None]
            indices[:, :, :video, : width + text] = torch.where(live, kept, after[:, :, None])
        full = torch.full((batch, heads, text), kv.blocks, dtype=torch.int32, device=device)
        parts = [full, rows + text] if call.grid.text_first else [rows + text, full]
        return BlockPlan(q, kv, indices, torch.cat(parts, -1))


def _identity(call: AttentionCall) -> tuple[object, ...]:
    """What lists and LSE are for; anything else starts a new search."""
    return (call.grid, call.heads, call.num_steps, tuple(call.query.shape), call.query.device)


def _list_dtype(blocks: int) -> torch.dtype:
    return torch.int16 if blocks <= _LARGEST else torch.int32
