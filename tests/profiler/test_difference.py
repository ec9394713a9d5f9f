# SPDX-License-Identifier: Apache-2.0
"""Differences of strategies: every place that differs is told once, and nothing else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.methods.params import method_text, params_of
from dit_sparse.profiler.differences import about, changes, ranges
from dit_sparse.strategy import Grid, Model, Receipt, Rule, Strategy

LAYERS, HEADS, STEPS = 3, 4, 6
METHODS = st.sampled_from(
    [("dense", {}), ("radial", {}), ("radial", {"decay_factor": 0.5}), ("pooled", {})]
)
SOME_LAYERS = st.just("all") | st.sets(st.integers(0, LAYERS - 1), min_size=1).map(sorted)
SOME_HEADS = st.just("all") | st.sets(st.integers(0, HEADS - 1), min_size=1).map(sorted)
BANDS = st.sets(st.integers(0, STEPS), min_size=2, max_size=2).map(sorted)


@st.composite
def strategies(draw):
    rules = []
    for _ in range(draw(st.integers(0, 4))):
        method, params = draw(METHODS)
        a, b = draw(BANDS)
        where = {"layers": draw(SOME_LAYERS), "heads": draw(SOME_HEADS)}
        rules.append(Rule(method=method, params=params, steps=(a / STEPS, b / STEPS), **where))
    return Strategy(name="drawn", rules=tuple(rules))


def doing(strategy, layer, step):
    """What each head does, by the last rule that names it."""
    found = [("dense", {})] * HEADS
    for rule in strategy.rules:
        first, last = (round(edge * STEPS) for edge in rule.steps)
        if (rule.layers == "all" or layer in rule.layers) and first <= step < last:
            for head in range(HEADS) if rule.heads == "all" else rule.heads:
                found[head] = (rule.method, rule.params)
    return found


@given(strategies(), strategies())
def test_every_place_that_differs_is_told_once(one, other):
    told = {}
    for each in changes(one, other, layers=LAYERS, heads=HEADS, num_steps=STEPS):
        for layer in each.layers:
            for head in each.heads:
                for step in each.steps:
                    assert (layer, head, step) not in told
                    told[layer, head, step] = (each.one, each.other)
    for layer in range(LAYERS):
        for step in range(STEPS):
            pairs = zip(doing(one, layer, step), doing(other, layer, step), strict=True)
            for head, (a, b) in enumerate(pairs):
                assert told.pop((layer, head, step), None) == (None if a == b else (a, b))
    assert not told


def test_layers_that_differ_alike_are_one_entry():
    one = Strategy.single("radial")
    other = Strategy.single("radial", decay_factor=0.5, dense_layers=[1])
    found = changes(one, other, layers=4, heads=2, num_steps=5)
    assert [(each.layers, each.heads, each.steps) for each in found] == [
        ((0, 2, 3), (0, 1), (0, 1, 2, 3, 4)),
        ((1,), (0, 1), (0, 1, 2, 3, 4)),
    ]
    assert found[1].other == ("dense", {})


def test_the_rest_of_a_file_is_told_key_by_key():
    one = Strategy(
        name="a", model=Model(classes=("A", "B")), receipt=Receipt(measured={"density": 0.5})
    )
    other = Strategy(
        name="b", grid=Grid(frames=2, height=3, width=4),
        receipt=Receipt(measured={"density": 0.25, "recall": 0.75}, seeds=(0, 1), note="n"),
    )  # fmt: skip
    found = {key: (a, b) for key, a, b in about(one, other)}
    assert found == {
        "model": ("classes A; B, config_hash not said", "any"),
        "grid": ("any", "frames 2, height 3, width 4, text 0"),
        "receipt.seeds": ("none", "0; 1"),
        "receipt.measured.density": ("0.5", "0.25"),
        "receipt.measured.recall": ("not said", "0.75"),
        "receipt.note": ("not said", "n"),
    }
    assert about(one, one) == []


def test_words_and_ranges():
    assert ranges((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"
    radial = ("radial", params_of(Strategy.single("radial", decay_factor=0.5).rules[0].instance))
    assert method_text(radial, short=True) == "radial (decay_factor 0.5)"
    assert "form paper" in method_text(radial)
    assert method_text(("dense", {})) == "dense"


def cli(*args):
    return CliRunner().invoke(app, ["diff", *map(str, args)])


@pytest.fixture
def files(tmp_path):
    one = Strategy.single("radial", name="one")
    other = Strategy(
        name="other",
        rules=(
            Rule(method="radial"),
            Rule(method="pooled", layers=(1,), heads=(0, 2), steps=(0.5, 1.0)),
        ),
    )
    paths = tmp_path / "one.json", tmp_path / "other.json"
    one.save(paths[0])
    other.save(paths[1])
    return paths


def test_the_command_tells_by_its_exit_code(files, tmp_path):
    same = tmp_path / "same.json"
    split = [Rule(method="radial", layers=(i,)) for i in range(3)]
    Strategy(name="split", rules=tuple(split)).save(same)
    size = ("--layers", 3, "--heads", 4, "--steps", 10)
    equal = cli(files[0], same, *size)
    assert equal.exit_code == 0, equal.output
    assert "No difference" in equal.stdout
    differ = cli(*files, *size)
    assert differ.exit_code == 1, differ.output
    assert "0, 2" in differ.stdout
    assert "5-9" in differ.stdout
    assert "pooled" in differ.stdout
    assert (
        "8.3% of all (head, step) pairs differ" in differ.stdout
    )  # 1 layer x 2 heads x 5 of 3 x 4 x 10
    assert cli("wan2.1-14b.720p.svg", "wan2.1-14b.720p.svg").exit_code == 0


def test_json_has_everything(files):
    result = cli(*files, "--layers", 3, "--heads", 4, "--steps", 10, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    (change,) = found["choices"]
    assert (change["layers"], change["heads"]) == ([1], [0, 2])
    assert change["steps"] == [5, 6, 7, 8, 9]
    assert change["one"]["method"] == "radial"
    assert change["two"]["params"]["density"] == 0.5
    assert found["same"] is False


def test_receipts_can_be_left_out(tmp_path):
    paths = []
    for number in (0.5, 0.25):
        made = Strategy(name="x", receipt=Receipt(measured={"density": number}))
        paths.append(tmp_path / f"{number}.json")
        made.save(paths[-1])
    assert cli(*paths).exit_code == 1
    assert cli(*paths, "--no-receipt").exit_code == 0


def test_the_model_says_how_many_layers_there_are(tmp_path, root):
    """All of six layers is the same as every layer only where there are six."""
    whole, listed = tmp_path / "whole.json", tmp_path / "listed.json"
    Strategy(name="a", rules=(Rule(method="pooled"),)).save(whole)
    Strategy(name="b", rules=(Rule(method="pooled", layers=tuple(range(6))),)).save(listed)
    assert cli(whole, listed, "--model", root / "samples" / "wan-tiny").exit_code == 0
    assert cli(whole, listed, "--model", "wan2.1-1.3b").exit_code == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"schema_version": 1, "name": "x"', "truncated"),
        ('{"schema_version": 1, "name": "x", "rule": []}', "did you mean 'rules'"),
        ('{"schema_version": 1, "name": "x", "rules": [{"method": "radial", "layers": [99999999999999999999999]}]}',  # noqa: E501
         "too large"),
        ('{"schema_version": 2, "name": "x"}', "too old"),
        ("[]", "must contain a JSON object"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line(files, tmp_path, content, words):
    path = tmp_path / "bad.json"
    path.write_text(content)
    result = cli(files[0], path)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert words in result.stderr
    assert "bad.json" in result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nothing", "radial"], "is named 'nothing'"),
        (["", "radial"], "got ''"),
        ([".", "radial"], "is a folder"),
        (["radial", "radial", "--model", "nowhere"], "unknown model name"),
        (["flux.1-dev.4k.gna", "radial", "--model", "wan2.1-14b"], "made for FluxTransformer2D"),
    ],
)
def test_bad_requests_are_one_line(args, words):
    result = cli(*args)
    assert result.exit_code == 2, result.output
    assert words in result.stderr


def test_a_rule_beyond_the_model_is_refused(tmp_path):
    path = tmp_path / "far.json"
    Strategy(name="far", rules=(Rule(method="radial", layers=(7,)),)).save(path)
    result = cli(path, "radial", "--layers", 6, "--heads", 4)
    assert result.exit_code == 2
    assert "layer 7 is out of range" in result.stderr
