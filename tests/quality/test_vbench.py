# SPDX-License-Identifier: Apache-2.0
"""VBench: layout, the runner's contract against interpreters that misbehave, results, totals."""

import json
import os
import shlex
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.quality import QualityInputError, compare, open_clip
from dit_sparse.quality.vbench import Item, export, read_results, run_vbench, totals
from dit_sparse.quality.vbench.dimensions import DIMENSIONS
from dit_sparse.quality.vbench.layout import MANIFEST, file_names
from tests.quality.conftest import moving, noisy

PROMPTS = ("a cat, running", "a cat, running", "up / down", '50% more: "yes" $(touch x)')


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vbench") / "clips"
    # Grey, as mp4 keeps colours at half the size only.
    clips = [noisy(moving(4, 33, 48, s), 6)[..., :1].repeat(3, -1) for s in range(4)]
    items = [Item(c, p, s) for s, (c, p) in enumerate(zip(clips, PROMPTS, strict=True))]
    return folder, export(items, folder, settings={"model": "m"}, fps=8), clips


def test_the_layout_is_vbenchs(exported):
    folder, manifest, clips = exported
    assert {p.name for p in folder.iterdir()} == {*manifest["files"], MANIFEST}
    assert list(manifest["files"]) == [
        "a cat, running-0.mp4", "a cat, running-1.mp4", "clip_0001-0.mp4", "clip_0002-0.mp4",
    ]  # fmt: skip
    assert [f["prompt"] for f in manifest["files"].values()] == list(PROMPTS)
    assert manifest["named_by_prompt"] is False
    assert manifest["suite"] == "VBench"
    for (name, told), clip in zip(manifest["files"].items(), clips, strict=True):
        found = open_clip(folder / name)
        assert (found.frames, found.fps, found.sha256) == (4, 8, told["sha256"])
        gap = np.stack(list(found.read())).astype(float) - clip[:, :32]
        assert np.abs(gap).mean() < 4


def test_clips_of_five_seconds_are_for_vbench_long(tmp_path):
    made = export([Item(moving(81, 16, 16), "x", 0)], tmp_path / "wan", fps=16)  # 5.06 s
    assert made["suite"] == "VBench-Long"
    assert made["named_by_prompt"] is True


@given(st.lists(st.text(max_size=300) | st.sampled_from(["a", "A", "clip_0000"]), max_size=8))
def test_names_are_whole_unique_and_fit_every_system(prompts):
    names = file_names(prompts)
    assert len({name.casefold() for name in names}) == len(names)
    for prompt, name in zip(prompts, names, strict=True):
        assert name.endswith(".mp4")
        assert not set(name) & set('/\\:*?"<>|\0\n')
        assert len(name.encode()) <= 255
        stem = name.rpartition("-")[0]
        assert stem in {prompt, f"clip_{list(dict.fromkeys(prompts)).index(prompt):04d}"}


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(QualityInputError, match="no clips to export"):
        export([], tmp_path / "a")
    with pytest.raises(QualityInputError, match="is an image"):
        export([Item(moving(1), "x", 0)], tmp_path / "b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(QualityInputError, match="must be a new or an empty folder"):
        export([Item(moving(), "x", 0)], tmp_path / "full")


def fake(folder, body):
    """Make an "interpreter" that runs ``body`` (Python) with the job as ``job``."""
    script = folder / "fake.py"
    head = "import json, sys\njob = json.load(open(sys.argv[2]))\nnames = sorted(job['prompts'])\n"
    tail = "\ndef write(told):\n    open(job['output'], 'w').write(json.dumps(told))\n"
    script.write_text(head + tail + body)
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {script} "$@"\n')
    program.chmod(0o755)
    return program


GOOD = """
each = [{"video_path": job["videos"] + "/" + name, "video_results": 0.5} for name in names]
"""


def test_a_good_result_is_taken(exported, tmp_path):
    body = GOOD + "write({'dimensions': {'temporal_flickering': "
    body += "{'status': 'ok', 'value': 0.5, 'videos': each}}, 'versions': {'vbench': '9'}})"
    found = run_vbench(exported[0], fake(tmp_path, body), dimensions=["temporal_flickering"])
    score = found.scores["temporal_flickering"]
    assert (score.value, score.status, len(score.videos)) == (0.5, "ok", 4)
    assert found.versions == {"vbench": "9"}
    assert found.to_dict()["totals"] is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("pass", "ended with code 0 and left no whole result"),
        ("print('CUDA died'); sys.exit(3)", "code 3 and left no whole result: CUDA died"),
        ("open(job['output'], 'w').write('{\"dimensions\": ')", "no whole result"),
        ("write({'error': 'no vbench here', 'dimensions': {}})", "could not run: no vbench here"),
        ("import time; time.sleep(60)", "gave no result within 2 s"),
    ],
)
def test_interpreters_that_misbehave_are_errors(exported, tmp_path, body, words):
    with pytest.raises(QualityInputError, match=words):
        run_vbench(exported[0], fake(tmp_path, body), timeout=2)


@pytest.mark.parametrize(
    ("value", "videos", "words"),
    [
        ("0.5", "each[1:]", "1 of 4 clips were not scored, the first 'a cat, running-0.mp4'"),
        ("None", "each", "no readable video"),
        ("0.9", "each", "0.9000 is not the mean of its clips"),
    ],
)
def test_results_that_do_not_add_up_have_no_value(exported, tmp_path, value, videos, words):
    body = f"{GOOD}write({{'dimensions': {{'temporal_flickering': "
    body += f"{{'status': 'ok', 'value': {value}, 'videos': {videos}}}}}}})"
    found = run_vbench(exported[0], fake(tmp_path, body), dimensions=["temporal_flickering"])
    score = found.scores["temporal_flickering"]
    assert (score.value, score.status) == (None, "error")
    assert words in score.reason


def test_requests_that_cannot_be_met(exported, tmp_path):
    folder = exported[0]
    with pytest.raises(QualityInputError, match="'flicker' is not one of: subject_consistency"):
        run_vbench(folder, "python", dimensions=["flicker"])
    with pytest.raises(QualityInputError, match="scene scores VBench's own prompts only"):
        run_vbench(folder, "python", dimensions=["scene"])
    with pytest.raises(QualityInputError, match="some prompts do not fit a file name"):
        run_vbench(folder, "python", standard=True)
    with pytest.raises(QualityInputError, match="nowhere/python: cannot be started"):
        run_vbench(folder, "nowhere/python")
    with pytest.raises(QualityInputError, match=r"manifest\.json: cannot be read"):
        run_vbench(tmp_path, "python")


def test_a_clip_that_is_gone_is_said_before_anything_runs(tmp_path):
    export([Item(moving(), "x", 0)], tmp_path / "c", fps=8)
    (tmp_path / "c" / "x-0.mp4").unlink()
    with pytest.raises(QualityInputError, match="1 of 1 clips are missing"):
        run_vbench(tmp_path / "c", "python")


def test_the_runner_without_vbench_says_so_for_each_dimension(exported, tmp_path):
    found = run_vbench(
        exported[0], sys.executable, cache=tmp_path, torch_hub=tmp_path,
        dimensions=["temporal_flickering", "motion_smoothness"],
    )  # fmt: skip
    assert found.scores["temporal_flickering"].status == "error"
    assert "No module named 'vbench'" in found.scores["temporal_flickering"].reason
    skipped = found.scores["motion_smoothness"]
    assert skipped.status == "skipped"
    assert skipped.reason == f"needs {tmp_path / 'amt_model' / 'amt-s.pth'}"


def test_totals_are_the_published_weighting_and_only_of_all_sixteen():
    assert len(DIMENSIONS) == 16
    assert totals({name: each.high for name, each in DIMENSIONS.items()}) == pytest.approx(
        {"quality": 1, "semantic": 1, "total": 1}
    )
    low = {name: each.low for name, each in DIMENSIONS.items()}
    assert totals(low) == pytest.approx({"quality": 0, "semantic": 0, "total": 0})
    # dynamic_degree counts half: .5 of 6.5; one of nine semantic ones.
    moved = {**low, "dynamic_degree": 1.0, "scene": 0.8222}
    wanted = {"quality": 0.5 / 6.5, "semantic": 1 / 9, "total": (4 * 0.5 / 6.5 + 1 / 9) / 5}
    assert totals(moved) == pytest.approx(wanted)
    for name in DIMENSIONS:
        assert totals({**low, name: None}) is None
        assert totals({key: value for key, value in low.items() if key != name}) is None


def test_results_made_elsewhere(tmp_path):
    def clip(value):
        return {"video_path": "/a/b/x-0.mp4", "video_results": value}

    folder = tmp_path / "results"
    (folder / "sub").mkdir(parents=True)
    first = {"imaging_quality": [0.62, [clip(62.0)]], "dynamic_degree": [1.0, [clip(True)]]}
    (folder / "a_eval_results.json").write_text(json.dumps(first))
    (folder / "a_full_info.json").write_text("[]")
    text = '{"temporal_flickering": [NaN, []], "scene": 0.5}'  # as VBench writes it
    (folder / "sub" / "b_eval_results.json").write_text(text)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in sorted(folder.rglob("*.json")):
            archive.write(path, path.name)
    for source in (folder, tmp_path / "all.zip"):
        found = read_results(source)
        assert found.scores["imaging_quality"].value == 0.62
        assert found.scores["imaging_quality"].videos == {"x-0.mp4": 0.62}
        assert found.scores["dynamic_degree"].videos == {"x-0.mp4": 1.0}
        assert found.scores["scene"].value == 0.5
        lost = found.scores["temporal_flickering"]
        assert (lost.value, lost.status, lost.reason) == (None, "error", "no readable video")
        json.dumps(found.to_dict(), allow_nan=False)
    one = read_results(folder / "a_eval_results.json")
    assert set(one.scores) == {"imaging_quality", "dynamic_degree"}
    (folder / "sub" / "c_eval_results.json").write_text('{"scene": 0.4}')
    with pytest.raises(QualityInputError, match="has another scene than a file before it"):
        read_results(folder)


@pytest.mark.parametrize("text", ["no json", "[1, 2]", '{"scene": [1]}', '{"other": 1}'])
def test_files_that_are_no_results(tmp_path, text):
    path = tmp_path / "x_eval_results.json"
    path.write_text(text)
    with pytest.raises(QualityInputError, match="x_eval_results"):
        read_results(path)
    with pytest.raises(QualityInputError, match="cannot be read"):
        read_results(tmp_path / "nowhere.json")


def test_complete_results_have_totals(tmp_path):
    path = tmp_path / "all_eval_results.json"
    path.write_text(json.dumps({name: [each.high, []] for name, each in DIMENSIONS.items()}))
    found = read_results(path)
    assert found.to_dict()["totals"]["total"] == pytest.approx(1)
    short = replace(found, scores={k: v for k, v in found.scores.items() if k != "color"})
    assert short.to_dict()["totals"] is None


@pytest.mark.slow
def test_the_official_evaluator_gives_our_flickering(exported, tmp_path_factory, carphone):
    packages = ("vbench==0.1.5", "decord", "opencv-python-headless", "torchvision==0.28.0")
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
    installed = subprocess.run([*command, *packages], capture_output=True, check=False)
    if installed.returncode:
        pytest.skip("VBench 0.1.5 cannot be installed here")
    folder = tmp_path_factory.mktemp("clips") / "real"
    export([Item(path, "a man in a car", i) for i, path in enumerate(carphone)], folder)
    for each in (folder, exported[0]):
        found = run_vbench(
            each, sys.executable, dimensions=["temporal_flickering"], torchvision_stub=True,
            environment={**os.environ, "PYTHONPATH": str(site)},
        )  # fmt: skip
        score = found.scores["temporal_flickering"]
        assert score.status == "ok", score.reason
        name = "vbench.temporal_flickering"
        for file, theirs in score.videos.items():
            ours = compare(each / file, each / file, metrics=[name]).rows[name].dense
            assert ours == pytest.approx(theirs, abs=1e-7)
