# SPDX-License-Identifier: Apache-2.0
"""Rows that say how to call their transformer without data, against real tiny models.

The oracle is the real model of ``tests/models/builders.py`` on the CPU, with tensors of the same
shapes that hold data; tokens, layers and attention's operations are counted by hand.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

import diffusers
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.errors import UnsupportedError
from dit_sparse.pipelines import FAMILIES, MODELS, family_by_name, size
from dit_sparse.pipelines.counting import Mixed
from dit_sparse.pipelines.examples import Example, Full, Positions
from dit_sparse.pipelines.family import Unsized
from dit_sparse.pipelines.size import compression, model_size
from tests.models.builders import CASES
from tests.models.case import call, make
from tests.models.test_rows import classes

UNSIZED = {
    "ErnieImageTransformer2DModel",
    "Flux3Transformer2DModel",
    "GlmImageTransformer2DModel",
    "HeliosTransformer3DModel",
    "HiDreamImageTransformer2DModel",
    "JoyImageEditPlusTransformer3DModel",
    "JoyImageEditTransformer3DModel",
    "MiniMaxH3Transformer3DModel",
    "WanAnimateTransformer3DModel",
}
SIZED = sorted(set(MODELS) - UNSIZED)
PROMPT = 7
# Latents of one sample that make the case's grid (patches or packing of 2 x 2, but for these).
WHOLE = {
    "BriaFiboTransformer2DModel",
    "HunyuanImageTransformer2DModel",
    "HunyuanVideo15Transformer3DModel",
    "LTX2VideoTransformer3DModel",
    "LTXVideoTransformer3DModel",
}
# Tokens beside the video's in its sequence, where they are not those of the prompt.
TEXT = {
    "AuraFlowTransformer2DModel": 8 + PROMPT,  # registers
    "BriaFibo2Transformer2DModel": 16,  # 7 lies 3/16 of the way from 4 to 20: 8 + 3, to eights
    "EasyAnimateTransformer3DModel": 2 * PROMPT,  # two encoders
    "HunyuanImageTransformer2DModel": PROMPT + 128,  # ByT5
    "HunyuanVideo15Transformer3DModel": PROMPT + 256 + 729,  # ByT5, and a picture
    "ZImageTransformer2DModel": 32 + 16,  # both filled up to a multiple of 32
}
FRAMES = {"LatteTransformer3DModel": 3}  # each attends by itself


def with_data(value):
    """Give tensors without data some."""
    if isinstance(value, torch.Tensor):
        return torch.randn(value.shape, dtype=value.dtype) if value.is_meta else value
    if isinstance(value, (list, tuple)):
        return type(value)(map(with_data, value))
    return value


def pixels(name):
    """Give height, width and frames in pixels that make the tokens of the class's case."""
    family, (frames, height, width) = family_by_name(name), CASES[name].grid
    patch = 1 if name in WHOLE else 2
    spatial, temporal = family.compression
    frames = FRAMES.get(name, frames)
    return height * patch * spatial, width * patch * spatial, (frames - 1) * temporal + 1


def counted(name, **config):
    case = {**CASES[name].config, **config, "_class_name": name}
    return model_size(case, *pixels(name), text=PROMPT)


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("name", SIZED)
def test_the_count_is_that_of_a_real_pass(name, monkeypatch):
    case, family = CASES[name], family_by_name(name)
    model, seen = make(name, case).requires_grad_(False), set()
    told = counted(name)
    text = 0 if family.text_free else TEXT.get(name, PROMPT)
    grid = told.grid
    assert (grid.frames, grid.height, grid.width) == case.grid
    assert grid.text_length == text
    head_dim = 12 if "blocks" in family.attention and case.config.get("freq_dim") else 16
    assert (told.layers, told.heads, told.head_dim) == (case.layers, 2, head_dim)
    video = case.grid[0] * case.grid[1] * case.grid[2]
    pairs = (case.layers - len(case.bare)) * (video + text) ** 2 + len(case.bare) * video**2
    assert told.attention_flops == 4 * pairs * 2 * head_dim * FRAMES.get(name, 1)

    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(query, *args, **kwargs):
        seen.add(query.shape[2])
        return attention(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    spatial, temporal = family.compression
    height, width, frames = pixels(name)
    latents = ((frames - 1) // temporal + 1, height // spatial, width // spatial)
    inputs = family.example(model.config, *latents, PROMPT)
    # Plain attention: torch's counter does not know the CPU's fused one.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call(model, {key: with_data(value) for key, value in inputs.items()})
    assert grid.tokens in seen
    assert told.attention_flops + told.other_flops == counter.get_total_flops()
    assert told.parameters == sum(weight.numel() for weight in model.parameters())


def test_rows_without_an_example_say_why():
    rows = {**FAMILIES, **MODELS}
    unsized = {name for name in rows if isinstance(family_by_name(name).example, Unsized)}
    assert unsized == UNSIZED
    for name in sorted(unsized):
        with pytest.raises(
            UnsupportedError, match=rf"^{name}: cannot be counted without data: "
        ) as e:
            model_size({**CASES[name].config, "_class_name": name}, 512, 512)
        assert len(str(e.value).split("data: ")[1].split()) > 6


# Where a pipeline's default is None or stands elsewhere, with where that is.
USUAL = {
    "AllegroTransformer3DModel": (720, 1280, 85),  # the class's sample sizes; 88 make as many
    "DiTTransformer2DModel": (256, 256, 1),  # the class's sample size, in latents
    "HunyuanImageTransformer2DModel": (2048, 2048, 1),  # the pipeline's default_sample_size
    "HunyuanVideo15Transformer3DModel": (480, 848, 121),  # 16:9 at the class's target_size
    "HunyuanVideoTransformer3DModel": (720, 1280, 129),
    "LTX2VideoTransformer3DModel": (512, 768, 121),  # where there is no duration head
    "LatteTransformer3DModel": (512, 512, 16),  # its argument is called video_length
    "MochiTransformer3DModel": (480, 848, 19),  # the pipeline's default_height, default_width
    "WanAnimateTransformer3DModel": (720, 1280, 77),  # a segment
    "WanTransformer3DModel": (720, 1280, 81),  # the larger models'
    "CogVideoXTransformer3DModel": (480, 720, 49),
    "MiniMaxH3Transformer3DModel": (512, 768, 121),
}
PROMPTS = {
    "PixArtTransformer2DModel": 300,  # sigma's
    "SD3Transformer2DModel": 77 + 256,  # CLIP's stand before T5's
}


def test_usual_sizes_are_those_of_the_installed_pipelines():
    found = dict(classes("pipelines"))
    for name in (*FAMILIES, *MODELS):
        if not hasattr(diffusers, name):
            continue  # newer than this version
        family = family_by_name(name)
        usual = (family.usual.height, family.usual.width, family.usual.num_frames)
        text = found.get(family.pipelines[0], "") if family.pipelines else ""
        body = re.search(r"def __call__\((.*?)\n    \)", text, flags=re.DOTALL)
        default = dict(re.findall(r"(\w+): [^=\n]+= (\d+),", body[1])) if body else {}
        sides = (default.get("height", 1024), default.get("width", 1024))
        wanted = (*sides, default.get("num_frames", 1))
        assert usual == USUAL.get(name, tuple(map(int, wanted))), name
        if name not in UNSIZED and "max_sequence_length" in default and name not in PROMPTS:
            assert family.text_tokens == int(default["max_sequence_length"]), name
    for name, tokens in PROMPTS.items():
        assert family_by_name(name).text_tokens == tokens


REFINER = {"patch_size": (1, 1, 1), "rope_axes_dim": (4, 6, 6)}


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("Kandinsky5Transformer3DModel", {"attention_type": "nabla"}, "is not supported.*NABLA"),
        ("SkyReelsV2Transformer3DModel", {"num_frame_per_block": 3}, "num_frame_per_block"),
        (
            "HunyuanImageTransformer2DModel",
            {"patch_size": (1, 1, 1), "rope_axes_dim": (4, 6, 6)},
            "refiner",
        ),
        ("SD3Transformer2DModel", {"num_layers": "many"}, "cannot be counted with this config"),
    ],
)
def test_checkpoints_that_cannot_be_counted_are_refused(name, config, words):
    with pytest.raises(UnsupportedError, match=words):
        counted(name, **config)


def test_pictures_have_one_frame():
    with pytest.raises(
        UnsupportedError, match="generates images, so the number of frames must be 1, got 17"
    ):
        model_size({"_class_name": "SD3Transformer2DModel"}, 512, 512, 17)


def test_a_mask_of_padding_is_counted_without_torchvision():
    """Its one more channel in the patch embedding, and nothing else."""
    name = "CosmosTransformer3DModel"
    without, with_mask = counted(name), counted(name, concat_padding_mask=True)
    assert with_mask.parameters - without.parameters == 1 * 2 * 2 * 32  # a patch, hidden width
    assert with_mask.other_flops - without.other_flops == 2 * 72 * (1 * 2 * 2) * 32
    assert with_mask.attention_flops == without.attention_flops


def test_a_grid_that_attention_does_not_have_is_never_told(monkeypatch):
    name = "LTXVideoTransformer3DModel"
    wrong = replace(family_by_name(name), shape=lambda *_: (3, 4, 5, 0))
    monkeypatch.setattr(size, "family_by_name", lambda _: wrong)
    with pytest.raises(UnsupportedError, match=r"grid is 3 x 4 x 5, .* called with \[72\] tokens"):
        counted(name)


def test_tensors_with_and_without_data_meet():
    mask, rows = torch.tensor([True, False, True]), torch.empty(3, 5, device="meta")
    with Mixed():
        assert rows[mask].shape == (2, 5)
        assert (rows * mask[:, None]).is_meta
        assert mask.sum().item() == 2
        everybody = torch.ones(4096, 1, dtype=torch.bool)
        assert not (everybody[:8] & everybody[:8].T).is_meta
        assert (everybody & everybody.T).is_meta  # not made: it may be of every token
        with pytest.raises(ValueError, match="over what has"):
            torch.ones(3, 5).copy_(rows)


def test_shapes_are_read_from_words():
    class Config:
        width, absent = 6, None

    made = Example(
        {
            "a": "1 t h w",
            "b": "text width",
            "c": "1 tokens ?absent",
            "d": Full("1 tokens", 0),
            "e": Positions(4, joint=True),
            "f": lambda *_: None,
        },
        pack=2,
    )(Config, 1, 4, 6, 3)
    assert {key: tuple(value.shape) for key, value in made.items()} == {
        "a": (1, 1, 4, 6),
        "b": (3, 6),
        "d": (1, 6),
        "e": (3 + 6, 4),
    }
    assert made["a"].is_meta
    assert made["e"].tolist()[2:5] == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert made["e"].tolist()[-1] == [0, 1, 2, 0]


def test_a_vae_without_ratios_tells_them_all_the_same():
    ltx = family_by_name("LTXVideoTransformer3DModel")
    config = {
        "block_out_channels": [128, 256, 512, 512],
        "spatio_temporal_scaling": [True, True, True, False],
        "patch_size": 4,
        "patch_size_t": 1,
        "spatial_compression_ratio": None,
    }
    assert compression(config, ltx) == (32, 8)


def forecast(folder, *args):
    run = CliRunner().invoke
    return run(app, ["forecast", str(folder), *map(str, args)], env={"COLUMNS": "160"})


def model_folder(path, name, **config):
    (path / "transformer").mkdir()
    (path / "model_index.json").write_text("{}", encoding="utf-8")
    known = CASES[name].config if name else {}
    (path / "transformer" / "config.json").write_text(json.dumps(known | config), encoding="utf-8")
    return path


def test_a_folder_without_a_size_is_forecast_at_its_pipeline_s(tmp_path):
    name = "LTXVideoTransformer3DModel"
    folder = model_folder(tmp_path, name, _class_name=name)
    result = forecast(folder)
    assert result.exit_code == 0, result.output
    assert "512 x 704 pixels, 161 frames, 50 steps" in " ".join(result.stdout.split())
    assert "7,392 (21 x 16 x 22)" in result.stdout
    result = forecast(folder, "--height", 64, "--width", 96, "--frames", 17)
    assert "18 (3 x 2 x 3)" in result.stdout


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        (None, {"_class_name": "UNet2DModel"}, "UNet2DModel is not supported"),
        (None, {}, "missing key '_class_name'"),
        (
            "HeliosTransformer3DModel",
            {"_class_name": "HeliosTransformer3DModel"},
            "in chunks",
        ),
    ],
)
def test_what_cannot_be_forecast_is_said(tmp_path, name, config, words):
    result = forecast(model_folder(tmp_path, name, **config))
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
