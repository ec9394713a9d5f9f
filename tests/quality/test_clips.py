# SPDX-License-Identifier: Apache-2.0
"""What a clip may be, and every bad input: each has its stated behaviour, none a wrong number."""

import re
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dit_sparse.quality import QualityInputError, compare, open_clip, record
from dit_sparse.quality.decode import ffmpeg
from dit_sparse.quality.recording import write_exact, write_preview
from tests.quality.conftest import moving, noisy


def frames_of(source, **options):
    clip = open_clip(source, **options)
    found = np.stack(list(clip.read()))
    assert found.shape == (clip.frames, clip.height, clip.width, 3)
    return found


def refused(source, *words, **options):
    with pytest.raises(QualityInputError) as error:
        frames_of(source, **options)
    for word in words:
        assert word in str(error.value)


def test_every_form_gives_the_same_frames(tmp_path):
    clip = moving(4, 21, 34)
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(clip):
        Image.fromarray(frame).save(folder / f"frame_{number + 8}.png")  # 8, 9, 10, 11
    np.save(tmp_path / "clip.npy", clip)
    np.savez_compressed(tmp_path / "clip.npz", frames=clip, other=np.zeros(3))
    write_exact(tmp_path / "clip.mkv", clip, 12)
    forms = [
        clip,
        clip[None],
        torch.from_numpy(clip),
        torch.from_numpy(clip).permute(0, 3, 1, 2),
        clip / 255,
        (clip / 255).astype(np.float32),
        torch.from_numpy(clip / 255).float().permute(0, 3, 1, 2)[None],
        [Image.fromarray(frame) for frame in clip],
        list(clip),
        [torch.from_numpy(frame) for frame in clip],
        folder,
        tmp_path / "clip.npy",
        tmp_path / "clip.npz",
        str(tmp_path / "clip.mkv"),
    ]
    for form in forms:
        np.testing.assert_array_equal(frames_of(form), clip)
    kinds = [open_clip(forms[i]).kind for i in (0, 10, 11, 13)]
    assert kinds == ["arrays", "lossless", "lossless", "lossless"]
    assert open_clip(forms[-1]).fps == 12
    again = open_clip(forms[-1])
    assert [len(list(again.read())) for _ in range(2)] == [4, 4]
    np.testing.assert_array_equal(again.pick([2])[2], clip[2])


@settings(max_examples=6)
@given(
    frames=st.integers(1, 4),
    height=st.integers(2, 40),
    width=st.integers(2, 40),
    seed=st.integers(0, 99),
)
def test_a_recorded_file_gives_every_byte_back(tmp_path_factory, frames, height, width, seed):
    random = np.random.default_rng(seed)
    clip = random.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("exact") / "clip.mkv"
    write_exact(path, iter(clip), 24)
    np.testing.assert_array_equal(frames_of(path), clip)
    assert open_clip(path).kind == "lossless"


def test_one_image_is_a_clip_of_one_frame(tmp_path):
    frame = moving(1)[0]
    Image.fromarray(frame).save(tmp_path / "one.png")
    Image.fromarray(frame).save(tmp_path / "one.jpg")
    for source in (frame, [Image.fromarray(frame)], tmp_path / "one.png"):
        np.testing.assert_array_equal(frames_of(source), frame[None])
    assert open_clip(tmp_path / "one.jpg").kind == "lossy"


def test_record_keeps_both_clips_and_says_what_they_are(tmp_path):
    dense, sparse = moving(5, 31, 45), noisy(moving(5, 31, 45), 9)
    manifest = record(dense / 255, sparse, tmp_path, fps=8, about={"prompt": "a cat"})
    assert manifest["about"] == {"prompt": "a cat"}
    for label, clip in (("dense", dense), ("sparse", sparse)):
        told = manifest["files"][label]
        np.testing.assert_array_equal(frames_of(tmp_path / told["exact"]), clip)
        assert open_clip(tmp_path / told["exact"]).sha256 == told["sha256"]
        small = open_clip(tmp_path / told["preview"])
        assert (small.kind, small.frames, small.height, small.width) == ("lossy", 5, 30, 44)


def test_an_mp4_for_people_is_called_lossy_and_is(tmp_path):
    clip = noisy(moving(3), 30)
    write_preview(tmp_path / "clip.mp4", iter(clip), 10)
    found = compare(clip, tmp_path / "clip.mp4", metrics=["psnr"])
    assert found.rows["psnr"].value < 40  # by its compression alone
    assert any("values above 34 dB are not trustworthy" in note for note in found.notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((1, 2, 3, 0, np.nan), ("1 values are NaN or infinite, the first in frame 1", "kernel")),
        ((2, 2, 3, 0, np.inf), ("first in frame 2",)),
        ((0, 0, 0, 0, 1.7), ("must lie in [0, 1]", "1.7]", "divide by 255")),
        ((0, 0, 0, 0, -0.9), ("[-0.9,", "(x + 1) / 2")),
    ],
)
@pytest.mark.parametrize("kind", ["numpy", "torch", "list"])
def test_values_that_are_no_colours(change, words, kind):
    clip = moving(3) / 255
    clip[change[:4]] = change[4]
    if kind == "list":
        words = [re.sub("the first in frame .", "the first in frame 0", word) for word in words]
        words = [w for w in words if "first in frame" not in w]
    source = {"numpy": clip, "torch": torch.from_numpy(clip), "list": list(clip)}[kind]
    refused(source, *words)


def test_rounding_just_outside_the_range_is_clipped():
    clip = np.array([1.0005, -0.0005, 0.5, 0.2]).reshape(1, 2, 2, 1).repeat(3, -1)
    assert frames_of(clip)[0, ..., 0].ravel().tolist() == [255, 0, 128, 51]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((2, 5, 5, 4), np.uint8), "got shape (2, 5, 5, 4)"),
        (np.zeros((0, 5, 5, 3), np.uint8), "got shape (0, 5, 5, 3)"),
        (np.zeros((2, 5, 5, 3), np.int64), "must be uint8 or float in [0, 1], got int64"),
        (7, "got int"),
        ([], "got list"),
        (None, "got NoneType"),
        ([np.zeros((5, 5, 3), np.uint8), np.zeros((5, 6, 3), np.uint8)], "frame 1 is 6 x 5"),
        ([Image.new("I;16", (4, 4))], "must be 8-bit RGB, got mode I;16"),
        ([Image.new("RGBA", (4, 4), (1, 2, 3, 9))], "partly transparent"),
    ],
)
def test_things_that_are_no_clip(source, words):
    refused(source, words)


def test_paths_that_are_no_clip(tmp_path):
    refused(tmp_path / "nowhere.mp4", "file or folder not found")
    refused(tmp_path, "has no images")
    empty = tmp_path / "empty.mp4"
    empty.touch()
    refused(empty, "empty.mp4: is empty")
    text = tmp_path / "text.mp4"
    text.write_text("no video at all " * 100)
    refused(text, "text.mp4", "not a video that ffmpeg can read")
    other = tmp_path / "clip.txt"
    other.write_text("x")
    refused(other, "unsupported file type", ".mp4")
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 nothing")
    refused(broken, "broken.npz: must be a NumPy file")
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    refused(tmp_path / "two.npz", "an array named frames")
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object))
    refused(tmp_path / "pickled.npy", "pickled.npy")  # and its pickle was not run
    (tmp_path / "frames").mkdir()
    Image.fromarray(moving(1)[0]).save(tmp_path / "frames" / "0.png")
    data = (tmp_path / "frames" / "0.png").read_bytes()
    (tmp_path / "frames" / "1.png").write_bytes(data[: len(data) // 2])
    refused(tmp_path / "frames", "1.png: not a readable image")


def test_names_that_look_like_options_or_protocols(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip = moving(3)
    for name in ("-y.mkv", "http:x.mkv", "a b'%d.mkv"):
        write_exact(tmp_path / "clip.mkv", clip, 10)
        (tmp_path / "clip.mkv").rename(tmp_path / name)
        np.testing.assert_array_equal(frames_of(name), clip)


@pytest.fixture(scope="module")
def faststart(film, tmp_path_factory):
    """Copy the film with its index in front: cut off, it still opens."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    command = [ffmpeg(), "-v", "error", "-i", film, "-map", "0:v", "-frames:v", "60"]
    options = ["-c", "copy", "-movflags", "+faststart", path]
    subprocess.run([*command, *options], check=True)
    return path


def test_a_cut_off_file_is_an_error_though_ffmpeg_says_none(faststart, tmp_path):
    data = faststart.read_bytes()
    assert open_clip(faststart).frames == 60
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: len(data) // 2])
    plain = [ffmpeg(), "-v", "quiet", "-i", path, "-f", "null", "-"]
    assert subprocess.run(plain, check=False).returncode == 0  # by itself it takes what is there
    refused(path, "cut.mp4: damaged or truncated after ", " complete frames", "copy it again")


def test_a_frame_of_gigabytes_is_refused_before_it_is_decoded(huge_picture, huge_video):
    refused(huge_video, "huge.mkv: its header declares 16000 x 16000 pixels", "as 8192 x 8192")
    refused(huge_picture, "huge.png: not a readable image: Image size", "exceeds")


def test_a_file_without_its_index(film, tmp_path):
    path = tmp_path / "head.mp4"
    path.write_bytes(film.read_bytes()[:400_000])
    refused(path, "not a video that ffmpeg can read", "moov atom not found")


def test_flipped_bits_are_an_error_though_all_frames_come(faststart, tmp_path):
    data = bytearray(faststart.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 4000, 40):
        data[place] ^= 0x55
    path = tmp_path / "rot.mp4"
    path.write_bytes(data)
    refused(path, "rot.mp4: damaged or truncated after")


def test_a_cut_off_lossless_recording_is_an_error(tmp_path):
    path = tmp_path / "clip.mkv"
    write_exact(path, noisy(moving(40), 40), 10)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused(path, "clip.mkv")


def test_a_file_that_changes_between_checking_and_reading(tmp_path):
    path = tmp_path / "clip.mkv"
    write_exact(path, moving(8), 10)
    clip = open_clip(path)
    write_exact(path, moving(5), 10)
    with pytest.raises(QualityInputError, match="gave 5 frames, 8 when it was first checked"):
        list(clip.read())


def test_readers_that_are_left_early_end_their_decoder(film):
    import psutil

    reader = open_clip(film).read()
    next(reader)
    children = psutil.Process().children()
    assert any("ffmpeg" in child.name() for child in children)
    reader.close()
    assert not [c for c in psutil.Process().children() if "ffmpeg" in c.name()]
