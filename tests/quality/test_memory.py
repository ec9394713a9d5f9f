# SPDX-License-Identifier: Apache-2.0
"""Length costs no memory: 129 frames of 720p are measured within 300 MB."""

import json
import subprocess
import sys

import pytest

from dit_sparse.quality.decode import ffmpeg

FRAMES = 129
LIMIT = 300e6  # bytes; one clip's frames alone are 357e6, both in float32 2.9e9
CODE = """
import json, sys, threading, psutil
from dit_sparse.quality import compare
import dit_sparse.quality.perceptual, dit_sparse.quality.vmaf
me = psutil.Process()
before, peak, children, stop = me.memory_info().rss, 0, 0, threading.Event()
def watch():
    global peak, children
    while not stop.wait(0.02):
        peak = max(peak, me.memory_info().rss)
        try:
            running = [c for c in me.children() if "ffmpeg" in c.name()]
            children = max(children, sum(c.memory_info().rss for c in running))
        except psutil.NoSuchProcess:
            pass
thread = threading.Thread(target=watch)
thread.start()
found = compare(sys.argv[1], sys.argv[2], metrics=json.loads(sys.argv[3]), every=16)
stop.set()
thread.join()
print(json.dumps({
    "frames": found.settings["frames_compared"],
    "size": [found.dense.height, found.dense.width],
    "rows": {name: row.value for name, row in found.rows.items()},
    "before": before, "grown": peak - before, "children": children,
    "seconds": found.settings["seconds"],
}))
"""


@pytest.fixture(scope="module")
def clips(film, tmp_path_factory):
    """Cut the film to 129 frames, twice, the second much compressed."""
    folder = tmp_path_factory.mktemp("clips")
    for name, crf in (("dense", 18), ("sparse", 38)):
        command = [ffmpeg(), "-v", "error", "-i", film, "-map", "0:v", "-frames:v", str(FRAMES)]
        options = ["-c:v", "libx264", "-preset", "ultrafast", "-threads", "1", "-crf", str(crf)]
        subprocess.run([*command, *options, folder / f"{name}.mp4"], check=True)
    return folder / "dense.mp4", folder / "sparse.mp4"


@pytest.mark.slow
def test_129_frames_of_720p_within_300_mb(clips):
    metrics = [
        "psnr", "psnr_pooled", "psnr_temporal", "ssim", "ms_ssim", "sharpness_ratio",
        "motion_ratio", "colour_shift", "vbench.temporal_flickering", "lpips_alex",
    ]  # fmt: skip
    command = [sys.executable, "-c", CODE, *clips, json.dumps(metrics)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["frames"], told["size"]) == (FRAMES, [720, 1280])
    assert 20 < told["rows"]["psnr"] < 45
    assert 0.5 < told["rows"]["ms_ssim"] < 1
    # What the call adds to the interpreter with its packages loaded.
    assert told["grown"] < LIMIT, told
