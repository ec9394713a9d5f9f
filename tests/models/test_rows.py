# SPDX-License-Identifier: Apache-2.0
"""The rows against the installed Diffusers; what is declined, refused, warned of; odd passes.

Past 300 lines, as its tables of odd passes share one way to change a case.
"""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

import dit_sparse
from dit_sparse.pipelines import FAMILIES, MODELS, family_by_name
from dit_sparse.pipelines.declined import DECLINED
from tests import tiny
from tests.models.builders import CASES, FLUX_INPUTS, PICTURE, TEXT
from tests.models.case import Case, arguments, call, ids, make, mask, per_sample, time
from tests.models.test_contract import GNA, POOLED, grid_of, run

INSTALLED = Path(diffusers.__file__).parent
# Models in that folder of diffusers that are no transformer of a pipeline for pictures or video:
# parts of UNets, priors, and parts of models that are in the table.
PARTS = {
    "AceStepConditionEncoder",
    "MiniMaxMusic3RVQDepthDecoder",
    "PriorTransformer",
    "SanaWMLTX2RefinerTransformer3DModel",
    "T5FilmDecoder",
    "Transformer2DModel",
    "TransformerTemporalModel",
}


def classes(folder):
    """Read the text of every class of a folder of diffusers, by name, without importing it."""
    for path in sorted((INSTALLED / folder).rglob("*.py")):
        if "deprecated" not in path.parts:
            for text in re.split(r"^class ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[
                1:
            ]:
                yield text[: re.search(r"\W", text).start()], text


def test_every_transformer_of_diffusers_has_a_row_or_a_reason():
    found = {
        name
        for name, text in classes("models/transformers")
        if re.match(r"\w+\([^)]*(ModelMixin|LegacyModelMixin)\b", text)
    }
    assert len(found) > 30
    assert found - {*FAMILIES, *MODELS, *DECLINED, *PARTS} == set()
    assert not set(DECLINED) & {*FAMILIES, *MODELS}


def test_the_pipelines_of_a_row_are_those_that_run_its_class():
    runs, installed = {}, set()
    for name, text in classes("pipelines"):
        installed.add(name)
        takes = re.search(r"def __init__\((.*?)\)( -> None)?:\n", text, flags=re.DOTALL)
        kind = takes and re.search(r"\btransformer: (\w+)", takes[1])
        if kind and "has been renamed to" not in text:  # an alias that diffusers has deprecated
            runs.setdefault(kind[1], set()).add(name)
    for name in (*FAMILIES, *MODELS):
        assert set(family_by_name(name).pipelines) & installed == runs.get(name, set()), name


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_row_says_truly_whether_there_is_text(name):
    family, case = family_by_name(name.split("/")[0]), CASES[name]
    assert family.text_free == (case.text == 0 and not case.texts)
    assert family.text_first == case.first


@pytest.mark.parametrize("name", sorted(DECLINED))
def test_a_declined_class_is_refused_with_its_reason(name):
    with pytest.raises(dit_sparse.UnsupportedError, match="is not supported") as raised:
        family_by_name(name)
    assert DECLINED[name] in str(raised.value)


REFUSED = {
    "SanaTransformer2DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "sample_size": 8,
        },
        "linear",
    ),
    "Kandinsky5Transformer3DModel": (
        {**CASES["Kandinsky5Transformer3DModel"].config, "attention_type": "nabla"},
        "trained with NABLA",
    ),
    "SkyReelsV2Transformer3DModel": (
        {**CASES["SkyReelsV2Transformer3DModel"].config, "num_frame_per_block": 3},
        "num_frame_per_block",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_model_is_not_touched(name):
    config, words = REFUSED[name]
    model = getattr(diffusers, name)(**config)
    before = [(path, type(each), set(vars(each))) for path, each in model.named_modules()]
    with pytest.raises(dit_sparse.UnsupportedError, match=words):
        dit_sparse.enable(model, "radial")
    after = [(path, type(each), set(vars(each))) for path, each in model.named_modules()]
    assert before == after


def test_gates_of_video_sparse_attention_are_left_alone():
    pipe, _ = tiny.wan()
    attention = pipe.transformer.blocks[0].attn1
    attention.to_gate_compress = nn.Linear(24, 24)
    with pytest.raises(dit_sparse.UnsupportedError, match="Video Sparse Attention"):
        pipe.enable_sparse_attention("radial")
    assert pipe.sparse_attention is None
    del attention.to_gate_compress
    pipe.enable_sparse_attention("radial")


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        ("FastVideo/FastWan2.1-T2V-1.3B-Diffusers", True),
        ("/cache/models--FastVideo--Wan2.1-VSA-T2V-14B-720P-Diffusers/snapshots/0", True),
        ("FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers", False),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", False),
        ("nvsawan/convsa-model", False),
    ],
)
def test_a_checkpoint_trained_with_sparse_attention_is_warned_of(name, warned, recwarn):
    pipe, _ = tiny.wan()
    pipe.transformer.register_to_config(_name_or_path=name)
    pipe.enable_sparse_attention("radial")  # allowed: diffusers runs dense attention
    said = [str(each.message) for each in recwarn if "Video Sparse" in str(each.message)]
    assert len(said) == warned
    assert all(name in each for each in said)


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
def test_mochi_keeps_a_memory_for_each_sample():
    """Its processor calls attention once for each sample, each with a text of its own length."""
    case = CASES["MochiTransformer3DModel"]
    model = make("MochiTransformer3DModel", case)
    _, calls, report = run(model, case.inputs(2), "pooled", steps=2, **POOLED)
    branches = {(described.layer, described.step, described.branch) for described, _ in calls}
    assert len(branches) == len(calls) == 2 * 2 * 2
    assert {described.branch for described, _ in calls} == {"cond, sample 0", "cond, sample 1"}
    by_sample = {described.branch: grid_of(described)[3] for described, _ in calls}
    assert by_sample == {"cond, sample 0": 4, "cond, sample 1": 7}
    assert not report.reasons


def changed(name, **inputs):
    """Take a case with other arguments."""
    case = CASES[name]
    return name, Case(
        case.config, lambda batch: {**case.inputs(batch), **arguments(**inputs)(batch)}
    )


def padded_in_the_middle(batch):
    """Hide other prompt tokens in each sample."""
    hidden = [{2}, {0, 3, 4}]
    return torch.tensor([[key not in hidden[i] for key in range(TEXT)] for i in range(batch)])


DENSE = {
    "two pictures of two sizes": (
        *changed(
            "QwenImageTransformer2DModel",
            hidden_states=per_sample(48 + 24, 16),
            img_shapes=[[(1, 6, 8), (1, 4, 6)]],
        ),
        "grid of this pass is unknown",
    ),
    "coordinates instead of a size": (
        *changed(
            "LTXVideoTransformer3DModel",
            num_frames=None,
            height=None,
            width=None,
            video_coords=lambda batch: torch.rand(batch, 3, 72),
        ),
        "grid of this pass is unknown",
    ),
    "a reference picture": (
        *changed(
            "Flux2Transformer2DModel",
            hidden_states=per_sample(48 + 48, 4),
            img_ids=torch.cat([ids(PICTURE, 4), ids(PICTURE, 4)]),
        ),
        "no single grid in the rows and columns in `img_ids`",
    ),
    "an additive mask": (
        *changed(
            "ChromaTransformer2DModel",
            attention_mask=lambda batch: torch.nn.functional.pad(
                mask((4, 7), TEXT)(batch).float(), (0, 48), value=1.0
            ),
        ),
        "torch.float32",
    ),
    "references of their own length": (
        *changed(
            "BriaFibo2Transformer2DModel",
            context_latents=lambda batch: [per_sample(4, 4, 4, seed=9)(batch)],
        ),
        "grid of this pass is unknown",
    ),
}


@pytest.mark.parametrize("what", sorted(DENSE))
def test_what_cannot_be_placed_stays_dense_and_says_why(what):
    name, case, words = DENSE[what]
    model = make(name, case)
    inputs = case.inputs(1)
    stock = call(model, inputs)
    with dit_sparse.sparse_attention(model, "gna", **GNA) as handle:
        handle.at(0, 1)
        assert torch.equal(call(model, inputs), stock)
        assert all(words in reason for reason in handle.report().reasons)
        assert handle.report().reasons
    with dit_sparse.sparse_attention(model, "gna", strict=True, **GNA) as handle:
        handle.at(0, 1)
        with pytest.raises(dit_sparse.GeometryError, match="strict"):
            call(model, inputs)


SPARSE = {
    "pictures of one size stand like frames": (
        *changed(
            "QwenImageTransformer2DModel",
            hidden_states=per_sample(48 + 48, 16),
            img_shapes=[[(1, 6, 8), (1, 6, 8)]],
        ),
        {(2, 6, 8, 7)},
    ),
    "no history yet": (
        "HeliosTransformer3DModel",
        Case(
            CASES["HeliosTransformer3DModel"].config,
            arguments(
                hidden_states=per_sample(4, 3, 8, 12),
                timestep=time,
                encoder_hidden_states=per_sample(TEXT, 16, seed=1),
            ),
        ),
        {(3, 4, 6, 0)},
    ),
    "padding in the middle of the prompt": (
        *changed("Krea2Transformer2DModel", encoder_attention_mask=padded_in_the_middle),
        {(1, 6, 8, 7)},
    ),
    "a picture filled up to the largest": (  # 16 x 16 tokens
        *changed("HiDreamImageTransformer2DModel", hidden_states=per_sample(4, 12, 16)),
        {(1, 6, 8, 256 - 48 + 17)},
    ),
    "a video with one item": (
        *changed("JoyImageEditTransformer3DModel", hidden_states=per_sample(4, 3, 12, 16)),
        {(3, 6, 8, 7)},
    ),
    "no mask": (
        *changed("ChromaTransformer2DModel", attention_mask=None),
        {(1, 6, 8, 7)},
    ),
    "positions with a batch in front": (
        *changed("BriaTransformer2DModel", img_ids=FLUX_INPUTS["img_ids"][None]),
        {(1, 6, 8, 7)},
    ),
}


@pytest.mark.parametrize("what", sorted(SPARSE))
def test_other_passes_that_can_be_placed(what):
    name, case, grids = SPARSE[what]
    model = make(name, case)
    stock = call(model, case.inputs(1))
    output, calls, _ = run(model, case.inputs(1), "gna", **GNA)
    assert {grid_of(described) for described, _ in calls} == grids
    assert not torch.equal(output, stock)


HOLES = {
    "krea2": changed("Krea2Transformer2DModel", encoder_attention_mask=padded_in_the_middle),
    "chroma": changed(
        "ChromaTransformer2DModel",
        attention_mask=lambda batch: torch.nn.functional.pad(
            padded_in_the_middle(batch), (0, 48), value=True
        ),
    ),
    "qwen": changed(
        "QwenImageTransformer2DModel", encoder_hidden_states_mask=padded_in_the_middle
    ),
    "motif": changed("MotifVideoTransformer3DModel", encoder_attention_mask=padded_in_the_middle),
    "hidream": changed("HiDreamImageTransformer2DModel", hidden_states=per_sample(4, 12, 16)),
}


@pytest.mark.parametrize("what", sorted(HOLES))
def test_padding_wherever_it_stands_changes_nothing(what):
    """Keeping every block equals the model, also where one of its two heads is dense."""
    name, case = HOLES[what]
    model = make(name, case)
    stock = call(model, case.inputs(2))
    everything = dit_sparse.Strategy.single("pooled", density=1.0, block_size=16).to_dict()
    for heads in ([0, 1], [1]):
        everything["rules"][0]["heads"] = heads
        with dit_sparse.sparse_attention(model, everything, strict=True) as handle:
            handle.at(0, 1)
            ours = call(model, case.inputs(2))
            report = handle.report()
        assert not report.reasons
        assert {"native", "cpu"} & set(report.kernels)
        assert ((ours - stock).abs().max() / stock.abs().max()).item() < 1e-5


@pytest.mark.parametrize("name", ["CogView4Transformer2DModel", "QwenImageTransformer2DModel"])
def test_readers_run_inside_a_compiled_graph(name):
    """One graph for the whole model, with the same prediction as without compiling."""
    case = CASES[name]
    model = make(name, case)
    plain, _, _ = run(model, case.inputs(1), "gna", **GNA)
    torch.compiler.reset()
    with dit_sparse.sparse_attention(model, "gna", strict=True, **GNA) as handle:
        handle.at(0, 1)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        inputs = case.inputs(1)
        if name == "QwenImageTransformer2DModel":
            inputs["encoder_hidden_states_mask"] = None  # stock reads the mask's values
            plain = call(model, inputs)
        assert torch.equal(call(compiled, inputs), plain)
    torch.compiler.reset()
