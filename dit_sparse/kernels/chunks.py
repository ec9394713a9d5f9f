# SPDX-License-Identifier: Apache-2.0
"""What the planning operations share: fp32 scores, bounded memory, seeded draws, slots to blocks.

Nothing here reads device memory, so nothing here makes the host wait.
"""

from __future__ import annotations

import sys
from math import prod
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from dit_sparse.core.grid import BlockLayout

BUDGET_CPU = 2 << 20  # bytes of scratch at a time: what stays in a cache
BUDGET = 256 << 20  # the same on an accelerator, where a launch has to be worth it
HALF = (torch.float16, torch.bfloat16)


def budget(device: torch.device) -> int:
    """Give the bytes of scratch that an operation may hold at a time."""
    return {"cpu": BUDGET_CPU, "meta": sys.maxsize}.get(device.type, BUDGET)  # meta holds nothing


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Give what scores of ``dtype`` are computed in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def scores(q: Tensor, k: Tensor) -> Tensor:
    """Multiply ``[..., m, d]`` with ``[..., n, d]``: fp32 ``[..., m, n]``, no half in between."""
    k_t = k.transpose(-1, -2)
    if q.dtype in HALF and q.is_cuda:
        flat = torch.bmm(q.flatten(0, -3), k_t.flatten(0, -3), out_dtype=torch.float32)
        return flat.view(*q.shape[:-1], k.shape[-2])
    work = work_dtype(q.dtype)
    return q.to(work) @ k_t.to(work)


def head_parts(heads: int, bytes_per_head: int, device: torch.device) -> Iterator[slice]:
    """Cut the heads into runs whose scratch fits the budget; at least one head a run."""
    step = max(1, budget(device) // max(1, bytes_per_head))
    for start in range(0, heads, step):
        yield slice(start, min(start + step, heads))


def of_heads(tensor: Tensor, part: slice) -> Tensor:
    """Take a run of heads of ``[batch|1, heads|1, ...]``; a shared tensor is every head's."""
    return tensor if tensor.shape[1] == 1 else tensor[:, part]


def heads_of(layout: BlockLayout, part: slice) -> tuple[Tensor, Tensor]:
    """Take a run of heads of a layout: starts and lengths."""
    return of_heads(layout.starts, part), of_heads(layout.lengths, part)


def seeded_order(
    seed: int, rows: tuple[int, ...] | Tensor, length: int, device: torch.device
) -> Tensor:
    """Shuffle ``range(length)`` for each of ``rows``: int64 ``[*rows, length]``.

    The order depends on the seed, the row's number and the length only, not on the device or on
    any generator's state: numbers are hashed (splitmix64), and sorted by their hash.

    Args:
        seed: For the draw.
        rows: How many rows, numbered from 0; or their numbers, int64 of any shape.
        length: Of each row.
        device: Of the result.
    """
    if not isinstance(rows, torch.Tensor):
        rows = torch.arange(prod(rows), dtype=torch.int64, device=device).view(rows)
    place = torch.arange(1, length + 1, dtype=torch.int64, device=device)
    place = place + rows[..., None] * length
    mixed = place * _signed(0x9E3779B97F4A7C15) + _signed(seed * 0xD1342543DE82EF95 + 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    mixed = mixed ^ _shifted(mixed, 31)
    return mixed.argsort(dim=-1, stable=True)


def _signed(value: int) -> int:
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


def _shifted(value: Tensor, by: int) -> Tensor:
    return (value >> by) & ((1 << (64 - by)) - 1)  # torch shifts int64 with its sign


def block_of_slot(layout: BlockLayout) -> Tensor:
    """Give every slot the number of its block, ``blocks`` where none covers it.

    Returns:
        int64 ``[batch|1, heads|1, slots]``.
    """
    empty = layout.lengths == 0
    # Empty blocks may stand anywhere: they go to the end, where no slot finds them.
    starts, order = layout.starts.masked_fill(empty, layout.slots).sort(dim=-1, stable=True)
    slot = torch.arange(layout.slots, dtype=torch.int32, device=layout.device)
    slot = slot.expand(*starts.shape[:2], -1).contiguous()
    found = torch.searchsorted(starts, slot, right=True) - 1
    rank = found.clamp(min=0)
    block = order.gather(-1, rank)
    inside = slot < starts.gather(-1, rank) + layout.lengths.gather(-1, block)
    return torch.where((found >= 0) & inside, block, layout.blocks)


def block_of_token(layout: BlockLayout, permutation: Tensor, tokens: int) -> Tensor:
    """Give every token the number of its block, ``blocks`` where it lies in none.

    Args:
        layout: The blocks, in slots.
        permutation: Token of each slot, integer ``[batch|1, heads|1, slots]``, -1: none.
        tokens: Length of the sequence.

    Returns:
        int64 ``[batch|1, heads|1, tokens]``.
    """
    block = block_of_slot(layout)
    lead = torch.broadcast_shapes(block.shape[:2], permutation.shape[:2])
    found = block.new_full((*lead, tokens + 1), layout.blocks)
    # Padding slots all land in the spare last column.
    token = torch.where(permutation < 0, tokens, permutation).long()
    found.scatter_(-1, token.expand(*lead, -1), block.expand(*lead, -1))
    return found[..., :tokens]


def segment_sums(x: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Sum ``x [groups, n, d]`` by ``segment [groups, n]``: fp32 ``[groups, segments, d]``.

    The order of the additions is fixed, so that the sums are the same every time, unless a
    gradient is wanted on an accelerator.
    """
    work = work_dtype(x.dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return indexed_sums(x.to(work), segment, segments)
    if x.device.type == "cpu":
        return bagged_sums(x.to(work), segment, segments)
    return sorted_sums(x.to(work), segment, segments)


def indexed_sums(x: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Sum by adding each row to its segment's."""
    groups, _, dim = x.shape
    offset = torch.arange(groups, device=x.device)[:, None] * segments
    total = x.new_zeros(groups * segments, dim)
    return total.index_add(0, (segment + offset).flatten(), x.flatten(0, 1)).view(groups, -1, dim)


def bagged_sums(x: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Sum bags of rows on the CPU: the same bits as ``indexed_sums``, several times faster."""
    groups, rows, dim = x.shape
    small = segment.to(torch.int16 if segments < 1 << 15 else torch.int32)
    order = torch.from_numpy(small.numpy().argsort(-1, kind="stable"))  # of 16 bits: by radix
    counts = segment.new_zeros(groups, segments).scatter_add_(1, segment, torch.ones_like(segment))
    place = order + torch.arange(groups)[:, None] * rows
    start = counts.flatten().cumsum(0) - counts.flatten()
    bags = torch.nn.functional.embedding_bag(
        place.flatten(), x.reshape(-1, dim), start, mode="sum"
    )
    return bags.view(groups, segments, dim)


def sorted_sums(x: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Sum runs of rows sorted by segment: no atomics, the same bits every time."""
    order = segment.argsort(dim=-1, stable=True)
    rows = x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
    counts = segment.new_zeros(x.shape[0], segments).scatter_add_(
        1, segment.long(), torch.ones_like(segment)
    )
    return torch.segment_reduce(rows, "sum", lengths=counts, axis=1, unsafe=True, initial=0)
