# SPDX-License-Identifier: Apache-2.0
"""Two processes with half the batch each make the update of one with all of it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.distill import setup, two

# Two right runs differ by rounding, and a value near 0 by a large part of itself. How much is
# measured: a stable computation is rounded as if its weights were (Higham, "Accuracy and Stability
# of Numerical Algorithms", 1.5), so a run with shaken weights has the error of one rounding, and
# a pass there and back through two layers has a few dozen operations in a row.
ROUNDINGS = 32

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="processes are forked"),
]


@pytest.fixture(scope="module")
def pairs(root, tmp_path_factory):
    """Train in two processes in every way; give the folders."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [
        {
            "script": str(root / "tests" / "distill" / "two.py"),
            "arguments": [str(folder / way), way],
            "processes": 2,
            "told": str(folder / f"{way}.told"),
        }
        for way in two.WAYS
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, "-m", "tests.parallel.launch", folder / "jobs.json"]
    env = {**os.environ, "PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [*command, "tests.distill.two", "peft"], cwd=root, env=env, check=True, timeout=900
    )
    return folder


def trained(folder, way, *, shaken=False):
    """Train in one process; give what it has trained, and its losses."""
    one = two.start(folder, way, alone=True, shaken=shaken)
    one.run()
    return one, setup.weights(one), losses(folder)


def losses(folder):
    rows = (folder / "log.csv").read_text().split()[1:]
    return torch.tensor([[float(x) for x in row.split(",")] for row in rows], dtype=torch.float64)


def allowed(shaken, value):
    """What rounding the weights makes of a value, and rounding the value itself."""
    own = torch.finfo(torch.float32).eps * value.abs()
    return ROUNDINGS * ((shaken - value).abs() + own)


@pytest.mark.parametrize("way", two.WAYS)
def test_two_processes_make_the_update_of_one(tmp_path, pairs, way):
    one, wanted, log = trained(tmp_path / "one", way)
    _, shaken, shaken_log = trained(tmp_path / "shaken", way, shaken=True)
    said = "".join((pairs / f"{way}.told.{i}").read_text()[-2000:] for i in (0, 1))
    files = [pairs / way / f"process-{i}.safetensors" for i in (0, 1)]
    assert all(file.is_file() for file in files), said
    both = [load_file(file) for file in files]
    parts = [int(each.pop("held")) for each in both]
    total = two.held(one.networks.models["teacher"])
    if way == "whole":
        assert parts == [total, total]
    else:  # the first process has the odd rows
        assert sum(parts) == total
        assert max(parts) < 0.55 * total
    assert wanted.keys() == both[0].keys() == both[1].keys()
    for key, value in wanted.items():
        assert torch.equal(both[0][key], both[1][key]), key
        gap = (both[0][key] - value).abs().max()
        assert gap <= allowed(shaken[key], value).max(), key
    assert ((losses(pairs / way) - log).abs() <= allowed(shaken_log, log).max(0).values).all()
