# SPDX-License-Identifier: Apache-2.0
"""Commands reuse stored results for the same inputs only; a changed input is named."""

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.distill.__main__ import main as distill
from dit_sparse.quality import open_clip
from dit_sparse.strategy import Strategy
from tests.strategy.test_identity import WEIGHTS, change_json, change_number

SMALL = ["--height", "64", "--width", "64", "--frames", "5", "--steps", "2", "--threads", "1"]


@pytest.fixture
def model(root, tmp_path):
    return shutil.copytree(root / "samples" / "wan-tiny", tmp_path / "model")


def shift(model):
    change_json(
        model / "scheduler" / "scheduler_config.json", '"flow_shift": 3.0', '"flow_shift": 9.0'
    )


def run(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def refused(result, *words):
    assert result.exit_code == 2, result.output
    line = " ".join(result.stderr.split())
    assert "error: " in line
    for word in (*words, "--fresh"):
        assert word in line
    assert "Traceback" not in result.output


@pytest.fixture
def evaluate(model, tmp_path):
    coarse = Strategy.coerce("radial", block_size=16, decay_factor=0.2)
    coarse.model_copy(update={"name": "coarse"}).save(tmp_path / "coarse.json")

    def call(output, *more):
        return run(
            "evaluate", model, "--strategy", tmp_path / "coarse.json", "--prompt", "a red circle",
            "--seeds", "0", *SMALL, "--metrics", "psnr", "--floor", "off", "-o", output, *more,
        )  # fmt: skip

    return call


def frames(folder):
    """Read all clips; their files have random ids of their container."""
    clips = sorted((folder / "pairs").glob("*/*.mkv"))
    return {path.stem: np.stack(list(open_clip(path).read())).tobytes() for path in clips}


def test_evaluate_never_takes_clips_of_another_pipeline(evaluate, model, tmp_path):
    out = tmp_path / "out"
    assert evaluate(out).exit_code == 0
    first = frames(out)
    shift(model)
    change_number(model / "vae" / WEIGHTS)
    refused(evaluate(out), "scheduler.config.flow_shift: 3.0, now 9.0", "pipeline.vae.weights: ")
    setup = out / "evaluation.json"
    setup.write_text(json.dumps({"schema_version": 1, "model": "m", "call": {"weights": "ab"}}))
    refused(evaluate(out), "contains clips from an earlier version of dit-sparse")
    for damage in ("[]", "[" * 100_000):
        setup.write_text(damage)
        refused(evaluate(out), "evaluation.json: ")
    assert frames(out) == first
    assert evaluate(out, "--fresh").exit_code == 0
    assert evaluate(tmp_path / "anew").exit_code == 0
    assert frames(out) == frames(tmp_path / "anew")
    assert not set(frames(out).values()) & set(first.values())
    # Clips that are made again to the same bytes bring their own times.
    pair = out / "pairs" / "p000-s0"
    change_json(pair / "dense.json", '"seconds": ', '"seconds": 1234')
    assert evaluate(out).exit_code == 0
    told = json.loads((pair / "vs-coarse" / "report.json").read_text())
    assert told["context"]["dense_seconds"] > 1234


@pytest.fixture
def profile(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")

    def call(*more):
        return run(
            "profile", model, "--prompts", tmp_path / "prompts.txt", *SMALL, "--density", "0.5",
            "--candidates", "pooled:block_size=16:density=0.25", "--costs", "assumed",
            "--no-check", "-o", tmp_path / "s.json", "--overwrite", *more,
        )  # fmt: skip

    return call


def test_profile_never_takes_measurements_of_another_pipeline(profile, model, tmp_path):
    assert profile().exit_code == 0
    store = tmp_path / "s.measured"
    setup, unit = store / "setup.json", store / "unit-00000.json"
    before, content = unit.read_bytes(), json.loads(setup.read_text())
    shift(model)
    refused(profile(), "pipeline.scheduler.config.flow_shift: 3.0, now 9.0")
    for damage in ("{", "[]", "[" * 100_000):
        setup.write_text(damage)
        refused(profile(), "setup.json: cannot be read: ")
    del content["pipeline"]
    setup.write_text(json.dumps(content))
    refused(profile(), "contains measurements from an earlier version of dit-sparse")
    setup.unlink()
    refused(profile(), "has measurements but no setup.json")
    assert unit.read_bytes() == before
    assert profile("--fresh").exit_code == 0
    after = unit.read_bytes()
    assert after != before
    unit.write_text("{")
    assert "delete this file to measure it again" in " ".join(profile().stderr.split())
    unit.unlink()
    assert profile().exit_code == 0
    assert unit.read_bytes() == after


TRAINING = """
task: distill
model: {0}/model
output: {0}/out
strategy: {0}/coarse.json
size: {{height: 64, width: 64, num_frames: 5}}
data: {{prompts: {0}/prompts.txt}}
device: cpu
lora: {{rank: 2, alpha: 2}}
train: {{iterations: {1}, batch: 1, dtype: float32, checkpoint_every: 1, gradient_checkpointing: false}}
distill: {{steps: 1, guidance: 1.0}}
"""  # noqa: E501


@pytest.fixture
def train(model, tmp_path, capsys):
    strategy = Strategy.coerce("pooled", density=0.5, block_size=16)
    strategy.model_copy(update={"name": "coarse"}).save(tmp_path / "coarse.json")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")

    def call(*more, iterations=1, words=()):
        path = tmp_path / "run.yaml"
        path.write_text(TRAINING.format(tmp_path, iterations))
        code = distill([str(path), *more])
        said = capsys.readouterr().err
        assert code == (1 if words else 0), said
        for word in (*words, *(["--fresh"] if words else [])):
            assert word in said
        return said

    return call


def test_training_never_continues_from_other_inputs(train, model, tmp_path):
    train()
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    cached = {path.name for path in (out / "cache").iterdir()}
    kept = {path: path.read_bytes() for path in (out / "checkpoints").iterdir()}
    whole = prompts.read_text()
    prompts.write_text(whole.replace("blue", "green"))
    train(words=["data.prompts.hash: "])
    prompts.write_text(whole)
    coarse = (tmp_path / "coarse.json").read_text()
    change_json(tmp_path / "coarse.json", '"density": 0.5', '"density": 0.25')
    train(words=["strategy.rules[0].params.density: 0.5, now 0.25"])
    (tmp_path / "coarse.json").write_text(coarse)
    weights = (model / "transformer" / WEIGHTS).read_bytes()
    change_number(model / "transformer" / WEIGHTS)
    train(words=["pipeline.transformer.weights: "])
    (model / "transformer" / WEIGHTS).write_bytes(weights)
    assert {path: path.read_bytes() for path in (out / "checkpoints").iterdir()} == kept
    train(iterations=2)  # everything is as it was: the second iteration follows the first
    rows = (out / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["iteration", "1", "2"]
    assert {path.name for path in (out / "cache").iterdir()} == cached
    change_number(model / "text_encoder" / "model.safetensors")
    train(words=["pipeline.text_encoder.weights: "])
    train("--fresh")
    assert len({path.name for path in (out / "cache").iterdir()} - cached) == len(cached)
    assert [path.name for path in (out / "checkpoints").iterdir()] == [
        "iteration-00000001.safetensors"
    ]
