# SPDX-License-Identifier: Apache-2.0
"""A run on which sparse attention had no effect warns once; labels in reports are right."""

from __future__ import annotations

import warnings

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend

import dit_sparse
from tests import tiny

RADIAL = {"form": "paper", "decay_factor": 0.3, "block_size": 8}


def quiet(made):
    pipe, args = made
    pipe.set_progress_bar_config(disable=True)
    return pipe, args


def kontext():
    """FLUX Kontext: the tokens of a reference picture stand behind those of the picture."""
    flux, args = tiny.flux()
    names = ("scheduler", "vae", "transformer")
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    parts = {name: getattr(flux, name) for name in names}
    picture = {"image": torch.rand(1, 3, 20, 28), "_auto_resize": False, "max_area": 20 * 28}
    return quiet((diffusers.FluxKontextPipeline(**parts, **absent), {**args, **picture}))


def warned(pipe, args, times=2, **changes):
    """Run it, and return its report and what it warned of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(times):
            tiny.run(pipe, args, **changes)
    about = [str(each.message) for each in found if "sparse attention" in str(each.message)]
    return pipe.sparse_attention.report(), about


def test_a_run_that_is_not_understood_warns_once():
    pipe, args = kontext()
    plain = {key: value for key, value in args.items() if key != "image"}
    pipe.enable_sparse_attention("radial", **RADIAL)
    report, about = warned(pipe, plain)
    assert (report.grid, about) == ("1 x 10 x 14 + 17 text", [])
    report, about = warned(pipe, args)
    assert not report.sparse_rows
    (message,) = about
    assert message.startswith(
        "sparse attention 'radial' had no effect, because every attention call"
    )
    (reason,) = report.reasons
    assert reason in message
    assert report.grid == ""  # not that of the run before
    assert "radial', 4 steps" in report.summary()


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("radial", {"form": "paper", "decay_factor": 1e9, "block_size": 16}),
        ("gna", {"window": (99, 99, 99)}),
        ("svg", {"density": 1.0, "block_size": 16}),
    ],
)
@pytest.mark.parametrize("family", ["wan", "pixart_sigma"])  # PixArt's says of no run that it ends
def test_a_method_that_keeps_everything_warns_once(family, method, params):
    pipe, args = quiet(tiny.PIPELINES[family]())
    pipe.enable_sparse_attention(method, **params)
    report, about = warned(pipe, args)
    assert report.density == 1
    (message,) = about
    assert f"{method} keeps every block pair on this grid ({report.grid} tokens)" in message


def test_one_of_two_methods_that_keeps_everything_is_named():
    pipe, args = quiet(tiny.wan())
    strategy = dit_sparse.Strategy(name="two").to_dict()
    strategy["rules"] = [
        {"method": "gna", "params": {"window": [99, 99, 99]}, "heads": [0]},
        {"method": "radial", "params": RADIAL, "heads": [1]},
    ]
    pipe.enable_sparse_attention(dit_sparse.Strategy.from_dict(strategy))
    _, (message,) = warned(pipe, args)
    assert message.startswith(
        "sparse attention 'two' had no effect, because gna keeps every block pair"
    )


@pytest.mark.parametrize("method", ["dense", "radial", "adaspa"])
def test_what_works_as_it_is_meant_to_warns_of_nothing(method):
    params = {"radial": RADIAL, "adaspa": {"density": 0.4, "search_steps": [0.0]}, "dense": {}}
    pipe, args = quiet(tiny.wan())
    options = {} if method == "dense" else {"dense_warmup_steps": 1}
    pipe.enable_sparse_attention(method, **options, **params[method])
    assert warned(pipe, args)[1] == []

    def stop(running, _step, _timestep, tensors):
        running._interrupt = True  # after the one step that is dense anyway
        return tensors

    assert warned(pipe, args, callback_on_step_end=stop)[1] == []


@pytest.mark.parametrize("family", ["cogvideox", "pixart_sigma"])
def test_the_branch_without_guidance(family):
    pipe, args = quiet(tiny.PIPELINES[family]())
    with dit_sparse.sparse_attention(pipe, "radial", strict=True, **RADIAL) as handle:
        for scale, branch in ((1.0, "cond"), (6.0, "both"), (1.0, "cond")):
            tiny.run(pipe, args, guidance_scale=scale)
            assert {row["branch"] for row in handle.report().rows} == {branch}


def test_the_backend_of_a_dense_call():
    pipe, args = quiet(tiny.wan())
    with dit_sparse.sparse_attention(pipe, "dense") as handle:
        tiny.run(pipe, args)
        assert set(handle.report().kernels) == {"model's own"}
        with attention_backend("_native_math"):
            tiny.run(pipe, args)
        assert set(handle.report().kernels) == {"model's own (_native_math)"}
    pipe, args = quiet(tiny.pixart())  # it calls torch itself, whatever the backend
    with dit_sparse.sparse_attention(pipe, "dense") as handle, attention_backend("_native_math"):
        tiny.run(pipe, args)
        assert set(handle.report().kernels) == {"model's own"}


def test_recomputation_has_the_reason_of_the_first_pass():
    pipe, args = tiny.wan()
    model = pipe.transformer
    model.enable_gradient_checkpointing()
    model.train()
    with dit_sparse.sparse_attention(model, "radial", **RADIAL) as handle:
        handle.at(0, 4)
        inputs = (tiny.normal(1, 16, 3, 8, 12), torch.tensor([500]), args["prompt_embeds"])
        model(*inputs, return_dict=False)[0].mean().backward()
        report = handle.report()
    (reason,) = report.reasons
    assert "gradients" in reason
    assert len(report.rows) == 4  # two layers, twice
