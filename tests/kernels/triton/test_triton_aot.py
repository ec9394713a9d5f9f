# SPDX-License-Identifier: Apache-2.0
"""What the compilers make of the kernels on chips that are not here: it must not get worse.

A row of ``docs/benchmarks/aot.json`` holds registers, spills, shared memory and matrix
instructions. A handful is compiled again in every run, and with ``-m slow`` every row whose
kernel, arguments, options or Triton are not those that the table was made with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from dit_sparse.kernels.triton_target import SHARED_MEMORY

ROOT = Path(__file__).parents[3]
FILE = ROOT / "docs" / "benchmarks" / "aot.json"
TABLE = json.loads(FILE.read_text())["rows"]
HANDFUL = (
    "forward/spread/bf16/128/128/sm_90",
    "forward/full/bf16/128/128/sm_90",
    "forward/uneven/bf16/72/128/sm_80",
    "forward/uneven/bf16/64/128/gfx942",
    "forward/spread/bf16/128/128/sm_100",
    "backward_key/uneven/bf16/64/128/sm_90",
    "hopper_specialized/uneven/bf16/128/128/sm_90",
    "mass/spread/bf16/128/128/sm_80",
    "kmeans_assign/spread/bf16/128/128/sm_90",
    "kmeans_sum/spread/bf16/128/128/sm_80",
)
MATRIX = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
KNOWN_SPILL = 640  # bytes; docs/benchmarks/notes.md has the reasons, row by row
SMALL_SPILL = 128  # bytes; plans with bit tiles and permutations may spill this much


@cache
def compiled(names: tuple[str, ...]):
    """Compile rows in a process of their own: this one's kernels may be the interpreter's."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "tests" / "kernels" / "triton" / "aot.py", *names],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def faults(name, row):
    """Say what is wrong with a row."""
    if "failed" in row:
        return [row["failed"]]
    kernel, plan, dtype, head_dim, _, target = name.split("/")
    found = []
    allowed = SMALL_SPILL if plan == "full" or kernel.startswith("backward") else 0
    if head_dim == "256" and (dtype == "fp32" or kernel.startswith("backward")):
        allowed = KNOWN_SPILL
    if row["spills"] > allowed:
        found.append(f"spills {row['spills']} bytes")
    if row["shared"] > SHARED_MEMORY[target]:
        found.append(f"{row['shared']} bytes of shared memory, {SHARED_MEMORY[target]} are there")
    multiplies = kernel not in {"delta", "kmeans_sum", "kmeans_mean"}
    if multiplies and dtype != "fp32" and not row[MATRIX[target]]:
        found.append(f"no {MATRIX[target]} instruction")
    if kernel == "hopper_specialized" and not row["setmaxnreg"]:
        found.append("warps are not specialized, without a word")
    if row.get("serialized"):
        found.append("wgmma is serialized")
    return found


def worse(name, new):
    """Compare a row with the committed one, which another version of Triton may have made."""
    old = TABLE[name]
    found = faults(name, new)
    if new.get("spills", 0) > old["spills"] + SMALL_SPILL // 2:
        found.append(f"spills {new['spills']} bytes, the table has {old['spills']}")
    return found


@pytest.mark.parametrize("name", TABLE)
def test_the_table_is_sound(name):
    assert faults(name, TABLE[name]) == []


def test_the_table_covers_every_target():
    assert {name.rsplit("/", 1)[1] for name in TABLE} == set(SHARED_MEMORY)
    assert set(HANDFUL) <= set(TABLE)


@pytest.mark.parametrize("name", HANDFUL)
def test_no_kernel_gets_worse(name):
    assert worse(name, compiled(HANDFUL)[name]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_no_row_gets_worse(name):
    assert worse(name, compiled(("changed", str(FILE)))[name]) == []


@pytest.mark.slow
def test_a_row_is_compiled_where_its_kernel_or_triton_changed(tmp_path):
    name = "kmeans_mean/spread/bf16/128/128/sm_80"
    other = "delta/spread/bf16/64/128/sm_80"
    rows = {
        name: {**TABLE[name], "registers": -1},
        other: {**TABLE[other], "registers": -1, "key": "of other source"},
    }
    for version, kept in ((json.loads(FILE.read_text())["triton"], {name}), ("0.1", set())):
        path = tmp_path / f"{version}.json"
        path.write_text(json.dumps({"triton": version, "rows": rows}))
        found = compiled(("changed", str(path)))
        assert {each for each, row in found.items() if row["registers"] < 0} == kept
