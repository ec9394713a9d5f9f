# SPDX-License-Identifier: Apache-2.0
"""Plans over clusters of video tokens, and the means that stand in for dropped clusters.

A cluster's tokens stand side by side, cut into blocks of at most ``block_size``; the choice is per
cluster. Text stays in blocks of its own and is kept whole. Samples and heads have clusters of
their own, so orders and block lengths differ between them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dit_sparse.core.grid import BlockLayout, cut
from dit_sparse.core.plan import BlockPlan
from dit_sparse.core.tiles import WORD, pack_bits
from dit_sparse.methods.merge import merge, writable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dit_sparse.core.call import AttentionCall, Ops

_SCRATCH_CPU = 64 * 2**20  # bytes held at a time; heads are taken in chunks
_SCRATCH = 256 * 2**20  # the same on an accelerator, where a launch has to be worth it


class Side(NamedTuple):
    """The video tokens of one side (queries or keys), ordered by cluster; a tuple of tensors.

    Args:
        order: ``order[slot] = token``, both counted from the first video token, int32 ``[batch,
            heads, video]``.
        starts: First slot of each block, int32 ``[batch, heads, blocks]``.
        lengths: Slots of each block, the same; a block holds one cluster; spare ones have 0.
        owner: Cluster of each block, int64 ``[batch, heads, blocks]``.
        counts: Tokens of each cluster, int32 ``[batch, heads, clusters]``.
        block_size: No block is longer.
    """

    order: Tensor
    starts: Tensor
    lengths: Tensor
    owner: Tensor
    counts: Tensor
    block_size: int

    @property
    def layout(self) -> BlockLayout:
        """Blocks over the video's slots."""
        return BlockLayout(self.starts, self.lengths, self.order.shape[-1], self.block_size)

    def of_heads(self, part: slice) -> Side:
        """Narrow to some heads."""
        order, starts, lengths, owner, counts = (x[:, part] for x in self[:-1])
        return Side(order, starts, lengths, owner, counts, self.block_size)


def cluster_side(
    points: Tensor,
    clusters: int,
    iterations: int,
    block_size: int,
    ops: Ops,
    *,
    init: Tensor | None,
    seed: int,
) -> tuple[Side, Tensor]:
    """Cluster video tokens ``[batch, video, heads, head_dim]`` and order them.

    Returns:
        The side, and its centroids, fp32 ``[batch, heads, clusters, head_dim]``.
    """
    centroids, labels, counts = ops.kmeans(points, clusters, iterations, init=init, seed=seed)
    order, layout, owner = ops.cluster_order(labels, counts, block_size)
    starts, lengths = layout.starts, layout.lengths
    if lengths.device.type == "cpu":  # reading is free there: drop the spare blocks at the end
        used = max(1, int((lengths > 0).sum(-1).max()))
        starts, lengths, owner = (x[..., :used].contiguous() for x in (starts, lengths, owner))
    return Side(order.int(), starts, lengths, owner, counts, block_size), centroids


def clustered_plan(call: AttentionCall, q: Side, kv: Side, mask: Tensor, ops: Ops) -> BlockPlan:
    """Plan the kept pairs of clusters, with all text: every row reads it, it reads everything.

    Args:
        call: The call.
        q: Query clusters.
        kv: Key clusters.
        mask: Kept pairs, bool ``[batch, heads, q_clusters, kv_clusters]``.
        ops: The operations.
    """
    q_order, q_layout = _with_text(call, q, None)
    kv_order, kv_layout = _with_text(call, kv, call.text_valid)
    batch, heads = mask.shape[:2]
    q_blocks, kv_blocks = q.owner.shape[-1], kv.owner.shape[-1]
    first = q_layout.blocks - q_blocks if call.grid.text_first else 0  # behind the text's blocks
    rows, columns = slice(first, first + q_blocks), slice(first, first + kv_blocks)
    lists, counts = [], []
    for part in _parts(heads, 24 * batch * q_layout.blocks * kv_layout.blocks, mask.device):
        own_q, own_kv = _layout_of(q_layout, part), _layout_of(kv_layout, part)
        kept = (own_q.lengths > 0)[..., None] & (own_kv.lengths > 0)[..., None, :]
        video = ops.expand_clusters(mask[:, part], q.owner[:, part], kv.owner[:, part])
        kept[:, :, rows, columns] &= video
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


def merge_cluster_means(
    call: AttentionCall,
    q: Side,
    kv: Side,
    mask: Tensor,
    output: Tensor,
    lse: Tensor,
    ops: Ops,
) -> Tensor:
    """Let queries read every dropped cluster as its mean.

    A query of cluster i reads, besides the keys of the clusters it keeps, each dropped cluster j
    of n_j keys as one key with j's mean key, mean value and weight n_j (its score plus ln n_j).

    Args:
        call: The call.
        q: Query clusters of its plan.
        kv: Key clusters of its plan.
        mask: Kept pairs, bool ``[batch, heads, q_clusters, kv_clusters]``.
        output: ``[batch, seq_len, heads, head_dim]``; changed in place unless it has gradients.
        lse: Of the kept keys, fp32 ``[batch, heads, seq_len]``.
        ops: The operations.

    Returns:
        The output, its video rows over all keys.
    """
    merged = writable(output)
    video = slice(call.grid.video_start, call.grid.video_start + call.grid.video_tokens)
    batch, heads, q_clusters, kv_clusters = mask.shape
    size = q.block_size
    words = -(-kv_clusters // size) * -(-size // WORD)
    tiles = 4 * batch * q_clusters * words * size  # bytes of a head
    tokens = batch * call.grid.video_tokens * call.query.shape[-1] * call.query.element_size()
    for part in _parts(heads, 2 * tokens + tiles, mask.device):
        own_q, own_kv = q.of_heads(part), kv.of_heads(part)
        key, value = (
            _cluster_means(x[:, video, part], own_kv, ops) for x in (call.key, call.value)
        )
        plan = _means_plan(own_q, own_kv, mask[:, part])
        means, means_lse = ops.attend(call.query[:, video, part], key, value, plan, call.scale)
        kept = output[:, video, part], lse[:, part, video]
        merged[:, video, part] = merge(*kept, means, means_lse)
    return merged


def _cluster_means(x: Tensor, side: Side, ops: Ops) -> Tensor:
    """Average ``[batch, video, heads, head_dim]`` over clusters: its dtype, clusters for video."""
    starts = side.counts.cumsum(-1, dtype=torch.int32) - side.counts
    groups = BlockLayout(starts, side.counts, x.shape[1], x.shape[1])
    ordered = ops.gather_tokens(x, side.order.long(), padding=False)
    return ops.pool(ordered, groups).transpose(1, 2).to(x.dtype)


def _means_plan(q: Side, kv: Side, mask: Tensor) -> BlockPlan:
    """Plan query clusters against the means of dropped key clusters, cut out by bit tiles.

    A tile is shared by all blocks of a query cluster, so it also has rows behind a short one.
    """
    batch, heads, q_clusters, kv_clusters = mask.shape
    means = BlockLayout.from_lengths(cut(kv_clusters, kv.block_size), mask.device)
    dropped = ~mask & (kv.counts > 0)[..., None, :]
    padding = means.blocks * means.max_length - kv_clusters
    dropped = torch.nn.functional.pad(dropped, (0, padding)).unflatten(-1, (means.blocks, -1))
    words = pack_bits(dropped)  # [batch, heads, q_clusters, blocks of means, words]
    tiles = words.reshape(-1, 1, words.shape[-1]).expand(-1, q.block_size, -1)
    live = dropped.any(-1).gather(2, q.owner[..., None].expand(-1, -1, -1, means.blocks))
    live &= (q.lengths > 0)[..., None]
    plan = BlockPlan.from_block_mask(
        live,
        q.layout,
        means,
        q_permutation=q.order.long(),
        kv_log_weight=kv.counts.clamp(min=1).float().log(),
    )
    group = torch.arange(batch * heads, dtype=torch.int32, device=mask.device)
    cluster = group.view(batch, heads, 1) * q_clusters + q.owner.int()
    tile = cluster[..., None] * means.blocks + plan.kv_indices
    return replace(plan, partial=tile, tiles=tiles.contiguous())


def _with_text(
    call: AttentionCall, side: Side, text_valid: Tensor | None
) -> tuple[Tensor, BlockLayout]:
    """Give the order of the whole sequence and its blocks, padded text left out of them."""
    grid, device = call.grid, side.order.device
    batch, heads, _ = side.order.shape
    text = cut(grid.text_length, side.block_size)
    video = grid.video_start
    parts = [(side.order.long() + video, side.starts + video, side.lengths)]
    if text:
        length = torch.tensor(text, dtype=torch.int32, device=device)
        behind = length.cumsum(0, dtype=torch.int32)
        length, start = length.expand(batch, -1), behind - length
        if text_valid is not None:
            room = text_valid.to(device, torch.int32)[:, None] - start
            length = torch.minimum(length, room.clamp(min=0))
        words = torch.arange(grid.text_length, device=device) + grid.text_start
        own = (
            words.expand(batch, heads, -1),
            (start + grid.text_start).expand(batch, heads, -1),
            length[:, None].expand(-1, heads, -1),
        )
        parts.insert(0 if grid.text_first else 1, own)
    order, starts, lengths = (torch.cat(piece, -1) for piece in zip(*parts, strict=True))
    return order, BlockLayout(starts, lengths, grid.tokens, side.block_size)


def _layout_of(layout: BlockLayout, part: slice) -> BlockLayout:
    """Narrow a layout that tells heads apart to some of them."""
    return replace(layout, starts=layout.starts[:, part], lengths=layout.lengths[:, part])


def _parts(heads: int, bytes_per_head: int, device: torch.device) -> Iterator[slice]:
    scratch = _SCRATCH_CPU if device.type == "cpu" else _SCRATCH
    step = max(1, scratch // bytes_per_head)
    return (slice(first, min(first + step, heads)) for first in range(0, heads, step))
