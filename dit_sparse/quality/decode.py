# SPDX-License-Identifier: Apache-2.0
"""Read video files strictly: a damaged or cut-off file is an error, never a shorter clip.

ffmpeg by itself gives 63 of 132 frames of a cut-off file, and all 132 of one with flipped bits,
without a word; so every file is decoded once, told to stop at the first error, before it is
compared.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_sparse.core.video import MAX_PIXELS, frame_too_large
from dit_sparse.quality.errors import QualityInputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dit_sparse.quality.pairs import Frame

TIMEOUT = 1800.0  # seconds for decoding a whole file once
EXACT_TAG = "dit_sparse exact RGB"  # the comment in files that ``record`` wrote
EXACT_CODECS = {"ffv1", "rawvideo", "png", "huffyuv", "ffvhuff", "utvideo", "magicyuv", "ppm"}
_STRICT = ("-xerror", "-err_detect", "explode", "-noautorotate", "-max_pixels", str(MAX_PIXELS))
_TELLING = re.compile(r"error|invalid|not found|corrupt", re.IGNORECASE)
_NOISE = re.compile(r"Conversion failed|Terminating thread|Task finished|Error opening input f")
_STREAM = re.compile(r"Stream #0:\d+.*?: Video: (?P<codec>\w+)(?P<rest>.*)")


@dataclass(frozen=True, slots=True)
class VideoFile:
    """What a checked file holds.

    Args:
        path: Where it is.
        frames: How many were decoded without an error.
        height: Pixels.
        width: Pixels.
        fps: Frames per second; None where the container has none.
        codec: Codec and pixel format, as ffmpeg names them.
        exact: Decoding gives the very RGB bytes that were written.
    """

    path: Path
    frames: int
    height: int
    width: int
    fps: float | None
    codec: str
    exact: bool

    def read(self, pixels: str = "rgb24") -> Iterator[Frame]:
        """Decode frame by frame, ``[height, width, 3]`` uint8 (``[height, width, 1]`` for gray).

        Raises:
            QualityInputError: It cannot be decoded to its end any more.
        """
        channels = 1 if pixels == "gray" else 3
        size = self.height * self.width * channels
        command = [ffmpeg(), "-v", "error", "-nostdin", *_STRICT, "-i", _url(self.path)]
        command += ["-map", "0:v:0", "-fps_mode", "passthrough"]
        command += ["-f", "rawvideo", "-pix_fmt", pixels, "-"]
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)  # noqa: S603  (a list, no shell)
            assert process.stdout is not None
            try:
                number = 0
                while len(data := process.stdout.read(size)) == size:
                    number += 1
                    yield np.frombuffer(data, np.uint8).reshape(self.height, self.width, channels)
                code = process.wait(TIMEOUT)
            finally:
                process.kill()
                process.stdout.close()
                process.wait()
            log.seek(0)
            if code != 0 or number != self.frames:
                raise QualityInputError(
                    f"{self.path}: gave {number} frames, {self.frames} when it was first "
                    f"checked: {_cause(log.read().decode(errors='replace'))}; was the file "
                    "changed in the meantime?"
                )


def ffmpeg() -> str:
    """Name the ffmpeg to run: the one that imageio-ffmpeg carries or is told to use."""
    import imageio_ffmpeg

    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise QualityInputError(
            f"ffmpeg is required to read and write videos: {error}; pip install imageio-ffmpeg"
        ) from error


def check_video(path: Path, timeout: float = TIMEOUT) -> VideoFile:
    """Decode a file once, from its first to its last frame, and say what it holds.

    Raises:
        QualityInputError: It is empty, no video, damaged or cut off, or takes too long.
    """
    if path.stat().st_size == 0:
        raise QualityInputError(f"{path}: is empty; give a video file")
    command = [ffmpeg(), "-hide_banner", "-nostats", "-nostdin", *_STRICT, "-i", _url(path)]
    command += ["-map", "0:v:0", "-fps_mode", "passthrough", "-progress", "pipe:1"]
    command += ["-f", "null", "-"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout, check=False)  # noqa: S603  (a list, no shell)
    except subprocess.TimeoutExpired as error:
        raise QualityInputError(
            f"{path}: not decoded within {timeout:.0f} s; check the length of the video"
        ) from error
    said, progress = (text.decode(errors="replace") for text in (done.stderr, done.stdout))
    stream = _STREAM.search(said.split("Stream mapping:")[0])
    if stream is None:
        raise QualityInputError(f"{path}: not a video that ffmpeg can read: {_cause(said)}")
    if (why := frame_too_large(said)) is not None:
        raise QualityInputError(f"{path}: {why}")
    size = re.search(r", (\d{1,6})x(\d{1,6})", stream["rest"])
    found = [int(count) for count in re.findall(r"^frame=\s*(\d+)", progress, re.MULTILINE)]
    frames = found[-1] if found else 0
    rate = re.search(r"([\d.]+)(k?) fps", stream["rest"])
    fps = float(rate[1]) * (1000 if rate[2] else 1) if rate else None
    if done.returncode != 0 or size is None or frames == 0:
        raise QualityInputError(
            f"{path}: damaged or truncated after {frames} complete frames: {_cause(said)}; "
            "create or copy it again"
        )
    _whole(path, said, frames, fps)
    inside = stream["rest"].split("\n")[0]
    pixels = re.search(r", ([a-z]\w+)[,(]", inside)
    codec = f"{stream['codec']}, {pixels[1] if pixels else 'unknown pixels'}"
    rgb = pixels is not None and re.match(r"(gbrp|rgb|bgr|0rgb|gray$|pal8)", pixels[1]) is not None
    exact = EXACT_TAG in said or (stream["codec"] in EXACT_CODECS and rgb)
    return VideoFile(path, frames, int(size[2]), int(size[1]), fps, codec, exact)


def _whole(path: Path, said: str, frames: int, fps: float | None) -> None:
    """Compare with the length that the container states; sound may be longer than pictures."""
    length = re.search(r"Duration: (\d+):(\d\d):(\d\d\.\d+)", said)
    if length is None or fps is None or ": Audio:" in said:
        return
    hours, minutes, seconds = (float(part) for part in length.groups())
    stated = (3600 * hours + 60 * minutes + seconds) * fps
    if stated - frames > max(2.0, 0.05 * stated):
        raise QualityInputError(
            f"{path}: truncated: {frames} frames found, but its header declares about "
            f"{stated:.0f}; create or copy it again"
        )


def _url(path: Path) -> str:
    """Keep ffmpeg from reading a name as an option or a protocol."""
    return f"file:{path}"


def _cause(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line for line in lines if not _NOISE.search(line)] or lines or ["no error message"]
    chosen = [line for line in told if _TELLING.search(line)]
    return re.sub(r"^\[[^\]]*\] ", "", chosen[0] if chosen else told[-1])[:300]


@contextlib.contextmanager
def encoder(options: list[str], log: Any, folder: str | Path | None = None) -> Iterator[Any]:
    """Run ffmpeg with a pipe to write into; kills it on an exception.

    Args:
        options: Between the program and its end.
        log: An open file for what it says.
        folder: Where it runs.
    """
    process = subprocess.Popen(  # noqa: S603  (a list, no shell)
        [ffmpeg(), *options], stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=folder
    )
    assert process.stdin is not None
    try:
        yield process
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.kill()
        process.wait()
