# SPDX-License-Identifier: Apache-2.0
"""Reports: well-formed, self-contained, nothing unescaped, strict JSON; drawn by a browser."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dit_sparse.quality import QualityInputError, compare, open_clip, write_comparison
from dit_sparse.quality.recording import write_exact
from dit_sparse.quality.report import check_folder, pictures
from dit_sparse.quality.report.charts import Axis, Point, axis, front, number, pareto
from dit_sparse.quality.report.markdown import escape
from tests.quality.conftest import moving, noisy

METRICS = ["psnr", "psnr_pooled", "psnr_temporal", "ssim", "motion_ratio", "ms_ssim"]
EVIL = '<script>alert("x")</script> & "quotes" | `code` {{ 7*7 }}'
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects what a page holds, and checks that its tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.words, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for k, v in attributes if k in {"src", "href"}]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    dense = moving(7, 50, 66)
    sparse = noisy(dense, 12)
    sparse[4] = noisy(dense[4:5], 60)[0]
    context = {
        "prompt": EVIL,
        "seed": 3,
        "model": "m",
        "strategy": "s",
        "density": 0.31,
        "speedup": 1.537,
        "kernels": {"cpu": 4},
    }
    found = compare(
        dense, sparse, metrics=METRICS, gates=["psnr>=25", "ssim>=0.1"], context=context, fps=8
    )
    return found, folder, write_comparison(found, folder)


def page(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_the_files_are_there_and_nothing_else(written):
    _, folder, files = written
    assert files == ["report.html", "report.json", "report.md"]
    assert {path.name for path in folder.iterdir()} == set(files)


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(written):
    text, found = page(written[1])
    assert "script" not in found.tags
    assert all(address.startswith("data:") for address in found.addresses)
    without_data = re.sub(r'"data:[^"]*"', '""', text)
    assert not re.search(r"https?://|@import|url\(", without_data)
    assert found.tags.count("video") == 2
    assert "svg" in found.tags


def test_what_the_user_wrote_is_shown_as_he_wrote_it(written):
    text, found = page(written[1])
    assert EVIL in found.words
    assert "<script>" not in text
    assert "49" not in [word.strip() for word in found.words]  # no template in a template
    markdown = (written[1] / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in markdown.replace("\\<", "")


def test_the_page_has_the_numbers_the_verdict_and_the_definitions(written):
    found, folder, _ = written
    words = " ".join(page(folder)[1].words)
    assert "FAIL" in words
    assert "psnr>=25: FAILED" in words
    assert "ssim>=0.1: passed" in words
    for name, row in found.rows.items():
        assert name in words
        assert row.definition in words
        assert (number(row.value) if row.ok else row.reason) in words
    assert "1.54" in words  # the speed-up
    assert "frame 4, worst PSNR" in words
    assert "worst: frame 4, 0.50 s" in words


def test_json_is_strict_and_equals_the_comparison(written):
    found, folder, _ = written

    def refuse(constant):
        raise AssertionError(constant)

    told = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    assert told == json.loads(json.dumps(found.to_dict()))
    assert told["passed"] is False
    assert told["metrics"]["psnr"]["worst_frame"] == 4


def test_infinite_context_becomes_null(tmp_path):
    clip = moving(2)
    write_comparison(compare(clip, clip, metrics=["psnr"], context={"x": float("nan")}), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["context"]["x"] is None


def test_the_video_shows_dense_left_and_sparse_right(tmp_path):
    dense = np.full((7, 51, 66, 3), 60, np.uint8)
    sparse = dense + np.arange(10, 150, 20, dtype=np.uint8)[:, None, None, None]
    found = compare(dense, sparse, metrics=["psnr"], fps=8)
    address = pictures.side_by_side(found, tmp_path).address
    path = tmp_path / "clip.mp4"
    path.write_bytes(base64.b64decode(address.removeprefix("data:video/mp4;base64,")))
    clip = open_clip(path)
    assert (clip.frames, clip.height, clip.width, clip.fps) == (7, 50, 132, 8)
    for index, frame in enumerate(clip.read()):
        assert frame[:, :60].mean() == pytest.approx(60, abs=3)
        assert frame[:, 72:].mean() == pytest.approx(70 + 20 * index, abs=3)


def test_large_videos_stand_beside_the_page_and_go_with_it(monkeypatch, tmp_path):
    clip, other = moving(3), noisy(moving(3), 9)
    monkeypatch.setattr(pictures, "EMBED", 100)
    found = compare(clip, other, metrics=["psnr"])
    files = write_comparison(found, tmp_path)
    assert files == ["report.html", "report.json", "report.md", "difference.mp4", "pair.mp4"]
    assert "pair.mp4" in page(tmp_path)[1].addresses
    monkeypatch.setattr(pictures, "EMBED", 10**9)
    write_comparison(found, tmp_path)
    assert not (tmp_path / "pair.mp4").exists()


def test_an_image_has_no_video_and_no_curves(tmp_path):
    write_comparison(compare(moving(1), noisy(moving(1), 9), metrics=METRICS), tmp_path)
    _, found = page(tmp_path)
    assert "video" not in found.tags
    assert "svg" not in found.tags
    assert found.tags.count("img") == 5  # the pair large, and a strip of one


def test_a_failed_write_leaves_an_earlier_report_alone(written, tmp_path, monkeypatch):
    write_comparison(written[0], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(pictures, "strip", fail)
    with pytest.raises(QualityInputError, match="cannot be written: disk full"):
        write_comparison(written[0], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folders_that_cannot_take_a_report(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(QualityInputError, match="cannot be created as a report folder"):
        check_folder(tmp_path / "file", overwrite=False)
    (tmp_path / "report.md").touch()
    with pytest.raises(QualityInputError, match=r"already contains report\.md; add --overwrite"):
        check_folder(tmp_path, overwrite=False)
    check_folder(tmp_path, overwrite=True)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9), st.floats(0, 10))
def test_an_axis_holds_its_values_and_its_ticks(values, least):
    found = axis(values, 150.0, 10.0, least)
    assert found.low < min(values) <= max(values) < found.high
    assert found.high - found.low >= least
    ticks = found.ticks()
    assert ticks
    assert all(found.low <= tick <= found.high for tick in ticks)
    assert all(10 <= found(tick) <= 150 for tick in ticks)
    assert Axis(0, 10, 0, 100)(2.5) == 25


@given(st.floats(-1e9, 1e9, allow_nan=False))
def test_numbers_are_written_without_powers(value):
    text = number(value)
    assert text == "below 1e-6" or "e" not in text
    if abs(value) >= 1e-3:
        assert float(text) == pytest.approx(value, rel=6e-4)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8),
    st.booleans(),
)
def test_the_front_is_what_nothing_beats(found, higher):
    points = [Point(str(i), s, v, v, v) for i, (s, v) in enumerate(found)]
    best = front(points, higher=higher)
    sign = 1 if higher else -1
    for point in points:
        beaten = any(
            o.speed >= point.speed
            and sign * o.value >= sign * point.value
            and (o.speed > point.speed or o.value != point.value)
            for o in points
        )
        assert (point in best) == (not beaten)
    assert [p.speed for p in best] == sorted(p.speed for p in best)
    Page(pareto(points, "PSNR", higher=higher, floor=None))


@given(st.text(max_size=40))
def test_markdown_stays_on_one_line(text):
    assert "\n" not in escape(text)
    assert not re.search(r"(?<!\\)[|<`]", escape(text).replace("\\\\", ""))


def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium here: apt install chromium")
def test_a_real_browser_draws_the_page(written, tmp_path):
    shot = tmp_path / "page.png"
    command = [
        browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1100,2200",
        f"--screenshot={shot}",
        (written[1] / "report.html").as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[:2] == (2200, 1100)
    red = (pixels[:400] == (251, 230, 228)).all(-1).mean()
    assert red > 0.02  # the verdict's band
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 2000  # frames and curves are drawn


def test_an_exact_file_is_called_lossless_on_the_page(tmp_path):
    write_exact(tmp_path / "a.mkv", moving(3), 8)
    found = compare(tmp_path / "a.mkv", tmp_path / "a.mkv", metrics=["psnr"])
    write_comparison(found, tmp_path / "out")
    words = " ".join(page(tmp_path / "out")[1].words)
    assert "every byte as it was made" in words
    assert "Identical output: was the sparse path active?" in words
