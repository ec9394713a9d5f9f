# SPDX-License-Identifier: Apache-2.0
"""Draw what heads keep: a row per head, its map and one token's view of every frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.inspect.view import HeadView

MAP = 192  # pixels of a map's side
FRAME_WIDTH = 150  # pixels of a frame at most
FRAMES = 8  # frames shown, evenly spread
GAP, TEXT, MARGIN = 10, 14, 14
KEPT, DROPPED, QUERY = (31, 90, 160), (236, 240, 245), (214, 40, 40)


def draw_views(
    views: Sequence[HeadView],
    grid: LatentsGrid,
    title: str,
    note: str = "",
    token: tuple[int, int, int] | None = None,
) -> Image.Image:
    """Draw views under each other.

    Args:
        views: Heads, from the top.
        grid: Where the tokens stand.
        title: First line.
        note: Second line: where the queries and keys came from.
        token: The query token (frame, row, column) whose keys are shown; None: the middle one.
    """
    from PIL import Image, ImageDraw, ImageFont

    try:
        font: Any = ImageFont.load_default(TEXT)
    except ImportError:  # Pillow without FreeType
        font = ImageFont.load_default()
    at = token or (grid.frames // 2, grid.height // 2, grid.width // 2)
    picks = np.linspace(0, grid.frames - 1, min(FRAMES, grid.frames)).round().astype(int)
    picks = np.unique(np.append(picks, at[0]))
    scale = min(FRAME_WIDTH / grid.width, (MAP - TEXT) / grid.height)
    cell = (max(1, int(grid.width * scale)), max(1, int(grid.height * scale)))
    pitch = MAP + 2 * TEXT + GAP
    top = MARGIN + 3 * (TEXT + 6)
    wide = 2 * MARGIN + MAP + 2 * GAP + len(picks) * (cell[0] + GAP)
    wide = max(wide, 2 * MARGIN + int(max(font.getlength(title), font.getlength(note))))
    picture = Image.new("RGB", (wide, top + len(views) * pitch + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN), title, "black", font)
    draw.text((MARGIN, MARGIN + TEXT + 6), note, "dimgray", font)
    head = "left: queries down, keys across, in the model's order; right: what the token "
    head += f"(frame {at[0]}, row {at[1]}, column {at[2]}; red) reads"
    draw.text((MARGIN, MARGIN + 2 * (TEXT + 6)), head, "dimgray", font)
    for i_row, view in enumerate(views):
        y = top + i_row * pitch
        text = "" if view.text_seen is None else f", text {view.text_seen:.0%}"
        line = f"head {view.head}: {view.method}, density {view.density:.1%}{text}"
        draw.text((MARGIN, y), line, "black", font)
        y += TEXT + 6
        square = _blend(view.kept_map.numpy())
        picture.paste(Image.fromarray(square).resize((MAP, MAP), Image.Resampling.BOX),
                      (MARGIN, y))  # fmt: skip
        draw.rectangle((MARGIN - 1, y - 1, MARGIN + MAP, y + MAP), outline="gray")
        for i_column, frame in enumerate(picks):
            x = MARGIN + MAP + 2 * GAP + i_column * (cell[0] + GAP)
            pixels = _blend(view.seen[int(frame)].float().numpy())
            if frame == at[0]:
                pixels[at[1], at[2]] = QUERY
            picture.paste(Image.fromarray(pixels).resize(cell, Image.Resampling.NEAREST),
                          (x, y + TEXT))  # fmt: skip
            draw.text((x, y - 4), f"frame {frame}", "dimgray", font)
    return picture


def _blend(share: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Colour shares in [0, 1] between dropped and kept: uint8 ``[rows, columns, 3]``."""
    low, high = np.array(DROPPED, dtype=float), np.array(KEPT, dtype=float)
    # The square root shows thin lines that fill a small share of a bin.
    mixed = low + (high - low) * np.sqrt(np.clip(share, 0, 1))[..., None]
    pixels: np.ndarray[Any, np.dtype[np.uint8]] = mixed.round().astype(np.uint8)
    return pixels
