# SPDX-License-Identifier: Apache-2.0
"""Two processes with half the batch each make the update of one with all of it."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.distill import setup, two

ROUNDING = 1e-5  # of a tensor's largest value: four gradients are summed in another order


def launch(root, module, *arguments):
    """Run a module in two processes."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", "2", "-m", module, *map(str, arguments),
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command, cwd=root, env=env, check=True, timeout=240, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("way", two.WAYS)
def test_two_processes_make_the_update_of_one(tmp_path, root, way):
    one = two.start(tmp_path / "one", way, alone=True)
    one.run()
    wanted = setup.weights(one)
    launch(root, "tests.distill.two", tmp_path / "two", way)
    both = [load_file(tmp_path / "two" / f"process-{i}.safetensors") for i in (0, 1)]
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
        gap = float((both[0][key] - value).abs().max())
        squared = 2 if "/exp_avg_sq/" in key else 1  # a square has twice the relative error
        assert gap <= squared * ROUNDING * float(value.abs().max()), key
    losses = [(tmp_path / name / "log.csv").read_text().split()[1:] for name in ("one", "two")]
    for one_row, two_row in zip(*losses, strict=True):
        numbers = [[float(x) for x in row.split(",")] for row in (one_row, two_row)]
        assert numbers[1] == pytest.approx(numbers[0], rel=10 * ROUNDING)
