# SPDX-License-Identifier: Apache-2.0
"""Windows that are a product of one rule per axis, as block lists and bit tiles.

A *run* is what a box has of one axis: coordinates that follow each other in their dilation group.
A pair of boxes is kept, cut or dropped by what the runs of each axis say of each other, by
interval arithmetic: no tensor here has tokens or coordinates on both of its axes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch

from dit_sparse.core.plan import BlockPlan
from dit_sparse.core.tiles import pack_bits
from dit_sparse.methods.order import Ordered, boxes

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.grid import LatentsGrid


@dataclass(frozen=True, slots=True)
class AxisRule:
    """Which coordinates of one axis see each other.

    A coordinate x stands at place x // dilation of group x mod dilation, and sees its own group
    only. Of a group of n places, those of one run of ``stride`` share a leader, min((p // stride)
    * stride + stride // 2, n - 1), and the window around it: window // 2 places before and
    window // 2 - 1 + window % 2 after, shifted inwards where it would leave the axis. So each
    coordinate sees exactly ``window`` others (Hassani et al. 2025, arXiv:2504.16922).

    Args:
        extent: Coordinates of the axis.
        window: Places that a coordinate sees, >= 1; window * dilation <= extent.
        stride: Places that share a window, in [1, window].
        dilation: Groups, >= 1.
    """

    extent: int
    window: int
    stride: int
    dilation: int

    def windows(self) -> tuple[Tensor, Tensor]:
        """Give the first and the last place that each coordinate sees: int64 ``[extent]``."""
        at = torch.arange(self.extent)
        group, place = at % self.dilation, at // self.dilation
        length = self.extent // self.dilation + (group < self.extent % self.dilation).long()
        leader = torch.minimum(place // self.stride * self.stride + self.stride // 2, length - 1)
        before = self.window // 2
        after = self.window - 1 - before
        center = torch.minimum(leader.clamp(min=before), length - 1 - after)
        return center - before, center + after

    def cuts(self, size: int) -> list[list[int]]:
        """Cut each dilation group into runs of ``size``; a group's last may be shorter."""
        groups = [list(range(first, self.extent, self.dilation)) for first in range(self.dilation)]
        return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def product_plan(
    grid: LatentsGrid,
    rules: tuple[AxisRule, ...],
    tile: tuple[int, ...],
    text_block_size: int,
    *,
    exact: bool,
) -> tuple[BlockPlan, Ordered] | None:
    """Plan the video pairs that all three axes allow; text is kept whole.

    Args:
        grid: Where the tokens stand.
        rules: For frames, rows and columns.
        tile: Their extents in a box.
        text_block_size: Tokens in a block of text.
        exact: Cut block pairs by bit tiles; else a pair is kept whole where any of it is.

    Returns:
        The plan and its order, None where everything is kept.
    """
    cuts = tuple(rule.cuts(size) for rule, size in zip(rules, tile, strict=True))
    ordered = boxes(grid, cuts, text_block_size)
    axes = [_Axis.of(rule, runs) for rule, runs in zip(rules, cuts, strict=True)]
    some = _joined([axis.some for axis in axes])  # [boxes, boxes]
    whole = _joined([axis.whole for axis in axes])
    if bool((some if not exact else whole).all()):
        return None
    mask = ordered.is_text[:, None] | ordered.is_text
    video = ~ordered.is_text
    pairs = video[:, None] & video
    mask[pairs] = some.flatten()
    plan = BlockPlan.from_block_mask(
        mask[None, None],
        ordered.layout,
        ordered.layout,
        q_permutation=ordered.permutation,
        kv_permutation=ordered.permutation,
    )
    part = some & ~whole
    if not exact or not bool(part.any()):
        return plan, ordered
    tiles, number = _tiles(axes, part, ordered.layout.max_length)
    index = torch.full(mask.shape, -1, dtype=torch.int32)
    index[pairs] = number.flatten()
    partial = index[None, None].gather(-1, plan.kv_indices.long())
    return replace(plan, partial=partial, tiles=tiles), ordered


@dataclass(frozen=True, slots=True)
class _Axis:
    """What one axis says of each pair of its runs.

    Args:
        some: Whether any pair of their coordinates is allowed, bool ``[runs, runs]``.
        whole: Whether all are.
        number: Index into ``patterns`` where ``some``, int64 ``[runs, runs]``.
        patterns: The different masks, bool ``[coordinates, coordinates]`` each.
    """

    some: Tensor
    whole: Tensor
    number: Tensor
    patterns: list[Tensor]

    @classmethod
    def of(cls, rule: AxisRule, runs: list[list[int]]) -> _Axis:
        low, high = rule.windows()
        head = torch.tensor([run[0] for run in runs])
        tail = torch.tensor([run[-1] for run in runs])
        first, last = head // rule.dilation, tail // rule.dilation  # places
        group = head % rule.dilation
        same = group[:, None] == group
        # Windows move by at most their own width: those of a run leave no gap between them.
        some = same & (low[head][:, None] <= last) & (high[tail][:, None] >= first)
        whole = same & (low[tail][:, None] <= first) & (high[head][:, None] >= last)
        i_q, i_kv = some.nonzero(as_tuple=True)
        size = last - first + 1
        member = torch.arange(int(size.max()))
        real = member < size[i_q][:, None]  # [pairs, longest run]
        at = (head[i_q][:, None] + member * rule.dilation).clamp(max=rule.extent - 1)
        room = size[i_kv][:, None]
        start, stop = (
            torch.minimum((place[at] - first[i_kv][:, None] + more).clamp(min=0), room) * real
            for place, more in ((low, 0), (high, 1))
        )
        # One row says all of a pair's mask: both sizes, and from where to where each query sees.
        rows = torch.cat([size[i_q][:, None], room, start, stop], 1)
        different, found = rows.unique(dim=0, return_inverse=True)
        number = torch.zeros(len(runs), len(runs), dtype=torch.int64)
        number[i_q, i_kv] = found
        patterns = []
        for (queries, keys), begin, end in zip(
            different[:, :2].tolist(), *different[:, 2:].chunk(2, 1), strict=True
        ):
            key = torch.arange(keys)
            patterns.append((key >= begin[:queries, None]) & (key < end[:queries, None]))
        return cls(some, whole, number, patterns)


def _joined(parts: list[Tensor]) -> Tensor:
    """Join ``[runs, runs]`` of each axis by "and" into ``[boxes, boxes]``."""
    found = parts[0]
    for part in parts[1:]:
        pairs = found[:, None, :, None] & part[None, :, None, :]
        found = pairs.flatten(2).flatten(0, 1)
    return found


def _tiles(axes: list[_Axis], part: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Make the bit tiles of box pairs that are cut, and each pair's row among them (else -1)."""
    i_q, i_kv = part.nonzero(as_tuple=True)
    runs = [axis.number.shape[0] for axis in axes]
    place = torch.zeros_like(i_q)
    for i_axis, axis in enumerate(axes):
        inner = prod(runs[i_axis + 1 :])  # boxes that follow each other within one run
        size = runs[i_axis]
        pattern = axis.number[i_q // inner % size, i_kv // inner % size]
        place = place * len(axis.patterns) + pattern
    different, found = place.unique(return_inverse=True)
    packed = []
    for combined in different.tolist():
        rest, cell = combined, torch.ones(1, 1, dtype=torch.bool)
        for axis in reversed(axes):
            rest, i_pattern = divmod(rest, len(axis.patterns))
            cell = _joined([axis.patterns[i_pattern], cell])
        tile = torch.zeros(longest, longest, dtype=torch.bool)
        tile[: cell.shape[0], : cell.shape[1]] = cell
        packed.append(pack_bits(tile))
    number = torch.full(part.shape, -1, dtype=torch.int32)
    number[i_q, i_kv] = found.int()
    return torch.stack(packed), number
