# SPDX-License-Identifier: Apache-2.0
"""VMAF through ffmpeg's libvmaf, fed with both clips' frames as one stream.

Frames go side by side into one pipe and are cut apart inside ffmpeg: it cannot pair the wrong
ones, pad a shorter clip or resample frame rates, all of which it does in silence with two files.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_sparse.quality.decode import encoder, ffmpeg
from dit_sparse.quality.errors import QualityInputError
from dit_sparse.quality.pairs import Meter
from dit_sparse.quality.scores import Scores

if TYPE_CHECKING:
    from dit_sparse.quality.pairs import Frame

SMALLEST = 32  # pixels on a side; ffmpeg itself crashes at 16
FEWEST = 3  # frames; with fewer the motion feature is 0 and identical clips read 92
MODEL = "vmaf_v0.6.1"
VMAF = (
    f"VMAF (Netflix), model {MODEL}, luma, mean over frames; made for compression seen on a "
    "1080p screen, so a second opinion here. Identical clips read between 97 and 100"
)


class Vmaf(Meter):
    """VMAF, mean over frames.

    Args:
        height: Pixels, at least 32.
        width: Pixels, at least 32.
        threads: Of libvmaf.
    """

    def __init__(self, height: int, width: int, threads: int = 1) -> None:
        self._count = 0
        self._open = contextlib.ExitStack()
        folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="dit-sparse-vmaf-"))
        self._result = Path(folder) / "vmaf.json"
        self._log: Any = self._open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  (the stack closes it)
        # A fixed rate: libvmaf's motion feature counts frames, not seconds.
        options = ["-v", "error", "-nostdin", "-f", "rawvideo", "-pix_fmt", "rgb24", "-r", "25"]
        options += ["-s", f"{2 * width}x{height}", "-i", "-"]
        half = f"crop={width}:{height}"
        # BT.709 limited range by name: what swscale would guess depends on the build.
        yuv = "scale=out_color_matrix=bt709:out_range=tv,format=yuv444p"
        graph = (
            f"split[a][b];[a]{half}:0:0,{yuv}[dense];[b]{half}:{width}:0,{yuv}[sparse];"
            f"[sparse][dense]libvmaf=n_threads={threads}:model='version={MODEL}':log_fmt=json"
            f":log_path={self._result.name}"
        )
        options += ["-lavfi", graph, "-f", "null", "-"]
        # A relative log_path: a folder's name may hold what the filter syntax reads as its own.
        self._process = self._open.enter_context(encoder(options, self._log, folder))

    def update(self, dense: Frame, sparse: Frame) -> None:
        """Send a pair."""
        self._count += 1
        with contextlib.suppress(BrokenPipeError):  # it died: its exit code and log say why
            self._process.stdin.write(np.concatenate((dense, sparse), 1).tobytes())

    def finish(self) -> list[Scores]:
        """Wait for ffmpeg and give the row; status "error" where it failed."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        code = self._process.wait()
        if code != 0 or not self._result.is_file():
            self._log.seek(0)
            said = self._log.read().decode(errors="replace").strip().splitlines()
            reason = f"ffmpeg ended with {code}: {said[-1] if said else 'no error message'}"
            return [Scores("vmaf", VMAF, "", None, reason=reason, status="error")]
        found = json.loads(self._result.read_text(encoding="utf-8"))
        per_frame = tuple(float(frame["metrics"]["vmaf"]) for frame in found["frames"])
        if len(per_frame) != self._count:
            reason = f"ffmpeg scored {len(per_frame)} of {self._count} frames"
            return [Scores("vmaf", VMAF, "", None, reason=reason, status="error")]
        source = f"libvmaf {found.get('version', '')} in {version()}"
        return [Scores("vmaf", VMAF, "", fmean(per_frame), per_frame, source=source)]

    def close(self) -> None:
        """End ffmpeg and remove its files."""
        self._open.close()


@cache
def version() -> str:
    """Name the ffmpeg that runs."""
    done = subprocess.run([ffmpeg(), "-version"], capture_output=True, text=True, check=False)  # noqa: S603  (a list, no shell)
    words = done.stdout.split()[:3]
    return " ".join(words[:1] + words[2:])


@cache
def unavailable() -> str | None:
    """Say why VMAF cannot run here; None where it can. Scores three frames to find out."""
    try:
        program = ffmpeg()
    except QualityInputError as error:
        return str(error)
    filters = subprocess.run([program, "-filters"], capture_output=True, text=True, check=False)  # noqa: S603  (a list, no shell)
    if " libvmaf " not in filters.stdout:
        return (
            f"{version()} has no libvmaf; on Linux, pip install -U imageio-ffmpeg installs an "
            "ffmpeg with libvmaf (check whether IMAGEIO_FFMPEG_EXE points elsewhere)"
        )
    grey = np.full((64, 64, 3), 128, np.uint8)
    with contextlib.closing(Vmaf(64, 64)) as meter:
        for _ in range(FEWEST):
            meter.update(grey, grey)
        (row,) = meter.finish()
    return None if row.ok else f"libvmaf failed on three grey frames: {row.reason}"
