# SPDX-License-Identifier: Apache-2.0
"""Make what a page shows of the clips: small videos, and frames with their differences."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dit_sparse.core.video import difference
from dit_sparse.quality.recording import DEFAULT_FPS, beside, differences, write_preview

if TYPE_CHECKING:
    from pathlib import Path

    from dit_sparse.quality.clips import Clip
    from dit_sparse.quality.comparison import Comparison
    from dit_sparse.quality.pairs import Frame

EMBED = 8 * 2**20  # bytes of a file above which it stands beside the page
CELL = 300  # pixels: widest frame in the strip
JPEG_QUALITY = 88


@dataclass(frozen=True)
class Shown:
    """One frame of the strip: the same moment of both clips and their difference.

    Args:
        caption: Which frame, and why it is shown.
        cells: ``data:`` addresses of dense, sparse, difference.
        pixelated: Frames are so small that they are shown enlarged, in whole pixels.
    """

    caption: str
    cells: tuple[str, str, str]
    pixelated: bool


@dataclass(frozen=True)
class Video:
    """A video of the page: embedded, or a file beside it."""

    address: str
    width: int
    height: int


def strip(found: Comparison) -> list[Shown]:
    """Choose frames (first, quartiles, last, the worst of two metrics) and draw them."""
    picks = interesting(found)
    dense, sparse = (clip.pick(list(picks)) for clip in (found.dense, found.sparse))
    small = found.dense.width <= CELL / 2
    shown = []
    for number, why in sorted(picks.items()):
        pair = dense[number], sparse[number]
        cells = (*pair, difference(pair[0][None], pair[1][None])[0])
        # Lossy colour errors would look like differences where frames are tiny.
        one, two, three = (_png(cell) if small else _jpeg(cell) for cell in cells)
        shown.append(Shown(f"frame {number}{why}", (one, two, three), small))
    return shown


def interesting(found: Comparison) -> dict[int, str]:
    """Give the frames of the strip, each with why it is there."""
    total = int(found.settings["frames_compared"])
    picks = dict.fromkeys(int(p) for p in np.linspace(0, total - 1, min(total, 5)).round())
    why = {number: [] for number in picks} if total > 1 else {0: []}  # type: dict[int, list[str]]
    for name, words in (("psnr", "worst PSNR"), ("psnr_temporal", "worst temporal PSNR")):
        row = found.rows.get(name)
        if total > 1 and row is not None and row.worst_frame is not None:
            why.setdefault(row.worst_frame, []).append(words)
    return {n: f", {', '.join(told)}" if told else "" for n, told in why.items()}


def side_by_side(found: Comparison, folder: Path) -> Video:
    """Write dense and sparse as one video."""
    return pair_video(found.dense, found.sparse, folder, "pair")


def pair_video(one: Clip, other: Clip, folder: Path, name: str) -> Video:
    """Write two clips as one video, side by side."""
    path = folder / f"{name}.mp4"
    write_preview(path, beside(one, other), _fps(one, other))
    return _video(path, 2 * one.width, one.height)


def still(one: Clip, other: Clip) -> str:
    """Lay two images side by side."""
    return _png(next(beside(one, other)))


def difference_video(found: Comparison, folder: Path) -> Video:
    """Write the coloured difference as a video."""
    path = folder / "difference.mp4"
    write_preview(path, differences(found.dense, found.sparse), _fps(found.dense, found.sparse))
    return _video(path, found.dense.width, found.dense.height)


def _fps(one: Clip, other: Clip) -> float:
    return one.fps or other.fps or DEFAULT_FPS


def _video(path: Path, width: int, height: int) -> Video:
    """Embed a small file and remove it; leave a large one beside the page."""
    if path.stat().st_size > EMBED:
        return Video(path.name, width, height)
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    path.unlink()
    return Video(f"data:video/mp4;base64,{data}", width, height)


def _jpeg(frame: Frame) -> str:
    from PIL import Image

    picture = Image.fromarray(frame)
    if picture.width > CELL:
        size = (CELL, max(1, round(CELL * picture.height / picture.width)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _png(frame: Frame) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
