# SPDX-License-Identifier: Apache-2.0
"""Read a plan back into the model's own token order, whatever order it computes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dit_sparse.core.tiles import unpack_tiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.core.plan import BlockPlan

MAP_SIDE = 192  # queries that stand for all in a map, and bins of keys
_CHUNK = 8  # query tokens read at a time: a row of keys is as long as the sequence


@dataclass(frozen=True, slots=True)
class HeadView:
    """What one head keeps.

    Args:
        head: Its index in the model.
        method: Which method chose.
        density: Kept share of all (query, key) pairs.
        kept_map: Share kept of each bin of pairs, tokens in the model's order, in [0, 1]:
            ``[queries, keys]``, at most ``MAP_SIDE`` each. A query stands for those around it.
        seen: Whether one query token reads each video token: bool ``[frames, height, width]``.
        text_seen: Share of the text tokens that it reads; None where there is no text.
    """

    head: int
    method: str
    density: float
    kept_map: Tensor
    seen: Tensor
    text_seen: float | None


def kept_keys(plan: BlockPlan, i_batch: int, i_head: int, tokens: Sequence[int]) -> Tensor:
    """Tell which keys each query token reads: bool ``[len(tokens), plan.key_length]``.

    Args:
        plan: Any plan; it is read on the CPU.
        i_batch: Sample.
        i_head: Head, of the plan's own.
        tokens: Query tokens, in the model's order.
    """
    index, count = (_pick(x, i_batch, i_head) for x in (plan.kv_indices, plan.kv_num_blocks))
    tile = None if plan.partial is None else _pick(plan.partial, i_batch, i_head)
    q_start, q_length = (_pick(x, i_batch, i_head) for x in (plan.q.starts, plan.q.lengths))
    k_start, k_length = (_pick(x, i_batch, i_head) for x in (plan.kv.starts, plan.kv.lengths))
    slot_of = _slots(plan.q_permutation, i_batch, i_head, plan.query_length)
    token_of = None if plan.kv_permutation is None else _pick(plan.kv_permutation, i_batch, i_head)
    kept = torch.zeros(len(tokens), plan.key_length, dtype=torch.bool)
    slot = torch.as_tensor(tokens, dtype=torch.int64)
    slot = slot if slot_of is None else slot_of[slot]
    inside = (q_start <= slot[:, None]) & (slot[:, None] < q_start + q_length)  # [tokens, blocks]
    block_of = torch.where((slot >= 0) & inside.any(1), inside.int().argmax(1), -1)
    for block in block_of.unique().tolist():
        if block < 0:
            continue
        rows = (block_of == block).nonzero().flatten()
        own = index[block, : int(count[block])].long()
        numbers = own.new_full(own.shape, -1) if tile is None else tile[block, : len(own)]
        whole = own[numbers < 0]
        # Whole blocks by where they begin and end; those that a border cuts one by one.
        edge = torch.zeros(plan.kv.slots + 1, dtype=torch.int32)
        one = torch.ones(len(whole), dtype=torch.int32)
        edge.index_add_(0, k_start[whole].long(), one)
        edge.index_add_(0, (k_start[whole] + k_length[whole]).long(), -one)
        read = (edge.cumsum(0)[:-1] > 0).repeat(len(rows), 1)  # [rows, slots]
        for i_kv, number in zip(own[numbers >= 0], numbers[numbers >= 0], strict=True):
            assert plan.tiles is not None
            start, length = int(k_start[i_kv]), int(k_length[i_kv])
            bits = plan.tiles[int(number), slot[rows] - int(q_start[block])].cpu()
            read[:, start : start + length] |= unpack_tiles(bits, length)
        row, found = read.nonzero().unbind(1)
        if token_of is not None:
            found = token_of[found]
            row, found = row[found >= 0], found[found >= 0]
        kept[rows[row], found] = True
    return kept


def _pick(tensor: Tensor, i_batch: int, i_head: int) -> Tensor:
    return tensor[i_batch % tensor.shape[0], i_head % tensor.shape[1]].cpu()


def _slots(permutation: Tensor | None, i_batch: int, i_head: int, tokens: int) -> Tensor | None:
    """Where each token stands; -1: nowhere."""
    if permutation is None:
        return None
    order = _pick(permutation, i_batch, i_head)
    slot = torch.full((tokens,), -1, dtype=torch.int64)
    live = (order >= 0).nonzero().flatten()
    slot[order[live]] = live
    return slot


def views_of(
    plan: BlockPlan,
    heads: Sequence[int],
    method: str,
    grid: LatentsGrid,
    token: tuple[int, int, int] | None = None,
    side: int = MAP_SIDE,
) -> list[HeadView]:
    """View the first sample of a plan, head by head.

    Args:
        plan: The plan.
        heads: Its heads' indices in the model.
        method: Who made it.
        grid: Where the tokens stand.
        token: Query token (frame, row, column) whose keys are shown; None: the middle one.
        side: Queries and bins of keys in a map, at most.
    """
    frame, row, column = token or (grid.frames // 2, grid.height // 2, grid.width // 2)
    inside = (frame * grid.height + row) * grid.width + column
    chosen = grid.video_start + inside
    density = plan.density()
    # Queries in the middle of equal spans; keys counted in equal bins.
    side = min(side, grid.tokens)
    sampled = [(2 * i + 1) * grid.tokens // (2 * side) for i in range(side)]
    bin_of = torch.arange(grid.tokens) * side // grid.tokens
    size = torch.bincount(bin_of, minlength=side)
    found = []
    for i_head, head in enumerate(heads):
        rows = [
            torch.zeros(len(part), side).index_add_(
                1, bin_of, kept_keys(plan, 0, i_head, part).float()
            )
            for part in (sampled[i : i + _CHUNK] for i in range(0, side, _CHUNK))
        ]
        keys = kept_keys(plan, 0, i_head, [chosen])[0]
        text = keys[grid.text_start : grid.text_start + grid.text_length]
        video = keys[grid.video_start : grid.video_start + grid.video_tokens]
        found.append(
            HeadView(
                head=head,
                method=method,
                density=float(density[0, i_head % density.shape[1]]),
                kept_map=torch.cat(rows) / size,
                seen=video.view(grid.frames, grid.height, grid.width),
                text_seen=float(text.float().mean()) if grid.text_length else None,
            )
        )
    return found
