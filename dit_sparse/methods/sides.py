# SPDX-License-Identifier: Apache-2.0
"""The video tokens of queries and keys in groups, each side in an order of its own, and plans.

A group is a run of tokens along a fixed order (raster, 3-D tiles, a curve) or a k-means cluster.
Its tokens stand side by side, cut into blocks of at most ``block_size``; choices are made per
group. Text stays in blocks of its own and is kept whole. Clusters differ between samples and
heads; fixed orders are shared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dit_sparse.core.call import AttentionCall, Ops

_SCRATCH_CPU = 64 * 2**20  # bytes held at a time; heads are taken in chunks
_SCRATCH = 256 * 2**20  # the same on an accelerator, where a launch has to be worth it


class Side(NamedTuple):
    """The video tokens of one side (queries or keys), group by group; a tuple of tensors.

    Leading dimensions ``[batch, heads]`` are 1 where samples or heads share the order.

    Args:
        order: ``order[slot] = token``, both counted from the first video token, int32 ``[batch|1,
            heads|1, video]``.
        starts: First slot of each block, int32 ``[batch|1, heads|1, blocks]``.
        lengths: Slots of each block, the same; a block holds one group; spare ones have 0.
        owner: Group of each block, int64 ``[batch|1, heads|1, blocks]``.
        counts: Tokens of each group, int32 ``[batch|1, heads|1, groups]``.
        block_size: No block is longer.
        spread: Whether starts are 0, block_size, 2 * block_size, ...
    """

    order: Tensor
    starts: Tensor
    lengths: Tensor
    owner: Tensor
    counts: Tensor
    block_size: int
    spread: bool = False

    @property
    def layout(self) -> BlockLayout:
        """Blocks over the video's slots."""
        slots = self.order.shape[-1]
        return BlockLayout(self.starts, self.lengths, slots, self.block_size, self.spread)

    @property
    def groups(self) -> BlockLayout:
        """Groups over the video's slots; a cluster is one however many blocks it has."""
        if self.counts is self.lengths:
            return self.layout
        slots = self.order.shape[-1]
        ends = self.counts.cumsum(-1, dtype=torch.int32)
        return BlockLayout(ends - self.counts, self.counts, slots, slots)


def fixed_side(call: AttentionCall, order: Tensor, lengths: list[int]) -> Side:
    """Cut the video's tokens, in a fixed order, into blocks that are groups.

    Args:
        call: The call.
        order: ``order[slot] = token``, both counted from the first video token, ``[video]``.
        lengths: Tokens of each block, at least 1.
    """
    layout = BlockLayout.from_lengths(lengths, call.query.device)
    owner = torch.arange(layout.blocks, device=layout.device)[None, None]
    place = order.to(layout.device, torch.int32)[None, None]
    counts, longest = layout.lengths, layout.max_length
    return Side(place, layout.starts, counts, owner, counts, longest, layout.spread)


def cluster_side(
    points: Tensor,
    clusters: int,
    iterations: int,
    block_size: int,
    ops: Ops,
    *,
    init: Tensor | None,
    seed: int,
    heads: Tensor,
) -> tuple[Side, Tensor]:
    """Cluster video tokens ``[batch, video, heads, head_dim]`` and order them.

    Returns:
        The side, and its centroids, fp32 ``[batch, heads, clusters, head_dim]``.
    """
    centroids, labels, counts = ops.kmeans(
        points, clusters, iterations, init=init, seed=seed, heads=heads
    )
    order, layout, owner = ops.cluster_order(labels, counts, block_size)
    starts, lengths = layout.starts, layout.lengths
    if lengths.device.type == "cpu":  # reading is free there: drop the spare blocks at the end
        used = max(1, int((lengths > 0).sum(-1).max()))
        starts, lengths, owner = (x[..., :used].contiguous() for x in (starts, lengths, owner))
    return Side(order.int(), starts, lengths, owner, counts, block_size), centroids


def plan_groups(call: AttentionCall, q: Side, kv: Side, mask: Tensor, ops: Ops) -> BlockPlan:
    """Plan the kept pairs of groups, with all text: every row reads it, it reads everything.

    Args:
        call: The call.
        q: Query groups.
        kv: Key groups.
        mask: Kept pairs, bool ``[batch, heads, q_groups, kv_groups]``.
        ops: The operations.
    """
    q_order, q_layout = _with_text(call, q, None)
    kv_order, kv_layout = _with_text(call, kv, call.text_valid)
    batch, heads = mask.shape[:2]
    q_blocks, kv_blocks = q.owner.shape[-1], kv.owner.shape[-1]
    rows, columns = (  # text's blocks come before or behind
        slice(all_blocks - own, all_blocks) if call.grid.text_first else slice(0, own)
        for all_blocks, own in ((q_layout.blocks, q_blocks), (kv_layout.blocks, kv_blocks))
    )
    lists, counts = [], []
    for part in _parts(heads, 24 * batch * q_layout.blocks * kv_layout.blocks, mask.device):
        own_q, own_kv = _layout_of(q_layout, part), _layout_of(kv_layout, part)
        own = mask[:, part]
        kept = (own_q.lengths > 0)[..., None] & (own_kv.lengths > 0)[..., None, :]
        kept = kept.expand(*own.shape[:2], -1, -1).clone()
        owners = (_spelled_out(side.owner, own, part) for side in (q, kv))
        kept[:, :, rows, columns] &= ops.expand_clusters(own, *owners)
        packed = BlockPlan.from_block_mask(kept, own_q, own_kv, cap=kv_layout.blocks)
        lists.append(packed.kv_indices)
        counts.append(packed.kv_num_blocks)
    indices, number = torch.cat(lists, 1), torch.cat(counts, 1)
    if indices.device.type == "cpu":
        indices = indices[..., : max(1, int(number.max()))].contiguous()
    return BlockPlan(
        q_layout,
        kv_layout,
        indices,
        number,
        q_permutation=q_order,
        kv_permutation=kv_order,
    )


def _with_text(
    call: AttentionCall, side: Side, text_valid: Tensor | None
) -> tuple[Tensor, BlockLayout]:
    """Give the order of the whole sequence and its blocks, padded text left out of them."""
    grid, device = call.grid, side.order.device
    batch, heads = side.order.shape[:2]
    if text_valid is not None:
        batch = max(batch, text_valid.shape[0])
    text, size = grid.text_length, side.block_size
    video = grid.video_start
    own = (side.order.long() + video, side.starts + video, side.lengths)
    parts = [tuple(x.expand(batch, heads, -1) for x in own)]
    if text:
        # Computed on the device: a list would be copied to it, which waits.
        start = torch.arange(0, text, size, dtype=torch.int32, device=device)
        length = (text - start).clamp(max=size).expand(batch, -1)
        if text_valid is not None:
            room = text_valid.to(device, torch.int32)[:, None] - start
            length = torch.minimum(length, room.clamp(min=0))
        words = torch.arange(text, device=device) + grid.text_start
        text_part = (
            words.expand(batch, heads, -1),
            (start + grid.text_start).expand(batch, heads, -1),
            length[:, None].expand(-1, heads, -1),
        )
        parts.insert(0 if grid.text_first else 1, text_part)
    order, starts, lengths = (torch.cat(piece, -1) for piece in zip(*parts, strict=True))
    return order, BlockLayout(starts, lengths, grid.tokens, side.block_size)


def _layout_of(layout: BlockLayout, part: slice) -> BlockLayout:
    """Narrow a layout to some heads; a shared one is every head's."""
    if layout.starts.shape[1] == 1:
        return layout
    return replace(layout, starts=layout.starts[:, part], lengths=layout.lengths[:, part])


def _spelled_out(owner: Tensor, mask: Tensor, part: slice) -> Tensor:
    own = owner if owner.shape[1] == 1 else owner[:, part]
    return own.expand(*mask.shape[:2], -1)


def _parts(heads: int, bytes_per_head: int, device: torch.device) -> Iterator[slice]:
    scratch = _SCRATCH_CPU if device.type == "cpu" else _SCRATCH
    step = max(1, scratch // bytes_per_head)
    return (slice(first, min(first + step, heads)) for first in range(0, heads, step))
