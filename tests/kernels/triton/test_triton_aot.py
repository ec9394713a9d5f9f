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
import torch

from dit_sparse.errors import KernelError
from dit_sparse.kernels import triton_target as choose
from dit_sparse.kernels.triton_target import SHARED_MEMORY

ROOT = Path(__file__).parents[3]
FILE = ROOT / "docs" / "benchmarks" / "aot.json"
TABLE = json.loads(FILE.read_text())["rows"]
HANDFUL = (
    "forward/uneven/bf16/128/128/sm_89",
    "forward/full/bf16/128/128/sm_90",
    "forward/uneven/bf16/64/128/gfx942",
    "backward_query/uneven/bf16/128/128/sm_80",
    "hopper_specialized/uneven/bf16/128/128/sm_90",
    "kmeans_assign/spread/bf16/128/128/sm_100",
)
MATRIX = {
    **dict.fromkeys(choose.AMPERE, "mma"),
    **dict.fromkeys(choose.CDNA, "mfma"),
    **dict.fromkeys(choose.RDNA, "wmma"),
    "sm_90": "wgmma",
    "sm_100": "tcgen05",
}
SLOWER = 1.15  # instructions of the forward pass's main loop over those of the yardstick
KNOWN_SPILL = 832  # bytes; docs/benchmarks/notes.md has the reasons, row by row
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
    wide_fp32 = dtype == "fp32" and (head_dim == "256" or target in choose.RDNA)
    if wide_fp32 or (kernel.startswith("backward") and (head_dim == "256" or target == "gfx1100")):
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
    if kernel.startswith("hopper") and not row["tma"]:
        found.append("no copy engine")
    if target in choose.AMPERE and multiplies and dtype != "fp32":
        found += [] if row["cp_async"] or row["stages"] == 1 else ["no asynchronous copy"]
        # P stays in registers where a tile has at least as many rows as a head has columns.
        tall = int(row["tile"].split("x")[kernel == "backward_key"]) >= int(head_dim)
        waits = (row.get("barriers"), row.get("stores"))
        if tall and kernel != "mass" and plan != "full" and waits != (2, 0):
            found.append("{} barriers, {} shared stores a tile".format(*waits))
    return found


def worse(name, new):
    """Compare a row with the committed one, which another version of Triton may have made."""
    old = TABLE[name]
    found = faults(name, new)
    if new.get("loop", 0) > 1.1 * old.get("loop", 0):
        found.append(f"{new['loop']} instructions in the main loop, the table has {old['loop']}")
    if new.get("spills", 0) > old["spills"] + SMALL_SPILL // 2:
        found.append(f"spills {new['spills']} bytes, the table has {old['spills']}")
    return found


@pytest.mark.parametrize("name", TABLE)
def test_the_table_is_sound(name):
    assert faults(name, TABLE[name]) == []


def test_the_table_covers_every_target():
    assert {name.rsplit("/", 1)[1] for name in TABLE} == set(SHARED_MEMORY)
    assert set(HANDFUL) <= set(TABLE)


@pytest.mark.parametrize("target", SHARED_MEMORY)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("plan", ["spread", "uneven"])
def test_the_main_loop_is_nearly_as_tight_as_a_dense_one(plan, head_dim, target):
    """Both at the same tile; where registers allow no loop of their own for whole tiles, masks."""
    row, dense = (
        TABLE[f"{kernel}/bf16/{head_dim}/128/{target}"]
        for kernel in (f"forward/{plan}", "dense/spread")
    )
    assert row["tile"] == dense["tile"]
    assert row["loop"] <= dense["loop"] * (SLOWER if target not in choose.RDNA else 1.45)


def test_kinds_of_gpus():
    """Each has a tiling of its own; what is too old or unknown is refused with the reason."""
    kinds = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_80", (8, 9): "sm_89", (9, 0): "sm_90"}
    kinds |= {(10, 0): "sm_100", (10, 3): "sm_100", (12, 0): "sm_120", (12, 1): "sm_120"}
    assert {each: choose.nvidia_target(*each) for each in kinds} == kinds
    amd = {"gfx90a:sramecc+:xnack-": "gfx90a", "gfx942": "gfx942", "gfx950:xnack-": "gfx950"}
    amd |= {"gfx1100": "gfx1100", "gfx1151": "gfx1100", "gfx1201": "gfx1201"}
    amd |= {"gfx906": "", "gfx1030": "", "gfx1250": ""}
    assert {each: choose.amd_target(each) for each in amd} == amd


def test_an_older_gpu_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(KernelError, match=r"needs compute capability 8.0 .* got 7.5"):
        choose.target_of(torch.device("cuda"))


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
