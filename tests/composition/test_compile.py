# SPDX-License-Identifier: Apache-2.0
"""torch.compile: as many graphs as the stock model, the same latents, no recompilation."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch._dynamo
import torch._inductor.config

import dit_sparse
from tests import tiny
from tests.composition.features import FEATURES
from tests.composition.switches import quietly
from tests.composition.table import Cannot, Works, cells
from tests.composition.test_features import SPARSE, alone, build, enable, is_plain

OPTIONS = {
    "radial": {"form": "paper", "decay_factor": 0.3, "block_size": 8},
    "adaspa": SPARSE,
}
NO_REGIONS = Cannot("diffusers names no repeated blocks (_repeated_blocks) for this model")
SMALLER = {
    "wan": {"height": 48, "width": 64, "num_frames": 5},
    "hunyuan_video": {"height": 32, "width": 48, "num_frames": 5},
    "cogvideox": {"height": 48, "width": 64, "num_frames": 5},
    "flux": {"height": 16, "width": 24},
    "pixart_sigma": {"height": 96, "width": 112},
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    restart()
    yield
    restart()


def restart():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def places(handle):
    return [(row["step"], row["layer"], row["branch"]) for row in handle.report().rows]


def close(one, other):
    return torch.allclose(one, other, rtol=0, atol=1e-5 * other.abs().max().item())


def shallow(family):
    """Build a pipeline with one layer of each kind: tracing takes time layer by layer."""
    pipe, args = build(family)
    for name, layers in pipe.transformer.named_children():
        if "blocks" in name:
            setattr(pipe.transformer, name, layers[:1])
    return pipe, args


def compiled_whole(pipe):
    pipe.transformer.compile(backend="eager", fullgraph=True, dynamic=True)


@cells("torch.compile: whole model, fullgraph, dynamic shapes", quick=("flux",))
def test_whole_model(family, verdict):
    assert isinstance(verdict, Works)
    pipe, args = shallow(family)
    smaller = {**args, **SMALLER[family]}
    stock = tiny.run(pipe, args)
    with enable(pipe):
        plain, plain_smaller = tiny.run(pipe, args), tiny.run(pipe, smaller)
    assert not close(plain, stock)

    compiled_whole(pipe)
    assert close(tiny.run(pipe, args), stock)
    one_size = graphs()
    tiny.run(pipe, smaller)
    needed = graphs()
    torch._dynamo.utils.counters.clear()
    handle = enable(pipe)
    assert close(tiny.run(pipe, args), plain)
    assert graphs() == one_size
    wanted = places(handle)
    assert close(tiny.run(pipe, args), plain)
    assert places(handle) == wanted
    assert graphs() == one_size  # nothing new over steps and generations
    assert close(tiny.run(pipe, smaller), plain_smaller)
    assert graphs() == needed
    assert not handle.report().reasons
    pipe.disable_sparse_attention()
    assert is_plain(pipe)
    assert close(tiny.run(pipe, args), stock)
    enable(pipe, dense=True)
    assert close(tiny.run(pipe, args), stock)


@cells("torch.compile(pipe.transformer), with and without fullgraph", quick=("flux",))
def test_graphs(family, verdict):
    """Without fullgraph compiled first, with it sparse first."""
    assert isinstance(verdict, Works)
    one_graph(family, "adaspa", fullgraph=False)
    restart()
    one_graph(family, "adaspa", sparse_first=True, backend="eager")


def one_graph(name, method, *, fullgraph=True, sparse_first=False, backend="aot_eager"):
    """A compiled transformer put into the pipeline is one graph, the least there can be."""
    pipe, args = tiny.PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    with dit_sparse.sparse_attention(pipe, method, strict=True, **OPTIONS[method]) as handle:
        eager, wanted = tiny.run(pipe, args), places(handle)

    def into_one_graph():
        pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=fullgraph)

    if not sparse_first:
        into_one_graph()
    with dit_sparse.sparse_attention(pipe, method, strict=True, **OPTIONS[method]) as handle:
        if sparse_first:
            into_one_graph()
        compiled = tiny.run(pipe, args)
        assert places(handle) == wanted
        assert handle.report().sparse_rows
    assert graphs() == 1
    assert close(compiled, eager)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [("hunyuan_video_guided", "adaspa"), ("cogvideox_1.5", "adaspa"), ("wan", "radial")],
)
def test_other_models_and_methods_are_one_graph_too(name, method):
    one_graph(name, method)


REGIONAL = dict.fromkeys(("cogvideox", "pixart_sigma"), NO_REGIONS)


@cells(
    "torch.compile: regional (compile_repeated_blocks, fullgraph)",
    REGIONAL,
    quick=("cogvideox", "pixart_sigma"),
)
def test_regional(family, verdict):
    pipe, args = build(family)
    if isinstance(verdict, Cannot):
        with pytest.raises(ValueError, match="_repeated_blocks"):
            pipe.transformer.compile_repeated_blocks(fullgraph=True)
        return
    stock, plain = alone(family)
    options = {"backend": "eager", "fullgraph": True}
    pipe.transformer.compile_repeated_blocks(**options)
    assert close(tiny.run(pipe, args), stock)
    needed = graphs()
    for compiled_first in (True, False):
        if compiled_first:
            torch._dynamo.utils.counters.clear()
        else:
            restart()
            pipe, _ = build(family)
        handle = enable(pipe)
        if not compiled_first:
            pipe.transformer.compile_repeated_blocks(**options)
        for _ in range(2):
            assert close(tiny.run(pipe, args), plain)
            traced = graphs()  # compiled first, regions without sparse attention stay as they are
            assert 0 < traced <= needed if compiled_first else traced == needed
        assert not handle.report().reasons
        if compiled_first:
            pipe.disable_sparse_attention()
            assert close(tiny.run(pipe, args), stock)


@pytest.mark.slow
def test_twelve_layers_are_one_region():
    pipe, args = tiny.wan(layers=12)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    pipe.enable_sparse_attention("adaspa", strict=True, **SPARSE)
    assert tiny.run(pipe, args).isfinite().all()
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("key", ["model_offload", "lora", "first_block", "group_leaf"])
def test_compiled_regions_beside_a_third_feature(key):
    on = quietly(FEATURES[key].on)
    # The first block's cache needs a second one; of the others one layer shows all.
    make = build if key == "first_block" else shallow
    pipe, args = make("wan")
    on(pipe, args)
    enable(pipe)
    eager = tiny.run(pipe, args)
    assert torch.equal(tiny.run(pipe, args), eager)
    for order in ([0, 1, 2], [2, 1, 0]):  # any two of the three in both orders
        restart()
        pipe, args = make("wan")
        steps = (
            lambda: on(pipe, args),  # noqa: B023  (called at once)
            lambda: enable(pipe),  # noqa: B023
            lambda: pipe.transformer.compile_repeated_blocks(backend="eager"),  # noqa: B023
        )
        for i in order:
            steps[i]()
        for _ in range(2):
            assert close(tiny.run(pipe, args), eager)
        assert not pipe.sparse_attention.report().reasons


@pytest.mark.slow
def test_processors_set_after_compiling_the_whole_model_are_taken_up():
    pipe, args = build("cogvideox")
    pipe.transformer.fuse_qkv_projections()
    handle = enable(pipe)
    fused, wanted = tiny.run(pipe, args), places(handle)
    pipe, args = build("cogvideox")
    handle = enable(pipe)
    pipe.transformer.compile(backend="eager", fullgraph=True)
    tiny.run(pipe, args)
    pipe.transformer.fuse_qkv_projections()
    assert close(tiny.run(pipe, args), fused)
    assert places(handle) == wanted


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("whole", [False, True])
# A pool's processes import torch anew, which takes longer than what they would compile.
@torch._inductor.config.patch(compile_threads=1)
def test_inductor(whole):
    pipe, args = shallow("wan")
    stock = tiny.run(pipe, args)
    enable(pipe)
    plain = tiny.run(pipe, args)
    assert not close(plain, stock)
    if whole:
        pipe.transformer.compile(fullgraph=True)
    else:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    assert torch.allclose(tiny.run(pipe, args), plain, rtol=0, atol=1e-3)
    pipe.disable_sparse_attention()
    assert torch.allclose(tiny.run(pipe, args), stock, rtol=0, atol=1e-3)


def test_the_operator_obeys_the_rules_of_operators():
    pipe, args = tiny.wan(layers=1)
    pipe.set_progress_bar_config(disable=True)
    handle = pipe.enable_sparse_attention("radial", **OPTIONS["radial"])
    tiny.run(pipe, args)
    handle.at(0, 4)
    site = handle._sites[0]
    query, key, value = (tiny.normal(1, 72, 2, 12, seed=i) for i in range(3))
    call = (query, key, value, None, site.id, [3, 4, 6, 0], None, 1)
    torch.library.opcheck(torch.ops.dit_sparse.attend.default, call)
