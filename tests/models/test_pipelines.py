# SPDX-License-Identifier: Apache-2.0
"""Pipelines around models of the table: steps, guidance branches, grid, and what is left."""

from __future__ import annotations

import pytest
import torch

import dit_sparse
from dit_sparse.pipelines.table import PIPED
from tests.models.builders import CASES
from tests.models.pipes import PIPES, build
from tests.models.test_contract import GNA
from tests.tiny import STEPS, run

# Mochi asks for autocast in float32, and torch says that there is none; guiders are new.
pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore:Guiders are currently:UserWarning"),
]


def test_the_table_names_these():
    assert {pipe.case for pipe in PIPES} == PIPED


@pytest.mark.parametrize("pipe", PIPES, ids=lambda pipe: pipe.name)
def test_a_pipeline_runs_sparse(pipe):
    made, case = build(pipe), CASES[pipe.case]
    stock = run(made, pipe.args)
    grids = set()
    with dit_sparse.sparse_attention(made, "gna", strict=True, **GNA) as handle:
        handle.watch = lambda call, *_: grids.add(call.grid)
        sparse = run(made, pipe.args)
        report = handle.report()
    assert sparse.isfinite().all()
    assert not torch.equal(sparse, stock)
    assert torch.equal(run(made, pipe.args), stock)
    places = {(row["step"], row["branch"], row["layer"]) for row in report.rows}
    wanted = [
        (step, branch, layer)
        for step in range(STEPS)
        for branch in pipe.branches
        for layer in range(case.layers)
    ]
    assert places == set(wanted)
    assert len(report.rows) == len(wanted)
    assert {(grid.frames, grid.height, grid.width) for grid in grids} == {case.grid}
    text = case.text if pipe.text is None else pipe.text
    assert max(grid.text_length for grid in grids) == (text or max(case.texts, default=0))
    assert 0 < report.density < 1
