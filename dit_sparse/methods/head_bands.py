# SPDX-License-Identifier: Apache-2.0
"""SVG's two kinds of heads: a band along frames, a band along patches, and which suits a head.

A *unit* is a frame of a video or a row of an image, ``length`` its tokens. Token p of unit u has
the position u * length + p for a spatial head and p * units + u for a temporal one, so that a band
of these positions covers whole units nearby, or nearby places of all units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dit_sparse.core.call import AttentionCall
    from dit_sparse.core.grid import LatentsGrid

SPATIAL, TEMPORAL = 0, 1
_SCRATCH_CPU = 64 * 2**20  # bytes of scores and of fp32 copies held at a time
_SCRATCH = 256 * 2**20  # the same on an accelerator, where a launch has to be worth it
_SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class HeadBands:
    """The two kinds, spatial first, for one grid.

    Args:
        order: ``order[kind, slot] = token`` over the whole sequence, text where it was, int64
            ``[2, tokens]``.
        block: Video block of each video token, int64 ``[2, video_tokens]``.
        mask: Kept pairs of video blocks, bool ``[2, blocks, blocks]``.
        lists: The same as ascending lists, int32 ``[2, blocks, cap]``.
        counts: How many entries of each list count, int32 ``[2, blocks]``.
    """

    order: Tensor
    block: Tensor
    mask: Tensor
    lists: Tensor
    counts: Tensor

    def to(self, device: torch.device | str) -> HeadBands:
        """Move every tensor to ``device``."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("order", "block", "mask", "lists", "counts")
        }
        return replace(self, **moved)


def band_width(grid: LatentsGrid, density: float) -> int:
    """Give the half width in tokens: a pair is in the band where its distance is below it.

    A band of half width W over N video tokens keeps 1 - (1 - W / N)^2 of their pairs, and text
    costs its rows and columns; W = N - S sqrt(1 - density), S = N + text, keeps ``density`` of all
    S^2 pairs. At least 1; density 1 gives N.
    """
    width = grid.video_tokens - grid.tokens * sqrt(1 - density)
    return max(1, int(width + _SLACK))


def head_bands(grid: LatentsGrid, block_size: int, width: int, *, sink: bool) -> HeadBands:
    """Build both kinds; with ``sink`` all queries keep the keys of unit 0.

    A block pair is kept where any token pair in it is. For a temporal head the sink's tokens stand
    apart, before the others, or every block would hold one of them.
    """
    units, length = units_of(grid)
    token = torch.arange(grid.video_tokens)
    along = token % length * units + token // length  # each token's position for a temporal head
    first, rest = token[:length], token[length:]
    kinds = [
        [(token, token)],
        [(part, along[part]) for part in ([first, rest] if sink else [token])],
    ]
    orders, blocks, masks = [], [], []
    for kind in kinds:
        sorted_parts = [(part[place.argsort()], place.sort().values) for part, place in kind]
        order = torch.cat([part for part, _ in sorted_parts])
        mask = _band_mask([place for _, place in sorted_parts], block_size, width)
        if sink:
            mask[:, : -(-length // block_size)] = True
        block = torch.empty_like(token)
        block[order] = token // block_size
        orders.append(_with_text(grid, order))
        blocks.append(block)
        masks.append(mask)
    mask = torch.stack(masks)
    counts = mask.sum(-1, dtype=torch.int32)
    kept_first = mask.int().argsort(dim=-1, descending=True, stable=True).int()
    lists = kept_first[..., : int(counts.max())].contiguous()
    return HeadBands(torch.stack(orders), torch.stack(blocks), mask, lists, counts)


def units_of(grid: LatentsGrid) -> tuple[int, int]:
    """Give the number of units and the tokens of each."""
    if grid.frames > 1:
        return grid.frames, grid.frame_tokens
    return grid.height, grid.width


def band_errors(call: AttentionCall, bands: HeadBands, rows: Tensor) -> Tensor:
    """Measure what each kind does to some rows: mean squared error, ``[2, batch, heads]``, fp32.

    Softmax over all keys, and over the keys that the kind's blocks keep (text among them, padding
    not); the same rows for all samples and heads.

    Args:
        call: The call.
        bands: Both kinds.
        rows: Video tokens, counted from the first one, int64 ``[rows]``.
    """
    grid = call.grid
    batch, tokens, heads, dim = call.key.shape
    work = torch.promote_types(call.query.dtype, torch.float32)
    video = slice(grid.video_start, grid.video_start + grid.video_tokens)
    dropped = torch.zeros(2, len(rows), tokens, dtype=torch.bool, device=rows.device)
    for kind in (SPATIAL, TEMPORAL):
        row_mask = bands.mask[kind].index_select(0, bands.block[kind, rows])
        dropped[kind, :, video] = ~row_mask.index_select(1, bands.block[kind])
    bytes_per_head = batch * tokens * work.itemsize * (3 * len(rows) + 2 * dim)
    scratch = _SCRATCH_CPU if call.key.device.type == "cpu" else _SCRATCH
    step = max(1, scratch // bytes_per_head)
    found = []
    for first in range(0, heads, step):
        part = slice(first, min(first + step, heads))
        q, k, v = (x[:, :, part].transpose(1, 2) for x in (call.query, call.key, call.value))
        q = q.index_select(2, rows + grid.video_start).to(work)
        score = q @ k.to(work).transpose(-1, -2) * call.scale  # [batch, part, rows, tokens]
        if call.text_valid is not None:
            score.masked_fill_(_padding(call)[:, None, None], -torch.inf)
        v = v.to(work)
        full = score.softmax(-1) @ v
        errors = [
            (score.masked_fill(dropped[kind], -torch.inf).softmax(-1) @ v - full)
            .square()
            .mean((-1, -2))
            for kind in (SPATIAL, TEMPORAL)
        ]
        found.append(torch.stack(errors))
    return torch.cat(found, -1)


def _band_mask(places: list[Tensor], block_size: int, width: int) -> Tensor:
    """Mark block pairs with a token pair nearer than ``width``: bool ``[blocks, blocks]``.

    Args:
        places: Positions of the slots, in parts that each ascend.
        block_size: Slots in a block.
        width: Half width.
    """
    position = torch.cat(places)
    block = torch.arange(len(position)) // block_size
    blocks = int(block[-1]) + 1
    # Where a token's keys begin and end in a part: the running sum over these marks counts, for
    # every query block and key block, the query tokens that have a key there.
    change = torch.zeros(blocks, blocks + 1, dtype=torch.int32)
    start = 0
    for place in places:
        begin = torch.searchsorted(place, position - width, right=True) + start
        end = torch.searchsorted(place, position + width) + start
        some = end > begin
        one = torch.ones_like(block[some], dtype=torch.int32)
        first, last = begin[some] // block_size, (end[some] - 1) // block_size
        change.index_put_((block[some], first), one, accumulate=True)
        change.index_put_((block[some], last + 1), -one, accumulate=True)
        start += len(place)
    return change.cumsum(-1)[:, :-1] > 0


def _with_text(grid: LatentsGrid, order: Tensor) -> Tensor:
    text = torch.arange(grid.text_length) + grid.text_start
    video = order + grid.video_start
    return torch.cat([text, video] if grid.text_first else [video, text])


def _padding(call: AttentionCall) -> Tensor:
    """Mark padded text keys: bool ``[batch, tokens]``."""
    assert call.text_valid is not None
    place = torch.arange(call.grid.tokens, device=call.query.device) - call.grid.text_start
    padded = place >= call.text_valid.to(place.device)[:, None]
    return padded & (place < call.grid.text_length)
