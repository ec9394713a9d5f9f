# SPDX-License-Identifier: Apache-2.0
"""The search from end to end on real pipelines of tiny size, its store, and kills."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import dit_sparse
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.profiler import Bands, ProfileError, Store, Wish, profile
from dit_sparse.profiler.build import rules_of
from dit_sparse.profiler.candidates import Candidate, parse_candidates, resolve
from dit_sparse.profiler.table import sum_up
from dit_sparse.strategy import Strategy
from tests import tiny

CANDIDATES = "pooled:block_size=8:density=0.25,adaspa:density=0.4:block_size=8"
HALVES = Bands((0.0, 0.5, 1.0))


def search(pipe, args, **changes):
    pipe.set_progress_bar_config(disable=True)
    call = {
        "arguments": {"num_inference_steps": 6},
        "candidates": CANDIDATES,
        "bands": HALVES,
        "wish": Wish(target=0.5),
        "costs": "assumed",
        "check": False,
        **changes,
    }
    return profile(pipe, [args], **call)


@pytest.fixture(scope="module")
def wan():
    pipe, args = tiny.wan()
    return tiny.stretch(pipe), args


@pytest.fixture(scope="module")
def found(wan):
    return search(*wan, check=True)


def test_bands_and_captures():
    bands = Bands((0.0, 0.5, 1.0), captures=3)
    assert bands.steps(7) == [range(4), range(4, 7)]
    assert bands.captured(7) == {0: 0, 1: 0, 3: 0, 4: 1, 5: 1, 6: 1}
    assert Bands((0, 1)).captured(20) == {0: 0, 10: 0}
    assert Bands((0, 0.01, 1)).captured(3) == {0: 1, 2: 1}  # the first band has no step


@pytest.mark.parametrize("edges", [(0.0,), (0.0, 0.5), (0.1, 1.0), (0.0, 0.7, 0.3, 1.0), ()])
def test_bad_bands_are_refused(edges):
    with pytest.raises(ProfileError, match="bands"):
        Bands(edges)
    with pytest.raises(ProfileError, match="captures"):
        Bands((0.0, 1.0), captures=1)


@pytest.mark.parametrize(
    "wish",
    [{"target": -0.1}, {"target": 1.5}, {"target": float("nan")}, {"budget": 0.0},
     {"budget": 2.0}, {"target": 0.1, "budget": 0.5}, {"weight": -1.0}, {"epsilon": 0.0}],
)  # fmt: skip
def test_bad_wishes_are_refused(wish):
    with pytest.raises(ProfileError):
        Wish(**wish)


def test_the_strategy_is_whole_runs_and_reads_back(found, wan, tmp_path):
    pipe, args = wan
    strategy = found.strategy
    assert strategy.rules
    strategy.save(tmp_path / "s.json")
    assert Strategy.load(tmp_path / "s.json") == strategy
    with dit_sparse.enable(pipe, strategy) as handle:
        tiny.run(pipe, args, num_inference_steps=6)
        report = handle.report()
    assert not report.reasons
    assert report.sparse_rows
    # The table's density counts a search as 1, as the report does; captured steps stand for all.
    assert report.density == pytest.approx(strategy.receipt.measured["density"], abs=0.02)


def test_the_receipt_says_what_was_measured(found):
    receipt = found.strategy.receipt
    assert receipt.seeds == (0,)
    wanted = {"relative_error", "density", "predicted_attention_speedup"}
    wanted |= {"measured_attention_speedup", "latents_relative_error"}
    assert wanted <= set(receipt.measured)
    assert 0 < receipt.measured["relative_error"] <= 0.5
    assert 0 < receipt.measured["latents_relative_error"] < 1
    assert "assumed" in receipt.note
    assert found.strategy.grid.model_dump() == {"frames": 3, "height": 4, "width": 6, "text": 0}


def test_choices_are_told_by_the_rules(found):
    """Each head of each layer at each step has the method that the table says."""
    steps = 6
    for (stage, layer, band), chosen in found.choices.items():
        for step in HALVES.steps(steps)[band]:
            groups = found.strategy.assign(layer, step, steps, stage, 2, 2)
            for group in groups:
                for head in group.heads:
                    column = chosen[head]
                    wanted = None if column == 0 else found.candidates[column - 1].instance
                    assert group.method == wanted


def test_rules_say_the_table_and_nothing_else():
    """A head that is dense in one band must not inherit the rule of another."""
    options = resolve(parse_candidates("pooled:density=0.25,radial"), LatentsGrid(9, 16, 16))
    bands, draw = Bands((0.0, 0.3, 0.5, 1.0)), np.random.default_rng(5)
    choices = {
        ("transformer", layer, band): tuple(map(int, draw.integers(0, len(options) + 1, 3)))
        for layer in range(4)
        for band in range(3)
    }
    strategy = Strategy(name="x", rules=rules_of(choices, options, bands))
    for (stage, layer, band), chosen in choices.items():
        for step in bands.steps(10)[band]:
            for group in strategy.assign(layer, step, 10, stage, 3, 4):
                for head in group.heads:
                    column = chosen[head]
                    wanted = None if column == 0 else options[column - 1].instance
                    assert group.method == wanted


def test_the_pipeline_is_untouched(wan):
    pipe, args = wan
    before = tiny.run(pipe, args)
    search(pipe, args)
    assert torch.equal(tiny.run(pipe, args), before)
    assert dit_sparse.current(pipe) is None


def test_a_tighter_target_and_the_papers_rule(wan, tmp_path):
    store = Store(tmp_path / "store")
    wishes = (Wish(target=0.0), Wish(target=1.0), Wish(budget=0.9), Wish(rule="sparse-vdit"))
    units = [search(*wan, wish=wish, store=store) for wish in wishes]
    dense, loose, budget, paper = (each.strategy for each in units)
    assert dense.rules == ()
    assert loose.receipt.measured["density"] < 1
    assert budget.receipt.measured["predicted_attention_speedup"] >= 1 / 0.9 - 1e-3
    assert paper.rules
    for key, row in units[3].rows.items():
        total = np.sqrt(row.error[:, 1:]) + 0.5 * row.density[:, 1:]
        best = [0 if line.min() > 1 else 1 + int(line.argmin()) for line in total]
        assert units[3].choices[key] == tuple(best)


def test_two_stages_have_their_own_rules():
    pipe, args = tiny.wan(two_stages=True)
    result = search(tiny.stretch(pipe), args)
    stages = {key[0] for key in result.choices}
    assert stages == {"transformer", "transformer_2"}
    assert {rule.stage for rule in result.strategy.rules} <= stages
    assert sum(row.steps for key, row in result.rows.items() if key[1] == 0) == 6


@pytest.mark.parametrize("family", ["cogvideox", "hunyuan_video", "flux", "pixart_sigma"])
def test_other_families(family):
    pipe, args = tiny.PIPELINES[family]()
    result = search(pipe, args, arguments={"num_inference_steps": 2}, bands=Bands((0.0, 1.0)))
    assert result.rows
    assert all(row.steps == 2 for row in result.rows.values())


@dataclass
class Process:
    """What accelerate's PartialState tells one of several processes."""

    process_index: int
    num_processes: int

    def wait_for_everyone(self):
        pass


def test_processes_share_units_and_give_the_same(wan, tmp_path):
    pipe, args = wan
    alone = search(pipe, args, seeds=(0, 1, 2), store=Store(tmp_path / "alone"))
    shared = Store(tmp_path / "shared")
    search(pipe, args, seeds=(0,), store=Store(tmp_path / "other"))  # of another search
    with pytest.raises(ProfileError, match="2 of 3 units are missing"):
        search(pipe, args, seeds=(0, 1, 2), store=shared, state=Process(0, 3))
    for index in (2, 1):
        again = search(pipe, args, seeds=(0, 1, 2), store=shared, state=Process(index, 3))
        assert again is None
    joint = search(pipe, args, seeds=(0, 1, 2), store=shared, state=Process(0, 3))
    assert joint.strategy == alone.strategy
    for number in range(3):
        assert shared.unit(number) == Store(tmp_path / "alone").unit(number)
    assert shared.unit(0)["calls"] != shared.unit(1)["calls"] != shared.unit(2)["calls"]


def test_every_band_searches_when_it_begins(wan, tmp_path):
    store = Store(tmp_path / "store")
    search(*wan, store=store)
    searched = {}
    for call in store.unit(0)["calls"]:
        (adaspa,) = (each for each in call["found"] if each["candidate"].startswith("adaspa"))
        searched.setdefault(call["step"], set()).add(adaspa["searched"])
    assert searched == {0: {True}, 2: {False}, 3: {True}, 5: {False}}


def test_a_store_of_another_search_is_refused(wan, tmp_path):
    store = Store(tmp_path / "store")
    search(*wan, store=store)
    before = {path.name: path.read_bytes() for path in store.folder.iterdir()}
    with pytest.raises(ProfileError, match=r"candidates.*add --fresh"):
        search(*wan, store=store, candidates="radial:block_size=8")
    assert {path.name: path.read_bytes() for path in store.folder.iterdir()} == before
    search(*wan, store=store, candidates="radial:block_size=8", fresh=True)


def test_a_broken_store_is_refused(wan, tmp_path):
    store = Store(tmp_path / "store")
    search(*wan, store=store)
    unit = store.folder / "unit-00000.json"
    unit.write_text(unit.read_text()[:100])
    with pytest.raises(ProfileError, match=r"unit-00000\.json: cannot be read"):
        search(*wan, store=store)
    full = tmp_path / "full"
    full.mkdir()
    (full / "a.txt").write_text("mine")
    with pytest.raises(ProfileError, match="not written by the profiler; choose another"):
        search(*wan, store=Store(full), fresh=True)
    assert (full / "a.txt").read_text() == "mine"


def put(value, *path):
    def change(data):
        *outer, last = path
        for key in outer:
            data = data[key]
        data[last] = value

    return change


def drop(key):
    return lambda data: data.pop(key)


IN_BANDS = {"sequential": "bands", "costs": "measured"}


@pytest.fixture(scope="module")
def measured(wan, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("measured") / "store")
    search(*wan, **IN_BANDS, store=store)
    return store.folder


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("unit-00000", drop("about"), "about: this key is missing"),
        ("unit-00000", drop("calls"), "calls: this key is missing"),
        ("unit-00000", put("three", "about", "grid", 0), r"about\.grid\[0\]: .*got 'three'"),
        ("unit-00000", put(0, "about", "heads"), "about.heads: .*got 0"),
        (
            "unit-00000",
            put([1], "calls", 0, "power"),
            "power must have one number .* 2 heads, got 1",
        ),
        ("unit-00000", put("other", "calls", 0, "stage"), "stage 'other' is not in steps"),
        ("unit-00000", put({}, "calls", 0, "found", 0), r"found\[0\]\.candidate: this key is mi"),
        ("unit-00000-band-0", drop("about"), "about: this key is missing"),
        ("chosen-0", put([["a", 0]], "choices"), r"choices\[0\]"),
        ("costs", drop("model"), "model: this key is missing"),
        ("costs", put("soon", "model", "launch"), "model.launch: .*got 'soon'"),
    ],
)
def test_json_of_another_structure_is_one_error(wan, measured, tmp_path, name, change, words):
    store = Store(tmp_path / "store")
    shutil.copytree(measured, store.folder)
    path = store.folder / f"{name}.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    if "band" in name:  # read where the whole unit is not made yet
        (store.folder / "unit-00000.json").unlink()
    with pytest.raises(ProfileError, match=rf"{name}\.json: .*{words}.*delete this file"):
        search(*wan, **IN_BANDS, store=store)


def test_units_of_other_candidates_are_refused(wan, tmp_path):
    store = Store(tmp_path / "store")
    search(*wan, store=store)
    unit = store.unit(0)
    for call in unit["calls"]:
        call["found"].pop()
    store.write_unit(0, unit)
    with pytest.raises(ProfileError, match=r"unit 0 holds .*this search needs .*--fresh"):
        search(*wan, store=store)


def test_no_space_leaves_no_half_file(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    store.open({"a": 1})

    def full(path, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ProfileError, match="No space left"):
        store.write_unit(0, {"b": 2})
    monkeypatch.undo()
    assert [path.name for path in store.folder.iterdir()] == ["setup.json"]
    assert json.loads((store.folder / "setup.json").read_text()) == {"a": 1}


def test_a_method_seen_only_while_searching_is_not_chosen():
    """Else its error would be 0 for a step that computed everything."""
    searcher = Candidate("adaspa", "adaspa", {})
    call = {
        "stage": "transformer", "layer": 0, "step": 0, "band": 0, "power": [1.0],
        "found": [{"candidate": "adaspa", "error": [0.0], "doubt": [0.0], "recall": [1.0],
                   "density": [1.0], "computed": [1.0], "ordered": False, "partial": 0.0,
                   "searched": True}],
    }  # fmt: skip
    unit = {
        "about": {"num_steps": 4, "heads": 1},
        "steps": {"transformer": [0, 1, 2, 3]},
        "calls": [call],
    }
    (row,) = sum_up([unit], [searcher], Bands((0.0, 1.0))).values()
    assert row.error[0, 1] > 1e6
    later = {**call, "step": 2, "found": [{**call["found"][0], "searched": False,
             "error": [0.4], "density": [0.2], "recall": [0.8]}]}  # fmt: skip
    (row,) = sum_up([{**unit, "calls": [call, later]}], [searcher], Bands((0.0, 1.0))).values()
    assert row.error[0, 1] == pytest.approx(0.75 * 0.4**2)
    assert row.density[0, 1] == pytest.approx(0.25 + 0.75 * 0.2)
    assert row.recall[0, 1] == pytest.approx(0.25 + 0.75 * 0.8)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
def test_killed_searches_resume_to_the_same_files(root):
    done = subprocess.run(
        [sys.executable, "tests/profiler/kill.py", "--kills", "4", "--seed", "3",
         "--sequential", "none", "bands"],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kills" in done.stdout
    assert "0 differ" in done.stdout
