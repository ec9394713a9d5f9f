# SPDX-License-Identifier: Apache-2.0
"""Every method on every family's real tiny pipeline: one test a cell of docs/conformance.md.

A cell runs the pipeline sparse, twice, and dense again. To write the table anew after a method or
a pipeline was added: ``python -m tests.pipelines.test_conformance``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dit_sparse import sparse_attention
from dit_sparse.inspect import kept_keys
from dit_sparse.methods import method_class
from tests import tiny
from tests.pipelines.test_families import SPARSE

TABLE = Path(__file__).parents[2] / "docs" / "conformance.md"
# What a method asks of the operations in a run of 4 steps, per layer and guidance pass, with the
# params of SPARSE: "pooled" chooses anew on every second step, "adaspa" searches on two, ...
ASKS = {
    "adaspa": ("block_mass", 2),
    "blade": ("tile_maximum", 4),
    "pooled": ("pooled_scores", 2),
    "sparsed": ("block_mass", 1),
    "svg2": ("kmeans", 8),  # queries and keys on each
    "xattention": ("antidiagonal", 4),
}

TITLE = """# Conformance: every method on every family

Each cell is a test (`tests/pipelines/test_conformance.py`) that runs the real Diffusers pipeline
at tiny size with random weights. It checks that

- the latents are finite, the same for the same seed, and different from dense;
- the reported density of every call equals a count of kept (query, key) tokens;
- static plans are built once, and dynamic ones on the steps of their schedule;
- the method's state is freed when the generation ends;
- after disabling, the latents are bit-identical to those of the unmodified pipeline.

Tests with random weights say nothing about quality.

"""


def table():
    """Render the page: a row for each method, a column for each pipeline."""
    columns = sorted(tiny.PIPELINES)
    rows = [["method", *columns], ["---"] * (len(columns) + 1)]
    rows += [[f"`{name}`", *["yes"] * len(columns)] for name in sorted(SPARSE)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return TITLE + "\n".join(lines) + "\n"


def test_the_table_has_every_cell():
    assert TABLE.read_text(encoding="utf-8") == table()


@pytest.fixture(scope="module", params=sorted(tiny.PIPELINES))
def family(request):
    """Build each pipeline once, with what it gives unmodified."""
    pipe, args = tiny.PIPELINES[request.param]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, args, tiny.run(pipe, args)


def graph(pipe):
    """Fingerprint all that attaching touches: classes, attributes and hooks of every module."""
    found = {}
    for stage in ("transformer", "transformer_2"):
        model = getattr(pipe, stage, None)
        for path, module in model.named_modules() if model is not None else ():
            processor = getattr(module, "processor", None)
            found[stage, path] = (
                type(module),
                id(processor),
                type(processor),
                frozenset(module.__dict__),
                len(module._forward_pre_hooks),
                len(module._forward_hooks),
            )
    return found


@pytest.mark.parametrize("method", sorted(SPARSE))
def test_cell(family, method):
    pipe, args, stock = family
    before = graph(pipe)
    plans, counts, calls, asked = [], {}, set(), []

    def watch(call, plan, name):
        assert name == method
        place = (call.stage, call.layer, call.branch)
        calls.add(place)
        if plan is not None:
            plans.append(plan)  # held, so that its id stays taken
            share = torch.tensor(
                [
                    [counted(counts, plan, call, b, h) for h in range(call.query.shape[2])]
                    for b in range(call.query.shape[0])
                ]
            )
            expected.append((*place, call.step, share.mean(0)))

    expected = []
    with sparse_attention(pipe, method, strict=True, **SPARSE[method]) as handle:
        assert graph(pipe) != before
        if method in ASKS:
            real = getattr(handle.backends, ASKS[method][0])
            setattr(
                handle.backends,
                ASKS[method][0],
                lambda *a, **k: (asked.append(1), real(*a, **k))[1],
            )
        handle.watch = watch
        ours = tiny.run(pipe, args)
        records = {(r.stage, r.layer, r.branch, r.step): r.parts for r in handle.records}
        assert not handle.memory.states  # freed
        times, handle.watch = len(asked), None
        built = geometry(handle)
        assert torch.equal(tiny.run(pipe, args), ours)
        if method_class(
            method
        ).static:  # built once for the geometry, for all layers, steps and generations
            assert built
            assert geometry(handle) == built
    assert graph(pipe) == before
    assert pipe.sparse_attention is None
    assert torch.equal(tiny.run(pipe, args), stock)
    assert ours.isfinite().all()
    assert not torch.equal(ours, stock)
    assert expected
    assert any(float(density.min()) < 1 for *_, density in expected)
    for stage, layer, branch, step, density in expected:
        (part,) = records[stage, layer, branch, step]
        told = torch.as_tensor(part.density).expand(len(density))
        torch.testing.assert_close(told.float(), density.float(), rtol=1e-5, atol=1e-6)
    if method in ASKS and len({place[0] for place in calls}) == 1:  # one transformer, all steps
        assert times == ASKS[method][1] * len(calls)


def geometry(handle):
    """What is kept for the geometry, by identity; a layout of valid keys follows the prompt."""
    shared = handle.memory.shared
    return {key: id(value) for key, value in shared.items() if "key_layout" not in key}


def counted(known, plan, call, i_batch, i_head):
    """Share kept of the pairs that dense attention has, counted token by token."""
    key = (id(plan), i_batch % plan.batch, i_head % plan.heads, valid_text(call, i_batch))
    if key not in known:
        tokens = call.grid.tokens
        mask = kept_keys(plan, i_batch, i_head, range(tokens))
        living = tokens - call.grid.text_length + key[3]
        pairs = int(mask.sum()) + (read_as_means(plan, mask, i_batch, i_head) if plan.means else 0)
        known[key] = (plan, pairs / (tokens * living))  # the plan: its id stays taken
    return known[key][1]


def read_as_means(plan, mask, i_batch, i_head):
    """Pairs of a query token and a key block of which it reads no token."""

    def own(tensor):
        return tensor[i_batch % tensor.shape[0], i_head % tensor.shape[1]]

    order = (
        torch.arange(mask.shape[1]) if plan.kv_permutation is None else own(plan.kv_permutation)
    )
    blocks = zip(own(plan.kv.starts).tolist(), own(plan.kv.lengths).tolist(), strict=True)
    return sum(
        int((~mask[:, order[start : start + length]].any(1)).sum())
        for start, length in blocks
        if length
    )


def valid_text(call, i_batch):
    """How many text tokens of a sample are no padding."""
    return call.grid.text_length if call.text_valid is None else int(call.text_valid[i_batch])


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
