# SPDX-License-Identifier: Apache-2.0
"""Write clips for people: mp4, PNG, and one picture with frames of two runs above each other.

Nothing is read back from these files: an mp4 is lossy, so quality is measured on raw frames.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from PIL import Image, ImageFont

    Frames = NDArray[np.uint8]  # [frames, height, width, 3]

CRF = 18  # x264's constant quality: 0 is lossless, 18 looks so, 51 is worst
DIFFERENCE_FULL = 64  # a difference of so many levels of 255 is white
COLUMNS = 8
MAX_PIXELS = 2**26  # of a frame that is read: 8192 x 8192; more is a damaged or a hostile header
# Five points of the colour map "magma": black, violet, red, orange, pale yellow.
_MAGMA = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))
_MARGIN, _GAP, _TEXT = 12, 4, 14  # pixels
_LEGEND = 3 * _TEXT + 28  # height of what stands left of the difference row


def as_uint8(frames: Any) -> Frames:
    """Turn a pipeline's output into RGB bytes, rounding to nearest.

    Args:
        frames: ``[frames, height, width, 3]``, array or tensor, float in [0, 1] (an error of
            1e-3 is clipped, more is refused) or uint8.

    Raises:
        ValueError: Another shape or range, or numbers that are not finite.
    """
    found = frames.detach().float().cpu().numpy() if isinstance(frames, torch.Tensor) else frames
    array: NDArray[Any] = np.asarray(found)
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(f"frames must be [frames, height, width, 3], got {array.shape}")
    if array.dtype == np.uint8:
        return array
    bad = ~np.isfinite(array)
    if bad.any():
        first = int(bad.any((1, 2, 3)).argmax())
        raise ValueError(
            f"{int(bad.sum())} values are NaN or infinite, the first in frame {first}"
        )
    low, high = float(array.min()), float(array.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"frames must lie in [0, 1], got values in [{low:.4g}, {high:.4g}]")
    # One frame at a time: a float64 copy of a whole clip would be eight times the result.
    return np.stack([(np.clip(f, 0, 1) * 255).round().astype(np.uint8) for f in array])


def write_mp4(path: Path, frames: Frames, fps: float) -> None:
    """Write H.264 that every player reads (yuv420p, faststart), whole or not at all.

    An odd last row or column is cut off, which yuv420p demands; nothing is rescaled.

    Args:
        path: Where to; replaced if it is there.
        frames: ``[frames, height, width, 3]`` uint8, RGB, at least 2 pixels on a side.
        fps: Frames per second.
    """
    height, width = (side // 2 * 2 for side in frames.shape[1:3])
    if not (height and width):
        raise ValueError(f"a video must be at least 2 x 2 pixels, got {frames.shape[2:0:-1]}")
    options = ["-c:v", "libx264", "-crf", str(CRF), "-pix_fmt", "yuv420p"]
    options += ["-movflags", "+faststart"]
    encode(path, (frame[:height, :width] for frame in frames), (height, width), fps, options)


def encode(
    path: Path,
    frames: Iterable[NDArray[np.uint8]],
    size: tuple[int, int],
    fps: float,
    options: list[str],
) -> None:
    """Write a video as its frames come, whole or not at all.

    Args:
        path: Where to; replaced if it is there. Its ending names the container.
        frames: ``[height, width, 3]`` uint8, RGB, each.
        size: Height and width.
        fps: Frames per second.
        options: Of ffmpeg, for the codec.

    Raises:
        OSError: ffmpeg failed; says why.
    """
    import imageio_ffmpeg

    # Our own process instead of imageio's writer: that one does not look at ffmpeg's exit code.
    with tempfile.TemporaryDirectory(prefix=".write-", dir=path.parent) as folder:
        scratch = Path(folder) / f"clip{path.suffix}"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y"]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[1]}x{size[0]}"]
        command += ["-r", f"{fps:g}", "-i", "-", "-an", *options, str(scratch)]
        with (
            (Path(folder) / "log").open("w+b") as log,
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log) as process,  # noqa: S603  (a list, no shell)
        ):
            assert process.stdin is not None
            try:
                with contextlib.suppress(BrokenPipeError):  # it died: its log says why
                    for frame in frames:
                        process.stdin.write(frame.tobytes())
                    process.stdin.close()
                code = process.wait()
            except BaseException:
                process.kill()
                raise
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()
        if code != 0 or not scratch.is_file():
            why = said[-1] if said else f"exit code {code}"
            raise OSError(f"{path}: ffmpeg cannot write this file: {why}")
        scratch.replace(path)


def frame_too_large(said: str) -> str | None:
    """Explain that ffmpeg refused a frame for its size; None where it said something else."""
    found = re.search(r"Picture size (\d+)x(\d+) exceeds", said)
    if found is None:
        return None
    return (
        f"its header declares {found[1]} x {found[2]} pixels per frame; the maximum is "
        f"{MAX_PIXELS:,} pixels (such as 8192 x 8192); scale the file down, or copy it again if "
        "the header is wrong"
    )


def write_png(path: Path, picture: Image.Image | NDArray[np.uint8]) -> None:
    """Write a picture, or one frame ``[height, width, 3]``, whole or not at all."""
    from PIL import Image

    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    with tempfile.TemporaryDirectory(prefix=".write-", dir=path.parent) as folder:
        scratch = Path(folder) / "picture.png"
        image.save(scratch)
        scratch.replace(path)


def difference(one: Frames, other: Frames) -> Frames:
    """Colour ``|one - other|``, the largest of the three channels, on a fixed scale.

    Black is 0, pale yellow ``DIFFERENCE_FULL`` levels of 255 or more, whatever the clip: pictures
    of different runs can be compared.
    """
    gap = np.abs(one.astype(np.int32) - other.astype(np.int32)).max(-1)
    palette: Frames = _palette()[np.minimum(gap * 255 // DIFFERENCE_FULL, 255)]
    return palette


def frame_strip(rows: dict[str, Frames], caption: str = "", columns: int = COLUMNS) -> Image.Image:
    """Draw frames of several runs above each other; a third row shows how two of them differ.

    Args:
        rows: Frames by label, from the top; all of one shape. Where there are two, the row
            "difference" follows.
        caption: One line above; cut to fit.
        columns: Frames shown, evenly spread, the first and the last among them.
    """
    from PIL import Image, ImageDraw, ImageFont

    first = next(iter(rows.values()))
    total, height, width = first.shape[:3]
    picks = np.linspace(0, total - 1, min(columns, total)).round().astype(int)
    shown = {label: frames[picks] for label, frames in rows.items()}
    if len(shown) == 2:
        shown["difference"] = difference(*shown.values())
    cell = _cell(width, height, len(picks))
    pitch = max(cell[1], _LEGEND) + _GAP
    try:
        font: Any = ImageFont.load_default(_TEXT)
    except ImportError:  # Pillow without FreeType
        font = ImageFont.load_default()
    side = _MARGIN + max(96, *(int(font.getlength(label)) for label in shown))
    top = _MARGIN + 2 * (_TEXT + 8)
    size = (
        side + len(picks) * (cell[0] + _GAP) + _MARGIN,
        top + len(shown) * pitch + _MARGIN,
    )
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN), _cut(caption, font, size[0] - 2 * _MARGIN), "black", font)
    for i_column, pick in enumerate(picks):
        x = side + i_column * (cell[0] + _GAP)
        if total > 1:
            draw.text((x, top - _TEXT - 6), f"frame {pick}", "dimgray", font)
        for i_row, frames in enumerate(shown.values()):
            frame = Image.fromarray(frames[i_column]).resize(cell, _filter(cell[0], width))
            picture.paste(frame, (x, top + i_row * pitch))
    for i_row, label in enumerate(shown):
        y = top + i_row * pitch
        draw.text((_MARGIN, y), label, "black", font)
        if label == "difference":
            bar = _palette()[None].repeat(8, 0)
            picture.paste(Image.fromarray(bar).resize((80, 8)), (_MARGIN, y + _TEXT + 8))
            scale = f"0 ... {DIFFERENCE_FULL}+"
            draw.text((_MARGIN, y + _TEXT + 20), scale, "dimgray", font)
            draw.text((_MARGIN, y + 2 * _TEXT + 24), "of 255", "dimgray", font)
    return picture


def _palette() -> NDArray[np.uint8]:
    """Interpolate 256 colours ``[256, 3]``."""
    at = np.linspace(0, len(_MAGMA) - 1, 256)
    points = np.array(_MAGMA, dtype=float)
    channels = [np.interp(at, np.arange(len(_MAGMA)), points[:, c]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def _cell(width: int, height: int, columns: int) -> tuple[int, int]:
    """Choose a frame's size in the strip: about 1,200 pixels of frames in a row."""
    wanted = min(1200 / columns, 512.0)
    by = max(1, int(wanted // width)) if width <= wanted else wanted / width
    return max(1, round(width * by)), max(1, round(height * by))


def _filter(shown: int, width: int) -> Image.Resampling:
    from PIL import Image

    return Image.Resampling.NEAREST if shown >= width else Image.Resampling.LANCZOS


def _cut(text: str, font: ImageFont.ImageFont, room: float) -> str:
    """Shorten one line to ``room`` pixels."""
    line = " ".join(text.split())[:500]
    if font.getlength(line) <= room:
        return line
    while line and font.getlength(line + "...") > room:
        line = line[:-1]
    return line + "..."
