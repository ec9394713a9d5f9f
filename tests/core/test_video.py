# SPDX-License-Identifier: Apache-2.0
"""Clips and pictures for people: what is in the files, and that none is left half written."""

import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from dit_sparse.core.video import as_uint8, difference, frame_strip, write_mp4, write_png

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(colour, frames=4, height=20, width=30):
    return np.full((frames, height, width, 3), colour, dtype=np.uint8)


def read(path):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24"]
    done = subprocess.run([*command, "-"], capture_output=True, check=True)
    said = re.search(r"Video: h264.*? (yuv\w+).*? (\d+)x(\d+).*? ([\d.]+) fps", str(done.stderr))
    width, height = int(said[2]), int(said[3])
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)
    return {"pix_fmt": said[1], "fps": float(said[4])}, frames


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_floats_become_bytes_by_rounding(kind):
    values = np.zeros((1, 1, 5, 3), dtype=np.float32)
    values[0, 0, :, 0] = [0, 1, 0.5, 100.4 / 255, 100.6 / 255]
    assert as_uint8(kind(values))[0, 0, :, 0].tolist() == [0, 255, 128, 100, 101]


def test_half_precision_tensors_and_small_overshoots_pass():
    assert as_uint8(torch.ones(1, 2, 2, 3, dtype=torch.bfloat16)).min() == 255
    assert as_uint8(np.full((1, 2, 2, 3), 1.0005)).max() == 255
    same = plain(RED)
    assert as_uint8(same) is same


def _with(value, frame=2):
    frames = np.zeros((4, 2, 2, 3))
    frames[frame, 1, 0, 2] = value
    return frames


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (np.zeros((2, 2, 3)), r"must be \[frames, height, width, 3\], got \(2, 2, 3\)"),
        (np.zeros((1, 3, 8, 8)), r"got \(1, 3, 8, 8\)"),
        (np.zeros((0, 8, 8, 3)), r"got \(0, 8, 8, 3\)"),
        (_with(np.nan), "1 values are NaN or infinite, the first in frame 2"),
        (_with(-np.inf, 3), "the first in frame 3"),
        (_with(1.5), r"must lie in \[0, 1\], got values in \[0, 1.5\]"),
        (_with(-0.5), r"got values in \[-0.5, 0\]"),
    ],
)
def test_what_is_no_clip_is_refused(frames, words):
    with pytest.raises(ValueError, match=words):
        as_uint8(frames)


def test_an_mp4_has_the_frames_the_rate_and_nearly_the_colours(tmp_path):
    frames = np.concatenate([plain(RED, 3, 64, 96), plain(BLUE, 4, 64, 96)])
    write_mp4(tmp_path / "clip.mp4", frames, 12)
    meta, found = read(tmp_path / "clip.mp4")
    assert found.shape == frames.shape  # nothing dropped, nothing rescaled
    assert meta["fps"] == 12
    assert meta["pix_fmt"] == "yuv420p"
    assert np.abs(found.astype(int) - frames.astype(int)).max() <= 4
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # faststart
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_odd_sizes_lose_a_row_and_are_not_rescaled(tmp_path):
    frames = plain(GREEN, 2, 33, 51)
    frames[:, :, 25:] = BLUE
    write_mp4(tmp_path / "odd.mp4", frames, 7.5)
    meta, found = read(tmp_path / "odd.mp4")
    assert found.shape == (2, 32, 50, 3)
    assert meta["fps"] == 7.5
    edge = np.abs(found[:, :, [20, 30]].astype(int) - frames[:, :32, [20, 30]]).max()
    assert edge <= 6


def test_an_existing_file_is_replaced_whole_or_kept(tmp_path):
    path = tmp_path / "clip.mp4"
    write_mp4(path, plain(RED), 8)
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"clip\.mp4: ffmpeg cannot write this file: .+"):
        write_mp4(path, plain(BLUE, 50, 64, 64), 0)  # ffmpeg refuses the rate and exits
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["clip.mp4"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    class Interrupted:
        shape = (3, 32, 32, 3)

        def __iter__(self):
            yield plain(RED, 1, 32, 32)[0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_mp4(tmp_path / "clip.mp4", Interrupted(), 8)
    assert list(tmp_path.iterdir()) == []


def test_a_frame_of_one_pixel_is_no_video(tmp_path):
    with pytest.raises(ValueError, match="2 pixels"):
        write_mp4(tmp_path / "clip.mp4", plain(RED, 2, 1, 9), 8)


def test_ffmpeg_gets_a_list_and_no_shell(tmp_path):
    path = tmp_path / "a b'c;$(x).mp4"
    write_mp4(path, plain(RED), 8)
    assert path.is_file()


def test_a_png_keeps_every_pixel(tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    write_png(tmp_path / "a.png", frame)
    with Image.open(tmp_path / "a.png") as image:
        assert (np.asarray(image) == frame).all()


def test_the_difference_has_a_fixed_scale():
    one = plain((100, 100, 100), 1, 1, 4)
    other = one.copy()
    other[0, 0, :, 1] = [100, 132, 164, 20]  # 0, half, full, more than full scale
    colours = difference(one, other)[0, 0].astype(int)
    assert tuple(colours[0]) == (0, 0, 4)
    assert tuple(colours[2]) == tuple(colours[3]) == (252, 253, 191)
    assert np.abs(colours[1] - (183, 55, 121)).max() <= 3
    assert (difference(other, one) == difference(one, other)).all()


def test_the_strip_shows_both_runs_and_their_difference():
    dense = np.concatenate([plain(RED, 10, 32, 48), plain(GREEN, 10, 32, 48)])
    sparse = dense.copy()
    sparse[-1] = 255
    strip = np.asarray(frame_strip({"dense": dense, "sparse": sparse}, "a prompt", columns=3))
    assert strip.dtype == np.uint8
    for colour, least in ((RED, 2), (GREEN, 1)):  # frames 0 and 10 of 20 twice, 19 once
        area = (strip == colour).all(-1).sum()
        scale = 8 * 8  # 48 pixels are shown as 384
        assert area >= least * 32 * 48 * scale
    # The last column of the last row is the largest difference, the first is none.
    bottom = strip[-30]
    assert tuple(bottom[-30]) == (252, 253, 191)
    assert (bottom == (0, 0, 4)).all(-1).sum() >= 384


def test_a_strip_of_one_run_and_of_one_image():
    alone = frame_strip({"sparse": plain(BLUE, 33, 16, 16)}, "x" * 3000)
    pair = frame_strip({"dense": plain(BLUE, 1, 700, 600), "sparse": plain(BLUE, 1, 700, 600)})
    assert alone.width < 1600
    assert alone.height < pair.height
    area = (np.asarray(pair) == BLUE).all(-1).sum()
    assert area == 2 * 512 * round(700 * 512 / 600)


def test_the_frames_of_a_strip_are_first_to_last():
    frames = np.stack([plain((i, 200, 0), 1, 150, 150)[0] for i in range(33)])
    strip = np.asarray(frame_strip({"sparse": frames})).reshape(-1, 3)
    shown = set(strip[(strip[:, 1] == 200) & (strip[:, 2] == 0), 0].tolist())
    assert shown == {0, 5, 9, 14, 18, 23, 27, 32}
