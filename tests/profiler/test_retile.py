# SPDX-License-Identifier: Apache-2.0
"""Re-tiling: what is scaled and what stays, and the check by a search at the other size."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.forecast.counted import counted_density
from dit_sparse.methods import METHODS, method_class
from dit_sparse.profiler import Bands, ProfileError, Store, Wish, profile
from dit_sparse.profiler.candidates import Candidate
from dit_sparse.profiler.retiling import refit, retile
from dit_sparse.profiler.search import Cell
from dit_sparse.profiler.stored import Stored, beside, fits, read_stored
from dit_sparse.profiler.table import Row
from dit_sparse.profiler.transfer import judge
from dit_sparse.strategy import Grid, Rule, Strategy, shipped_names
from tests import tiny
from tests.methods.naive import NaiveOps, make_call, token_mask

SIDES = st.tuples(*[st.integers(1, 40)] * 3)


def one_rule(method, params, old, text=0):
    grid = Grid(frames=old[0], height=old[1], width=old[2], text=text)
    return Strategy(name="made", grid=grid, rules=(Rule(method=method, params=params),))


@given(st.data(), SIDES, SIDES)
def test_windows_grow_with_their_axis(data, old, new):
    window = [data.draw(st.integers(1, 2 * side) | st.just(side)) for side in old]
    parts = [data.draw(st.integers(1, 4)) for _ in old]  # often a whole number of strides
    stride = [extent // part or 1 for extent, part in zip(window, parts, strict=True)]
    made, _ = retile(one_rule("gna", {"window": window, "stride": stride}, old), LatentsGrid(*new))
    found = made.rules[0].params["window"]
    for axis in range(3):
        extent, step = window[axis], stride[axis]
        if old[axis] == new[axis]:
            assert found[axis] == extent
        elif extent >= old[axis]:  # it saw the whole axis, and still does
            assert found[axis] >= new[axis]
        else:
            unit = step if extent % step == 0 else 1
            assert found[axis] % unit == 0
            exact = extent * new[axis] / old[axis]
            assert found[axis] == step or abs(found[axis] - exact) <= unit / 2
        assert found[axis] >= step


def test_an_axis_seen_whole_is_seen_whole_after_rounding():
    """7 of 7 is 1.4 strides of 5 of 5: rounding down would cut its ends off."""
    strategy = one_rule("gna", {"window": [5, 6, 4], "stride": [5, 6, 4]}, (5, 6, 8))
    made, _ = retile(strategy, LatentsGrid(7, 9, 14))
    assert made.rules[0].params["window"] == [10, 12, 8]


def test_a_mask_inside_a_method_is_fitted_as_the_mask():
    params = {"mask": "gna", "mask_params": {"window": [1, 8, 16], "tile": [1, 8, 16]}}
    found = refit(one_rule("rettention", params, (1, 64, 64)), LatentsGrid(1, 128, 96))
    assert found.strategy.rules[0].params["mask_params"] == {
        "window": [1, 16, 24], "tile": [1, 8, 16],
    }  # fmt: skip
    assert found.scaled == ("rettention: mask window [1, 8, 16] -> [1, 16, 24] (1 rule)",)
    usual = refit(one_rule("rettention", {"mask": "gna"}, (18, 48, 48)), LatentsGrid(18, 24, 24))
    assert usual.strategy.rules[0].params["mask_params"] == {"window": [18, 12, 12]}
    radial = {"mask": "radial", "mask_params": {"decay_factor": 0.5}}
    made, _ = retile(one_rule("rettention", radial, (3, 8, 8)), LatentsGrid(5, 8, 8))
    assert made.rules[0].params["mask_params"] == {"decay_factor": 0.5}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_our_own_methods_state_why_params_stay(name):
    assert "stays" in vars(method_class(name))


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_strategies_can_be_fitted(name, tmp_path):
    strategy = Strategy.load(name)
    if strategy.grid is None:
        with pytest.raises(ProfileError, match="grid: missing"):
            retile(strategy, LatentsGrid(1, 2, 3))
        return
    old = strategy.grid
    grid = LatentsGrid(max(1, old.frames // 2), old.height // 2 + 1, old.width * 2, old.text)
    found = refit(strategy, grid)
    assert "extrapolated" in found.warnings[0]
    assert not found.strategy.receipt.published
    assert not found.strategy.receipt.measured
    found.strategy.save(tmp_path / "x.json")
    assert Strategy.load(tmp_path / "x.json") == found.strategy
    assert len(found.strategy.rules) == len(strategy.rules)
    for a, b in zip(strategy.rules, found.strategy.rules, strict=True):
        assert (a.layers, a.heads, a.steps, a.stage, a.method) == (
            b.layers, b.heads, b.steps, b.stage, b.method,
        )  # fmt: skip
    same = LatentsGrid(old.frames, old.height, old.width, old.text)
    assert refit(strategy, same).strategy == strategy


def kept_share(method, params, grid):
    """Count kept token pairs, by the oracle that reads a plan token by token."""
    plan = Strategy.single(method, **params).rules[0].instance.plan(make_call(grid), NaiveOps())
    return float(token_mask(plan, 1, 2, grid.tokens, grid.tokens)[0].float().mean())


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("radial", {"decay_factor": 0.1, "block_size": 8, "sink": False}),
        ("gna", {"window": [1, 4, 4], "stride": [1, 2, 2], "tile": [1, 4, 4], "exact": False}),
        ("sparse_vdit", {"diagonal_density": 0.2, "block_size": 8}),
    ],
)
def test_what_static_choices_keep_is_counted_on_both_grids(method, params):
    old, new = LatentsGrid(3, 6, 6), LatentsGrid(7, 9, 8)
    found = refit(one_rule(method, params, (3, 6, 6)), new, count=True)
    now = kept_share(method, found.strategy.rules[0].params, new)
    before = kept_share(method, params, old)
    told = f"keeps {now:.3f} of the pairs, {before:.3f} before (counted)"
    assert abs(now - before) > 0.02
    assert any(told in line for line in found.warnings), (told, found.warnings)


def test_what_reads_the_content_is_not_counted():
    grid = LatentsGrid(3, 6, 6)
    assert counted_density("svg2", {}, grid) == (None, False)
    assert counted_density("pooled", {"density": 0.25, "block_size": 9}, grid) == (0.25, False)
    found = refit(one_rule("xattention", {}, (3, 6, 6)), LatentsGrid(3, 9, 9), count=True)
    assert not any("counted)" in line for line in found.warnings)


def test_a_longer_text_is_told():
    found = refit(one_rule("radial", {}, (3, 6, 6), text=7), LatentsGrid(3, 6, 6, 9))
    assert "re-tiled from 3x6x6+7 to 3x6x6+9 tokens" in found.warnings[0]


# The check: choices looked up in the tables of another search.

BANDS = Bands((0.0, 0.5, 1.0))


def candidate(density, block=9):
    params = {
        "select": "top_k",
        "density": density,
        "top_p": 0.9,
        "floor": 0.0,
        "refresh": 1,
        "compensate": "none",
    }
    return Candidate(f"pooled@{density}", "pooled", {**params, "block_size": block})


def table(seed, layers=2, heads=3, densities=(0.25, 0.5)):
    """Make up what a search measured: columns are dense, then one for each density."""
    draw = np.random.default_rng(seed)
    shape = (heads, 1 + len(densities))
    rows, cells = {}, {}
    for layer in range(layers):
        for band in range(2):
            error = np.concatenate([np.zeros((heads, 1)), draw.random((heads, 2))], 1)
            density = np.broadcast_to([1.0, *densities], shape)
            time = draw.random(shape) + 0.5
            launch = np.array([0.0, 0.125, 0.25])
            key = ("transformer", layer, band)
            row = {"steps": 3, "error": error, "density": density, "computed": density,
                   "recall": density, "power": np.ones(heads), "ordered": (False,) * 3,
                   "partial": (0.0,) * 3}  # fmt: skip
            names = Row.__dataclass_fields__
            row |= {name: density for name in names if name not in row}
            rows[key] = Row(**row)
            cells[key] = Cell(key, 3, error, time, launch)
    options = tuple(candidate(density) for density in densities)
    return Stored(
        None, LatentsGrid(3, 4, 5), 6, layers, heads, BANDS, options, rows, cells, 1, "made up"
    )  # fmt: skip


def chosen(columns, options):
    """Write a table of columns, by (layer, band, head), as a strategy, a rule for each head."""
    rules = [
        Rule(layers=(layer,), heads=(head,), steps=(band / 2, (band + 1) / 2),
             method="pooled", params=options[column - 1].params)
        for (layer, band, head), column in columns.items() if column
    ]  # fmt: skip
    return Strategy(name="x", grid=Grid(frames=3, height=4, width=5), rules=tuple(rules))


@given(st.integers(0, 1000))
def test_choices_are_looked_up(seed):
    stored = table(seed)
    draw = np.random.default_rng(seed + 1)
    columns = {
        (layer, band, head): int(draw.integers(0, 3))
        for layer in range(2)
        for band in range(2)
        for head in range(3)
    }
    found = judge(chosen(columns, stored.candidates), stored)
    error = density = time = dense = 0.0
    for (layer, band, head), column in columns.items():
        key = ("transformer", layer, band)
        error += stored.rows[key].error[head, column] / 12
        density += stored.rows[key].density[head, column] / 12
        time += stored.cells[key].time[head, column]
        dense += stored.cells[key].time[head, 0]
    for layer in range(2):
        for band in range(2):
            used = {columns[layer, band, head] for head in range(3)}
            time += sum([0.0, 0.125, 0.25][column] for column in used)
    assert found.error == pytest.approx(error**0.5)
    assert found.density == pytest.approx(density)
    assert found.time == pytest.approx(time / dense)
    assert found.exact == 1
    assert found.shares.get("dense", 0) == pytest.approx(list(columns.values()).count(0) / 12)


def test_a_choice_that_keeps_all_is_in_the_column_of_dense():
    stored = table(0)
    assert stored.column("dense", {}) == stored.column("sparse_vdit", {"patterns": "full"}) == 0
    assert stored.column("pooled", candidate(0.5).params) == 2
    assert stored.column("radial", {}) is None


def test_what_was_not_measured_is_read_off_between_its_neighbours():
    stored = table(3)
    between = candidate(0.3125)
    columns = {(1, 0, 2): 1}
    strategy = chosen(columns, (between,))
    found = judge(strategy, stored)
    rows, cells = stored.rows["transformer", 1, 0], stored.cells["transformer", 1, 0]
    error = 0.75 * rows.error[2, 1] + 0.25 * rows.error[2, 2]
    assert found.error == pytest.approx((error / 12) ** 0.5)
    assert found.density == pytest.approx((11 + 0.3125) / 12)
    time = 0.75 * cells.time[2, 1] + 0.25 * cells.time[2, 2] + 0.125
    everything = sum(float(cell.time[:, 0].sum()) for cell in stored.cells.values())
    assert found.time == pytest.approx((everything - cells.time[2, 0] + time) / everything)
    assert found.exact == pytest.approx(11 / 12)
    beyond = judge(chosen(columns, (candidate(0.9),)), stored)  # the nearest stands
    assert beyond.density == pytest.approx((11 + 0.5) / 12)
    other = strategy.model_copy(update={"rules": (Rule(method="radial"),)})
    with pytest.raises(ProfileError, match="radial was not among the candidates"):
        judge(other, stored)


CANDIDATES = "pooled:block_size=8:density=0.25,radial:block_size=8:sink=false"


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Search at two sizes of one real pipeline."""
    folder = tmp_path_factory.mktemp("searched")
    pipe, args = tiny.wan()
    tiny.stretch(pipe).set_progress_bar_config(disable=True)
    for name, height in (("small", 64), ("large", 96)):
        found = profile(
            pipe, [{**args, "height": height}], arguments={"num_inference_steps": 4},
            candidates=CANDIDATES, wish=Wish(target=0.6), bands=BANDS, costs="assumed",
            check=False, name=name, store=Store(beside(folder / f"{name}.json")),
        )  # fmt: skip
        found.strategy.save(folder / f"{name}.json")
    return folder


def test_a_search_judged_by_its_own_tables_is_its_receipt(searched):
    strategy = Strategy.load(searched / "small.json")
    stored = read_stored(beside(searched / "small.json"))
    assert stored.grid == LatentsGrid(3, 4, 6)
    assert fits(stored, strategy) is None
    found = judge(strategy, stored)
    measured = strategy.receipt.measured
    assert found.error == pytest.approx(measured["relative_error"], rel=1e-4)
    assert found.density == pytest.approx(measured["density"], rel=1e-4)
    assert found.time == pytest.approx(1 / measured["predicted_attention_speedup"], rel=1e-4)
    assert strategy.rules


def test_measurements_of_another_grid_are_not_taken(searched):
    strategy = Strategy.load(searched / "small.json")
    stored = read_stored(beside(searched / "large.json"))
    assert "the strategy has another grid" in fits(stored, strategy)
    far = strategy.model_copy(update={"rules": (Rule(method="radial", layers=(5,)),)})
    own = read_stored(beside(searched / "small.json"))
    assert "names layer 5" in fits(own, far)
    assert read_stored(searched / "nothing") is None


def cli(*args):
    return CliRunner().invoke(app, ["retile", *map(str, args)])


def test_the_check_compares_with_the_native_search(searched):
    result = cli(searched / "small.json", "--check", searched / "large.json")
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "3 x 4 x 6 -> 3 x 6 x 6 tokens" in words
    stored = read_stored(beside(searched / "large.json"))
    made, _ = retile(Strategy.load(searched / "small.json"), stored.grid)
    for strategy, label in ((made, "re-tiled"), (Strategy.load(searched / "large.json"), "searc")):
        found = judge(strategy, stored)
        assert label in words
        assert f"{found.error:.3f} {found.density:.3f} {found.time:.3f}" in words
    assert not list(searched.glob("*.new"))


def test_the_command_writes_a_file(tmp_path):
    output = tmp_path / "new.json"
    result = cli("wan2.1-14b.720p.svg2", "--height", 480, "--width", 832, "-o", output)
    assert result.exit_code == 0, result.output
    assert "key_clusters 1000 -> 433" in result.stdout
    assert "not measured there" in result.stdout
    assert "top_p and floor are fractions" in result.stdout
    made = Strategy.load(output)
    assert made.grid == Grid(frames=21, height=30, width=52)
    assert made.name == "new"


def test_an_existing_file_is_kept_unless_told(root, tmp_path):
    output = tmp_path / "new.json"
    output.write_text("mine")
    model = ("--model", root / "samples" / "wan-tiny")
    args = ("wan-tiny.radial", *model, "--height", 96, "-o", output)
    again = cli(*args)
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    assert output.read_text() == "mine"
    result = cli(*args, "--overwrite", "--frames", 17)
    assert result.exit_code == 0, result.output
    assert Strategy.load(output).grid == Grid(frames=5, height=12, width=16)
    assert [path.name for path in tmp_path.iterdir()] == ["new.json"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "--height, --width or --frames"),
        (("--height", 99999999), "'--height': .*(less than or equal to |<=)16384"),
        (("--height", 96, "--model", "hunyuan-video"), "made for WanTransformer3DModel"),
        (
            ("--height", 97, "--width", 96, "--model", "wan2.1-1.3b"),
            "does not match the latent grid",
        ),
        (("--height", 96), "the model is unknown"),
        (("--height", 96, "--model", "nowhere"), "unknown model name 'nowhere'"),
    ],
)
def test_bad_sizes_and_models_are_refused(args, words, tmp_path):
    result = cli("wan-tiny.radial", *args, "-o", tmp_path / "x.json")
    assert result.exit_code == 2, result.output
    assert re.search(words, " ".join(result.stderr.replace("│", "").split()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.txt", ".json"),
        ("no/x.json", "does not exist"),
        ("", "is a folder"),
        (None, "-o is missing"),
    ],
)
def test_bad_outputs_are_refused(name, words, tmp_path):
    folder = tmp_path / "a.json"
    folder.mkdir()
    output = () if name is None else ("-o", tmp_path / name if name else folder)
    result = cli("wan-tiny.radial", "--height", 96, *output)
    assert result.exit_code == 2
    assert words in result.stderr


def test_bad_files_are_refused(searched, tmp_path):
    text = (searched / "small.json").read_text()
    data = json.loads(text)
    bad = {
        "truncated": text[:200],
        "unknown key 'widths'": json.dumps({**data, "widths": 1}),
        "is too large": text.replace('"height": 4', '"height": 9' + "9" * 40),
        "1000000": text.replace('"height": 4', '"height": 99999999999'),
    }
    for words, content in bad.items():
        path = tmp_path / "bad.json"
        path.write_text(content)
        result = cli(path, "--height", 96, "-o", tmp_path / "x.json")
        assert result.exit_code == 2, result.output
        assert "bad.json" in result.stderr
        assert words in result.stderr
    for path, words in ((tmp_path, "is a folder"), ("radial", "grid: missing"),
                        (tmp_path / "no.json", "file not found")):  # fmt: skip
        result = cli(path, "--height", 96, "-o", tmp_path / "x.json")
        assert result.exit_code == 2
        assert words in result.stderr
    assert not (tmp_path / "x.json").exists()


def test_a_bad_check_is_refused(searched, tmp_path):
    bare = tmp_path / "bare.json"
    Strategy.load(searched / "large.json").save(bare)
    small = searched / "small.json"
    for check, words in (
        (bare, "no measurements in"),
        (tmp_path / "no.json", "file not found"),
        (tmp_path, "is a folder"),
    ):
        result = cli(small, "--check", check)
        assert result.exit_code == 2, result.output
        assert words in result.stderr
    other = json.loads((searched / "large.json").read_text())
    other["model"]["config_hash"] = "0" * 16
    (tmp_path / "other.json").write_text(json.dumps(other))
    (tmp_path / "other.measured").symlink_to(searched / "large.measured")
    result = cli(small, "--check", tmp_path / "other.json")
    assert result.exit_code == 2
    assert "model does not match" in result.stderr
    unit = tmp_path / "bare.measured"
    unit.mkdir()
    setup = json.loads((searched / "large.measured" / "setup.json").read_text())
    (unit / "setup.json").write_text(json.dumps({**setup, "candidates": ["nothing@0.5"]}))
    (unit / "unit-00000.json").write_text(
        (searched / "large.measured" / "unit-00000.json").read_text()
    )
    result = cli(small, "--check", bare)
    assert result.exit_code == 2
    assert "nothing" in result.stderr
