# SPDX-License-Identifier: Apache-2.0
"""Store a pair of clips: lossless files to measure, small mp4s for people.

The usual way to write an mp4 costs about 36 dB by itself, so it cannot show what is closer. x264
in RGB with constant quality 0 gives every byte back, in a tenth of what FFV1 needs.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_sparse.core.video import difference, encode
from dit_sparse.quality.clips import file_hash, open_clip
from dit_sparse.quality.decode import EXACT_TAG
from dit_sparse.quality.errors import QualityInputError
from dit_sparse.quality.files import replace_text, writing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dit_sparse.quality.clips import Clip
    from dit_sparse.quality.pairs import Frame

EXACT = ["-c:v", "libx264rgb", "-crf", "0", "-preset", "veryfast", "-pix_fmt", "rgb24"]
PREVIEW = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
DEFAULT_FPS = 16.0


def write_exact(path: Path, frames: Iterable[Frame], fps: float) -> None:
    """Write a file that gives every byte back: ``.mkv``, x264, RGB, constant quality 0.

    Args:
        path: Where to; ends in ``.mkv``.
        frames: ``[height, width, 3]`` uint8, RGB.
        fps: Frames per second.
    """
    walk = iter(frames)
    first = next(walk)
    options = [*EXACT, "-metadata", f"comment={EXACT_TAG}"]
    encode(path, chain([first], walk), first.shape[:2], fps, options)


def write_preview(path: Path, frames: Iterator[Frame], fps: float, crf: int = 20) -> None:
    """Write a small mp4 that every player reads; an odd last row or column is cut off."""
    first = next(frames)
    height, width = (side // 2 * 2 for side in first.shape[:2])
    if not (height and width):
        raise QualityInputError(f"a video must be at least 2 x 2 pixels, got {first.shape[:2]}")
    cut = (frame[:height, :width] for frame in chain([first], frames))
    encode(path, cut, (height, width), fps, [*PREVIEW, "-crf", str(crf)])


def beside(one: Clip, other: Clip) -> Iterator[Frame]:
    """Lay two clips side by side: in one file they cannot drift apart."""
    for left, right in zip(one.read(), other.read(), strict=False):
        yield np.concatenate((left, right), 1)


def differences(one: Clip, other: Clip) -> Iterator[Frame]:
    """Colour how two clips differ, frame by frame, on ``video.difference``'s fixed scale."""
    for left, right in zip(one.read(), other.read(), strict=False):
        yield difference(left[None], right[None])[0]


def record(
    dense: Any,
    sparse: Any,
    folder: str | Path,
    *,
    fps: float | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Store both clips of a pair, lossless and as small mp4s, with a manifest.

    Writes ``dense.mkv``, ``sparse.mkv``, ``dense.mp4``, ``sparse.mp4`` (for images, ``.png``)
    and ``manifest.json`` with codec and SHA-256 of each.

    Args:
        dense: The reference; what ``open_clip`` opens.
        sparse: The clip under test.
        folder: Made if it is not there.
        fps: Frames per second; None: what the clips say, else 16.
        about: Facts to keep in the manifest: prompt, seed, settings.
    """
    place = Path(folder)
    files: dict[str, Any] = {}
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
        for label, source in (("dense", dense), ("sparse", sparse)):
            clip = open_clip(source, f"the {label} clip", fps)
            files[label] = store(clip, place, label, clip.fps or fps or DEFAULT_FPS)
    manifest = {"schema_version": 1, "about": about or {}, "files": files}
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
    replace_text(place / "manifest.json", text + "\n")
    return manifest


def store(clip: Clip, folder: Path, label: str, fps: float) -> dict[str, Any]:
    """Store one clip lossless and, where it is a video, as a small mp4; describe the files."""
    if clip.frames == 1:
        from dit_sparse.core.video import write_png

        path = folder / f"{label}.png"
        write_png(path, next(clip.read()))
        return {"exact": path.name, "codec": "png", "sha256": file_hash(path), "frames": 1}
    path = folder / f"{label}.mkv"
    write_exact(path, clip.read(), fps)
    write_preview(folder / f"{label}.mp4", clip.read(), fps, crf=18)
    return {
        "exact": path.name,
        "codec": "libx264rgb, crf 0",
        "sha256": file_hash(path),
        "frames": clip.frames,
        "fps": fps,
        "preview": f"{label}.mp4",
    }
