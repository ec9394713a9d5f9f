# SPDX-License-Identifier: Apache-2.0
"""Strategy files: told apart in words, fitted to other grids, and a thousand broken ones."""

import json
import random

import pytest

from dit_sparse.errors import StrategyError
from dit_sparse.grid import LatentsGrid
from dit_sparse.profiler import ProfileError
from dit_sparse.profiler.difference import difference
from dit_sparse.profiler.retile import retile
from dit_sparse.strategy import Grid, Receipt, Rule, Strategy

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
    with pytest.raises(ProfileError, match="grid: names none"):
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
