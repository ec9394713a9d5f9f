# SPDX-License-Identifier: Apache-2.0
"""The map as one picture: a row of panels for each quantity, a panel for each band."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from dit_sparse.inspect.colours import RAMPS, UNKNOWN, colour_of, mixed

if TYPE_CHECKING:
    from PIL import Image

    from dit_sparse.inspect.atlas import Atlas, Quantity

MARGIN, GAP, TEXT, LEFT = 18, 26, 14, 26
LARGEST, SMALLEST, WIDEST = 18, 4, 1500  # pixels: of a square, and of the picture about


def draw_poster(atlas: Atlas, shown: int = 4) -> Image.Image:
    """Draw the map.

    Args:
        atlas: What it shows.
        shown: Quantities drawn at most, beside the methods.
    """
    from PIL import Image, ImageDraw, ImageFont

    try:
        font: Any = ImageFont.load_default(TEXT)
    except ImportError:  # Pillow without FreeType
        font = ImageFont.load_default()
    layout = atlas.layout
    panels = len(layout.stages) * len(layout.bands)
    room = (WIDEST - 2 * MARGIN) // panels - LEFT - GAP
    size = max(SMALLEST, min(LARGEST, room // layout.heads, 460 // layout.layers))
    width, height = LEFT + layout.heads * size, layout.layers * size
    rows: list[Quantity | None] = [None] if atlas.choices else []
    sparse = atlas.sparse
    known = [q for q in atlas.quantities if q.known(sparse)]
    rows += known[:shown]
    head = [atlas.title, *atlas.lines]
    if missing := [q.name for q in atlas.quantities if not q.known(sparse) and any(sparse)]:
        head.append(f"not known: {', '.join(missing)}")
    top = MARGIN + len(head) * (TEXT + 6) + 6
    pitch = height + 3 * (TEXT + 8) + GAP
    lines = [_legend(atlas, row) for row in rows]
    wide = MARGIN + panels * (width + GAP) + MARGIN
    longest = max(
        [font.getlength(line) for line in head] + [_length(each, font) for each in lines]
    )
    wide = max(wide, int(longest) + 2 * MARGIN + 30)
    picture = Image.new("RGB", (wide, top + len(rows) * pitch + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(head):
        draw.text((MARGIN, MARGIN + i * (TEXT + 6)), line, "black" if i == 0 else "dimgray", font)
    for i_row, row in enumerate(rows):
        y = top + i_row * pitch
        draw.text((MARGIN, y), "method" if row is None else row.name, "black", font)
        _swatches(draw, lines[i_row], MARGIN, y + TEXT + 6, font)
        for panel in range(panels):
            x = MARGIN + LEFT + panel * (width + GAP)
            stage, band = divmod(panel, len(layout.bands))
            name = f"{layout.stages[stage]}, " if len(layout.stages) > 1 else ""
            at = y + 2 * (TEXT + 8)
            draw.text((x, at - 2), f"{name}{layout.bands[band]}", "dimgray", font)
            _panel(draw, atlas, row, panel, (x, at + TEXT + 4), size)
            for layer in range(0, layout.layers, max(1, -(-(TEXT + 2) // size))):
                draw.text((x - LEFT, at + TEXT + 4 + layer * size - 2), str(layer), "gray", font)
    return picture


def _panel(
    draw: Any, atlas: Atlas, row: Quantity | None, panel: int, corner: tuple[int, int], size: int
) -> None:
    layout = atlas.layout
    first = panel * layout.layers * layout.heads
    for i in range(layout.layers * layout.heads):
        layer, head = divmod(i, layout.heads)
        x, y = corner[0] + head * size, corner[1] + layer * size
        box = (x, y, x + size - 2, y + size - 2)
        if row is None:
            draw.rectangle(box, fill=colour_of(atlas.choices[atlas.choice_of[first + i]].method))
            continue
        value = row.values[first + i]
        if value is None:
            draw.rectangle(box, outline=UNKNOWN)
            draw.line((x, y + size - 2, x + size - 2, y), fill=UNKNOWN)
        else:
            draw.rectangle(box, fill=mixed(RAMPS[row.good or "none"], value / row.top))


def _legend(atlas: Atlas, row: Quantity | None) -> list[tuple[Any, str]]:
    """Give (colour, text) pairs; a colour of None is what is not known."""
    if row is None:
        lengths = [band.stop - band.start for band in atlas.layout.bands]
        per_band = atlas.layout.layers * atlas.layout.heads
        count: Counter[str] = Counter()
        for spot, number in enumerate(atlas.choice_of):
            count[atlas.choices[number].method] += lengths[spot // per_band % len(lengths)]
        total = sum(count.values())
        return [(colour_of(name), f"{name} {n / total:.1%}") for name, n in count.most_common()]
    ramp = RAMPS[row.good or "none"]
    told = [
        (mixed(ramp, share), f"{share * row.top:.0%}" if row.share else f"{share * row.top:.3g}")
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    missing = sum(value is None for value in row.values)
    return [*told, *([(None, f"not known: {missing} of {len(row.values)}")] if missing else [])]


def _length(legend: list[tuple[Any, str]], font: Any) -> float:
    return float(sum(TEXT + 24 + font.getlength(text) for _, text in legend))


def _swatches(draw: Any, legend: list[tuple[Any, str]], x: float, y: int, font: Any) -> None:
    for colour, text in legend:
        box = (x, y + 2, x + TEXT - 2, y + TEXT)
        if colour is None:
            draw.rectangle(box, outline=UNKNOWN)
            draw.line((x, y + TEXT, x + TEXT - 2, y + 2), fill=UNKNOWN)
        else:
            draw.rectangle(box, fill=colour)
        draw.text((x + TEXT + 4, y), text, "dimgray", font)
        x += TEXT + 24 + font.getlength(text)
