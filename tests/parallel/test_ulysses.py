# SPDX-License-Identifier: Apache-2.0
"""Several processes that share a model give what one gives, with the same strategy."""

import json
import subprocess
import sys

import pytest

from tests.parallel.cases import CASES, FOUR, MORE

# Of the largest value; dense attention itself differs by 1.1e-7 between four processes and one.
ROUNDING = 1e-6

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")


def run(processes, root):
    command = [sys.executable, "-m", "tests.parallel.run", "--json", str(processes)]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {row["case"]: row for row in json.loads(done.stdout.splitlines()[-1])}


@pytest.fixture(scope="module")
def two(root):
    return run(2, root)


@pytest.fixture(scope="module")
def four(root):
    return run(4, root)


def holds(row):
    if "largest" in row:
        assert row["relative"] < ROUNDING, f"largest difference {row['largest']:.1e}"
        # What one process computes is not dense: a wrong head would show.
        assert row.get("sparse_moves", 1) > 1000 * ROUNDING


@pytest.mark.parametrize("case", [*CASES, *MORE])
def test_two_processes_give_what_one_gives(two, case):
    holds(two[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR)
def test_four_processes_give_what_one_gives(four, case):
    holds(four[case])
