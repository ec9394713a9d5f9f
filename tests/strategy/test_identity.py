# SPDX-License-Identifier: Apache-2.0
"""The identity of a pipeline: any change of content is named, nothing else changes it."""

import json
import shutil

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dit_sparse.strategy.identity import (
    changed,
    differences,
    pipeline_identity,
    plain,
    remember,
    tensor_digest,
)
from tests import tiny


@pytest.fixture(scope="module")
def model(root, tmp_path_factory):
    """Copy a whole pipeline, so that its files can be changed."""
    return shutil.copytree(root / "samples" / "wan-tiny", tmp_path_factory.mktemp("m") / "wan")


def load(folder):
    return diffusers.DiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def identity(model):
    """Take the way of an identity that is stored: through JSON."""
    return json.loads(json.dumps(pipeline_identity(load(model))))


def change_number(path):
    """Change one number of one tensor, by the least that its dtype can express."""
    tensors = load_file(path)
    value = next(iter(tensors.values())).view(-1)
    one = value[len(value) // 3]
    one.copy_(torch.nextafter(one, torch.tensor(9.0, dtype=value.dtype)))
    save_file(tensors, path, {"format": "pt"})


def change_json(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


WEIGHTS = "diffusion_pytorch_model.safetensors"
CHANGES = {
    "pipeline.scheduler.config.flow_shift: 3.0, now 5.0": lambda m: change_json(
        m / "scheduler" / "scheduler_config.json", '"flow_shift": 3.0', '"flow_shift": 5.0'
    ),
    "pipeline.vae.weights": lambda m: change_number(m / "vae" / WEIGHTS),
    "pipeline.transformer.weights": lambda m: change_number(m / "transformer" / WEIGHTS),
    "pipeline.text_encoder.weights": lambda m: change_number(
        m / "text_encoder" / "model.safetensors"
    ),
    "pipeline.tokenizer.content": lambda m: change_json(
        m / "tokenizer" / "tokenizer.json", '"▁circle"', '"▁cirkle"'
    ),
    "pipeline.config.expand_timesteps: false, now true": lambda m: change_json(
        m / "model_index.json", '"expand_timesteps": false', '"expand_timesteps": true'
    ),
}


@pytest.mark.parametrize("named", CHANGES)
def test_one_change_in_any_component_is_named(model, identity, tmp_path, named):
    other = shutil.copytree(model, tmp_path / "other")
    assert differences(identity, plain(pipeline_identity(load(other)))) == []  # paths do not count
    CHANGES[named](other)
    found = changed({"pipeline": identity}, {"pipeline": pipeline_identity(load(other))}, "clips")
    assert found.startswith(f"contains clips made with other inputs: {named}")
    assert found.count(", now ") == 1
    assert found.endswith("add --fresh (fresh=True) to delete these clips")


def test_a_generation_does_not_change_the_identity(model, identity):
    pipe = load(model)
    pipe.set_progress_bar_config(disable=True)
    pipe("a red circle", height=64, width=64, num_frames=5, num_inference_steps=2)
    assert differences(identity, plain(pipeline_identity(pipe))) == []


def test_what_no_file_holds_counts_too(identity, model):
    pipe = load(model)
    pipe.vae.enable_tiling()
    assert differences(identity, plain(pipeline_identity(pipe))) == [
        "vae.settings.use_tiling: false, now true"
    ]
    pipe, _ = tiny.flux()
    before = pipeline_identity(pipe)
    pipe.scheduler.set_shift(7.0)
    assert differences(plain(before), pipeline_identity(pipe)) == ["scheduler.shift: 1.0, now 7.0"]


def test_adapters_count_with_their_scale():
    from peft import LoraConfig

    pipe, _ = tiny.wan()
    plain_one = pipeline_identity(pipe)["transformer"]
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"])
    pipe.transformer.add_adapter(config, adapter_name="one")
    whole = pipeline_identity(pipe)["transformer"]
    pipe.transformer.set_adapters("one", 0.5)
    half = pipeline_identity(pipe)["transformer"]
    assert whole["weights"] == half["weights"] != plain_one["weights"]
    assert whole["settings"]["adapters"] != half["settings"]["adapters"]


def test_where_weights_lie_does_not_count():
    pipe, _ = tiny.wan()
    before = pipeline_identity(pipe)
    for weight in pipe.vae.parameters():
        if weight.ndim == 5:
            weight.data = weight.data.to(memory_format=torch.channels_last_3d)
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    assert {p.device.type for p in pipe.transformer.parameters()} == {"meta"}
    assert pipeline_identity(pipe)["transformer"]["weights"] == before["transformer"]["weights"]
    assert pipeline_identity(pipe)["vae"]["weights"] == before["vae"]["weights"]


@given(
    st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=40),
    st.sampled_from([torch.int16, torch.bfloat16, torch.float16]),
    st.data(),
)
def test_every_bit_and_the_form_of_a_tensor_count(bits, dtype, data):
    value = torch.tensor(bits, dtype=torch.int16).view(dtype)
    assert tensor_digest(value.clone()) == tensor_digest(value)
    assert tensor_digest(value.repeat_interleave(2)[::2]) == tensor_digest(value)
    at, bit = data.draw(st.integers(0, len(bits) - 1)), data.draw(st.integers(0, 14))
    flipped = [number ^ (1 << bit) if i == at else number for i, number in enumerate(bits)]
    other = torch.tensor(flipped, dtype=torch.int16).view(dtype)
    assert tensor_digest(other) != tensor_digest(value)
    assert tensor_digest(value[None]) != tensor_digest(value)
    assert tensor_digest(value.view(torch.int16).view(torch.uint16)) != tensor_digest(value)


def test_call_arguments_count_by_content():
    from PIL import Image

    embeds = torch.arange(6.0)
    picture = Image.new("RGB", (4, 4), "red")
    call = {"prompt_embeds": embeds, "image": picture, "height": 64}
    same = {"height": 64, "image": picture.copy(), "prompt_embeds": embeds.clone()}
    assert plain(call) == plain(same)
    assert plain(call) != plain({**call, "prompt_embeds": embeds.flip(0)})  # of the same sum
    assert plain(call) != plain({**call, "image": Image.new("RGB", (4, 4), "blue")})
    json.dumps(plain(call), allow_nan=False)


def test_results_of_an_earlier_version_are_refused():
    found = changed(None, {"a": 1}, "measurements")
    assert found.startswith("contains measurements from an earlier version of dit-sparse")
    assert "--fresh" in found


def test_a_script_records_an_identity_and_holds_to_it(tmp_path):
    path = tmp_path / "inputs.json"
    assert remember(path, {"steps": (1, 2)}, "clips") is None
    assert remember(path, {"steps": (1, 2)}, "clips") is None
    assert "contains clips made with other inputs: steps[1]: 2, now 3" in remember(
        path, {"steps": (1, 3)}, "clips"
    )
    for damaged in ("{", '{"steps": ["\\u001b[2J"]}'):
        path.write_text(damaged)
        assert "earlier version" in remember(path, {"steps": (1, 2)}, "clips")
