# SPDX-License-Identifier: Apache-2.0
"""A method in a folder outside of the package: one file, one line, and everything takes it."""

from __future__ import annotations

import inspect
import runpy
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import dit_sparse
from dit_sparse import Strategy, StrategyError, methods
from dit_sparse.cli import app
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.methods import METHODS, method_class
from dit_sparse.methods.params import build_method
from dit_sparse.profiler import Bands, Wish, parse_candidates, profile, resolve
from dit_sparse.profiler.retiling import refit
from dit_sparse.strategy import Grid, Rule
from tests import test_hostile, tiny
from tests.forecast import test_generation
from tests.inspect import test_atlas, test_inspect
from tests.methods import test_contract, test_extremes
from tests.methods.naive import NaiveOps, make_call, token_mask
from tests.parallel import test_parallel
from tests.strategies import latents_grids

PATH = "tests.outside.sliding_tiles:SlidingTiles"
NAME = "sliding_tiles"
EXAMPLE = {"window": [1, 2, 3], "tile": [2, 2, 2]}


@pytest.fixture(autouse=True)
def _registered():
    """Add the one line; the table is as it was afterwards."""
    before = dict(METHODS)
    dit_sparse.register_method(NAME, PATH)
    yield
    METHODS.clear()
    METHODS.update(before)


def oracle(grid, window, tile):
    """Kept pairs of video tokens, from their coordinates alone."""
    sides, ranges = (grid.frames, grid.height, grid.width), []
    for side, extent, size in zip(sides, window, tile, strict=True):
        count = -(-side // size)
        before, after = extent // 2, extent // 2 + extent % 2 - 1
        kept = []
        for i in range(count):
            middle = min(max(i, before), count - 1 - after)
            kept.append({j for j in range(count) if middle - before <= j <= middle + after})
        ranges.append(kept if extent < count else [set(range(count))] * count)
    place = [
        (f // tile[0], r // tile[1], c // tile[2])
        for f in range(sides[0]) for r in range(sides[1]) for c in range(sides[2])
    ]  # fmt: skip
    return torch.tensor(
        [[all(b in near[a] for near, a, b in zip(ranges, p, q, strict=True)) for q in place]
         for p in place]
    )  # fmt: skip


@given(
    latents_grids.filter(lambda size: size[0] * size[1] * size[2] <= 120),
    st.tuples(*[st.integers(1, 5)] * 3), st.tuples(*[st.integers(1, 3)] * 3),
)  # fmt: skip
def test_kept_pairs_are_those_of_the_paper(size, window, tile):
    grid = LatentsGrid(*size, 3)
    method = build_method(NAME, {"window": list(window), "tile": list(tile)})
    plan = method.plan(make_call(grid), NaiveOps()).validate()
    mask = token_mask(plan, 1, 2, grid.tokens, grid.tokens)[0, 0]
    video = grid.video_tokens
    assert torch.equal(mask[:video, :video], oracle(grid, window, tile))
    assert bool(mask[video:].all() and mask[:, video:].all())


DRAWN = {
    "calls": test_contract.generations(),
    "size": latents_grids,
    "density": st.floats(0.01, 1),
    "block_size": st.sampled_from([16, 64, 128]),
    "num_steps": st.sampled_from([1, 2, 4, 8]),
}


def loops():
    """Tests that run for every name of the table, and what else they are drawn."""
    found = []
    for module in (test_contract, test_extremes, test_generation, test_inspect, test_atlas,
                   test_parallel, test_hostile):  # fmt: skip
        for name, test in vars(module).items():
            raw = getattr(getattr(test, "hypothesis", None), "inner_test", test)
            marks = [m.args for m in getattr(test, "pytestmark", ()) if m.name == "parametrize"]
            all_methods = any(key == "name" and "gna" in values for key, values in marks)
            takes = set(inspect.signature(raw).parameters) if name.startswith("test_") else set()
            if "name" in takes <= {"name", "data", *DRAWN} and (all_methods or not marks):
                found.append(pytest.param(raw, takes - {"name"}, id=name))
    return found


@pytest.mark.parametrize(("test", "takes"), loops())
@given(data=st.data())
def test_it_passes_what_ours_pass(test, takes, data):
    drawn = {key: data if key == "data" else data.draw(DRAWN[key]) for key in takes}
    test(name=NAME, **drawn)


def test_it_generates():
    pipe, args = tiny.wan()
    stock = tiny.run(pipe, args)
    with dit_sparse.sparse_attention(pipe, NAME, strict=True, **EXAMPLE) as handle:
        sparse = tiny.run(pipe, args)
        report = handle.report()
    assert 0.1 < report.density < 0.6
    assert sparse.isfinite().all()
    assert not torch.equal(sparse, stock)
    with dit_sparse.sparse_attention(pipe, NAME, strict=True, window=[9, 9, 9], tile=[2, 2, 2]):
        torch.testing.assert_close(tiny.run(pipe, args), stock, rtol=1e-3, atol=1e-4)
    assert torch.equal(tiny.run(pipe, args), stock)


def test_it_is_searched_and_re_tiled(tmp_path):
    pipe, args = tiny.wan()
    found = profile(
        pipe, [args], arguments={"num_inference_steps": 4}, wish=Wish(target=0.9),
        candidates="sliding_tiles:window=[1,2,3]:tile=[2,2,2],pooled:block_size=8:density=0.9",
        bands=Bands((0.0, 1.0)), costs="assumed", check=False, name="own",
    )  # fmt: skip
    assert {rule.method for rule in found.strategy.rules} == {NAME}
    found.strategy.save(tmp_path / "own.json")
    strategy = Strategy.load(tmp_path / "own.json")
    assert strategy == found.strategy
    wider = refit(strategy, LatentsGrid(3, 4, 12))
    assert wider.strategy.rules[0].params["window"] == [1, 2, 6]
    assert any("window [1, 2, 3] -> [1, 2, 6]" in line for line in wider.scaled)
    assert wider.stays == ("sliding_tiles: tile is tokens of a block",)


def test_it_is_in_the_default_preset_at_three_densities():
    grid = LatentsGrid(12, 32, 32)
    own = [c for c in resolve(parse_candidates("default"), grid) if c.method == NAME]
    assert [c.name for c in own] == [f"{NAME}@{level}" for level in (0.5, 0.25, 0.125)]
    kept = [float(c.instance.plan(make_call(grid), None).density().mean()) for c in own]
    assert kept == pytest.approx([0.5, 0.25, 0.125], rel=0.35)


def test_a_method_without_any_trait_does_not_get_in_the_way():
    dit_sparse.register_method("only_a_plan", "tests.outside.only_a_plan:OnlyAPlan")
    found = resolve(parse_candidates("default"), LatentsGrid(3, 8, 8))
    assert [c.name for c in found if c.method == "only_a_plan"] == ["only_a_plan"]
    rules = (Rule(method="only_a_plan"),)
    strategy = Strategy(name="x", grid=Grid(frames=3, height=8, width=8), rules=rules)
    assert "does not state" in refit(strategy, LatentsGrid(3, 8, 16)).stays[0]
    test_generation.test_memory_without_data_is_what_is_remembered_with_data("only_a_plan")


def test_it_can_be_the_mask_of_a_compensating_method():
    method = build_method("rettention", {"mask": NAME, "mask_params": EXAMPLE})
    assert method.block_tokens == 8
    pipe, args = tiny.wan()
    with dit_sparse.sparse_attention(
        pipe, "rettention", strict=True, mask=NAME, mask_params=EXAMPLE
    ) as handle:
        tiny.run(pipe, args)
        assert handle.report().density < 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["methods", NAME], "Tiles along frames, rows and columns"),
        (["forecast", "hunyuan-video", "--strategy", NAME], "counted from plans"),
        (["inspect", NAME, "--grid", "4x6x8", "--set", "window=[1,2,3]", "--set", "tile=[2,2,2]",
          "-o", "x.png"], f"head 0: {NAME}, density"),
        (["inspect", NAME, "--grid", "4x6x8", "-o", "x.html"], ""),
    ],
)  # fmt: skip
def test_the_command_line_takes_it(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert words in " ".join(result.output.split())


def test_it_has_a_page(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs" / "_site"))
    import benchmark_pages
    import method_pages

    docs = Path(__file__).parents[2] / "docs" / "benchmarks"
    assert "arxiv.org/abs/2502.04507" in method_pages.generated(NAME, docs)
    for page in ("methods", "memory"):
        wanted = f"Not measured yet: [`{NAME}`](../methods/{NAME}.md)."
        assert benchmark_pages.pages(docs)[page].endswith(f"{wanted}\n")
    assert method_pages.picture(NAME, LatentsGrid(2, 4, 6)).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("radial", PATH, "method 'radial' is already dit_sparse.methods.radial:Radial"),
        (
            NAME,
            "tests.outside.only_a_plan:OnlyAPlan",
            f"already {PATH}, so it cannot be registered as tests",
        ),
        ("Sliding", PATH, "lower-case letters, digits and underscores.*got 'Sliding'"),
        ("", PATH, "lower-case"),
        ("a=b", PATH, "lower-case"),
        ("own", "own.py", "path must be 'package.module:Class', got 'own.py'"),
        ("own", "own:", "path must be 'package.module:Class'"),
    ],
)
def test_what_cannot_be_registered_is_refused(name, path, words):
    before = dict(METHODS)
    with pytest.raises(StrategyError, match=words):
        dit_sparse.register_method(name, path)
    assert before == METHODS


def test_the_same_line_again_changes_nothing():
    dit_sparse.register_method(NAME, PATH)
    assert METHODS[NAME] == PATH


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no_such_module_here:Own", "no_such_module_here:Own cannot be imported: No module named"),
        ("tests.outside.sliding_tiles:Own", "has no attribute 'Own'"),
        ("pathlib:Path", "pathlib:Path must be a frozen dataclass that inherits from"),
    ],
)
def test_nothing_is_imported_before_it_is_named(path, words):
    dit_sparse.register_method("own", path)
    with pytest.raises(StrategyError, match=words):
        method_class("own")


def test_a_strategy_file_names_methods_and_imports_none():
    plain = {"schema_version": 1, "name": "x", "rules": [{"method": PATH, "params": {}}]}
    with pytest.raises(StrategyError, match=f"unknown method '{PATH}'"):
        Strategy.from_dict(plain)


def declare(folder, **points):
    """Write what pip writes of a package with entry points."""
    info = folder / "own-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    lines = [f"{name} = {path}\n" for name, path in points.items()]
    (info / "entry_points.txt").write_text("[dit_sparse.methods]\n" + "".join(lines))


def test_an_installed_package_declares_a_method(tmp_path, monkeypatch):
    declare(tmp_path, tiles="sliding_tiles:SlidingTiles")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    fresh = runpy.run_path(methods.__file__)  # what runs when the package is imported
    assert fresh["METHODS"]["tiles"] == "sliding_tiles:SlidingTiles"
    assert set(fresh["METHODS"]) - set(METHODS) == {"tiles"}
    assert fresh["method_class"]("tiles").__module__ == "sliding_tiles"


def test_an_installed_package_cannot_take_a_name(tmp_path, monkeypatch):
    declare(tmp_path, radial="sliding_tiles:SlidingTiles")
    monkeypatch.syspath_prepend(str(tmp_path))
    (point,) = entry_points(group="dit_sparse.methods", name="radial")
    with pytest.warns(UserWarning, match="package own: method 'radial' is already dit_sparse"):
        methods._add_declared(point)
    assert METHODS["radial"] == "dit_sparse.methods.radial:Radial"
