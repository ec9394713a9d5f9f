# SPDX-License-Identifier: Apache-2.0
"""Config files: what is refused, and that the key is named; defaults are the published ones."""

import pytest
import torch

from dit_sparse.distill.__main__ import main
from dit_sparse.distill.conditions import read_prompts
from dit_sparse.distill.config import read_config
from dit_sparse.distill.errors import DistillError
from dit_sparse.errors import StrategyError

GOOD = """
task: distill
model: samples/wan-tiny
output: out
strategy: {method: blade, density: 0.3}
size: {height: 64, width: 64, num_frames: 9}
data: {prompts: prompts.txt}
"""


def write(folder, text):
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_a_short_file_has_blades_settings(tmp_path):
    config = read_config(write(tmp_path, GOOD))
    assert (config.distill.steps, config.distill.eta, config.distill.guidance) == (8, 0.9, 5.0)
    assert (config.train.student_lr, config.train.critic_lr) == (1e-4, 5e-4)
    assert (config.lora.rank, config.lora.alpha) == (64, 64)
    assert config.distill.huber == pytest.approx(1e-3 / 128)
    assert config.train.betas == (0.0, 0.95)
    assert config.make_strategy().rules[0].params["density"] == 0.3


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("task:", "tsk: 1\ntask:", r"tsk: unknown key; the file takes: task, model"),
        ("num_frames: 9", "frames: 9", r"size.frames: unknown key; size takes: height, width"),
        ("prompts: prompts.txt", "prompt: x", r"data.prompt: unknown key; data takes: prompts"),
        ("data: {prompts: prompts.txt}", "", "data.prompts: missing"),
        ("task: distill", "task: finetune", "data.clips: missing; required for task finetune"),
        ("task: distill", "task: other", r"task: Input should be 'distill' or 'finetune'"),
        ("height: 64", "height: 0", "size.height: Input should be greater than or equal to 1"),
        ("model: samples/wan-tiny\n", "", "model: Field required"),
        ("data:", "train: {micro_batch: 3}\ndata:", "train.micro_batch: must divide .*got 3"),
        ("data:", "train: {student_lr: .nan}\ndata:", "train.student_lr"),
        ("data:", "distill: {eta: 2}\ndata:", "distill.eta"),
        ("data:", "lora: {rnk: 2}\ndata:", "lora.rnk: unknown key; lora takes: rank, alpha"),
        ("{method: blade, density: 0.3}", "{density: 0.3}", "strategy: method is missing"),
        (GOOD, "- 1", "must be a mapping of keys and values, got list"),
        (GOOD, "{", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named_before_any_work(tmp_path, old, new, words):
    with pytest.raises(DistillError, match=words):
        read_config(write(tmp_path, GOOD.replace(old, new)))


@pytest.mark.parametrize("strategy", ["{method: blade, dens: 0.3}", "blad", "{method: blad}"])
def test_a_wrong_strategy_is_refused_early(tmp_path, strategy):
    text = GOOD.replace("{method: blade, density: 0.3}", strategy)
    with pytest.raises(StrategyError, match=r"dens|blad"):
        read_config(write(tmp_path, text))


def test_settings_that_may_change_on_resuming_are_not_fixed(tmp_path):
    one = read_config(write(tmp_path, GOOD))
    longer = read_config(write(tmp_path, GOOD + "train: {iterations: 999}\n"))
    other = read_config(write(tmp_path, GOOD + "seed: 1\n"))
    falling = read_config(write(tmp_path, GOOD + "train: {schedule: cosine}\n"))
    longest = read_config(write(tmp_path, GOOD + "train: {schedule: cosine, iterations: 999}\n"))
    assert one.fixed() == longer.fixed()
    assert len({str(each.fixed()) for each in (one, other, falling, longest)}) == 4


def test_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# of ours\n a cat \n\nzwei Hähne # two\n", encoding="utf-8")
    assert read_prompts(path) == ["a cat", "zwei Hähne # two"]
    for text, words in (("\n#x\n", "contains no prompts"), (None, "cannot be read")):
        path.unlink()
        if text is not None:
            path.write_text(text)
        else:
            path = tmp_path / "nowhere.txt"
        with pytest.raises(DistillError, match=words):
            read_prompts(path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("prompts: prompts.txt", "prompts: nowhere.txt", "nowhere.txt: cannot be read"),
        ("density: 0.3", "density: 3", "density"),
        ("data:", "device: cuda\ndata:", "device: cuda was requested"),
    ],
)
def test_the_command_says_it_in_one_line(tmp_path, capsys, monkeypatch, old, new, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    if torch.cuda.is_available() and "cuda" in new:
        pytest.skip("there is one")
    text = GOOD.replace(old, new)
    text += "" if "device" in text else "device: cpu\n"
    assert main([str(write(tmp_path, text))]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert "Traceback" not in error


def test_the_command_refuses_a_model_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    text = GOOD.replace("samples/wan-tiny", "nowhere/model") + "device: cpu\n"
    assert main([str(write(tmp_path, text))]) == 1
    assert "model: nowhere/model: cannot be loaded" in capsys.readouterr().err


BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD + "x: " + "[" * 5000 + "]" * 5000, "levels deep"),
        (GOOD + "x: " + "{a: " * 40 + "1" + "}" * 40, "levels deep"),
        (GOOD + "x: &x [*x]", "levels deep"),
        (GOOD + "a0: &a0 [1]\n" + BOMB, "values once its aliases are expanded"),
        (GOOD + "seed: 2020-99-99", "not valid YAML"),
        ("[1, 2", "not valid YAML"),
    ],
)
def test_hostile_yaml_is_one_line(tmp_path, capsys, text, words):
    assert main([str(write(tmp_path, text))]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
