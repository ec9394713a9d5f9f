# SPDX-License-Identifier: Apache-2.0
"""Every family, every method, on real tiny pipelines: equality, batches, branches."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import dit_sparse
from dit_sparse.methods import METHODS, method_class
from dit_sparse.methods.params import param_names
from dit_sparse.pipelines import FAMILIES, family_by_name
from tests import tiny

SPARSE = {name: dict(method_class(name).example) for name in METHODS if name != "dense"}


def everything(name):
    """Params with which a method keeps every block; it searches where the example does."""
    cls = method_class(name)
    size = {"block_size": 16} if "block_size" in param_names(name) else {}
    searches = {key: cls.example[key] for key in cls.at_start}
    return {**size, **searches, **cls.everything}


@pytest.fixture(scope="module", params=sorted(tiny.PIPELINES))
def family(request):
    """Build each pipeline once, with what it gives unmodified."""
    pipe, args = tiny.PIPELINES[request.param]()
    pipe.set_progress_bar_config(disable=True)
    return request.param, pipe, args, tiny.run(pipe, args)


@pytest.fixture(scope="module")
def rounding(family):
    """How far torch's own two ways to compute attention part on this pipeline.

    DDIM's few steps amplify a rounding a hundredfold: 1.8e-5 on one processor.
    """
    _, pipe, args, stock = family
    with sdpa_kernel(SDPBackend.MATH):
        return distance(tiny.run(pipe, args), stock)


def distance(one, other):
    """Give the largest difference, relative to the size of the latents."""
    return ((one - other).abs().max() / other.abs().max()).item()


def test_every_family_has_a_pipeline_here():
    built = {type(make()[0].transformer).__name__ for make in tiny.PIPELINES.values()}
    assert built == set(FAMILIES)
    assert all(family_by_name(name).name for name in FAMILIES)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_keeping_everything_equals_the_unmodified_pipeline(family, rounding, method):
    _, pipe, args, stock = family
    with dit_sparse.sparse_attention(pipe, method, strict=True, **everything(method)) as handle:
        ours = tiny.run(pipe, args)
        report = handle.report()
    assert report.density == 1.0
    assert not report.reasons
    if method == "dense":
        assert torch.equal(ours, stock)
    else:
        assert {"native", "cpu"} & set(report.kernels)
        assert distance(ours, stock) < max(1e-5, 2 * rounding)


def test_every_call_is_described(family):
    name, pipe, args, _ = family
    with dit_sparse.sparse_attention(pipe, "radial", **SPARSE["radial"], probe=3) as handle:
        tiny.run(pipe, args)
        rows = handle.report().rows
    assert {row["step"] for row in rows} == set(range(tiny.STEPS))
    assert {row["layer"] for row in rows} == {0, 1}
    guided = {"wan", "wan_2.2", "wan_i2v", "hunyuan_video_guided"}
    batched = {"cogvideox", "cogvideox_1.5", "pixart_sigma", "pixart_alpha", "pixart_ddim"}
    wanted = {"cond", "uncond"} if name in guided else {"both"} if name in batched else {"cond"}
    assert {row["branch"] for row in rows} == wanted
    stages = {"transformer", "transformer_2"} if name == "wan_2.2" else {"transformer"}
    assert {row["stage"] for row in rows} == stages
    places = [(r["stage"], r["layer"], r["step"], r["branch"]) for r in rows]
    assert len(set(places)) == len(places) == 2 * tiny.STEPS * len(wanted)
    assert all(0 < row["recall"] <= 1 for row in rows)


@pytest.mark.parametrize("turn", range(4))
def test_a_batch_of_two_equals_two_singles(family, turn):
    """Four methods a family; each method on three families or more, one with padded text."""
    name, pipe, args, _ = family
    methods = sorted(SPARSE)
    method = methods[(4 * sorted(tiny.PIPELINES).index(name) + turn) % len(methods)]
    if name == "wan_i2v":  # its pipeline takes one image
        pytest.skip("one image per call")
    double = {
        key: torch.cat([value, value.flip(-1) if value.is_floating_point() else value])
        for key, value in args.items()
        if isinstance(value, torch.Tensor)
    }
    singles = [{k: v[i : i + 1] for k, v in double.items()} for i in range(2)]
    with dit_sparse.sparse_attention(pipe, method, strict=True, **SPARSE[method]):
        both = tiny.run(pipe, {**args, **double}, seeds=[3, 4])
        apart = [tiny.run(pipe, {**args, **singles[i]}, seed=3 + i) for i in range(2)]
    if name == "cogvideox_1.5":  # its sampler draws noise for the whole batch at every step
        both, apart = both[:1], apart[:1]
    for i, single in enumerate(apart):
        assert distance(both[i], single[0]) < 1e-4


@pytest.mark.parametrize("count", ["num_videos_per_prompt", "num_images_per_prompt"])
def test_several_results_per_prompt(family, count):
    name, pipe, args, _ = family
    image = name.startswith(("flux", "pixart"))
    if image != ("images" in count) or name in {"wan_i2v", "cogvideox", "cogvideox_1.5"}:
        pytest.skip("not an argument of this pipeline (CogVideoX fixes it to 1)")
    with dit_sparse.sparse_attention(pipe, "adaspa", strict=True, **SPARSE["adaspa"]):
        several = tiny.run(pipe, args, seeds=[7, 8], **{count: 2})
        single = tiny.run(pipe, args, seed=7)
    assert distance(several[0], single[0]) < 1e-4


@pytest.mark.parametrize("method", sorted(SPARSE))
def test_guidance_in_two_passes_and_in_one_batch_agree(method):
    pipe, _ = tiny.cogvideox()
    model = pipe.transformer
    latents, text = tiny.normal(2, 3, 4, 8, 12), tiny.normal(2, 13, 32)
    together, apart = [], {"uncond": [], "cond": []}
    steps = 4

    def forward(rows, step):
        time = torch.full((rows.stop - rows.start,), 900 - 100 * step)
        noisy = latents[rows] * (1 + 0.1 * step)
        with torch.no_grad():
            return model(noisy, encoder_hidden_states=text[rows], timestep=time).sample

    with dit_sparse.sparse_attention(model, method, strict=True, **SPARSE[method]) as handle:
        for step in range(steps):
            handle.at(step, steps, "both")
            together.append(forward(slice(0, 2), step))
    with dit_sparse.sparse_attention(model, method, strict=True, **SPARSE[method]) as handle:
        for step in range(steps):
            for row, branch in enumerate(apart):
                handle.at(step, steps, branch)
                apart[branch].append(forward(slice(row, row + 1), step))
    for row, branch in enumerate(apart):
        for step in range(steps):
            assert distance(apart[branch][step][0], together[step][row]) < 1e-5


def first_queries(pipe, args):
    """Collect the query and the described call of layer 0 at every pass of the first step."""
    seen = []
    with dit_sparse.sparse_attention(pipe, "radial", strict=True, **SPARSE["radial"]) as handle:
        attention = handle.attention

        def watched(site, query, key, value, mask, shape, *rest):
            if site.layer == 0:
                seen.append((query.clone(), handle.stages[site.stage].family.grid(shape)))
            return attention(site, query, key, value, mask, shape, *rest)

        handle.attention = watched
        tiny.run(
            pipe, args, num_inference_steps=2
        )  # PixArt alpha takes one step for a special case
    return seen[: len(seen) // 2]


def test_the_text_stands_where_the_adapter_says(family):
    """Another prompt changes the queries of exactly the text's positions in the first layer."""
    name, pipe, args, _ = family
    if name == "hunyuan_video":  # all of the text is valid, so that all of it changes
        pipe, args = tiny.hunyuan_video(valid=16)
        pipe.set_progress_bar_config(disable=True)
    other = {**args, "prompt_embeds": args["prompt_embeds"] + 1.0}
    if "negative_prompt_embeds" in args:
        other["negative_prompt_embeds"] = args["negative_prompt_embeds"] + 1.0
    for (one, grid), (two, _) in zip(
        first_queries(pipe, args), first_queries(pipe, other), strict=True
    ):
        changed = (one != two).flatten(2).any(-1).any(0)
        start, stop = grid.text_start, grid.text_start + grid.text_length
        assert not changed[:start].any()
        assert not changed[stop:].any()
        if name != "hunyuan_video_guided":  # whose padding may well stay as it is
            assert changed[start:stop].all()
