# SPDX-License-Identifier: Apache-2.0
"""What a search says of itself: sampled rows, their doubt, the model's name; and its entry."""

import json
import subprocess
import sys

import numpy as np
import pytest

import dit_sparse
from dit_sparse.profiler import Store, Wish
from dit_sparse.profiler.build import figures
from dit_sparse.profiler.table import Row
from dit_sparse.strategy import Strategy
from tests import tiny
from tests.profiler.test_run import CANDIDATES, HALVES, search


@pytest.fixture(scope="module")
def wan():
    pipe, args = tiny.wan()
    return tiny.stretch(pipe), args


def test_profile_stands_at_the_top_and_costs_no_import(wan, root):
    pipe, args = wan
    pipe.set_progress_bar_config(disable=True)
    found = dit_sparse.profile(
        pipe, [args], arguments={"num_inference_steps": 4}, candidates=CANDIDATES, bands=HALVES,
        wish=Wish(target=0.5), costs="assumed", check=False,
    )  # fmt: skip
    assert isinstance(found.strategy, Strategy)
    code = "import sys, dit_sparse; assert 'profile' in dir(dit_sparse); dit_sparse.enable; "
    code += "sys.exit(any(name.startswith('dit_sparse.profiler') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_sampled_rows_and_their_doubt_stand_in_the_receipt(wan, tmp_path):
    pipe, args = wan
    large = {**args, "height": 128, "width": 256}  # 384 tokens: a third is compared
    found = {}
    for sample in (0, 2):
        store = Store(tmp_path / str(sample))
        found[sample] = search(pipe, large, sample=sample, store=store)
        assert json.loads((store.folder / "setup.json").read_text())["sample"] == sample
    whole, some = (each.strategy.receipt.measured for each in found.values())
    assert "relative_error_doubt" not in whole
    assert 0 < some["relative_error_doubt"] < some["relative_error"]
    for key, row in found[2].rows.items():
        truth = found[0].rows[key]
        assert (row.doubt[:, 1:] > 0).all()
        assert np.array_equal(row.density, truth.density)
        assert (abs(row.error - truth.error) <= 8 * row.doubt + 1e-12).all()


def test_the_doubt_is_added_as_figures_says():
    """By hand: two layers of two heads, three steps each."""
    row = {
        "steps": 3, "density": np.ones((2, 2)), "computed": np.ones((2, 2)),
        "recall": np.ones((2, 2)), "power": np.ones(2), "ordered": (False, False),
        "partial": (0.0, 0.0),
    }  # fmt: skip
    errors = [np.array([[0.0, 0.04], [0.0, 0.09]]), np.array([[0.0, 0.01], [0.0, 0.02]])]
    doubts = [np.array([[0.0, 0.001], [0.0, 0.002]]), np.array([[0.0, 0.004], [0.0, 0.0]])]
    rows = {
        ("transformer", layer, 0): Row(error=error, doubt=doubt, **row)
        for layer, (error, doubt) in enumerate(zip(errors, doubts, strict=True))
    }
    found = figures(dict.fromkeys(rows, (1, 1)), rows)
    mean = (0.04 + 0.09 + 0.01 + 0.02) / 4
    spread = (0.003**2 + 0.004**2) ** 0.5 / 4
    assert found["relative_error"] == pytest.approx(mean**0.5, rel=1e-5)
    assert found["relative_error_doubt"] == pytest.approx(spread / (2 * mean**0.5), rel=1e-5)
    kept_dense = figures(dict.fromkeys(rows, (0, 0)), rows)
    assert "relative_error_doubt" not in kept_dense
