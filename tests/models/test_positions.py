# SPDX-License-Identifier: Apache-2.0
"""Positions of packed pictures: any corner and pitch is served, anything else stays dense."""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dit_sparse
from dit_sparse.pipelines import family_by_name
from dit_sparse.pipelines.readers import Ids
from tests import tiny
from tests.models.builders import CASES
from tests.models.case import TEXT, call, ids, make
from tests.models.test_contract import GNA

PICTURE = (1, 6, 8)
NAMES = [
    "FluxTransformer2DModel",
    *(name for name in CASES if "img_ids" in family_by_name(name.split("/")[0]).shape_inputs),
]


@functools.cache
def build(name):
    """Make a model and the arguments of one pass, with positions of any number of columns."""
    if name == "FluxTransformer2DModel":
        inputs = {
            "hidden_states": tiny.normal(1, 48, 4),
            "encoder_hidden_states": tiny.normal(1, TEXT, 32),
            "pooled_projections": tiny.normal(1, 32),
            "timestep": torch.tensor([0.5]),
            "img_ids": ids(PICTURE),
            "txt_ids": torch.zeros(TEXT, 3),
        }
        return tiny.flux()[0].transformer, inputs
    return make(name, CASES[name]), CASES[name].inputs(1)


def shuffled(positions):
    return positions[torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))]


UNUSUAL = {
    "random, as in diffusers' own tests": lambda x: tiny.normal(*x.shape),
    "all the same": torch.zeros_like,
    "in another order": shuffled,
    "from the bottom": lambda x: x.flip(0),
    "column by column": lambda x: x.unflatten(0, PICTURE[1:]).transpose(0, 1).flatten(0, 1),
    "negative": lambda x: -x,
    "NaN": lambda x: torch.full_like(x, torch.nan),
    "of two pictures": lambda x: torch.cat([x[:24] + torch.eye(x.shape[1])[0], x[:24]]),
}


@pytest.mark.parametrize("what", sorted(UNUSUAL))
@pytest.mark.parametrize("name", NAMES)
def test_unusual_positions_stay_dense(name, what):
    model, inputs = build(name)
    inputs = {**inputs, "img_ids": UNUSUAL[what](inputs["img_ids"])}
    stock = call(model, inputs)
    for method, options in (("dense", {}), ("gna", GNA)):
        with dit_sparse.sparse_attention(model, method, **options) as handle:
            handle.at(0, 1)
            assert torch.equal(call(model, inputs).nan_to_num(), stock.nan_to_num())
            (reason,) = handle.report().reasons
            assert "no single grid in the rows and columns in `img_ids`" in reason
            assert handle.report().density == 1
    with dit_sparse.sparse_attention(model, "gna", strict=True, **GNA) as handle:
        handle.at(0, 1)
        with pytest.raises(dit_sparse.GeometryError, match=r"img_ids.*strict"):
            call(model, inputs)
    assert torch.equal(call(model, inputs).nan_to_num(), stock.nan_to_num())


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_may_begin_anywhere(name):
    model, inputs = build(name)
    moved = {**inputs, "img_ids": inputs["img_ids"] * 2 + torch.tensor(512.0)}
    grids = set()
    with dit_sparse.sparse_attention(model, "gna", strict=True, **GNA) as handle:
        handle.watch = lambda described, *_: grids.add(described.grid)
        handle.at(0, 1)
        call(model, moved)
        assert handle.report().density < 1
    assert {(grid.frames, grid.height, grid.width) for grid in grids} == {PICTURE}


@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    text=st.integers(0, 5),
    corner=st.tuples(st.integers(-300, 600), st.integers(-300, 600)),
    pitch=st.sampled_from([0.5, 1.0, 3.0]),
    joint=st.booleans(),
)
def test_sides_are_counted_at_any_corner_and_pitch(height, width, text, corner, pitch, joint):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    sides = torch.stack([rows, columns], -1).flatten(0, 1) * pitch + torch.tensor(corner)
    positions = torch.cat([torch.ones(height * width, 1), sides], 1)
    if joint:
        positions = torch.cat([torch.zeros(text, 3), positions])
    prompt = torch.zeros(1, text, 4)
    inputs = {"img_ids": positions, "encoder_hidden_states": prompt}
    for given_ids in (positions, positions[None].expand(2, -1, -1)):
        inputs["img_ids"] = given_ids
        assert Ids(joint=joint)(None, inputs) == (1, height, width, text)


def test_samples_with_positions_of_their_own_stay_dense():
    positions = torch.stack([ids(PICTURE), ids((1, 8, 6))])
    inputs = {"img_ids": positions, "encoder_hidden_states": torch.zeros(2, 3, 4)}
    assert Ids()(None, inputs) is None


def test_bfloat16_positions_of_a_large_picture_are_read():
    """Beyond 256 neighbours are equal in bfloat16."""
    positions = ids((1, 300, 280)).bfloat16()
    inputs = {"img_ids": positions, "encoder_hidden_states": torch.zeros(1, 3, 4)}
    assert Ids()(None, inputs) == (1, 300, 280, 3)


class Renamed(diffusers.WanTransformer3DModel):
    """A user's own, whose arguments have other names."""

    def forward(self, latents, time, prompt):
        return super().forward(latents, time, prompt)


def test_arguments_that_cannot_be_read_stay_dense():
    model = tiny.wan()[0].transformer
    model.__class__ = Renamed
    inputs = {
        "latents": tiny.normal(1, 16, 3, 8, 12),
        "time": torch.tensor([500]),
        "prompt": tiny.normal(1, 512, 32),
    }
    stock = call(model, inputs)
    with dit_sparse.sparse_attention(model, "gna", **GNA) as handle:
        handle.at(0, 1)
        assert torch.equal(call(model, inputs), stock)
        (reason,) = handle.report().reasons
        assert "KeyError('hidden_states')" in reason
    with dit_sparse.sparse_attention(model, "gna", strict=True, **GNA) as handle:
        handle.at(0, 1)
        with pytest.raises(dit_sparse.GeometryError, match="strict"):
            call(model, inputs)


def test_unusual_positions_stay_dense_in_a_graph():
    model, inputs = build("FluxTransformer2DModel")
    torch.compiler.reset()
    unusual = {**inputs, "img_ids": shuffled(inputs["img_ids"])}
    stock, usual = call(model, unusual), call(model, inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with dit_sparse.sparse_attention(model, "gna", **GNA) as handle:
        for given_inputs, expected, dense in (
            (inputs, usual, False),
            (unusual, stock, True),
            (inputs, usual, False),
        ):
            handle.at(0, 1)
            output = call(compiled, given_inputs)
            assert torch.allclose(output, expected, rtol=0, atol=1e-5) == dense
            reason = handle.report().rows[-1]["reason"]
            assert ("no single grid" in reason) if dense else (reason is None)
    torch.compiler.reset()
