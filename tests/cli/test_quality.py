# SPDX-License-Identifier: Apache-2.0
"""``dit-sparse compare`` and ``evaluate``: exit codes, what they write, how they refuse."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.quality import open_clip
from dit_sparse.quality.recording import write_exact
from dit_sparse.strategy import Strategy
from tests.quality.conftest import moving, noisy

CHEAP = ["--metrics", "psnr,ssim,motion_ratio"]
SMALL = ["--height", "64", "--width", "64", "--frames", "9", "--steps", "2", "--threads", "1"]


def run(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def refused(result, *words):
    assert result.exit_code == 2, result.output
    line = " ".join(result.stderr.split())
    for word in words:
        assert word in line
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    clip = moving(5, 40, 56)
    write_exact(folder / "dense.mkv", clip, 10)
    write_exact(folder / "sparse.mkv", noisy(clip, 14), 10)
    write_exact(folder / "short.mkv", clip[:3], 10)
    return folder


def compare(pair, output, *more, sparse="sparse.mkv"):
    return run("compare", pair / "dense.mkv", pair / sparse, "-o", output, *CHEAP, *more)


def test_compare_writes_a_report_and_passes_without_gates(pair, tmp_path):
    result = compare(pair, tmp_path / "out")
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.html", "report.json", "report.md"}
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(told["metrics"]) == ["psnr", "ssim", "motion_ratio"]
    assert f"{told['metrics']['psnr']['value']:.4g} dB" in result.stdout
    assert "comparing" in result.stderr
    assert told["dense"]["kind"] == "lossless"


def test_gates_give_exit_code_0_and_1(pair, tmp_path):
    passed = compare(pair, tmp_path, "--gate", "psnr>=10", "--gate", "ssim>=0,psnr.worst>=5")
    assert passed.exit_code == 0, passed.output
    assert "psnr>=10: passed" in passed.stdout
    failed = compare(pair, tmp_path, "--gate", "psnr>=10,ssim>=0.999", "--overwrite")
    assert failed.exit_code == 1
    assert "ssim>=0.999: FAILED" in failed.stdout
    assert (tmp_path / "report.html").is_file()  # a failed gate is a result, not an error


def test_bad_input_gives_exit_code_2_and_one_line(pair, tmp_path):
    out = tmp_path / "out"
    refused(compare(pair, out, sparse="short.mkv"), "has 5 frames", "has 3", "--align first")
    refused(compare(pair, out, sparse="nowhere.mkv"), "file or folder not found")
    (pair / "text.mp4").write_text("no video")
    refused(compare(pair, out, sparse="text.mp4"), "not a video that ffmpeg can read")
    refused(compare(pair, out, "--gate", "vmaf>=9"), "'vmaf' is not measured in this run")
    refused(compare(pair, out, "--metrics", "snr"), "metric 'snr' is unknown")
    refused(compare(pair, out, "--compat", "x"), "compat 'x' is unknown; available: svg")
    refused(
        compare(pair, out, "--lpips-weights", "squeeze=x"), "must be alex or vgg or dists=PATH"
    )
    refused(compare(pair, out, "--lpips-weights", "alex=nowhere"), "nowhere does not exist")
    assert not list(out.iterdir())
    (tmp_path / "report.md").touch()
    refused(compare(pair, tmp_path), "already contains report.md; add --overwrite")


def test_align_every_and_compat_reach_the_comparison(pair, tmp_path):
    result = compare(
        pair,
        tmp_path,
        "--align",
        "first",
        "--every",
        "2",
        "--metrics",
        "svg.ssim",
        sparse="short.mkv",
    )
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["settings"]["align"] == "first"
    assert len(told["metrics"]["svg.ssim"]["per_frame"]) == 2
    assert "only the first 3 of each" in result.stdout.replace("\n", " ")


@contextmanager
def room_for(size):
    """Let no file grow beyond ``size`` bytes: what the system answers then is like a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_compare_without_room_for_its_report_is_one_line(pair, tmp_path):
    with room_for(1000):
        result = compare(pair, tmp_path)
    refused(result, "cannot be written: File too large", "Free space")
    assert list(tmp_path.iterdir()) == []
    assert compare(pair, tmp_path).exit_code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_where_there_is_none(pair, tmp_path):
    refused(compare(pair, tmp_path, "--device", "cuda"), "finds no GPU")


@pytest.fixture(scope="module")
def model(root):
    return root / "samples" / "wan-tiny"


@pytest.fixture(scope="module")
def strategy(tmp_path_factory):
    """Save a strategy sparse enough to change pixels at 192 tokens."""
    path = tmp_path_factory.mktemp("strategy") / "coarse.json"
    content = Strategy.coerce("radial", block_size=16, decay_factor=0.2).to_dict()
    path.write_text(json.dumps({**content, "name": "coarse"}))
    return path


@pytest.fixture(scope="module")
def evaluate(model, strategy):
    def call(output, *more, prompts=("a red circle", "a blue square")):
        given = [part for prompt in prompts for part in ("--prompt", prompt)]
        more = (*given, *SMALL, *CHEAP, "-o", output, *more)
        return run("evaluate", model, "--strategy", strategy, *more)

    return call


@pytest.fixture(scope="module")
def evaluated(evaluate, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated")
    return evaluate(output, "--seeds", "0,3"), output


def test_evaluate_makes_pairs_measures_and_reports(evaluated):
    result, output = evaluated
    assert result.exit_code == 0, result.output
    told = json.loads((output / "report.json").read_text())
    (row,) = told["results"].values()
    assert len(row["pairs"]) == 4
    assert row["speedup"]["low"] > 0
    assert 0 < row["density"] < 1
    assert told["noise_floor"]["metrics"]["psnr"]["value"] > 50
    assert {path.name for path in (output / "pairs").iterdir()} == {
        "p000-s0",
        "p000-s3",
        "p001-s0",
        "p001-s3",
    }
    for folder in (output / "pairs").iterdir():
        names = {path.name for path in folder.iterdir()}
        assert {"dense.mkv", "dense.mp4", "floor.mkv", "coarse.mkv", "vs-coarse"} <= names
    assert "noise floor: SDPA math" in result.stdout
    assert "4 pairs only" in result.stdout.replace("\n", " ")


def test_the_dense_arm_is_the_pipeline_itself(evaluated, model):
    import diffusers

    from dit_sparse.core.video import as_uint8

    _, output = evaluated
    pipe = diffusers.DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        "a blue square",
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=2,
        output_type="np",
        guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(3),
    ).frames[0]
    kept = np.stack(list(open_clip(output / "pairs" / "p001-s3" / "dense.mkv").read()))
    np.testing.assert_array_equal(kept, as_uint8(frames))


def test_evaluate_goes_on_and_makes_nothing_twice(evaluated, evaluate):
    _, output = evaluated
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*.mkv")}
    assert len(before) == 12
    again = evaluate(output, "--seeds", "0,3", "--gate", "psnr>=99")
    assert again.exit_code == 1, again.output
    assert "FAILED" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*.mkv")} == before
    assert "dense, seed" not in again.stderr
    refused(
        evaluate(output, "--guidance-scale", "2"),
        "call.guidance_scale: 4.0, now 2.0",
        "add --fresh",
    )


@pytest.mark.parametrize(("size", "words"), [(1000, "evaluation.json"), (16_000, "dense.mkv")])
def test_evaluate_without_room_is_one_line(evaluate, tmp_path, size, words):
    more = ("--seeds", "0", "--floor", "off")
    with room_for(size):
        result = evaluate(tmp_path, *more, prompts=("a red circle",))
    refused(result, words, "cannot be written: ", "Free space")
    assert not list(tmp_path.rglob(".*")) + list(tmp_path.rglob("dense.json"))


def test_evaluate_refuses_before_it_loads_anything(evaluate, tmp_path):
    out = tmp_path / "out"

    def tried(*arguments):
        return run("evaluate", "nowhere/model", "-o", out, *arguments)

    one = ("--strategy", "radial")
    refused(tried(*one), "no prompts; give --prompts FILE")
    refused(tried(*one, "--prompt", "x", "--seeds", "1,x"), "must be comma-separated integers")
    refused(tried(*one, "--prompt", "x", "--gate", "snr>=3"), "'snr' is not measured in this run")
    refused(tried("--strategy", "raidal", "--prompt", "x"), "raidal")
    refused(tried(*one, *one, "--prompt", "x"), "another strategy is also named 'radial'")
    refused(tried(*one, "--prompts", tmp_path / "none.txt"), "none.txt: cannot be read")
    refused(tried(*one, "--prompt", "x", "--kernel", "magic"), "magic")
    assert not out.exists()
    refused(evaluate(out, prompts=("a", "a")), "prompts: duplicate value 'a'")


def test_prompt_files_have_comments_and_empty_lines(tmp_path):
    from pathlib import Path

    from dit_sparse.cli.evaluating import read_prompts

    class Wish:
        prompts = Path(tmp_path / "p.txt")
        prompt = (" last ",)

    Wish.prompts.write_text("# all\n\n a cat \na dog # brown\n", encoding="utf-8")
    assert read_prompts(Wish) == ("a cat", "a dog # brown", "last")


def test_vbench_export_and_import(evaluated, tmp_path):
    _, output = evaluated
    result = run("vbench", "export", output, "coarse", "-o", tmp_path / "clips")
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "clips").iterdir()}
    wanted = {f"a {what}-{n}.mp4" for what in ("red circle", "blue square") for n in (0, 1)}
    assert names == {*wanted, "manifest.json"}
    refused(run("vbench", "export", output, "x", "-o", tmp_path / "x"), "available: coarse, dense")
    refused(run("vbench", "export", tmp_path, "x", "-o", tmp_path / "x"), "no finished clips")
    scores = tmp_path / "scores_eval_results.json"
    scores.write_text('{"temporal_flickering": [0.9, []]}')
    read = run("vbench", "import", scores, "-o", tmp_path / "out.json")
    assert read.exit_code == 0, read.output
    assert "No totals: all 16 dimensions are required" in read.stdout
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["dimensions"]["vbench.temporal_flickering"]["value"] == 0.9
    scores.write_text('{"temporal_flickering": [NaN, []]}')
    assert run("vbench", "import", scores, "-o", tmp_path / "out.json").exit_code == 1


def test_vbench_run_says_what_is_missing(evaluated, tmp_path):
    _, output = evaluated
    run("vbench", "export", output, "coarse", "-o", tmp_path / "clips")
    arguments = (tmp_path / "clips", "--dimension", "temporal_flickering", "-o", tmp_path / "s")
    result = run("vbench", "run", *arguments, "--python", sys.executable)
    assert result.exit_code == 1
    assert "No module named 'vbench'" in " ".join(result.stdout.split())
    refused(run("vbench", "run", *arguments, "--python", tmp_path / "no"), "cannot be started")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is POSIX's")
def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(
    evaluate, model, strategy, tmp_path
):
    listening = (  # a shell's background job starts with SIGINT ignored
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('dit_sparse', run_name='__main__')"
    )
    prompts = ("--prompt", "a red circle", "--prompt", "a blue square")
    command = [sys.executable, "-c", listening, "evaluate", model, "--strategy", strategy]
    command += [*prompts, *SMALL, *CHEAP, "-o", tmp_path]
    with subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, env={**os.environ}
    ) as process:
        too_long = threading.Timer(200, process.kill)
        too_long.start()
        said = ""
        for line in process.stderr:
            said += line
            if line.startswith("floor, seed"):
                process.send_signal(signal.SIGINT)
                break
        said += process.stderr.read()
        too_long.cancel()
    assert process.returncode == 130, said
    assert f"Finished clips are kept in {tmp_path}" in said
    assert "Traceback" not in said
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mkv")}
    assert [path.name for path in before] == ["dense.mkv"]
    result = evaluate(tmp_path)
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(tmp_path.rglob("*.mkv"))) == 6
