# SPDX-License-Identifier: Apache-2.0
"""Strategy files: told apart in words, fitted to other grids, and a thousand broken ones."""

import json
import os
import random
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

import dit_sparse
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.errors import DitSparseError, StrategyError
from dit_sparse.profiler import ProfileError, Store
from dit_sparse.profiler.differences import difference
from dit_sparse.profiler.retiling import retile
from dit_sparse.strategy import Grid, Model, Receipt, Rule, Strategy
from tests import tiny

MODEL = {"layers": 2, "heads": 4, "num_steps": 10}


def made(*rules, **more):
    return Strategy(name="made", grid=Grid(frames=9, height=16, width=16), rules=rules, **more)


def rule(method="radial", params=None, **where):
    return Rule(method=method, params=params or {}, **where)


def test_the_same_in_other_words_is_no_difference():
    whole = made(rule(params={"decay_factor": 0.5}))
    split = made(
        rule(params={"decay_factor": 0.5}, layers=(0,), steps=(0.0, 0.5)),
        rule(params={"decay_factor": 0.5}, layers=(0,), steps=(0.5, 1.0)),
        rule(params={"decay_factor": 0.5}, layers=(1,), heads=(0, 1)),
        rule(params={"decay_factor": 0.5}, layers=(1,), heads=(2, 3)),
    )
    assert difference(whole, split, **MODEL) == []


def test_a_difference_is_told_by_layer_head_and_step():
    one = made(rule(), receipt=Receipt(measured={"density": 0.5}))
    other = made(
        rule(), rule("dense", layers=(1,), heads=(0, 1, 3), steps=(0.2, 0.5)),
        receipt=Receipt(measured={"density": 0.625}),
    )  # fmt: skip
    first, second = difference(one, other, **MODEL)
    assert first.startswith("layer 1, heads 0-1, 3, steps 2-4: radial (form paper, decay_factor")
    assert first.endswith("-> dense")
    assert second == "measured density: 0.5 -> 0.625"
    params = difference(one, made(rule(params={"decay_factor": 0.5})), **MODEL)
    assert len(params) == 2
    assert "decay_factor 1.0" in params[0]
    assert "decay_factor 0.5" in params[0]
    bare = one.model_copy(update={"grid": None})
    assert difference(one, bare, **MODEL) == ["grid: frames 9, height 16, width 16, text 0 -> any"]


def test_windows_and_clusters_grow_with_the_grid():
    strategy = made(
        rule("gna", {"window": [4, 8, 8], "stride": [4, 4, 4], "tile": [4, 4, 4]}),
        rule("svg2", {"query_clusters": 10, "key_clusters": 40}, layers=(1,)),
        rule("pooled", {"density": 0.25}, heads=(0,)),
        receipt=Receipt(measured={"density": 0.2}, note="Searched."),
    )
    new, warnings = retile(strategy, LatentsGrid(9, 32, 24))
    assert new.rules[0].params["window"] == [4, 16, 12]
    assert new.rules[1].params["query_clusters"] == 30
    assert new.rules[1].params["key_clusters"] == 120
    assert new.rules[2] == strategy.rules[2]
    assert new.grid == Grid(frames=9, height=32, width=24)
    assert new.receipt.measured == {}
    assert "re-tiled from 9x16x16 to 9x32x24" in new.receipt.note
    assert "extrapolated" in warnings[0]
    assert any(line.startswith("svg2: ") for line in warnings)
    assert strategy.receipt.measured == {"density": 0.2}


def test_the_same_grid_changes_nothing_and_no_grid_is_refused():
    strategy = made(rule())
    assert retile(strategy, LatentsGrid(9, 16, 16)) == (strategy, ())
    with pytest.raises(ProfileError, match="grid: is missing"):
        retile(strategy.model_copy(update={"grid": None}), LatentsGrid(9, 16, 16))


ODD = (None, True, -1, 0, 2**70, 1e308, "", "x" * 5000, [], [[]], {}, {"a": 1}, 0.5, "NaN", "\0")


def mutated(text, draw):
    """Break a file: bytes, lines, values, keys."""
    kind = draw.randrange(6)
    if kind == 0:
        return text[: draw.randrange(len(text))]
    if kind == 1:
        at = draw.randrange(len(text))
        return text[:at] + chr(draw.choice([0, 34, 44, 91, 123, 125, 0x1F600])) + text[at + 1 :]
    if kind == 2:
        lines = text.splitlines()
        lines.insert(draw.randrange(len(lines)), lines[draw.randrange(len(lines))])
        return "\n".join(lines)
    data = json.loads(text)
    place, key = data, draw.choice(list(data))
    while isinstance(place[key], dict | list) and place[key] and draw.random() < 0.8:
        place = place[key]
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
    if kind == 3:
        place[key] = draw.choice(ODD)
    elif kind == 4:
        del place[key]
    elif isinstance(place, dict):
        place[f"{key}x"] = place[key]
    else:
        place.append(place[key])
    return json.dumps(data)


def loaded(path):
    try:
        return Strategy.load(path), ""
    except StrategyError as error:
        return None, str(error)


def test_a_thousand_broken_files_are_errors_or_valid(tmp_path):
    """Never another exception; an error is one line that names the file."""
    whole = made(
        rule("gna", {"window": [4, 8, 8]}, layers=(0, 1), heads=(1, 2), steps=(0.0, 0.3)),
        rule("adaspa", {"density": 0.25}, stage="transformer"),
        rule("rettention", {"mask_params": {"decay_factor": 0.5}}, layers=(3,)),
        rule("sparse_vdit", {"patterns": ["skip", "full"]}, heads=(0,)),
        receipt=Receipt(measured={"density": 0.5}, prompts=("a", "b"), seeds=(0, 1)),
    ).to_json()
    draw, path = random.Random(0), tmp_path / "broken.json"
    refused = 0
    for _ in range(1000):
        path.write_text(mutated(whole, draw), encoding="utf-8")
        strategy, error = loaded(path)
        if strategy is None:
            refused += 1
            assert error.startswith(str(path))
            assert "\n" not in error
            continue
        assert Strategy.from_dict(json.loads(strategy.to_json())) == strategy
        strategy.assign(0, 0, 10, "transformer", 4, 4)
    assert 500 < refused < 1000


def processors(pipe):
    return [block.attn1.processor for block in pipe.transformer.blocks]


def test_broken_files_leave_a_pipeline_as_it_was(tmp_path):
    """Given to a real pipeline, a broken file is a clear error, or a strategy that runs."""
    small = {"block_size": 8}
    whole = Strategy(
        name="small",
        model=Model(classes=("WanTransformer3DModel",)),
        grid=Grid(frames=3, height=4, width=6),
        rules=(
            rule("pooled", {**small, "density": 0.25}, layers=(0, 1), heads=(0,), steps=(0, 0.7)),
            rule("adaspa", {**small, "search_steps": [0.0]}, stage="transformer", heads=(1,)),
            rule("rettention", {"mask_params": small}, layers=(1,), steps=(0.5, 1.0)),
        ),
        receipt=Receipt(measured={"density": 0.5}, prompts=("a",), seeds=(0,)),
    ).to_json()
    pipe, args = tiny.wan()
    plain, before = tiny.run(pipe, args, num_inference_steps=2), processors(pipe)
    draw, path = random.Random(1), tmp_path / "broken.json"
    outcomes = {"refused": 0, "ran": 0, "failed": 0}
    messages = []
    for number in range(160):
        path.write_text(whole if number == 0 else mutated(whole, draw), encoding="utf-8")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as a file of another config
                handle = dit_sparse.enable(pipe, path)
        except DitSparseError as error:
            outcomes["refused"] += 1
            messages.append(str(error))
        else:
            with handle:
                try:
                    found = tiny.run(pipe, args, num_inference_steps=2)
                    outcomes["ran"] += 1
                    assert found.isfinite().all()
                except DitSparseError as error:
                    outcomes["failed"] += 1
                    messages.append(str(error))
        assert dit_sparse.current(pipe) is None
        assert all(a is b for a, b in zip(processors(pipe), before, strict=True))
    assert torch.equal(tiny.run(pipe, args, num_inference_steps=2), plain)
    assert all(messages)
    assert not any("\n" in message for message in messages)
    assert outcomes["refused"] > 40
    assert outcomes["ran"] > 15


full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@full_disk
def test_a_full_disk_leaves_the_old_strategy_whole(tmp_path, monkeypatch):
    """The system's own answer to a write without space, not an exception made up here."""
    path = tmp_path / "s.json"
    made(rule()).save(path)
    before, make = path.read_bytes(), tempfile.mkstemp

    def full(*args, **more):
        handle, name = make(*args, **more)
        os.close(handle)
        return os.open("/dev/full", os.O_WRONLY), name

    monkeypatch.setattr(tempfile, "mkstemp", full)
    with pytest.raises(StrategyError, match=r"s\.json: cannot be written: No space left"):
        made(rule("pooled")).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["s.json"]


@full_disk
def test_a_full_disk_leaves_the_old_measurements_whole(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    store.open({"a": 1})
    store.write("notes.json", {"b": 1})
    before = {path.name: path.read_bytes() for path in store.folder.iterdir()}
    plain = Path.open

    def full(self, *args, **more):
        if not self.name.startswith("."):
            return plain(self, *args, **more)
        plain(self, *args, **more).close()
        return plain(Path("/dev/full"), *args, **more)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ProfileError, match=r"notes\.json: cannot be written: No space left"):
        store.write("notes.json", {"b": 2})
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in store.folder.iterdir()} == before
    assert store.read("notes.json") == {"b": 1}
