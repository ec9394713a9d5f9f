# SPDX-License-Identifier: Apache-2.0
"""The distillation sample: configs are valid, prompts are fair, the page says what data say."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dit_sparse.distill.config import read_config
from dit_sparse.quality.clips import open_clip
from dit_sparse.strategy import Strategy

WEIGHTS = "pytorch_lora_weights.safetensors"  # named: diffusers before 0.40 demands it offline
DISTILLATION = Path(__file__).parents[2] / "samples" / "distillation"


@pytest.fixture(scope="module", autouse=True)
def _scripts_on_path():
    sys.path.insert(0, str(DISTILLATION))
    yield
    sys.path.remove(str(DISTILLATION))
    for name in ("run", "page", "findings", "prompts"):
        sys.modules.pop(name, None)


def test_the_students_differ_in_their_sparsity_alone():
    sparse, dense = (read_config(DISTILLATION / f"{name}.yaml") for name in ("sparse", "dense"))
    assert sparse.make_strategy() is not None
    assert dense.make_strategy() is None
    changed = {"strategy", "output"}
    assert sparse.model_dump(exclude=changed) == dense.model_dump(exclude=changed)


def test_no_prompt_to_train_on_is_held_out():
    from data import COLOURS, MOTIONS, SHAPES, is_held_out

    prompts = (DISTILLATION / "prompts.txt").read_text().splitlines()
    assert len(set(prompts)) == len(prompts) == 240
    for prompt in prompts:
        shape, colour, motion = (
            next(word for word in words if word in prompt) for words in (SHAPES, COLOURS, MOTIONS)
        )
        assert not is_held_out(shape, colour, motion), prompt


def test_the_prompts_are_what_their_script_writes(capsys):
    import prompts

    prompts.main()
    assert capsys.readouterr().out == (DISTILLATION / "prompts.txt").read_text()


def arm(steps, guided, folder, right):
    row = {
        "prompt": "a circle",
        "held_out": True,
        "colour": True,
        "shape": right,
        "motion": True,
        "right": right,
    }
    row |= {"overlap": 0.5, "psnr": 20.0, "ssim": 0.9, "lpips_alex": None, "density": 0.25}
    rows = [row | {"sharpness_ratio": 1.0, "processor_seconds": 2.0 + n} for n in range(4)]
    return {"steps": steps, "guided": guided, "folder": folder, "rows": rows}


def test_the_page_has_a_row_for_each_arm(tmp_path, monkeypatch):
    import page

    results, clips = tmp_path / "distillation", tmp_path / "clips"
    results.mkdir()
    arms = {
        "teacher": arm(20, guided=True, folder="teacher", right=True),
        "sparse, 4 steps": arm(4, guided=True, folder="sparse-4-steps", right=True),
        "sparse student": arm(4, guided=False, folder="sparse-student", right=False),
    }
    for row in arms["sparse student"]["rows"][:3]:
        row["overlap"] = 0.7
    for one in arms.values():
        (clips / one["folder"]).mkdir(parents=True)
        for at in range(4):
            np.save(clips / one["folder"] / f"{at:03}.npy", np.zeros((9, 16, 16, 3), np.uint8))
    told = {"model": "some-tiny", "strategy": {"method": "blade"}, "clips": 4, "arms": arms}
    (results / "some-tiny.json").write_text(json.dumps(told))
    for student in ("dense", "sparse"):
        lines = ["iteration,student_loss,critic_loss", *(f"{n},0.1,0.2" for n in range(12))]
        (results / f"some-tiny-{student}.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(page, "RESULTS", results)
    monkeypatch.setattr(page, "PAGE", tmp_path / "distillation.md")
    monkeypatch.setattr(sys, "argv", ["page.py", str(clips)])
    page.main()
    text = (tmp_path / "distillation.md").read_text()
    assert (
        "| teacher | 20 | 40 | 0.25 | **4/4** | 4 | 4 | 4 | 0.50 | - | - | - | 1.00 | 3.5 |"
        in text
    )
    assert (
        "| sparse student | 4 | 4 | 0.25 | **0/4** | 4 | 0 | 4 | 0.65 | 20.0 | 0.900 | - |" in text
    )
    assert "| overlap | PSNR | SSIM | right, it alone | right, the other alone |" in text
    assert "| 3 of 4 | 0 of 4 | 0 of 4 | 0 | 4 |" in text
    assert "| sparse student | 0 of 4 | 0 of 0 | 0 of 0 | 0 of 4 |" in text
    for part in ("curves", "strip"):
        assert (results / f"some-tiny-{part}.png").stat().st_size > 1000
    frames = np.stack(list(open_clip(results / "some-tiny.mp4").read()))
    assert frames.shape == (9, 3 * 16, 4 * 16, 3)  # arms above each other, prompts side by side


def test_the_shipped_student_makes_the_clip_that_the_page_counts(root):
    """By ``load_lora_weights`` and ``enable_sparse_attention``, nothing else."""
    import run

    folder = DISTILLATION / "student"
    told = json.loads((root / "docs/benchmarks/distillation/wan-tiny.json").read_text())
    row = next(row for row in told["arms"]["sparse student"]["rows"] if row["right"])
    pipe = run.DiffusionPipeline.from_pretrained(root / "samples" / "wan-tiny")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(folder), weight_name=WEIGHTS)
    handle = pipe.enable_sparse_attention(str(folder))
    assert handle.strategy.rules[0].params == run_params(told["strategy"])
    call = {"height": 128, "width": 128, "num_frames": 33, "num_inference_steps": 4}
    clip, _ = run.make_clip(pipe, row["number"], {**call, "guidance_scale": 1.0})
    again = run.row_of(row["number"], clip, clip)
    assert again["right"]
    assert again["overlap"] == pytest.approx(row["overlap"], abs=0.05)
    assert handle.report().density == pytest.approx(row["density"], abs=0.005)


def run_params(strategy):
    options = dict(strategy)
    return Strategy.single(options.pop("method"), **options).rules[0].params
