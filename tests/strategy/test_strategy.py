# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501  (tables of bad input read best with one case a line)
"""Strategies: files there and back, bad files told apart, and who does what."""

from __future__ import annotations

import copy
import json
import pickle
import random
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse import _version
from dit_sparse.errors import StrategyError
from dit_sparse.methods import METHODS
from dit_sparse.methods.radial import Radial
from dit_sparse.methods.steps import step_at
from dit_sparse.strategy import (
    CONFIG_NAME,
    Grid,
    Model,
    Receipt,
    Rule,
    Schedule,
    Strategy,
    config_hash,
    shipped_names,
)

RULES = [
    {"method": "dense"},
    {"method": "radial", "params": {"decay_factor": 0.5}},
    {"method": "radial", "params": {"form": "released", "block_size": 64, "sink": False}},
    {"method": "adaspa", "params": {"density": 0.3, "search_steps": [0.0, 0.5]}},
]
# A name is one line, other texts may have line breaks; neither has control characters.
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
letters = st.characters(exclude_categories=["Cc", "Cs"], exclude_characters=BIDI)
lines = st.text(letters, min_size=1, max_size=20)
notes = st.text(st.one_of(letters, st.sampled_from("\n\t")), max_size=20)
places = st.one_of(st.just("all"), st.lists(st.integers(0, 3), min_size=1, unique=True))
bands = st.lists(st.integers(0, 10), min_size=2, max_size=2, unique=True).map(
    lambda pair: [n / 10 for n in sorted(pair)]
)


@st.composite
def rules(draw):
    """Draw a rule as plain data."""
    stage = draw(st.sampled_from([None, "transformer", "transformer_2"]))
    where = {"layers": draw(places), "heads": draw(places), "steps": draw(bands), "stage": stage}
    return where | copy.deepcopy(draw(st.sampled_from(RULES)))


@st.composite
def strategies(draw):
    """Draw a whole strategy as plain data."""
    texts = st.one_of(st.none(), notes)
    return {
        "schema_version": 1,
        "name": draw(lines),
        "model": draw(
            st.sampled_from([None, {"classes": ["WanTransformer3DModel"], "config_hash": "ab"}])
        ),
        "grid": draw(st.sampled_from([None, {"frames": 9, "height": 16, "width": 16}])),
        "schedule": {
            "dense_warmup_steps": draw(st.one_of(st.integers(0, 4), st.sampled_from([0.0, 0.25]))),
            "dense_last_steps": draw(st.integers(0, 2)),
            "dense_layers": draw(st.lists(st.integers(0, 3), unique=True, max_size=2)),
        },
        "rules": draw(st.lists(rules(), max_size=4)),
        "receipt": {
            "published": draw(st.booleans()),
            "command": draw(texts),
            "note": draw(texts),
            "seeds": draw(st.lists(st.integers(0, 9), max_size=3)),
            "prompts": draw(st.lists(notes, max_size=3)),
            "measured": {"density": draw(st.floats(0, 1)), "psnr_db": draw(st.floats(0, 99))},
        },
    }


@given(strategies())
def test_round_trip_through_a_file(tmp_path_factory, data):
    strategy = Strategy.from_dict(data)
    path = tmp_path_factory.mktemp("there") / "back.json"
    strategy.save(path)
    again = Strategy.load(path)
    assert again == strategy
    assert again.to_json() == strategy.to_json()
    assert json.loads(path.read_text(encoding="utf-8")) == strategy.to_dict()
    assert Strategy.from_dict(strategy.to_dict()) == strategy
    strategy.assign(0, 0, 4, "transformer", 4, 4)
    assert again == strategy  # what is cached is no part of it
    assert pickle.loads(pickle.dumps(strategy)) == strategy
    assert strategy.name in repr(strategy) or repr(strategy.name)[1:-1] in repr(strategy)


def test_brackets_in_text_stay_as_they_are():
    prompts = ("a [ b", "c ] d", "[", "]\n[", "{x} [ y ]")
    strategy = Strategy(name="[ n ]", receipt=Receipt(prompts=prompts, note="[\n a,\n b ]"))
    assert json.loads(strategy.to_json()) == strategy.to_dict()


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_files_load_save_and_compare_equal(name, root, tmp_path):
    strategy = Strategy.load(name)
    assert strategy.name == name
    file = root / "dit_sparse" / "profiles" / f"{name}.json"
    assert strategy.to_json() == file.read_text(encoding="utf-8")  # complete and in our own form
    strategy.save(tmp_path / "copy.json")
    assert Strategy.load(tmp_path / "copy.json") == strategy == Strategy.coerce(name)
    assert strategy.receipt.published or strategy.receipt.source or strategy.receipt.command
    if strategy.receipt.measured:
        assert strategy.receipt.command, "a measured figure names the command that measured it"
    for rule in strategy.rules:
        assert rule.instance is rule.instance


def test_something_is_shipped():
    assert {"wan-tiny.dense", "wan-tiny.radial", "wan-tiny.adaspa"} <= set(shipped_names())


def last_rule(data, layer, head, step, num_steps, stage):
    """Which rule governs one head, read from the plain data: the last that names it, or None."""
    schedule = data["schedule"]
    first = schedule["dense_warmup_steps"]
    first = first if isinstance(first, int) else step_at(first, num_steps)
    last = num_steps - schedule["dense_last_steps"]
    if not first <= step < last or layer in schedule["dense_layers"]:
        return None
    found = None
    for i_rule, rule in enumerate(data["rules"]):
        start, stop = (step_at(fraction, num_steps) for fraction in rule["steps"])
        if (
            (rule["layers"] == "all" or layer in rule["layers"])
            and (rule["heads"] == "all" or head in rule["heads"])
            and start <= step < stop
            and rule["stage"] in {None, stage}
        ):
            found = i_rule
    return found


@given(strategies(), st.integers(1, 8))
def test_assign_is_what_the_rules_say(data, num_steps):
    strategy = Strategy.from_dict(data)
    stages = ("transformer", "transformer_2")
    for layer, step, stage in product(range(4), range(num_steps), stages):
        choices = strategy.assign(layer, step, num_steps, stage, 4, 4)
        assert strategy.assign(layer, step, num_steps, stage, 4, 4) is choices
        assert sorted(head for choice in choices for head in choice.heads) == [0, 1, 2, 3]
        methods = [choice.method for choice in choices]
        assert len(set(methods)) == len(methods)  # who shares a choice is one group
        for rule, method, heads in choices:
            wanted = [last_rule(data, layer, head, step, num_steps, stage) for head in heads]
            for i_rule in wanted:
                if method is None:
                    assert i_rule is None or data["rules"][i_rule]["method"] == "dense"
                else:
                    assert strategy.rules[i_rule].instance == method
            assert rule == min((i_rule for i_rule in wanted if i_rule is not None), default=None)


def test_a_later_rule_wins_where_both_speak():
    rules = [
        {"method": "radial"},
        {"method": "adaspa", "heads": [1, 3], "layers": [0]},
        {"method": "dense", "heads": [3], "steps": [0.5, 1.0]},
        {"method": "radial", "heads": [2], "params": {"sink": False}, "stage": "transformer_2"},
    ]
    strategy = Strategy.from_dict({"schema_version": 1, "name": "x", "rules": rules})

    def groups(layer, step, stage="transformer"):
        return [(c.rule, c.heads) for c in strategy.assign(layer, step, 4, stage, 4, 2)]

    assert groups(0, 0) == [(0, (0, 2)), (1, (1, 3))]
    assert groups(1, 0) == [(0, (0, 1, 2, 3))]
    assert groups(1, 2) == [(0, (0, 1, 2)), (2, (3,))]
    assert groups(0, 2, "transformer_2") == [(0, (0,)), (1, (1,)), (3, (2,)), (2, (3,))]


def test_heads_with_equal_methods_are_one_group_under_the_first_rule():
    rules = [
        {"method": "dense", "heads": [0]},
        {"method": "radial", "heads": [1], "params": {"decay_factor": 0.5}},
        {"method": "adaspa", "heads": [2]},
        {"method": "radial", "heads": [3], "params": {"decay_factor": 0.5, "sink": True}},
        {"method": "dense", "heads": [4]},
    ]
    strategy = Strategy.from_dict({"schema_version": 1, "name": "x", "rules": rules})
    choices = strategy.assign(0, 0, 4, "transformer", 6, 1)
    assert [(c.rule, c.heads) for c in choices] == [(0, (0, 4, 5)), (1, (1, 3)), (2, (2,))]
    assert choices[0].method is None


def test_bands_that_touch_leave_no_step_out():
    half = [
        {"method": "radial", "steps": [0.0, 0.37]},
        {"method": "adaspa", "steps": [0.37, 1.0]},
    ]
    strategy = Strategy.from_dict({"schema_version": 1, "name": "x", "rules": half})
    for num_steps in range(1, 60):
        found = [
            strategy.assign(0, step, num_steps, "transformer", 1, 1)[0].rule
            for step in range(num_steps)
        ]
        assert None not in found
        assert found == sorted(found)


def test_assign_refuses_what_is_not_there():
    for place in ((4, 0, 5), (0, 5, 5), (-1, 0, 5), (0, -1, 5)):
        with pytest.raises(StrategyError, match="no layer"):
            Strategy.single("radial").assign(*place, "transformer", 2, 4)


def test_single_and_options():
    strategy = Strategy.single("radial", decay_factor=0.5, dense_warmup_steps=2)
    assert strategy.name == "radial"
    assert strategy.rules[0].instance == Radial(decay_factor=0.5)
    assert strategy.schedule.dense_warmup_steps == 2
    other = Strategy.coerce(strategy, dense_layers=[1], sink=False)
    assert other.rules[0].instance == Radial(decay_factor=0.5, sink=False)
    assert other.schedule == Schedule(dense_warmup_steps=2, dense_layers=(1,))
    assert strategy.rules[0].params["sink"] is True  # the first one is as it was
    assert Strategy.coerce(strategy) is strategy
    assert Strategy.coerce("radial", decay_factor=0.5, dense_warmup_steps=2) == strategy


def test_options_of_a_file_void_what_was_measured():
    measured = Receipt(published=True, measured={"density": 0.4})
    strategy = Strategy(name="m", rules=(Rule(method="radial"),), receipt=measured)
    changed = strategy.with_options(decay_factor=0.5)
    assert changed.receipt.measured == {}
    assert not changed.receipt.published
    assert changed.receipt.note == "changed from m by options: decay_factor"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Strategy.single("radial", decay=1), "radial: unknown option 'decay'; options are radial: form, decay_factor, block_size, sink, compensate; schedule: dense_warmup_steps, dense_last_steps, dense_layers"),
        (lambda: Strategy.single("dense", decay=1), "dense: unknown option 'decay'; options are schedule:"),
        (lambda: Strategy.single("radiall"), "unknown method 'radiall'"),
        (lambda: Strategy.single("radial", decay_factor="x"), r"rules\[0\].params: decay_factor: .*got 'x'"),
        (lambda: Strategy.single("radial", decay_factor=object()), "valid JSON"),
        (lambda: Strategy.single("radial", dense_layers=2), "schedule.dense_layers: .* first 2 are"),
        (lambda: Strategy.from_dict({"schema_version": 1, "name": "two", "rules": [{"method": "radial"}, {"method": "adaspa"}]}).with_options(sink=False), r"unknown option 'sink'; change the params of several methods \(adaspa, radial\)"),
        (lambda: Strategy.coerce("wan-tiny.radail"), "did you mean wan-tiny.radial"),
        (
            lambda: Strategy.coerce("radiall"),
            r"did you mean .*radial.* Shipped: .*wan-tiny.adaspa.*Methods: adaspa, .*dense, .*radial",
        ),
        (lambda: Strategy.coerce("./nowhere/x.json"), "nowhere/x.json: file not found"),
        (lambda: Strategy.coerce(Path("nowhere.json")), "nowhere.json: file not found"),
        (lambda: Strategy.coerce("some-one/no-such-strategy"), "some-one/no-such-strategy: no sparse_strategy.json"),
        (lambda: Strategy.coerce(5), "strategy must be a name.* got int"),
        (lambda: Strategy.coerce(None), "strategy must be a name.* got NoneType"),
        (lambda: Strategy.coerce({}), "schema_version: must be 1, got 'nothing'"),
        (lambda: Strategy.coerce("a\0b"), "not a path|no strategy file"),
        (lambda: Strategy.coerce("x" * 5000), "not a path|no strategy file"),
        (lambda: Strategy.coerce(""), "."),
    ],
)  # fmt: skip
def test_bad_requests(make, message):
    with pytest.raises(StrategyError, match=message):
        make()


def test_coerce_takes_whatever_names_a_strategy(tmp_path):
    strategy = Strategy.single("adaspa", density=0.3)
    strategy.save(tmp_path / "a.json")
    strategy.save_pretrained(tmp_path / "folder")
    for profile in (
        strategy, strategy.to_dict(), tmp_path / "a.json", str(tmp_path / "a.json"),
        tmp_path / "folder", str(tmp_path / "folder"),
    ):  # fmt: skip
        assert Strategy.coerce(profile) == strategy
        assert Strategy.coerce(profile, density=0.5).rules[0].params["density"] == 0.5
    assert Strategy.from_pretrained(tmp_path / "folder") == strategy
    for name in METHODS:
        assert Strategy.coerce(name) == Strategy.single(name)


GOOD = {"schema_version": 1, "name": "good", "rules": [{"method": "radial"}, {"method": "dense"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": 1}, "x.json: unknown key 'nam' .did you mean 'name'..; allowed keys: schema_version"),
        ({"name": ""}, "x.json: name: "),
        ({"name": 3}, "x.json: name: .* got 3"),
        ({"schema_version": 2}, "x.json: schema_version: must be 1, got 2; dit_sparse .* is too old for this file"),
        ({"schema_version": 0}, "x.json: schema_version: "),
        ({"schema_version": True}, "x.json: schema_version: "),
        ({"schema_version": 1.0}, "x.json: schema_version: "),
        ({"schema_version": "1"}, "x.json: schema_version: "),
        ({"schema_version": None}, "x.json: schema_version: "),
        ({"rules": {}}, "x.json: rules: "),
        ({"rules": [{}]}, r"x.json: rules\[0\].method: required key is missing"),
        ({"rules": [{"method": "dense"}, 3]}, r"x.json: rules\[1\]: "),
        ({"rules": [{"method": "rdial"}]}, r"x.json: rules\[0\].method: unknown method 'rdial'"),
        ({"rules": [{"method": None}]}, r"x.json: rules\[0\].method: "),
        ({"rules": [{"method": "radial", "params": {"windw": 3}}]}, r"x.json: rules\[0\].params: unknown key 'windw'; radial takes: form, decay"),
        ({"rules": [{"method": "radial", "params": []}]}, r"x.json: rules\[0\].params: "),
        ({"rules": [{"method": "radial", "params": {"sink": 1}}]}, r"x.json: rules\[0\].params: sink: .* got 1"),
        ({"rules": [{"method": "dense", "layer": "all"}]}, r"x.json: rules\[0\]: unknown key 'layer' .did you mean 'layers'"),
        ({"rules": [{"method": "dense", "layers": "some"}]}, r"x.json: rules\[0\].layers: must be \"all\""),
        ({"rules": [{"method": "dense", "layers": []}]}, r"x.json: rules\[0\].layers: .*at least one"),
        ({"rules": [{"method": "dense", "heads": [0, 0]}]}, r"x.json: rules\[0\].heads: heads names 0 more than once"),
        ({"rules": [{"method": "dense", "heads": [-1]}]}, r"x.json: rules\[0\].heads: "),
        ({"rules": [{"method": "dense", "heads": [0.0]}]}, r"x.json: rules\[0\].heads: "),
        ({"rules": [{"method": "dense", "heads": 3}]}, r"x.json: rules\[0\].heads: .* first 3 are \[0, 1, 2\]"),
        ({"rules": [{"method": "dense", "steps": [0, 50]}]}, r"x.json: rules\[0\].steps: must be \[start, stop\) as fractions"),
        ({"rules": [{"method": "dense", "steps": [0.5, 0.5]}]}, r"x.json: rules\[0\].steps: "),
        ({"rules": [{"method": "dense", "steps": [0.5]}]}, r"x.json: rules\[0\].steps: "),
        ({"rules": [{"method": "dense", "steps": "all"}]}, r"x.json: rules\[0\].steps: "),
        ({"rules": [{"method": "dense", "steps": [True, "a"]}]}, r"x.json: rules\[0\].steps: "),
        ({"rules": [{"method": "dense", "stage": "unet"}]}, r"x.json: rules\[0\].stage: .*'transformer' or 'transformer_2'"),
        ({"model": {"classes": []}}, "x.json: model.classes: "),
        ({"model": {"classes": "Wan"}}, "x.json: model.classes: "),
        ({"model": "Wan"}, "x.json: model: "),
        ({"grid": {"frames": 0, "height": 1, "width": 1}}, "x.json: grid.frames: .* got 0"),
        ({"grid": [9, 16, 16]}, "x.json: grid: "),
        ({"schedule": {"dense_warmup": 1}}, "x.json: schedule: unknown key 'dense_warmup' .did you mean"),
        ({"schedule": {"dense_warmup_steps": 2.5}}, "x.json: schedule.dense_warmup_steps: .*; write 2 for"),
        ({"receipt": {"measured": {"psnr": "high"}}}, "x.json: receipt.measured.psnr: .* got 'high'"),
        ({"receipt": {"publishd": True}}, "x.json: receipt: unknown key 'publishd'"),
        ({"nam": 1, "nme": 2}, r"and 1 more\)"),
    ],
)  # fmt: skip
def test_bad_content_names_file_and_key(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text(json.dumps(GOOD | change), encoding="utf-8")
    with pytest.raises(StrategyError, match="^" + message if message[0] == "x" else message):
        Strategy.load("x.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty or truncated"),
        (b'{"schema_version": 1, "name": "a', "not valid JSON"),
        (b'{"schema_version": 1, "name": "a", "rules": [', "truncated"),
        (b"[]", "must contain a JSON object, got list"),
        (b"null", "must contain a JSON object, got NoneType"),
        (b"3", "must contain a JSON object, got int"),
        (b"{}", "schema_version: must be 1, got 'nothing'"),
        (b'{"schema_version": 1, "name": "a", "name": "b"}', "duplicate key 'name'"),
        (b'{"schema_version": 1, "name": "a", "rules": [{"method": "dense", "method": "dense"}]}', "duplicate key 'method'"),
        (b'{"schema_version": NaN, "name": "a"}', "NaN is not a valid JSON number"),
        (b'{"schema_version": 1, "name": "a", "schedule": {"dense_warmup_steps": -Infinity}}', "-Infinity is not a valid JSON"),
        (b'{"schema_version": 1, "name": "a", "schedule": {"dense_warmup_steps": 1e999}}', "1e999 is too large"),
        (b'{"schema_version": 1, "name": "a", "schedule": {"dense_warmup_steps": ' + b"9" * 6000 + b"}}", "is too large"),
        (b'{"schema_version": 1, "name": "a", "schedule": {"dense_warmup_steps": 10000000000}}', "whole number from 0"),
        (b"\xff\xfe\x00", "not valid UTF-8"),
        (b"\x89PNG\r\n\x1a\n", "not valid UTF-8"),
        (b"[" * 100000, "nested too deeply|not valid JSON"),
        (b'{"a":' * 100000, "nested too deeply|not valid JSON"),
        (b'{"schema_version": 1, "name": "\\ud800"}', "."),
    ],
)  # fmt: skip
def test_bad_files(content, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(StrategyError, match=message) as caught:
        Strategy.load(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 600


def test_bad_places(tmp_path):
    with pytest.raises(StrategyError, match="is a folder; give a strategy file"):
        Strategy.load(tmp_path)
    with pytest.raises(StrategyError, match="is a folder"):
        Strategy.coerce(tmp_path)
    Strategy.single("dense").save_pretrained(tmp_path)
    with pytest.raises(StrategyError, match="use Strategy"):
        Strategy.load(tmp_path)
    (tmp_path / "big.json").write_bytes(b" " * (16 * 2**20 + 1))
    with pytest.raises(StrategyError, match="larger than 16 MiB"):
        Strategy.load(tmp_path / "big.json")
    with pytest.raises(StrategyError, match="cannot be written"):
        Strategy.single("dense").save(tmp_path / "big.json" / "below.json")
    (tmp_path / CONFIG_NAME).unlink()
    with pytest.raises(StrategyError, match="file not found"):
        Strategy.from_pretrained(tmp_path)
    with pytest.raises(StrategyError, match="cannot be read: File name too long"):
        Strategy.load("x" * 5000 + ".json")


def test_a_file_with_a_byte_order_mark_loads(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8-sig")
    assert Strategy.load(path).name == "good"


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    Strategy.single("radial").save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(StrategyError, match="No space left on device"):
        Strategy.single("dense").save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


JUNK = [
    None, True, -1, 0, 1, 2.5, 1e308, 10**18, "", "all", "radial", "\x00", "é" * 300, [], [[]],
    [0], [0, 0], ["all"], {}, {"method": "dense"}, {"": 0}, [{}], [None], 0.1, "1", [0.2, 0.1],
]  # fmt: skip


def mutate(data, dice):
    """Put junk at a random place of nested data, drop it, double it, or rename its key."""
    spots = []

    def walk(value):
        if isinstance(value, dict | list):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            for key in keys:
                spots.append((value, key))
                walk(value[key])

    walk(data)
    if not spots:
        return
    place, key = dice.choice(spots)
    act = dice.randrange(4)
    if act == 0:
        del place[key]
    elif act == 1 and isinstance(place, list):
        place.insert(key, copy.deepcopy(place[key]))
    elif act == 2 and isinstance(place, dict):
        place[dice.choice(["", "steps", key + "s", "heads"])] = place.pop(key)
    else:
        place[key] = copy.deepcopy(dice.choice(JUNK))


def test_mutated_files_load_or_say_why(tmp_path):
    dice = random.Random(20251121)
    path = tmp_path / "x.json"
    start = [json.loads(Strategy.load(name).to_json()) for name in shipped_names()]
    start.append(
        Strategy.from_dict(
            GOOD | {"rules": RULES, "grid": {"frames": 1, "height": 1, "width": 1}}
        ).to_dict()
    )
    outcomes, messages = {True: 0, False: 0}, []
    for _ in range(600):
        data = copy.deepcopy(dice.choice(start))
        for _ in range(dice.randint(1, 3)):
            mutate(data, dice)
        text = json.dumps(data).encode()
        if dice.random() < 0.3:
            spot = dice.randrange(len(text))
            text = (
                text[:spot] + bytes([dice.randrange(256)]) * dice.randrange(3) + text[spot + 1 :]
            )
        path.write_bytes(text)
        try:
            strategy = Strategy.load(path)
        except StrategyError as error:
            outcomes[False] += 1
            messages.append(str(error))
        else:
            outcomes[True] += 1
            assert Strategy.from_dict(strategy.to_dict()) == strategy
            for layer in range(3):
                strategy.assign(layer, 2, 4, "transformer", 4, 6)
    assert min(outcomes.values()) > 50, outcomes
    for message in messages:
        assert message.startswith(str(path))
        assert "\n" not in message


def made_for(**fields):
    return Strategy.from_dict({"schema_version": 1, "name": "s"} | fields)


def test_validate_for_accepts_what_fits():
    strategy = made_for(
        model={"classes": ["A", "B"], "config_hash": "0123"},
        schedule={"dense_layers": [5]},
        rules=[{"method": "radial", "layers": [0, 5], "heads": [3], "stage": "transformer_2"}],
    )
    stages = ("transformer", "transformer_2")
    assert strategy.validate_for("B", 6, 4, stages=stages) == ()
    assert strategy.validate_for("B", 6, 4, stages=stages, config_hash="0123") == ()
    (remark,) = strategy.validate_for("B", 6, 4, stages=stages, config_hash="4567")
    assert "another config of B" in remark
    assert Strategy.single("radial").validate_for("Anything", 1, 1) == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {"classes": ["A", "B"]}}, "s: model: made for A or B, but this model is a C; .* model to null"),
        ({"rules": [{"method": "dense"}, {"method": "dense", "layers": [1, 6]}]}, r"s: rules\[1\].layers: layer 6 is out of range; this model has 6 layers, 0 to 5"),
        ({"rules": [{"method": "dense", "heads": [9, 4]}]}, r"s: rules\[0\].heads: head 9 is out of range; this model has 4 heads"),
        ({"rules": [{"method": "dense", "stage": "transformer_2"}]}, r"s: rules\[0\].stage: this pipeline has no 'transformer_2'; its stages are transformer"),
        ({"schedule": {"dense_layers": [7]}}, "s: schedule.dense_layers: layer 7 is out of range"),
    ],
)  # fmt: skip
def test_validate_for_names_what_does_not_fit(fields, message):
    with pytest.raises(StrategyError, match=message):
        made_for(**fields).validate_for("C", 6, 4)


def test_config_hash_ignores_order_and_private_keys():
    one = {"num_layers": 6, "patch_size": (1, 2, 2), "_diffusers_version": "0.36"}
    two = {"patch_size": [1, 2, 2], "num_layers": 6}
    assert config_hash(one) == config_hash(two)
    assert config_hash(two) != config_hash(two | {"num_layers": 7})


def test_built_in_python_like_a_file():
    strategy = Strategy(
        name="good",
        model=Model(classes=("A",)),
        grid=Grid(frames=1, height=2, width=3),
        rules=(Rule(method="radial", layers=(1,), params={"decay_factor": 0.5}),),
    )
    assert strategy.library_version == _version.__version__
    assert Strategy.from_dict(strategy.to_dict()) == strategy
    with pytest.raises(ValueError, match="frozen"):
        strategy.name = "other"


def test_push_to_hub_and_back(tmp_path, monkeypatch):
    import huggingface_hub

    strategy = Strategy.single("radial", sink=False)

    class Api:
        def __init__(self, token=None):
            assert token == "t"

        def create_repo(self, repo_id, private, exist_ok):
            assert (private, exist_ok) == (True, True)
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id, commit_message):
            assert repo_id == "me/fast"
            assert path_in_repo == CONFIG_NAME
            (tmp_path / CONFIG_NAME).write_bytes(path_or_fileobj)
            return SimpleNamespace(commit_url="https://hub/commit")

    def download(repo_id, filename, **options):
        assert (repo_id, filename, options) == ("me/fast", CONFIG_NAME, {"revision": "main"})
        return str(tmp_path / CONFIG_NAME)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert strategy.push_to_hub("fast", private=True, token="t") == "https://hub/commit"
    assert Strategy.from_pretrained("me/fast", revision="main") == strategy
