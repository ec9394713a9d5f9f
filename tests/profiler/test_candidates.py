# SPDX-License-Identifier: Apache-2.0
"""Candidates: what text names them, and that fitting to a grid gives the density aimed at."""

import pytest
import torch

from dit_sparse.core.call import AttentionCall
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.methods import METHODS, method_class
from dit_sparse.profiler.candidates import LEVELS, parse_candidates, presets, resolve
from dit_sparse.profiler.errors import ProfileError
from dit_sparse.profiler.measure import Meter

GRID = LatentsGrid(9, 16, 16)


def density(candidate, grid):
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, grid.tokens, 1, 16, generator=random) for _ in range(3))
    call = AttentionCall(query, key, value, grid, 0.25, heads=(0,), step=0, num_steps=10)
    plan = candidate.instance.plan(call, Backends())
    return float(plan.density().mean())


def test_every_method_is_in_the_default_set_at_three_levels():
    found = parse_candidates("default")
    assert {want.method for want in found} == set(METHODS) - {"dense"}
    for family in {want.family for want in found}:
        assert [want.level for want in found if want.family == family] == list(LEVELS)
    assert "svg2:compensate=means" in {want.family for want in found}


def test_a_density_can_be_named():
    (one,) = parse_candidates("svg2:compensate=means@0.3")
    assert (one.params, one.level) == ({"compensate": "means"}, 0.3)
    assert one.text == "svg2:compensate=means@0.3"
    assert not one.settled
    (other,) = parse_candidates("adaspa@0.3")
    assert other.settled
    assert other.fitted(GRID).params["density"] == 0.3
    assert other.fitted(GRID, 0.2).params["density"] == 0.2


def test_a_bare_name_of_many_patterns_is_what_its_preset_is():
    """And each can be found again by its own name, as in what a search stored."""
    found = parse_candidates("sparse_vdit")
    assert found == parse_candidates("sparse-vdit")
    for want in found:
        assert want in parse_candidates(want.text.rpartition("@")[0] or want.text)
    (listed,) = parse_candidates('sparse_vdit:patterns=["full","skip"]')
    assert listed.params == {"patterns": ["full", "skip"]}


def test_the_preset_has_the_five_patterns():
    found = resolve(parse_candidates("sparse-vdit"), GRID)
    patterns = [candidate.params["patterns"] for candidate in found[:2]]
    assert patterns == ["full", "skip"]
    assert {c.params["patterns"] for c in found} == {
        "full", "skip", "diagonal", "multi_diagonal", "vertical_stripe"
    }  # fmt: skip
    assert [c.keeps_all for c in found].count(True) == 1


def sets_density(name):
    """Whether a method's params decide what it keeps, from its first step on."""
    cls = method_class(name)
    return name != "dense" and not cls.at_start and (cls.static or hasattr(cls, "density"))


@pytest.mark.parametrize("method", sorted(filter(sets_density, METHODS)))
@pytest.mark.parametrize("level", LEVELS)
def test_a_level_is_about_the_density_of_the_plan(method, level):
    wanted = [w for w in parse_candidates("default") if (w.method, w.level) == (method, level)]
    grid = LatentsGrid(24, 16, 16)  # Radial keeps neighbouring frames whole: 70 / 576 here
    for candidate in resolve(tuple(wanted), grid):
        # GNA's windows are rounded to whole tokens and shifted inwards at the borders.
        assert density(candidate, grid) == pytest.approx(level, rel=0.35, abs=0.1)


def test_whole_tiles_err_less_for_the_same_blocks():
    """Why candidates of GNA keep whole tiles: the price is the same, what is seen is more."""
    random = torch.Generator().manual_seed(0)
    grid = LatentsGrid(6, 12, 12)
    place = torch.stack([c.flatten() for c in torch.meshgrid(
        *(torch.arange(side).float() for side in (6, 12, 12)), indexing="ij")], -1)  # fmt: skip
    near = torch.cat([place, torch.randn(grid.tokens, 5, generator=random)], -1)[None, :, None]
    value = torch.randn(1, grid.tokens, 1, 8, generator=random)
    # Scores fall with the squared distance: -|a - b|^2 = 2 a b - |a|^2 - |b|^2.
    key = near.clone()
    query = torch.cat([near[..., :3], near[..., 3:] * 0.1], -1)
    call = AttentionCall(query, key - key.mean(1, keepdim=True), value, grid, 0.5, heads=(0,))
    sizes = ("window=[3,6,6]:stride=[1,1,1]:tile=[2,4,4]", "window=[3,4,4]:tile=[2,4,4]")
    for text in sizes:
        pair = parse_candidates(f"gna:{text}:exact=true,gna:{text}:exact=false")
        _, (exact, whole) = Meter(resolve(pair, grid)).measure(call, 0)
        assert whole.computed == pytest.approx(exact.computed)
        assert whole.partial == 0 < exact.partial
        assert whole.density[0] > exact.density[0]
        assert whole.error[0] < exact.error[0]


def test_levels_of_a_static_method_fall():
    for method in ("radial", "gna"):
        found = [density(c, GRID) for c in resolve(parse_candidates(method), GRID)]
        assert found == sorted(found, reverse=True)
        assert found[0] > found[-1]


def test_choices_that_come_out_the_same_stand_once():
    found = resolve(parse_candidates("radial,gna"), LatentsGrid(2, 4, 4))
    kinds = [(c.method, sorted(map(str, c.params.items()))) for c in found]
    assert all(kinds.count(kind) == 1 for kind in kinds)
    assert len(found) < 2 * len(LEVELS)


def test_params_are_read_and_completed():
    (one,) = resolve(parse_candidates("gna:window=[3,5,5]:exact=false"), GRID)
    assert one.params["window"] == [3, 5, 5]
    assert one.params["exact"] is False
    assert one.name == "gna:window=[3,5,5]:exact=false"
    a, b = resolve(parse_candidates("radial:decay_factor=0.5, adaspa:density=0.25"), GRID)
    assert (a.params["decay_factor"], a.params["block_size"]) == (0.5, 64)
    assert b.params["search_steps"] == [0.0]
    assert b.params["recall_threshold"] == 1.0


def test_a_method_can_be_left_out():
    whole, rest = parse_candidates("default"), parse_candidates("default,-rettention")
    assert [want for want in whole if want.method != "rettention"] == list(rest)
    assert len(whole) - len(rest) == len(LEVELS)
    again = parse_candidates("quick,-radial,radial:decay_factor=0.5")
    assert [want.text for want in again if want.method == "radial"] == ["radial:decay_factor=0.5"]


def test_large_grids_get_large_blocks():
    (one,) = resolve(parse_candidates("pooled:density=0.25"), LatentsGrid(21, 30, 52))
    assert one.params["block_size"] == 128


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "comma-separated methods"),
        (" , ", "comma-separated methods"),
        ("radail", "unknown method or preset"),
        ("dense", "always a choice"),
        ("radial@", "density after @ must be in (0, 1], got ''"),
        ("radial@0", "density after @ must be in (0, 1], got '0'"),
        ("radial@nan", "density after @ must be in (0, 1], got 'nan'"),
        ("adaspa:density=0.25@0.3", "already set the density; remove '@0.3' or the param"),
        ("radial:decay=1", "unknown key 'decay'"),
        ("radial:decay_factor", "KEY=VALUE"),
        ("adaspa:density=2", "density must lie in (0, 1]"),
        ("adaspa:search_steps=[0.2]", "when it begins"),
        ("radial,radial", "duplicate candidate radial"),
        ("quick,radial", "duplicate candidate radial"),
        ("radial,-gna", "no preceding candidate uses this method; preceding methods: radial"),
        ("-gna,gna", "preceding methods: none"),
        ("radial,-radial", "removes every candidate"),
    ],
)
def test_bad_candidates_are_refused(text, words):
    with pytest.raises(ProfileError, match="candidates: ") as refused:
        parse_candidates(text)
    assert words in str(refused.value)


@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize(
    "grid", [GRID, LatentsGrid(1, 13, 9, 17, text_first=True), LatentsGrid(5, 1, 3)]
)
def test_presets_fit_any_grid(preset, grid):
    found = resolve(parse_candidates(preset), grid)
    assert len({candidate.name for candidate in found}) == len(found)
    for candidate in found:
        assert candidate.instance is candidate.instance


@pytest.mark.parametrize(
    ("text", "dense"),
    [("composed:score=mass:select=top_k:refresh=4", 3), ("composed", 0), ("adaspa@0.25", 1)],
)
def test_dense_calls_of_a_band_are_counted(text, dense):
    name, _, level = text.partition("@")
    found = [c for c in resolve(parse_candidates(name), GRID) if not level or level in c.name]
    assert {candidate.dense_steps(9) for candidate in found} == {dense}
