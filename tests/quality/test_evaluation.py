# SPDX-License-Identifier: Apache-2.0
"""An evaluation: nothing is made twice, nothing of other settings is taken, numbers add up."""

import json
from dataclasses import replace
from statistics import median

import numpy as np
import pytest

from dit_sparse.quality import QualityInputError, find_weights, open_clip, psnr
from dit_sparse.quality.evaluation import Store, generate, measure, open_store
from dit_sparse.quality.evaluation_setup import FLOOR, Made, Setup
from dit_sparse.quality.report import write_evaluation
from dit_sparse.quality.summary import Pair, summarise
from tests.quality.conftest import moving, noisy
from tests.quality.test_perceptual import drawn
from tests.quality.test_report import Page

SETUP = Setup(
    model="a model",
    prompts=("a cat", "a <b>dog</b>"),
    seeds=(0, 7),
    strategies={"half": {"method": "radial"}, "third": {"method": "x"}},
    call={"steps": 4, "height": 40},
    fps=8.0,
    floor="SDPA math",
    metrics=("psnr", "ssim", "lpips_alex", "motion_ratio"),
)
NOISE = {"dense": 0, "floor": 1, "half": 12, "third": 25}
SECONDS = {"dense": 6.0, "floor": 9.0, "half": 4.0, "third": 3.0}


class Fake:
    """Makes clips whose noise is known, and counts them."""

    def __init__(self, fail_after=None):
        self.made, self.fail_after = [], fail_after

    def __call__(self, arm, prompt, seed):
        if len(self.made) == self.fail_after:
            raise KeyboardInterrupt
        self.made.append((arm, prompt, seed))
        clip = moving(3, 32, 40, seed=seed + len(prompt))
        if NOISE[arm]:
            clip = noisy(clip, NOISE[arm] + seed, seed)
        facts = {"seconds": SECONDS[arm] + seed, "density": NOISE[arm] / 50, "reasons": {}}
        return Made(clip, facts)


def run(root, setup=SETUP, fake=None, **options):
    place = open_store(root, setup, fresh=options.get("fresh", False))
    fake = fake or Fake()
    list(generate(setup, place, fake, setup.jobs()))
    return place, fake


def pairs(setup, place):
    return {
        arm: [
            Pair(job, f"pairs/{job.key}/vs-{arm}/report.html", measure(setup, place, job, arm))
            for job in setup.jobs()
        ]
        for arm in setup.arms
        if arm != "dense"
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    place, _ = run(root)
    return root, place, pairs(SETUP, place)


def test_every_clip_is_made_once_dense_first(tmp_path):
    place, fake = run(tmp_path)
    assert len(fake.made) == len(set(fake.made)) == 2 * 2 * 4
    assert [arm for arm, _, _ in fake.made[:4]] == ["dense", "floor", "half", "third"]
    clip = open_clip(place.folder(SETUP.jobs()[0]) / "half.mkv")
    wanted = noisy(moving(3, 32, 40, seed=5), 12, 0)
    np.testing.assert_array_equal(np.stack(list(clip.read())), wanted)
    _, again = run(tmp_path)
    assert again.made == []


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    first = Fake(fail_after=6)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fake=first)
    _, second = run(tmp_path)
    assert len(first.made) == 6
    assert len(second.made) == 10
    assert not set(first.made) & set(second.made)


@pytest.mark.parametrize("damage", ["clip", "facts", "missing"])
def test_a_damaged_clip_is_made_anew(tmp_path, damage):
    place, _ = run(tmp_path)
    folder = place.folder(SETUP.jobs()[1])
    if damage == "clip":
        (folder / "half.mkv").write_bytes(b"broken")
    elif damage == "facts":
        (folder / "half.json").write_text('{"fingerprint": ')
    else:
        (folder / "half.mkv").unlink()
    _, again = run(tmp_path)
    assert again.made == [("half", "a cat", 7)]


def test_more_strategies_and_seeds_reuse_what_is_there(tmp_path):
    small = replace(SETUP, strategies={"half": SETUP.strategies["half"]}, seeds=(0,))
    run(tmp_path, small)
    _, more = run(tmp_path)
    assert len(more.made) == 16 - 6
    assert ("dense", "a cat", 0) not in more.made
    changed = replace(SETUP, strategies={**SETUP.strategies, "half": {"method": "svg"}})
    _, again = run(tmp_path, changed)
    assert {arm for arm, _, _ in again.made} == {"half"}
    assert len(again.made) == 4


def test_other_settings_are_refused_or_made_anew(tmp_path):
    run(tmp_path)
    other = replace(SETUP, call={"steps": 5, "height": 40})
    with pytest.raises(QualityInputError, match=r"call\.steps: 4, now 5; restore .*--fresh"):
        run(tmp_path, other)
    _, anew = run(tmp_path, other, fresh=True)
    assert len(anew.made) == 16
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(QualityInputError, match=r"evaluation\.json: cannot be read"):
        run(tmp_path, other)


def test_prompts_that_changed_places_are_not_mixed_up(tmp_path):
    run(tmp_path)
    turned = replace(SETUP, prompts=SETUP.prompts[::-1])
    _, again = run(tmp_path, turned)
    assert len(again.made) == 16


def test_jobs_split_over_processes_cover_everything_once(tmp_path):
    place = open_store(tmp_path, SETUP)
    fakes = [Fake() for _ in range(3)]
    for rank, fake in enumerate(fakes):
        list(generate(SETUP, place, fake, SETUP.jobs()[rank::3]))
    made = [clip for fake in fakes for clip in fake.made]
    assert len(made) == len(set(made)) == 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": ()}, "prompts: at least one is required"),
        ({"seeds": (1, 1)}, "seeds: duplicate value '1'"),
        ({"strategies": {}}, "strategies: at least one is required"),
        ({"strategies": {"dense": {}}}, "must not be 'dense' or 'floor'"),
        ({"strategies": {"a/b": {}}}, "its name is used as a file name"),
    ],
)
def test_setups_that_make_no_sense(change, words):
    with pytest.raises(QualityInputError, match=words):
        replace(SETUP, **change)


def test_a_pair_is_measured_from_its_lossless_files(done):
    root, place, found = done
    pair = found["third"][1]
    folder = place.folder(pair.job)
    clips = [list(open_clip(folder / f"{arm}.mkv").read()) for arm in ("dense", "third")]
    assert pair.value("psnr") == psnr(*clips).value
    assert pair.found["context"]["speedup"] == pytest.approx((6 + 7) / (3 + 7))
    assert not pair.found["notes"]
    assert (root / pair.page).is_file()


def test_measuring_again_reads_what_is_there_until_something_changes(done, monkeypatch):
    from dit_sparse.quality import evaluation

    _, place, found = done
    calls = []
    real = evaluation.compare
    monkeypatch.setattr(evaluation, "compare", lambda *a, **k: calls.append(1) or real(*a, **k))
    job = SETUP.jobs()[0]
    assert measure(SETUP, place, job, "half") == found["half"][0].found
    assert not calls
    measure(replace(SETUP, metrics=("psnr",)), place, job, "half")
    assert calls == [1]
    measure(SETUP, place, job, "half")


def test_a_row_that_lacked_something_is_measured_once_it_is_there(tmp_path, monkeypatch):
    from dit_sparse.quality import catalogue, evaluation

    place, _ = run(tmp_path)
    job = SETUP.jobs()[0]
    with monkeypatch.context() as patched:
        patched.setattr(catalogue, "find_weights", lambda net, file=None: f"no {net} here")
        skipped = measure(SETUP, place, job, "half")["metrics"]["lpips_alex"]
        assert skipped["status"] == "skipped: no alex here"
        calls = []
        patched.setattr(evaluation, "compare", lambda *a, **k: calls.append(1))
        measure(SETUP, place, job, "half")  # it still lacks it
        assert not calls
    weights = find_weights("alex", drawn("alex", tmp_path)[0])
    monkeypatch.setattr(catalogue, "find_weights", lambda net, file=None: weights)
    again = measure(SETUP, place, job, "half")["metrics"]["lpips_alex"]
    assert again["status"] == "ok"
    assert again["value"] > 0


def test_the_summary_is_medians_and_worst_pairs(done):
    _, _, found = done
    gates = ["psnr>=10", "psnr.worst>=20", "motion_ratio<=90"]
    summary = summarise(SETUP, found, gates)
    assert [arm.label for arm in summary.arms] == ["half", "third"]
    for arm in summary.arms:
        values = [pair.value("psnr") for pair in found[arm.label]]
        assert arm.rows["psnr"].value == median(values)
        assert arm.rows["psnr"].worst == min(values)
        assert [p.value("psnr") for p in arm.pairs] == sorted(values)
        speeds = [(6 + s) / (SECONDS[arm.label] + s) for s in (0, 7, 0, 7)]
        assert arm.speedup == pytest.approx((median(speeds), min(speeds), max(speeds)))
        assert arm.density == NOISE[arm.label] / 50
    assert [v.passed for v in summary.arms[0].verdicts] == [True, True, True]
    assert [v.passed for v in summary.arms[1].verdicts] == [True, False, True]
    assert summary.passed is False
    assert summarise(SETUP, found).passed is None
    assert summary.floor.rows["psnr"].value > 30
    assert "4 pairs only" in summary.notes[0]
    told = summary.to_dict()
    json.dumps(told, allow_nan=False)
    assert told["results"]["half"]["metrics"]["psnr"]["per_pair"]
    assert len(told["results"]["half"]["pairs"]) == 4


def test_the_summary_says_what_makes_numbers_worthless(done):
    _, _, found = done
    same = {**found, "half": found[FLOOR], FLOOR: found["half"]}
    notes = " ".join(summarise(SETUP, same).notes)
    assert "half is as close to the dense clips as a second dense run" in notes
    equal = json.loads(json.dumps(found["half"][0].found))
    equal["metrics"]["psnr"]["value"] = 100
    equal["context"]["stayed_dense"] = {"the mask is not understood": 3}
    alike = [Pair(p.job, p.page, equal) for p in found["half"]]
    notes = " ".join(summarise(SETUP, {**found, "half": alike, FLOOR: alike}).notes)
    assert "half: 4 of 4 clips are identical to the dense clips" in notes
    assert "stayed dense: the mask is not understood" in notes
    assert "gives no bound" in notes


def test_a_busy_machine_is_said(done):
    _, _, found = done
    busy = replace(SETUP, call={**SETUP.call, "device": "cpu"})
    told = json.loads(json.dumps(found["half"][0].found))
    told["context"] |= {"speedup": 0.8, "speedup_processor": 1.25}
    half = [Pair(pair.job, pair.page, told) for pair in found["half"]]
    notes = summarise(busy, {**found, "half": half}).notes
    assert any("half: by CPU time the speed-up is 1.25x, not 0.80x" in n for n in notes)
    told["context"]["speedup_processor"] = 0.81
    assert not any("busy" in n for n in summarise(busy, {**found, "half": half}).notes)


def test_a_row_that_one_pair_lacks_has_no_median(done):
    _, _, found = done
    broken = json.loads(json.dumps(found["half"][2].found))
    broken["metrics"]["ssim"] |= {"value": None, "status": "error: ffmpeg died"}
    half = [*found["half"][:2], Pair(found["half"][2].job, "x", broken), found["half"][3]]
    arm = summarise(SETUP, {**found, "half": half}, ["ssim>=0"]).arms[0]
    assert (arm.rows["ssim"].status, arm.rows["ssim"].reason) == ("error", "ffmpeg died")
    assert arm.passed is False


def test_the_page(done):
    root, _, found = done
    files = write_evaluation(summarise(SETUP, found, ["psnr>=10"]), root)
    assert files == ["report.html", "report.json", "report.md"]
    text = (root / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    words = " ".join(page.words)
    assert "PASS" in words
    assert "2 prompts x 2 seeds = 4 pairs" in words
    assert "noise floor: SDPA math" in words
    assert "a <b>dog</b>" in words
    assert page.tags.count("video") == 4
    links = [a for a in page.addresses if not a.startswith("data:")]
    assert len(links) == 4 + 8
    assert all((root / link).is_file() for link in links)
    assert "half" in (root / "report.md").read_text()


def test_images_too(tmp_path):
    setup = replace(SETUP, prompts=("a cat",), seeds=(0,))

    class Image(Fake):
        def __call__(self, arm, prompt, seed):
            made = super().__call__(arm, prompt, seed)
            return Made(made.frames[:1], made.facts)

    place, _ = run(tmp_path, setup, Image())
    assert (place.folder(setup.jobs()[0]) / "half.png").is_file()
    write_evaluation(summarise(setup, pairs(setup, place)), tmp_path)
    assert "video" not in Page((tmp_path / "report.html").read_text(encoding="utf-8")).tags


def test_a_store_knows_nothing_of_what_was_not_finished(tmp_path):
    place = Store(tmp_path)
    job = SETUP.jobs()[0]
    assert place.done(SETUP, "dense", job) is None
    with pytest.raises(QualityInputError, match="has no finished dense clip"):
        measure(SETUP, place, job, "half")
