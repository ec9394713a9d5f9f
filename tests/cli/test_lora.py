# SPDX-License-Identifier: Apache-2.0
"""``--lora`` on every command that runs a model: merged as Diffusers would, told, refused."""

import json

import diffusers
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.cli.console import UserError
from dit_sparse.cli.lora import Lora, merge_loras, read_loras
from dit_sparse.strategy.identity import weights_digest
from tests import tiny

RANK, ALPHA = 2, 3
WEIGHTS = "pytorch_lora_weights.safetensors"  # named: diffusers before 0.40 demands it offline
SMALL = ["--height", "64", "--width", "64", "--frames", "9", "--steps", "2", "--threads", "1"]


def run(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def wan(root):
    return root / "samples" / "wan-tiny"


def load(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def loras(wan, tmp_path_factory):
    """Two adapters of random weights, as Diffusers saves them, and their factors by layer."""
    found = []
    for seed, targets in enumerate((["to_q", "to_v"], ["ffn.net.2", "to_q"])):
        model = load(wan).transformer
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=False
        )
        model.add_adapter(config, "made")
        weights = peft.get_peft_model_state_dict(model, adapter_name="made")
        folder = tmp_path_factory.mktemp(f"lora-{seed}")
        diffusers.WanPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=weights,
            transformer_lora_adapter_metadata=model.peft_config["made"].to_dict()
            | {"target_modules": targets},
        )
        found.append((folder, {key: value.double() for key, value in weights.items()}))
    return found


def merged(folder, source, scale):
    pipe = load(folder)
    merge_loras(pipe, [Lora(str(source), scale)])
    return weights_digest(pipe.transformer)


def added(weights, layer, scale):
    down, up = (weights.get(f"{layer}.lora_{side}.weight") for side in "AB")
    return 0.0 if down is None else scale * ALPHA / RANK * up @ down


def test_weights_are_the_models_own_and_the_scaled_products(wan, loras):
    pipe, plain = load(wan), load(wan).transformer
    merge_loras(pipe, [Lora(str(loras[0][0]), 0.5), Lora(str(loras[1][0]), -2.0)])
    own = plain.state_dict()
    assert [*own] == [*pipe.transformer.state_dict()]  # no layers of an adapter are left
    changed = 0
    for key, value in pipe.transformer.state_dict().items():
        layer = key.removesuffix(".weight")
        more = added(loras[0][1], layer, 0.5) + added(loras[1][1], layer, -2.0)
        torch.testing.assert_close(value.double(), own[key].double() + more, atol=1e-6, rtol=1e-6)
        changed += isinstance(more, torch.Tensor)
    blocks = len(plain.blocks)
    assert changed == blocks * (2 * 2 + 1)  # q and v of two attentions, one projection


def test_generate_runs_the_merged_model_and_says_so(wan, loras, tmp_path):
    given = f"{loras[0][0]}=0.5"
    result = run(
        "generate", wan, "a red circle moving right", "--strategy", "dense",
        "-o", tmp_path / "out", *SMALL, "--lora", given, "--probe", "0",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "out" / "result.json").read_text())
    assert told["request"]["lora"] == [given]

    pipe = load(wan)
    pipe.load_lora_weights(str(loras[0][0]), adapter_name="one", weight_name=WEIGHTS)
    pipe.set_adapters("one", 0.5)
    pipe.fuse_lora(adapter_names=["one"])
    call = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    seed = torch.Generator().manual_seed(0)
    theirs = pipe("a red circle moving right", **call, guidance_scale=4.0, generator=seed)
    from dit_sparse.core.video import as_uint8, write_mp4
    from dit_sparse.quality.clips import open_clip

    write_mp4(tmp_path / "theirs.mp4", as_uint8(theirs.frames[0]), 12.0)
    ours, wanted = (
        [*open_clip(path).read()]
        for path in (tmp_path / "out" / "sparse.mp4", tmp_path / "theirs.mp4")
    )
    assert len(ours) == len(wanted) == 9
    assert all(np.array_equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_an_evaluation_tells_adapters_and_scales_apart(wan, loras, tmp_path):
    command = [
        "evaluate", wan, "--strategy", "pooled", "--prompt", "a red circle moving right",
        "--seeds", "0", *SMALL, "--metrics", "psnr", "--floor", "off",
        "-o", tmp_path / "out",
    ]  # fmt: skip
    first = run(*command, "--lora", loras[0][0])
    assert first.exit_code == 0, first.output
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["about"]["lora"] == str(loras[0][0])
    transformer = told["identity"]["pipeline"]["transformer"]
    assert transformer["weights"] == merged(wan, loras[0][0], 1.0)
    other = run(*command, "--lora", f"{loras[0][0]}=0.5")
    assert other.exit_code == 2, other.output
    assert "pipeline.transformer.weights: " in other.stderr


def test_a_profile_measures_the_merged_model(wan, loras, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moving right\n")
    result = run(
        "profile", wan, "--prompts", prompts, "--candidates", "pooled", "--costs", "assumed",
        "--no-check", *SMALL, "--lora", f"{loras[1][0]}=2", "-o", tmp_path / "mine.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    receipt = json.loads((tmp_path / "mine.json").read_text())["receipt"]
    assert f"--lora {loras[1][0].name}=2" in receipt["command"]
    setup = json.loads((tmp_path / "mine.measured" / "setup.json").read_text())
    assert setup["pipeline"]["transformer"]["weights"] == merged(wan, loras[1][0], 2.0)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["x=y"], "with a scale"),
        (["=0.5"], "with a scale"),
        (["x=nan"], "with a scale"),
        (["x", "x=0.5"], "x: given twice"),
    ],
)
def test_what_cannot_be_read_is_refused(texts, words):
    with pytest.raises(UserError, match=words):
        read_loras(texts)


def test_what_is_read_is_written_the_same():
    assert read_loras(None) == ()
    assert [str(one) for one in read_loras(["a/b", "c=0.5", "d=1"])] == ["a/b", "c=0.5", "d"]


def test_a_source_that_is_none_a_model_that_takes_none_and_two_transformers(wan, root, tmp_path):
    with pytest.raises(UserError, match=r"--lora .*nowhere: file or folder not found"):
        merge_loras(load(wan), [Lora(str(tmp_path / "nowhere"))])
    other = tmp_path / "other.safetensors"
    save_file({"another.model.lora_A.weight": torch.ones(2, 8)}, other)
    pipe = load(wan)
    with pytest.raises(UserError, match=r"--lora .*other\.safetensors: "):
        merge_loras(pipe, [Lora(str(other))])
    with pytest.raises(UserError, match="PixArtSigmaPipeline does not support LoRA"):
        merge_loras(load(root / "samples" / "pixart-tiny"), [Lora("a")])
    with pytest.raises(UserError, match="two transformers"):
        merge_loras(tiny.wan(two_stages=True)[0], [Lora("a")])
