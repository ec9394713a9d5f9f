# SPDX-License-Identifier: Apache-2.0
"""Read attention masks: does one hide padded text, and nothing else? Where does it stand?

Plans take padding at the end of the text. Where a model has it elsewhere, the valid tokens are
put together for the length of the call: positions are in queries and keys already, so attention
does not see the order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.grid import LatentsGrid

ROWS = 1024  # query rows compared at once: a mask of [tokens, tokens] is never copied whole


def video_row(mask: Tensor, grid: LatentsGrid, batch: int) -> Tensor | None:
    """Read which keys the first video token may see, bool ``[batch, tokens]``.

    Args:
        mask: Bool ``[batch|1, heads|1, tokens|1, tokens]``, True = may be seen.
        grid: Where the tokens stand.
        batch: Samples of the call.

    Returns:
        None where the mask is of another kind: additive, or of another shape.
    """
    if mask.dtype != torch.bool or mask.ndim != 4:
        return None
    if mask.shape[3] != grid.tokens or mask.shape[2] not in {1, grid.tokens}:
        return None
    query = 0 if mask.shape[2] == 1 else grid.video_start
    return mask[:, 0, query].expand(batch, -1)


def only_padding(mask: Tensor, row: Tensor, grid: LatentsGrid) -> bool:
    """Tell whether a mask hides some text from everybody, and nothing else.

    What padded text itself may see does not matter: nobody reads what comes of it. Reads the
    device.

    Args:
        mask: Bool ``[batch|1, heads|1, tokens|1, tokens]``.
        row: What ``video_row`` read of it.
        grid: Where the tokens stand.
    """
    video = row[:, grid.video_start : grid.video_start + grid.video_tokens]
    if not bool(video.all()):
        return False
    if mask.stride(1) == 0:  # expanded, not stored
        mask = mask[:, :1]
    if mask.stride(2) == 0:
        mask = mask[:, :, :1]
    if mask.shape[2] == 1:
        return bool((mask == row[:, None, None]).all())
    for start in range(0, grid.tokens, ROWS):
        part = mask[:, :, start : start + ROWS]
        padded = ~row[:, None, start : start + ROWS, None]  # these query rows may hold anything
        if not bool(((part == row[:, None, None]) | padded).all()):
            return False
    return True


def at_the_end(row: Tensor, grid: LatentsGrid) -> bool:
    """Tell whether in every sample all padding stands behind all valid text; reads the device."""
    text = row[:, grid.text_start : grid.text_start + grid.text_length]
    return not bool((text[:, 1:] & ~text[:, :-1]).any())


def valid_first(row: Tensor, grid: LatentsGrid) -> Tensor:
    """Order each sample's tokens so that valid text comes before padded text.

    Gives int64 ``[batch, tokens]``. Video tokens stay where they are, and valid text keeps its
    own order.
    """
    order = torch.arange(grid.tokens, device=row.device).expand(row.shape[0], -1).clone()
    text = slice(grid.text_start, grid.text_start + grid.text_length)
    places = row[:, text].to(torch.int8).argsort(dim=1, descending=True, stable=True)
    order[:, text] = places + grid.text_start
    return order


def take(tokens: Tensor, order: Tensor) -> Tensor:
    """Bring ``[batch, seq_len, heads, head_dim]`` into an order of each sample's own."""
    return tokens.gather(1, order[:, :, None, None].expand_as(tokens))


def back(tokens: Tensor, order: Tensor) -> Tensor:
    """Undo ``take``."""
    return take(tokens, order.argsort(dim=1))
