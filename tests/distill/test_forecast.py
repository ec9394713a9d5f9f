# SPDX-License-Identifier: Apache-2.0
"""Forecast of a training iteration, against sums made by hand."""

import itertools

import pytest

from dit_sparse.distill.__main__ import main
from dit_sparse.distill.forecast import GIB, forecast, walk_length
from dit_sparse.pipelines.known import KNOWN_MODELS
from dit_sparse.pipelines.size import model_size
from tests.distill import setup

SIZE = {"height": 480, "width": 832, "num_frames": 81}


def wan(tmp_path, **changes):
    base = {"model": "wan2.1-1.3b", "size": SIZE, "lora": {"rank": 64, "alpha": 64}}
    train = {"dtype": "bfloat16", "batch": 1, "gradient_checkpointing": True}
    return setup.config(tmp_path, **{**base, "distill": {"steps": 8}, "train": train, **changes})


def test_walks_are_as_long_as_the_later_of_two_steps():
    for steps in (1, 2, 5):
        pairs = list(itertools.product(range(steps), repeat=2))
        assert walk_length(steps) == pytest.approx(sum(map(max, pairs)) / len(pairs))


def test_wan_takes_its_flops_and_its_weights(tmp_path):
    strategy = {"method": "blade", "density": 0.17, "pooled": 30}
    told = forecast(wan(tmp_path, strategy=strategy))
    size = model_size(KNOWN_MODELS["wan2.1-1.3b"].config, 480, 832, 81)
    attention, other = size.attention_flops / 600e12, size.other_flops / 650e12
    sparse = (0.17 + 1 / 30) / 0.9 + 0.01
    forward = other + sparse * attention
    passes = walk_length(8) + 1 + 1 + 1 + 1  # walk, critic's x0, student, critic, its look
    back = 2 * (2 * other + 3.5 * sparse * attention)  # checkpointed: one more forward in each
    wanted = passes * forward + back + 2 * (other + attention)
    assert told.seconds == pytest.approx(wanted, rel=0.01)
    assert told.memory["frozen weights, bfloat16"] == pytest.approx(size.parameters * 2)
    # Four square projections in two attentions of each of 30 layers, at rank 64, for two roles.
    rank_64 = 30 * 2 * 4 * 64 * (1536 + 1536)
    trained = next(v for k, v in told.memory.items() if k.startswith("trained"))
    assert trained == pytest.approx(2 * 16 * rank_64)
    assert 5 * GIB < sum(told.memory.values()) < 40 * GIB


def test_checkpointing_and_sparsity_pay(tmp_path):
    small = {"model": "samples/wan-tiny", "size": {"height": 256, "width": 256, "num_frames": 33}}
    one = forecast(wan(tmp_path, **small))
    dense = forecast(wan(tmp_path, strategy=None, **small))
    train = {"dtype": "bfloat16", "batch": 1, "gradient_checkpointing": False}
    kept = forecast(wan(tmp_path, train=train, **small), device_memory=1e8)
    assert one.seconds < dense.seconds
    assert kept.seconds < one.seconds
    assert sum(kept.memory.values()) > 3 * sum(one.memory.values())
    assert any("does not fit" in line for line in kept.assumed)


def test_the_command_says_that_it_is_a_forecast(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        "task: finetune\nmodel: samples/wan-tiny\noutput: out\nstrategy: radial\n"
        "size: {height: 128, width: 128, num_frames: 65}\ndata: {clips: x}\n"
        "train: {batch: 1}\n"
    )
    assert main([str(path), "--forecast"]) == 0
    text = capsys.readouterr().out
    assert "forecast, not measured" in text
    assert "assumed:" in text
    path.write_text(path.read_text().replace("samples/wan-tiny", "nowhere"))
    assert main([str(path), "--forecast"]) == 1
    assert "give a folder or one of" in capsys.readouterr().err
