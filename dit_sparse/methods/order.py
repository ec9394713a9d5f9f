# SPDX-License-Identifier: Apache-2.0
"""Orders in which tokens stand, so that those kept together share blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch

from dit_sparse.core.grid import BlockLayout, LatentsGrid, check_blocks, cut

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self


@dataclass(frozen=True, slots=True)
class Ordered:
    """Video tokens in blocks of their own order, text in blocks of the same size.

    Args:
        permutation: ``permutation[slot] = token`` over the whole sequence, int64
            ``[1, 1, tokens]``; text stays where it was.
        layout: The blocks, in slots.
        is_text: Which blocks hold text, bool ``[blocks]``.
        text_starts: First text token of each block (0 for the others), int32 ``[blocks]``.
    """

    permutation: Tensor
    layout: BlockLayout
    is_text: Tensor
    text_starts: Tensor

    def to(self, device: torch.device | str) -> Self:
        """Move every tensor to ``device``."""
        return replace(
            self,
            permutation=self.permutation.to(device),
            layout=self.layout.to(device),
            is_text=self.is_text.to(device),
            text_starts=self.text_starts.to(device),
        )

    def key_layout(self, text_valid: Tensor | None) -> BlockLayout:
        """Leave padded text (int ``[batch]`` valid tokens; None: no padding) out of the blocks."""
        layout = self.layout
        if text_valid is None:
            return layout
        room = text_valid.to(layout.device, torch.int32)[:, None, None] - self.text_starts
        short = torch.minimum(layout.lengths, room.clamp(min=0))
        lengths = torch.where(self.is_text, short, layout.lengths)
        starts = layout.starts.expand_as(lengths)
        return BlockLayout(starts, lengths, layout.slots, layout.max_length, layout.spread)


@dataclass(frozen=True, slots=True)
class ImageTiles(Ordered):
    """An image's tokens tile by tile; tiles at the right and lower edge may be smaller.

    Args:
        permutation: See ``Ordered``; one block per tile.
        layout: See ``Ordered``.
        is_text: See ``Ordered``.
        text_starts: See ``Ordered``.
        rows: First and last token row of each row of tiles.
        columns: First and last token column of each column of tiles.
    """

    rows: list[tuple[int, int]]
    columns: list[tuple[int, int]]


def image_tiles(grid: LatentsGrid, tile: tuple[int, int]) -> ImageTiles:
    """Order an image (one frame) in tiles of ``(height, width)`` tokens, raster within a tile."""
    rows = _spans(grid.height, tile[0])
    columns = _spans(grid.width, tile[1])
    found = boxes(
        grid,
        ([[0]], *([list(range(a, b + 1)) for a, b in spans] for spans in (rows, columns))),
        tile[0] * tile[1],
    )
    return ImageTiles(
        found.permutation, found.layout, found.is_text, found.text_starts, rows, columns
    )


def boxes(grid: LatentsGrid, cuts: tuple[list[list[int]], ...], text_block_size: int) -> Ordered:
    """Order a video in boxes, the product of a cut of each axis; raster between and within boxes.

    Args:
        grid: Where the tokens stand.
        cuts: For frames, rows and columns: their coordinates in lists, each coordinate once.
        text_block_size: Tokens in a block of text.
    """
    count = prod(map(len, cuts)) + -(-grid.text_length // text_block_size)
    check_blocks(count, "tile (with its dilation or block_size)", grid)
    token = torch.arange(grid.video_tokens).view(grid.frames, grid.height, grid.width)
    # All coordinates of an axis side by side, then box by box views of the reordered video.
    for axis, lists in enumerate(cuts):
        token = token.index_select(axis, torch.tensor([c for part in lists for c in part]))
    sizes = [[len(part) for part in lists] for lists in cuts]
    parts = [
        box.reshape(-1)
        for slab in token.split(sizes[0], 0)
        for bar in slab.split(sizes[1], 1)
        for box in bar.split(sizes[2], 2)
    ]
    lengths = [part.numel() for part in parts]
    text = cut(grid.text_length, text_block_size)
    permutation = torch.cat(parts) + grid.video_start
    words = torch.arange(grid.text_length) + grid.text_start
    text_starts = [sum(text[:i_block]) for i_block in range(len(text))]
    nothing = [0] * len(parts)
    if grid.text_first:
        order, lengths, starts = [words, permutation], text + lengths, text_starts + nothing
        marks = [True] * len(text) + [False] * len(parts)
    else:
        order, lengths, starts = [permutation, words], lengths + text, nothing + text_starts
        marks = [False] * len(parts) + [True] * len(text)
    return Ordered(
        torch.cat(order)[None, None],
        BlockLayout.from_lengths(lengths),
        torch.tensor(marks),
        torch.tensor(starts, dtype=torch.int32),
    )


def fitted_tile(tile: tuple[int, ...], extents: tuple[int, ...]) -> tuple[int, int, int]:
    """Cut a tile of frames x rows x columns to a grid; on short axes others double for it.

    The tile holds no more tokens than before.
    """
    sides = [min(size, extent) for size, extent in zip(tile, extents, strict=True)]
    axis, tried = 1, 0
    while tried < 3:  # rows, columns, frames in turn, until none can grow
        if 2 * sides[axis] <= extents[axis] and 2 * prod(sides) <= prod(tile):
            sides[axis] *= 2
            tried = 0
        else:
            tried += 1
        axis = (axis + 1) % 3
    return sides[0], sides[1], sides[2]


def tile_order(grid: LatentsGrid, tile: tuple[int, int, int]) -> tuple[Tensor, list[int]]:
    """Order the video in tiles of frames x rows x columns, raster between and within tiles.

    Returns:
        ``order[slot] = token`` from the first video token, and the tokens of each tile.
    """
    extents = (grid.frames, grid.height, grid.width)
    sizes = fitted_tile(tile, extents)
    cuts = tuple(
        [list(range(a, b + 1)) for a, b in _spans(extent, size)]
        for extent, size in zip(extents, sizes, strict=True)
    )
    found = boxes(LatentsGrid(*extents), cuts, 1)
    return found.permutation[0, 0], found.layout.lengths[0, 0].tolist()


def morton_order(grid: LatentsGrid) -> Tensor:
    """Order the video along the Z curve: by the interleaved bits of frame, row and column.

    Returns:
        ``order[slot] = token`` from the first video token, int64 ``[video]``.
    """
    token = torch.arange(grid.video_tokens)
    column, row = token % grid.width, token // grid.width % grid.height
    place = torch.zeros_like(token)
    for i_axis, axis in enumerate((column, row, token // grid.frame_tokens)):
        for bit in range(int(axis.max()).bit_length()):
            place |= (axis >> bit & 1) << (3 * bit + i_axis)
    return place.argsort(stable=True)


def patch_major(grid: LatentsGrid) -> Tensor:
    """Order all tokens so that those at one place of different frames follow each other.

    Rows take the place of frames in an image, so that its columns follow each other. Text stays
    where it was.

    Returns:
        ``permutation[slot] = token``, int64 ``[1, 1, tokens]``.
    """
    units = grid.frames if grid.frames > 1 else grid.height
    order = torch.arange(grid.tokens)
    video = order[grid.video_start : grid.video_start + grid.video_tokens]
    order[grid.video_start : grid.video_start + grid.video_tokens] = (
        video.clone().view(units, -1).T.flatten()
    )
    return order[None, None]


def _spans(extent: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, extent) - 1) for first in range(0, extent, size)]
