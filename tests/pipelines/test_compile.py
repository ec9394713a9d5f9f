# SPDX-License-Identifier: Apache-2.0
"""A compiled transformer stays as many graphs as the stock one, and computes the same."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

import dit_sparse
from tests import tiny

OPTIONS = {
    "radial": {"form": "paper", "decay_factor": 0.3, "block_size": 8},
    "adaspa": {"density": 0.4, "block_size": 8, "search_steps": (0.0, 0.5)},
}
FAMILIES = ["wan", "hunyuan_video_guided", "cogvideox_1.5", "flux", "pixart_sigma"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def places(handle):
    return [(row["step"], row["layer"], row["branch"]) for row in handle.report().rows]


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(OPTIONS))
@pytest.mark.parametrize("name", FAMILIES)
def test_whole_model_is_one_graph(name, method):
    pipe, args = tiny.PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    with dit_sparse.sparse_attention(pipe, method, strict=True, **OPTIONS[method]) as handle:
        eager, wanted = tiny.run(pipe, args), places(handle)
    stock = pipe.transformer
    pipe.transformer = torch.compile(stock, backend="aot_eager", fullgraph=True)
    with dit_sparse.sparse_attention(pipe, method, strict=True, **OPTIONS[method]) as handle:
        compiled = tiny.run(pipe, args)
        assert places(handle) == wanted
        assert handle.report().sparse_rows
    assert graphs() == 1
    assert torch.allclose(compiled, eager, rtol=0, atol=1e-5 * eager.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "hunyuan_video_guided", "flux"])
def test_regional_compilation_needs_no_graph_more(name):
    counts = []
    for sparse in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        pipe, args = tiny.wan(layers=12) if name == "wan" else tiny.PIPELINES[name]()
        pipe.set_progress_bar_config(disable=True)
        pipe.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        if sparse:
            pipe.enable_sparse_attention("adaspa", strict=True, **OPTIONS["adaspa"])
        assert tiny.run(pipe, args).isfinite().all()
        counts.append(graphs())
    assert counts[1] == counts[0]


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
