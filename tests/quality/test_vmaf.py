# SPDX-License-Identifier: Apache-2.0
"""VMAF: equal to ffmpeg's own with two files, monotone, refused where ffmpeg would be wrong."""

import json
import subprocess

import numpy as np
import pytest

from dit_sparse.quality import QualityInputError, compare, vmaf
from dit_sparse.quality.clips import open_clip
from dit_sparse.quality.decode import ffmpeg
from tests.quality.conftest import moving, noisy


@pytest.fixture(autouse=True)
def _there():
    if vmaf.unavailable():
        pytest.skip(vmaf.unavailable())


def score(one, other):
    return compare(one, other, metrics=["vmaf"]).rows["vmaf"]


def test_equal_to_ffmpeg_with_two_files(carphone, tmp_path):
    pristine, distorted = carphone
    graph = "[0:v][1:v]libvmaf=log_fmt=json:log_path=out.json"
    command = [ffmpeg(), "-v", "error", "-i", distorted, "-i", pristine, "-lavfi", graph]
    subprocess.run([*command, "-f", "null", "-"], check=True, cwd=tmp_path)
    wanted = json.loads((tmp_path / "out.json").read_text())["pooled_metrics"]["vmaf"]
    row = score(pristine, distorted)
    # The file's luma went to 8-bit RGB and back on our side.
    assert row.value == pytest.approx(wanted["mean"], abs=0.1)
    assert len(row.per_frame) == 120
    assert "libvmaf" in row.source


def test_identical_is_near_the_top_and_noise_lowers_it():
    clip = np.repeat(np.repeat(moving(6, 64, 72), 2, 1), 2, 2)
    values = [score(clip, noisy(clip, sigma)).value for sigma in (0, 6, 18, 45)]
    assert values[0] > 95
    assert values == sorted(values, reverse=True)
    assert values[0] - values[-1] > 20


def test_which_one_is_the_reference_matters(carphone):
    pair = [np.stack(list(open_clip(p).pick(range(8)).values())) for p in carphone]
    assert abs(score(*pair).value - score(*reversed(pair)).value) > 1


def test_sizes_that_crash_ffmpeg_and_counts_it_pads_are_refused():
    for side, status in ((16, "n/a"), (31, "n/a"), (33, "ok")):
        clip = moving(4, side, 40)
        row = score(clip, noisy(clip, 5))
        assert row.as_dict()["status"].startswith(status)
    with pytest.raises(QualityInputError, match="has 24 frames"):
        compare(moving(24), moving(20), metrics=["vmaf"])


def test_an_ffmpeg_without_libvmaf_is_said_not_an_error(monkeypatch, tmp_path):
    fake = tmp_path / "ffmpeg"
    fake.write_text("#!/bin/sh\necho ffmpeg version 5.1 x\n")
    fake.chmod(0o755)
    for module in (vmaf,):
        monkeypatch.setattr(module, "ffmpeg", lambda: str(fake))
    vmaf.unavailable.cache_clear()
    vmaf.version.cache_clear()
    try:
        row = score(moving(), moving())
        assert row.status == "skipped"
        assert "ffmpeg 5.1 has no libvmaf" in row.reason
        assert "pip install -U imageio-ffmpeg" in row.reason
    finally:
        vmaf.unavailable.cache_clear()
        vmaf.version.cache_clear()


def test_a_dying_ffmpeg_is_a_row_with_an_error(monkeypatch):
    monkeypatch.setattr(vmaf, "MODEL", "no_such_model")
    row = score(moving(), moving())
    assert row.status == "error"
    assert "ffmpeg ended with" in row.reason
