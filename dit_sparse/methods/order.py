# SPDX-License-Identifier: Apache-2.0
"""Orders in which tokens stand, so that those kept together share blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dit_sparse.grid import BlockLayout, LatentsGrid, cut

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ImageTiles:
    """An image's tokens tile by tile; tiles at the right and lower edge may be smaller.

    Args:
        rows: First and last token row of each row of tiles.
        columns: First and last token column of each column of tiles.
        permutation: ``permutation[slot] = token`` over the whole sequence, int64
            ``[1, 1, tokens]``; text stays where it was.
        layout: One block per tile, text in blocks of the tile's size.
        is_text: Which blocks hold text, bool ``[blocks]``.
        text_starts: First text token of each block (0 for tiles), int32 ``[blocks]``.
    """

    rows: list[tuple[int, int]]
    columns: list[tuple[int, int]]
    permutation: Tensor
    layout: BlockLayout
    is_text: Tensor
    text_starts: Tensor

    def to(self, device: torch.device | str) -> ImageTiles:
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


def image_tiles(grid: LatentsGrid, tile: tuple[int, int]) -> ImageTiles:
    """Order an image (one frame) in tiles of ``(height, width)`` tokens, raster within a tile."""
    rows = _spans(grid.height, tile[0])
    columns = _spans(grid.width, tile[1])
    token = torch.arange(grid.height * grid.width).view(grid.height, grid.width)
    parts = [
        token[top : bottom + 1, left : right + 1].flatten()
        for top, bottom in rows
        for left, right in columns
    ]
    text = cut(grid.text_length, tile[0] * tile[1])
    lengths = [part.numel() for part in parts]
    permutation = torch.cat(parts) + grid.video_start
    words = torch.arange(grid.text_length) + grid.text_start
    text_starts = [sum(text[:i_block]) for i_block in range(len(text))]
    if grid.text_first:
        order = [words, permutation]
        lengths = text + lengths
        starts = text_starts + [0] * len(parts)
        marks = [True] * len(text) + [False] * len(parts)
    else:
        order = [permutation, words]
        lengths = lengths + text
        starts = [0] * len(parts) + text_starts
        marks = [False] * len(parts) + [True] * len(text)
    return ImageTiles(
        rows,
        columns,
        torch.cat(order)[None, None],
        BlockLayout.from_lengths(lengths),
        torch.tensor(marks),
        torch.tensor(starts, dtype=torch.int32),
    )


def _spans(extent: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, extent) - 1) for first in range(0, extent, size)]
