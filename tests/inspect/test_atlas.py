# SPDX-License-Identifier: Apache-2.0
"""The map: what is known of each head stands at its place, what is not known is said to be so."""

from __future__ import annotations

import base64
import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.errors import StrategyError
from dit_sparse.inspect.atlas import Atlas, Band, Layout, Quantity
from dit_sparse.inspect.colours import RAMPS, UNKNOWN, colour_of, mixed
from dit_sparse.inspect.fill import (
    draw_attention,
    draw_choices,
    draw_run,
    equal_bands,
    model_atlas,
)
from dit_sparse.inspect.mass import attention_mass
from dit_sparse.inspect.observe import observe_run, observe_static
from dit_sparse.inspect.pictures import Pictures, kept_picture, mass_picture, seen_picture
from dit_sparse.inspect.poster import draw_poster
from dit_sparse.inspect.survey import layout_of, strategy_atlas
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.methods import METHODS
from dit_sparse.methods.params import build_method
from dit_sparse.profiler import Bands, Store, Wish, profile
from dit_sparse.profiler.stored import read_stored
from dit_sparse.strategy import Grid, Rule, Strategy
from tests import tiny
from tests.methods.naive import make_call
from tests.strategies import seeds

STEPS = 6


@pytest.fixture(scope="module")
def wan():
    pipe, args = tiny.wan()
    tiny.stretch(pipe).set_progress_bar_config(disable=True)
    return pipe, {**args, "num_inference_steps": STEPS, "output_type": "latent"}


@pytest.fixture(scope="module")
def searched(wan, tmp_path_factory):
    pipe, args = wan
    folder = tmp_path_factory.mktemp("searched") / "s.measured"
    found = profile(
        pipe, [args], candidates="pooled:block_size=8:density=0.25,radial:block_size=8:sink=false",
        bands=Bands((0.0, 0.5, 1.0)), wish=Wish(target=0.5), costs="assumed", check=False,
        store=Store(folder),
    )  # fmt: skip
    return found, read_stored(folder)


def spots(layout):
    """Walk all spots in their order, by plain counting."""
    number = 0
    for stage in layout.stages:
        for band in range(len(layout.bands)):
            for layer in range(layout.layers):
                for head in range(layout.heads):
                    assert layout.spot(stage, band, layer, head) == number
                    yield number, stage, band, layer, head
                    number += 1
    assert number == layout.spots


def test_measured_figures_stand_at_their_spots(searched):
    found, stored = searched
    layout = layout_of(found.strategy, layers=2, heads=2, num_steps=STEPS, stored=stored)
    assert layout.bands == (Band(0, 3, 6), Band(3, 6, 6))
    atlas = strategy_atlas(found.strategy, layout, stored)
    values = {quantity.key: quantity.values for quantity in atlas.quantities}
    names = ["dense", *(c.name for c in found.candidates)]
    assert len({atlas.choices[n].name for n in atlas.choice_of}) > 1
    for spot, stage, band, layer, head in spots(layout):
        column = found.choices[stage, layer, band][head]
        row = found.rows[stage, layer, band]
        assert atlas.choices[atlas.choice_of[spot]].name == names[column]
        assert values["error"][spot] == pytest.approx(row.error[head, column] ** 0.5)
        assert values["density"][spot] == pytest.approx(row.density[head, column])
        assert values["recall"][spot] == pytest.approx(row.recall[head, column])
        cell = stored.cells[stage, layer, band]
        time = cell.time[head, column] / cell.time[head, 0]
        assert values["saved"][spot] == pytest.approx(1 - time)
        assert atlas.candidates.columns["time"][spot][column] == pytest.approx(time, rel=6e-3)
        told = atlas.candidates.columns["error"][spot]
        assert told == pytest.approx(np.sqrt(row.error[head]), rel=6e-3)


def test_without_measurements_nothing_is_guessed():
    strategy = Strategy(
        name="x", grid=Grid(frames=3, height=4, width=4),
        rules=(
            Rule(method="svg2", layers=(0,)),
            Rule(method="pooled", params={"density": 0.25}, layers=(1,), heads=(0,)),
            Rule(method="gna", params={key: [1, 2, 4] for key in ("window", "stride", "tile")},
                 layers=(1,), heads=(1,), steps=(0.5, 1.0)),
        ),
    )  # fmt: skip
    layout = layout_of(strategy, layers=2, heads=2, num_steps=4)
    assert layout.bands == (Band(0, 2, 4), Band(2, 4, 4))
    atlas = strategy_atlas(strategy, layout)
    values = {quantity.key: quantity.values for quantity in atlas.quantities}
    assert values["density"] == [None, None, 0.25, 1.0, None, None, 0.25, 1 / 6]
    assert values["error"] == [None, None, None, 0.0, None, None, None, None]
    assert values["saved"] == values["error"]
    assert atlas.candidates is None
    assert [atlas.choices[n].method for n in atlas.choice_of[-2:]] == ["pooled", "gna"]


EDGE = st.integers(0, 8)


@given(st.lists(st.tuples(EDGE, EDGE, st.integers(0, 2)), max_size=4), st.integers(0, 3))
def test_bands_are_cut_where_something_changes_and_only_there(drawn, warmup):
    rules = [
        Rule(method="radial", layers=(layer,), steps=(min(a, b) / 8, max(a, b) / 8))
        for a, b, layer in drawn
        if a != b
    ]
    strategy = Strategy(name="x", rules=tuple(rules)).with_options(dense_warmup_steps=warmup)

    def sparse(step):
        return [
            step >= warmup
            and any(min(a, b) <= step < max(a, b) and own == layer for a, b, own in drawn)
            for layer in range(3)
        ]

    bands = layout_of(strategy, layers=3, heads=1, num_steps=8).bands
    assert [step for band in bands for step in range(band.start, band.stop)] == list(range(8))
    for band in bands:
        assert all(sparse(step) == sparse(band.start) for step in range(band.start, band.stop))
    for one, other in pairwise(bands):
        assert sparse(one.start) != sparse(other.start)


@given(st.integers(1, 20), st.integers(1, 60))
def test_equal_bands_cover_the_run(count, steps):
    bands = equal_bands(count, steps)
    assert [step for band in bands for step in range(band.start, band.stop)] == list(range(steps))
    sizes = [band.stop - band.start for band in bands]
    assert len(bands) == min(count, steps)
    assert max(sizes) - min(sizes) <= 1


@given(seeds, st.integers(0, 9), st.booleans(), st.integers(1, 2))
def test_the_attention_map_is_the_softmax(seed, text, first, batch):
    """Against the whole softmax in float64; blocks of 64, the last one short, text apart."""
    grid = LatentsGrid(2, 9, 10, text, first and text > 0)
    call = make_call(grid, seed % 1000, batch=batch)
    found = attention_mass(call, Backends())
    scores = torch.einsum("bqhd,bkhd->bhqk", call.query, call.key) * call.scale
    weight = scores.softmax(-1).mean(0)  # [heads, queries, keys]
    cuts = [64, 64, 52] if not text else ([text, 64, 64, 52] if first else [64, 64, 52, text])
    for head, mass in enumerate(found):
        parts = [p.split(cuts, 1) for p in weight[head].split(cuts)]
        wanted = torch.tensor([[float(k.sum()) / k.shape[0] for k in row] for row in parts])
        torch.testing.assert_close(mass.map.float(), wanted.float(), atol=1e-5, rtol=1e-4)
        ranked = wanted.double().sort(1, descending=True).values
        for share, told in zip((0.125, 0.25, 0.5), mass.heaviest, strict=True):
            blocks = max(1, round(share * len(cuts)))
            assert told == pytest.approx(float(ranked[:, :blocks].sum(1).mean()), abs=1e-5)
        if not text:
            assert mass.text is None
            continue
        column = 0 if first else len(cuts) - 1
        rows = [i for i in range(len(cuts)) if i != column]
        assert mass.text == pytest.approx(float(wanted[rows, column].mean()), abs=1e-5)


def pixels(address):
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_pictures_show_what_they_are_given():
    kept = torch.zeros(8, 8)
    kept[:4, :2] = 1
    found = pixels(kept_picture(kept))
    dark = found.sum(-1) < 400
    assert dark.shape == (8, 8)
    assert torch.equal(torch.from_numpy(dark), kept.bool())
    seen = torch.zeros(3, 4, 5, dtype=torch.bool)
    seen[1, 2:, 3:] = True
    found = pixels(seen_picture(seen))
    assert found.shape[:2] == (4, 3 * 5 + 2)
    dark = found.sum(-1) < 400
    assert dark.sum() == 4
    assert dark[2:, 6 + 3 : 6 + 5].all()
    assert (found[:, 5] == 255).all()  # between two frames
    mass = torch.full((6, 6), 0.01)
    mass[2, 4] = 0.5
    found = pixels(mass_picture(mass))
    assert np.argmax(np.abs(found - found[0, 0]).sum(-1)) == 2 * 6 + 4
    big = pixels(kept_picture(torch.eye(192)))
    assert big.shape[:2] == (48, 48)
    assert (np.diagonal(big.sum(-1)) < big.sum(-1)[0, 20]).all()


def test_equal_pictures_are_kept_once_and_within_a_budget():
    pictures = Pictures(budget=100)
    assert pictures.add("a" * 60) == 0
    assert pictures.add("b" * 50) is None
    assert pictures.left_out == 1
    assert pictures.add("a" * 60) == 0
    assert pictures.add("c" * 40) == 1
    assert sum(map(len, pictures.addresses)) <= 100


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"dense"}))
def test_static_methods_are_drawn_exactly_and_others_said_to_be_made_up(name):
    params = Strategy.single(name).rules[0].params
    if "block_size" in params:
        params = {**params, "block_size": 8}
    grid = LatentsGrid(3, 6, 6, 4)
    atlas = strategy_atlas(
        Strategy.single(name, **params), Layout(("transformer",), (Band(0, 4, 4),), 1, 2)
    )
    draw_choices(atlas, grid)
    (choice,) = atlas.choices
    views = observe_static(name, params, grid, 2)
    method = build_method(name, params)
    assert (views is None) == (not (method.inner or method).static)
    assert ("synthetic" in choice.why) == (views is None)
    assert ("its mask" in choice.why) == (method.inner is not None)
    assert choice.kept is not None
    assert choice.seen is not None


def test_heads_with_patterns_of_their_own_are_drawn_apart():
    params = {"patterns": ["diagonal", "full"], "block_size": 8, "diagonal_density": 0.2}
    strategy = Strategy.single("sparse_vdit", **params)
    atlas = strategy_atlas(strategy, Layout(("transformer",), (Band(0, 4, 4),), 2, 2))
    draw_choices(atlas, LatentsGrid(3, 6, 6))
    assert atlas.kept[0] == atlas.kept[2] != atlas.kept[1] == atlas.kept[3]
    addresses = atlas.pictures.addresses
    light = [pixels(addresses[atlas.kept[spot]]).sum(-1).max() for spot in (0, 1)]
    assert light[0] > light[1]  # head 1 keeps everything: nothing is left light


def test_a_large_grid_of_a_dynamic_method_is_not_drawn():
    atlas = strategy_atlas(
        Strategy.single("svg2"), Layout(("transformer",), (Band(0, 4, 4),), 1, 1)
    )
    draw_choices(atlas, LatentsGrid(21, 45, 80))
    assert atlas.choices[0].kept is None
    assert "--model" in atlas.choices[0].why


def test_a_run_is_drawn_as_it_ran_and_the_pipeline_left_alone(wan):
    pipe, args = wan
    before = tiny.run(pipe, args)

    def call():
        return args | {"generator": torch.Generator().manual_seed(0)}

    strategy = Strategy.single("pooled", density=0.3, block_size=8, dense_layers=[0])
    layout = layout_of(strategy, layers=2, heads=2, num_steps=STEPS)
    atlas = strategy_atlas(strategy, layout)
    assert str(draw_attention(atlas, pipe, call())) == "3 x 4 x 6"
    draw_run(atlas, pipe, strategy, call())
    assert sorted(atlas.attention) == [0, 1, 2, 3]
    assert sorted(atlas.kept) == sorted(atlas.seen) == [2, 3]  # layer 0 is dense
    top = next(q for q in atlas.quantities if q.key == "top0.5")
    assert all(0.5 < value <= 1 for value in top.values)
    assert torch.equal(tiny.run(pipe, args), before)
    plain = model_atlas("x", Layout(("transformer",), equal_bands(3, STEPS), 2, 2))
    draw_attention(plain, pipe, call())
    assert sorted(plain.attention) == list(range(12))


def test_only_the_conditional_pass_is_looked_at(wan):
    pipe, args = wan
    seen = []

    def look(call, plan, method):
        seen.append((call.step, call.branch, call.layer, plan, method))

    assert observe_run(pipe, Strategy.single("dense"), args, {2}, look) == STEPS
    assert seen == [(2, "cond", 0, None, "dense"), (2, "cond", 1, None, "dense")]
    with pytest.raises(
        StrategyError, match=r"no attention call was observed at steps \[9\].*6 steps"
    ):
        observe_run(pipe, Strategy.single("dense"), args, {9}, look)


def test_the_poster_has_each_heads_colour(searched):
    found, stored = searched
    layout = layout_of(found.strategy, layers=2, heads=2, num_steps=STEPS, stored=stored)
    atlas = strategy_atlas(found.strategy, layout, stored)
    seen = {tuple(c) for c in np.asarray(draw_poster(atlas)).reshape(-1, 3)}
    for number in set(atlas.choice_of):
        colour = colour_of(atlas.choices[number].method)
        assert tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) in seen
    density, error = atlas.quantities[:2]
    for quantity in (density, error):
        for value in quantity.values:
            assert mixed(RAMPS["low"], value / quantity.top) in seen
    atlas.quantities = [Quantity("x", "x", [None, *density.values[1:]])]
    seen = {tuple(c) for c in np.asarray(draw_poster(atlas)).reshape(-1, 3)}
    assert tuple(int(UNKNOWN[i : i + 2], 16) for i in (1, 3, 5)) in seen


def test_colours_tell_methods_apart():
    assert len({colour_of(name) for name in METHODS}) == len(METHODS)
    assert mixed(RAMPS["high"], 0) == tuple(RAMPS["high"][0])
    assert mixed(RAMPS["high"], 2.0) == tuple(RAMPS["high"][-1])


def test_an_empty_scale_is_whole():
    layout = Layout(("transformer",), (Band(0, 1, 1),), 1, 2)
    assert Quantity("a", "a", [None, 0.0]).top == 1.0
    assert Quantity("a", "a", [0.25, None]).top == 0.25
    assert Quantity("a", "a", [0.25, None], share=True).top == 1.0
    assert draw_poster(Atlas("x", [], layout, [Quantity("a", "a", [None, 0.0])])).width > 0
