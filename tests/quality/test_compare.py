# SPDX-License-Identifier: Apache-2.0
"""``compare``: one pass, what it refuses, what it remarks; gates; latents."""

import json
import math
from importlib.metadata import version

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.quality import QualityInputError, compare, psnr, ssim
from dit_sparse.quality.catalogue import DEFAULT, FAMILIES, chosen, kinds
from dit_sparse.quality.gates import parse_gates
from dit_sparse.quality.pairs import Meter
from dit_sparse.quality.recording import write_exact
from tests.quality.conftest import moving, noisy

CHEAP = ["psnr", "ssim", "motion_ratio"]


def test_all_rows_are_those_of_the_single_functions():
    one, other = moving(), noisy(moving(), 12)
    found = compare(one, other, metrics=["psnr", "psnr_pooled", "ssim"])
    assert found.rows["psnr"] == psnr(one, other)
    assert found.rows["ssim"] == ssim(one, other)
    assert list(found.rows) == ["psnr", "psnr_pooled", "ssim"]


def test_clips_are_read_once_a_frame_at_a_time_and_meters_are_closed(monkeypatch):
    from dit_sparse.quality import catalogue

    seen, closed = [], []

    class Watching(Meter):
        def update(self, dense, sparse):
            seen.append((dense.shape, sparse.shape))

        def finish(self):
            return []

        def close(self):
            closed.append(True)

    family = catalogue.Family({"psnr_temporal": catalogue.Kind("x")}, lambda _: Watching())
    monkeypatch.setattr(catalogue, "FAMILIES", (*catalogue.FAMILIES, family))
    told = []
    compare(
        moving(),
        noisy(moving(), 5),
        metrics=["psnr_temporal"],
        watch=lambda done, total: told.append((done, total)),
    )
    assert seen == [((48, 64, 3), (48, 64, 3))] * 6
    assert closed == [True]
    assert told == [(i, 6) for i in range(1, 7)]


def test_meters_are_closed_after_an_exception(monkeypatch):
    from dit_sparse.quality import pixels, vmaf

    if vmaf.unavailable():
        pytest.skip(vmaf.unavailable())
    closed = []
    real = vmaf.Vmaf.close
    monkeypatch.setattr(vmaf.Vmaf, "close", lambda self: (closed.append(1), real(self)))

    def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(pixels.Psnr, "update", fail)
    with pytest.raises(RuntimeError, match="broken"):
        compare(moving(), moving(), metrics=["vmaf"])
    assert closed == [1]


@pytest.mark.parametrize(
    ("sparse", "words"),
    [
        (moving(5), ("has 6 frames", "has 5", "--align first")),
        (moving(6, 48, 60), ("is 64 x 48", "is 60 x 48", "never rescaled")),
    ],
)
def test_clips_that_do_not_fit(sparse, words):
    with pytest.raises(QualityInputError) as error:
        compare(moving(), sparse, metrics=CHEAP)
    for word in words:
        assert word in str(error.value)


def test_align_first_compares_what_both_have_and_says_so():
    one = moving(6)
    found = compare(one, noisy(one[:4], 9), metrics=CHEAP, align="first")
    assert found.rows["psnr"] == psnr(one[:4], noisy(one[:4], 9))
    assert found.settings["frames_compared"] == 4
    assert "have 6 and 4 frames; only the first 4" in found.notes[0]


def test_every_and_max_frames_are_recorded():
    one, other = moving(9), noisy(moving(9), 12)
    found = compare(one, other, metrics=CHEAP, every=3, max_frames=8)
    assert found.rows["ssim"].per_frame == ssim(one[:8:3], other[:8:3]).per_frame
    assert found.rows["psnr"].per_frame == psnr(one[:8], other[:8]).per_frame
    worst = found.rows["ssim"]
    assert worst.worst_frame == 3 * worst.per_frame.index(min(worst.per_frame))
    assert any("every 3th frame" in note for note in found.notes)
    assert any("first 8 of 9 frames" in note for note in found.notes)
    for bad in ({"every": 0}, {"max_frames": 0}):
        with pytest.raises(QualityInputError, match="must be >= 1"):
            compare(one, other, **bad)


def test_different_rates_are_remarked(tmp_path):
    write_exact(tmp_path / "a.mkv", moving(), 10)
    write_exact(tmp_path / "b.mkv", moving(), 12)
    found = compare(tmp_path / "a.mkv", tmp_path / "b.mkv", metrics=["psnr"])
    assert any("play at 10 and 12 frames per second" in note for note in found.notes)


def test_identical_output_is_a_remark_with_the_density():
    found = compare(moving(), moving(), metrics=["ssim"], context={"density": 0.25})
    assert found.notes[0] == (
        "Identical output: was the sparse path active? Its measured density was 0.250."
    )
    assert list(found.rows) == ["ssim"]
    half = moving()
    half[0] += 1
    assert "5 of 6 frames are identical." in compare(moving(), half, metrics=["ssim"]).notes


def test_huge_clips_need_a_yes():
    class Huge:
        pass

    from dit_sparse.quality.clips import Clip

    clip = Clip("film", 100_000, 1080, 1920, 24, "arrays", "", None, lambda: iter(()))
    with pytest.raises(QualityInputError, match=r"207\.4 gigapixels to compare, more than 8"):
        compare(clip, clip, metrics=["psnr"])


def test_tiny_frames_and_images_have_rows_that_do_not_apply():
    one = moving(1, 9, 9)
    found = compare(one, noisy(one, 9), metrics=["all"]).to_dict()["metrics"]
    assert found["psnr"]["status"] == "ok"
    for name in ("ssim", "ms_ssim", "lpips_alex", "lpips_vgg", "vmaf", "psnr_temporal"):
        assert found[name]["value"] is None
        assert found[name]["status"].startswith("n/a: ")
    assert "each side must have at least 31 pixels" in found["lpips_alex"]["status"]
    assert "at least 3 frames" in found["vmaf"]["status"]


def test_json_is_strict_and_every_row_has_a_definition():
    found = compare(moving(), noisy(moving(), 5), metrics=[*CHEAP, "lpips_vgg"]).to_dict()
    text = json.dumps(found, allow_nan=False)
    assert json.loads(text) == json.loads(json.dumps(found))
    for row in found["metrics"].values():
        assert row["definition"]
    assert found["schema_version"] == 1
    assert found["settings"]["versions"]["torch"] == version("torch")
    assert found["dense"]["kind"] == "arrays"


def test_names_of_rows_are_checked_before_any_work():
    with pytest.raises(
        QualityInputError, match="metric 'snr' is unknown; available metrics: all, psnr"
    ):
        compare("nowhere.mp4", "nowhere.mp4", metrics=["snr"])
    with pytest.raises(QualityInputError, match="compat 'x' is unknown; available: svg"):
        compare("nowhere.mp4", "nowhere.mp4", compat=["x"])
    assert set(DEFAULT) <= set(kinds())
    assert set(chosen(["all"])) == set(kinds())
    assert chosen(["ssim", "psnr"]) == ("psnr", "ssim")  # always in the report's order
    names = [name for family in FAMILIES for name in family.rows]
    assert len(names) == len(set(names))


def test_gates_are_bounds_that_pass_or_fail():
    one, other = moving(), noisy(moving(), 12)
    found = compare(one, other, metrics=CHEAP, gates=["psnr>=20, psnr.worst>=10", "ssim<=1"])
    assert found.passed
    value = found.rows["psnr"].value
    assert found.check(f"psnr>={value!r}")[0].passed  # the bound itself passes
    assert found.check(f"psnr<={value!r}")[0].passed
    (failed,) = found.check(f"psnr>={math.nextafter(value, 100)!r}")
    assert not failed.passed
    assert failed.found == value
    assert "FAILED" in str(failed)
    assert compare(one, other, metrics=CHEAP, gates=["psnr>=99"]).passed is False
    assert compare(one, other, metrics=CHEAP).passed is None


def test_a_gate_on_a_row_without_a_number_fails():
    one = moving(1)
    found = compare(one, one, metrics=CHEAP, gates=["motion_ratio>=0.5"])
    assert found.passed is False
    assert found.verdicts[0].reason == "requires at least 2 frames, but the clips have 1"


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("psnr>25", "must be METRIC>=NUMBER"),
        ("psnr>=lots", "must be METRIC>=NUMBER"),
        ("psnr>=nan", "must be METRIC>=NUMBER"),
        ("psnr=>3", "must be METRIC>=NUMBER"),
        (
            "vmaf>=80",
            "'vmaf' is not measured in this run; measured metrics: psnr, ssim, motion_ratio",
        ),
        ("psnr.best>=3", "'psnr.best' is not measured in this run"),
    ],
)
def test_gates_that_cannot_be_read(gate, words):
    with pytest.raises(QualityInputError, match=words.replace("[", r"\[")):
        compare("nowhere", "nowhere", metrics=CHEAP, gates=[gate])


@given(
    bound=st.floats(-1e6, 1e6),
    part=st.sampled_from(["", ".worst", ".median", ".spread", ".dense"]),
    sign=st.sampled_from([">=", "<="]),
)
def test_gates_are_read_as_they_are_written(bound, part, sign):
    text = f"vbench.temporal_flickering{part}{sign}{bound!r}"
    (gate,) = parse_gates([text], ["psnr", "vbench.temporal_flickering"])
    assert gate.metric == "vbench.temporal_flickering"
    assert gate.part == (part[1:] or "value")
    assert (gate.bound, gate.at_least) == (bound, sign == ">=")


def test_latents():
    one = torch.randn(1, 4, 2, 3, 3, dtype=torch.bfloat16)
    other = one.clone()
    other[0, 0, 0, 0, 0] += 1
    found = compare(
        moving(), moving(), metrics=["psnr"], latents=(one, other), gates=["latent_rel_l2<=0.5"]
    )
    gap = (other.double() - one.double()).norm() / one.double().norm()
    assert found.rows["latent_rel_l2"].value == pytest.approx(float(gap))
    bad = one.clone()
    bad[0, 0, 0, 0, 0] = math.nan
    for pair, words in (
        ((one, one[:, :2]), "must have the same shape"),
        ((one, bad), "1 values of the"),
    ):
        with pytest.raises(QualityInputError, match=words):
            compare(moving(), moving(), metrics=["psnr"], latents=pair)


def test_worst_follows_what_is_better():
    from dit_sparse.quality import Scores

    values = (0.5, 2.2, -3.0, 1.0)
    worst = {
        b: Scores("x", "", "", 1.0, values, better=b).worst for b in ("higher", "lower", "zero")
    }
    assert worst == {"higher": -3.0, "lower": 2.2, "zero": -3.0}
    ratios = Scores("x", "", "", 1.0, (0.4, 1.0, 2.2), better="one", first=1)
    assert (ratios.worst, ratios.worst_frame) == (0.4, 1)  # 1 / 0.4 is further than 2.2
    assert ratios.spread == pytest.approx(np.percentile((0.4, 1, 2.2), 90) - 0.52)


def test_equal_clips_have_the_best_value_of_every_row_that_can_be_measured_here():
    clip = moving(5, 192, 192)
    rows = compare(clip, clip, metrics=["all"]).rows
    assert set(rows) == set(kinds())
    measured = {name: row for name, row in rows.items() if row.ok}
    assert {"psnr", "ssim", "ms_ssim", "psnr_temporal", "motion_ratio"} <= set(measured)
    changed = compare(clip, noisy(clip, 9), metrics=["all"]).rows
    for name, row in measured.items():
        best = {"one": 1.0, "zero": 0.0, "lower": 0.0}
        if row.better in best:
            assert row.value == pytest.approx(best[row.better], abs=1e-6), name
        else:
            assert row.value > changed[name].value, name
