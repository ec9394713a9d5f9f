# SPDX-License-Identifier: Apache-2.0
"""Pictures of plans: what they show is what the plan keeps, read by other means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.core.grid import BlockLayout, LatentsGrid
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import StrategyError
from dit_sparse.inspect import (
    draw_views,
    kept_keys,
    observe_pipeline,
    observe_synthetic,
    views_of,
)
from dit_sparse.inspect.draw import DROPPED, KEPT, MAP, MARGIN, TEXT
from dit_sparse.methods import METHODS
from dit_sparse.methods.params import param_names
from dit_sparse.strategy import Strategy
from tests import tiny
from tests.methods.naive import NaiveOps, make_call, token_mask
from tests.strategies import generator, seeds


@given(seeds, st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.booleans())
def test_kept_keys_are_those_of_the_token_mask(seed, queries, keys, size, permuted):
    """A plan cut from a random token mask is read back to that very mask."""
    random = generator(seed)
    mask = torch.rand(1, 2, queries, keys, generator=random) < 0.3
    mask[..., : queries // 2, : keys // 2] = True  # some whole blocks
    q, kv = (
        BlockLayout.from_lengths([size] * (n // size) + ([n % size] if n % size else []))
        for n in (queries, keys)
    )
    plan = BlockPlan.from_token_mask(mask, q, kv)
    q_order, kv_order = torch.arange(queries), torch.arange(keys)
    if permuted:
        q_order = torch.randperm(queries, generator=random)
        kv_order = torch.randperm(keys, generator=random)
        plan = BlockPlan(
            plan.q, plan.kv, plan.kv_indices, plan.kv_num_blocks,
            partial=plan.partial, tiles=plan.tiles,
            q_permutation=q_order[None, None].expand(1, 2, -1),
            kv_permutation=kv_order[None, None].expand(1, 2, -1),
        )  # fmt: skip
    for head in range(2):
        wanted = torch.zeros(queries, keys, dtype=torch.bool)
        wanted[q_order[:, None], kv_order] = mask[0, head]
        assert torch.equal(kept_keys(plan, 0, head, range(queries)), wanted)


@given(st.sampled_from(["radial", "svg", "svg2", "blade", "pooled"]), seeds, st.integers(0, 5))
def test_views_show_the_plan(name, seed, text):
    grid = LatentsGrid(3, 4, 5, text, text > 2)
    params = {"block_size": 4} if "block_size" in param_names(name) else {}
    method = Strategy.single(name, **params).rules[0].instance
    call = make_call(grid, seed % 1000)
    plan = method.plan(call, NaiveOps())
    mask = token_mask(plan, 1, 2, grid.tokens, grid.tokens)[0]
    views = views_of(plan, [4, 7], name, grid, (1, 2, 3))
    assert [view.head for view in views] == [4, 7]
    for i_head, view in enumerate(views):
        assert view.method == name
        assert view.density == pytest.approx(float(mask[i_head].float().mean()))
        torch.testing.assert_close(view.kept_map, mask[i_head].float())  # as many bins as tokens
        start = grid.video_start
        row = mask[i_head, start + (1 * 4 + 2) * 5 + 3]
        assert torch.equal(view.seen.flatten(), row[start : start + 60])
        assert view.text_seen == (1.0 if text else None)


def test_maps_of_long_sequences_are_shares():
    grid = LatentsGrid(4, 16, 16)
    plan = (
        Strategy.single("gna", window=[1, 5, 5])
        .rules[0]
        .instance.plan(make_call(grid), NaiveOps())
    )
    view = views_of(plan, [0], "gna", grid)[0]
    assert view.kept_map.shape == (192, 192)
    assert float(view.kept_map.mean()) == pytest.approx(view.density, rel=0.1)
    assert int(view.seen.sum()) == 25


def test_the_picture_shows_kept_and_dropped():
    grid = LatentsGrid(2, 2, 2)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    layout = BlockLayout.from_lengths([4, 4])
    plan = BlockPlan.from_token_mask(mask, layout, layout)
    picture = np.asarray(draw_views(views_of(plan, [0], "x", grid), grid, "title", "note"))
    top = MARGIN + 3 * (TEXT + 6) + TEXT + 6
    square = picture[top : top + MAP, MARGIN : MARGIN + MAP]
    assert (square[:, : MAP // 2 - 2] == KEPT).all()
    assert (square[:, MAP // 2 + 2 :] == DROPPED).all()


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"dense"}))
def test_every_method_can_be_drawn(name):
    small = {"block_size": 8} if "block_size" in param_names(name) else {}
    views = observe_synthetic(
        Strategy.single(name, **small),
        LatentsGrid(4, 6, 8, 5),
        heads=3,
        head_dim=16,
        num_layers=2,
        step=4,
        num_steps=6,
    )
    assert [view.head for view in views] == [0, 1, 2]
    assert all(0 < view.density <= 1 for view in views)
    assert views[0].seen.shape == (4, 6, 8)


def test_a_pipeline_is_viewed_as_it_ran_and_left_alone():
    pipe, args = tiny.wan()
    before = tiny.run(pipe, args)
    strategy = Strategy.single("pooled", density=0.3, block_size=8)
    call = args | {"num_inference_steps": 4, "output_type": "latent"}
    views, grid = observe_pipeline(pipe, strategy, call, layer=1, step=2)
    assert grid.tokens == views[0].seen.numel()
    assert [view.head for view in views] == [0, 1]
    assert all(view.density < 0.5 for view in views)
    assert torch.equal(before, tiny.run(pipe, args))
    with pytest.raises(StrategyError, match="layer 9 was not called at step 2"):
        observe_pipeline(pipe, strategy, call, layer=9, step=2)


def cli(*args):
    return CliRunner().invoke(app, ["inspect", *map(str, args)])


def test_command_line(tmp_path):
    path = tmp_path / "svg.png"
    result = cli("svg", "--grid", "3x8x8+6", "--steps", "2", "--token", "1,2,3", "-o", path)
    assert result.exit_code == 0, result.output
    assert "head 3: svg, density" in result.stdout
    result = cli("svg", "radial", "--grid", "3x8x8+6", "--steps", "2", "--heads", "1", "-o", path)
    assert "head 0: svg, density" in result.stdout
    assert "head 0: radial, density" in result.stdout
    with Image.open(path) as picture:
        assert min(picture.size) > 200


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["radial", "--grid", "3x4x5", "--model", "x", "--prompt", "y"],
            "--model and --grid cannot be combined",
        ),
        ([], "nothing to inspect"),
        (["radial", "svg"], "a map shows one strategy"),
        (["radial", "--grid", "0x4x5"], "frames, height, width >= 1"),
        (["radial", "--grid", "99999x99999x99999"], "the maximum is 4,000,000"),
        (["radial", "--grid", "3x4"], "must be FRAMESxHEIGHTxWIDTH"),
        (["radial", "--grid", "3x4x5", "--token", "3,0,0"], "outside the grid"),
        (["radial", "--grid", "3x4x5", "--token", "a"], "must be FRAME,ROW,COLUMN"),
        (["radial", "--grid", "3x4x5", "--layer", "50"], "count from 0"),
        (["dense", "--grid", "3x4x5"], "is dense at step"),
        (["radial", "--model", "samples/wan-tiny"], "--model requires --prompt"),
        (["nothing", "--grid", "3x4x5"], "nothing"),
        (
            ["radial", "svg", "--grid", "3x4x5", "--set", "block_size=8"],
            "--set requires exactly one",
        ),
    ],
)
def test_bad_requests_are_refused(args, words, tmp_path):
    result = cli(*args, "-o", tmp_path / "x.png")
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_only_pictures_and_pages_are_written(tmp_path):
    for name, words in (
        ("x.gif", "must be a .html file, a .png file or a folder"),
        ("no/x.png", "does not exist"),
    ):
        result = cli("radial", "--grid", "3x4x5", "-o", tmp_path / name)
        assert result.exit_code == 2
        assert words in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())
