# SPDX-License-Identifier: Apache-2.0
"""The sweep over tilings runs, and no wrong or broken variant gets a time."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.kernels.triton_target import Tiling
from tests.kernels.triton import sweep

GOOD, WRONG, BROKEN = Tiling(32, 32, 4, 1), Tiling(16, 32, 4, 1), Tiling(32, 16, 4, 1)


def test_wrong_and_broken_variants_get_no_time(monkeypatch, capsys):
    attend = sweep.kernel.attend

    def sabotaged(query, key, value, plan, scale, tiling=None):
        if tiling == BROKEN:
            raise RuntimeError("out of resource\nmore")
        output, lse = attend(query, key, value, plan, scale, tiling)
        return (output.roll(1, 1) if tiling == WRONG else output), lse

    monkeypatch.setattr(sweep.kernel, "attend", sabotaged)
    monkeypatch.setattr(sweep, "variants", lambda case: [GOOD, WRONG, BROKEN])
    (case,) = sweep.SMOKE
    faults = sweep.compile_all(sweep.SMOKE, "cpu", 1)
    assert {tiling: fault for (_, tiling), fault in faults.items()} == {
        GOOD: None, WRONG: None, BROKEN: "out of resource"
    }  # fmt: skip
    rows = sweep.measure(case, torch.device("cpu"), faults)
    assert [row["default"] for row in rows] == [True, False, False, False]
    assert [row["fault"] for row in rows] == [
        None, None, "differs from the default tiling", "out of resource"
    ]  # fmt: skip
    for row in rows[:2]:
        assert row["efficiency"] == pytest.approx(row["dense_ms"] * row["density"] / row["ms"])
    assert not any("ms" in row for row in rows[2:])
    sweep.tell(rows)
    said = capsys.readouterr().out
    assert "default 64x32, 8 warps" in said
    assert "16x32" not in said


def test_variants_fit_their_block_and_hold_both_kernels():
    for case in sweep.CASES:
        found = sweep.variants(case)
        assert len(set(found)) == len(found)
        assert all(max(tiling.block_m, tiling.block_n) <= case.block for tiling in found)
        assert {tiling.copy_engine for tiling in found} == {False, True}
