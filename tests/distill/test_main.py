# SPDX-License-Identifier: Apache-2.0
"""The command on a shipped sample model: prompts in, weights that Diffusers loads out."""

import json

import diffusers
import pytest
import torch
from safetensors import safe_open

import dit_sparse
from dit_sparse.distill import source
from dit_sparse.distill.__main__ import main

WEIGHTS = "pytorch_lora_weights.safetensors"  # named: diffusers before 0.40 demands it offline

RUN = """
task: distill
model: {model}
output: {output}
strategy: {{method: pooled, density: 0.5, block_size: 16}}
size: {{height: 64, width: 64, num_frames: 5}}
data: {{prompts: {prompts}}}
device: cpu
lora: {{rank: 2, alpha: 2}}
train: {{iterations: {iterations}, batch: 2, dtype: float32, checkpoint_every: 1}}
distill: {{steps: 2, guidance: 1.0}}
"""


@pytest.fixture
def command(tmp_path, root):
    model = root / "samples" / "wan-tiny"
    prompts, path = tmp_path / "prompts.txt", tmp_path / "run.yaml"
    prompts.write_text("a red circle\na blue square\n")

    def run(iterations=1):
        path.write_text(
            RUN.format(
                model=model, output=tmp_path / "out", prompts=prompts, iterations=iterations
            )
        )
        return main([str(path)])

    return run


@pytest.mark.slow
def test_the_command_trains_goes_on_and_its_result_samples(command, tmp_path, capsys, monkeypatch):
    assert command() == 0
    out = tmp_path / "out"
    encoded = sorted(path.name for path in (out / "cache").iterdir())
    assert len(encoded) == 2
    left = []
    free = source.free_encoders

    def note(pipe):
        free(pipe)
        left.append(pipe.text_encoder)

    monkeypatch.setattr(source, "free_encoders", note)
    assert command(iterations=2) == 0
    assert left == [None]
    assert sorted(path.name for path in (out / "cache").iterdir()) == encoded
    assert [row.split(",")[0] for row in (out / "log.csv").read_text().split()] == [
        "iteration", "1", "2"
    ]  # fmt: skip
    model = json.loads((out / "config.json").read_text())["model"]
    with safe_open(out / "result" / WEIGHTS, "pt") as file:
        saved = json.loads(file.metadata()["lora_adapter_metadata"])
    # No setting at its default, which an older peft may not know, but those that diffusers wants.
    assert {key.removeprefix("transformer.") for key in saved} == {
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"
    }  # fmt: skip
    pipe = diffusers.WanPipeline.from_pretrained(model)
    pipe.load_lora_weights(out / "result", weight_name=WEIGHTS)
    handle = dit_sparse.enable(pipe, out / "result")
    clip = pipe(
        "a red circle", height=64, width=64, num_frames=5, num_inference_steps=2,
        guidance_scale=1.0, output_type="latent", generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    assert bool(clip.isfinite().all())
    rows = handle.report().rows
    assert rows
    assert all(list(row["methods"]) == ["pooled"] and row["reason"] is None for row in rows)
    capsys.readouterr()
