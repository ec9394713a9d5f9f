# SPDX-License-Identifier: Apache-2.0
"""SVG against bands, sinks and row errors written out from token coordinates."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.errors import StrategyError
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.methods.head_bands import band_errors, band_width
from dit_sparse.methods.svg import SVG
from tests.methods.chosen import block_sizes, runs, tokens_kept
from tests.methods.naive import NaiveOps, make_call, masked_attention, run, token_mask

shares = st.sampled_from([0.05, 0.2, 0.4, 0.6, 0.85])


def video_blocks(method, grid, *, temporal):
    """Video tokens of each block, as (token, position, in the sink?), by coordinates alone."""
    video = grid.frames > 1
    sink = method.sink and video
    found = []
    for token, (frame, row, column) in enumerate(
        product(range(grid.frames), range(grid.height), range(grid.width))
    ):
        unit, place = (frame, row * grid.width + column) if video else (row, column)
        units, length = (
            (grid.frames, grid.height * grid.width) if video else (grid.height, grid.width)
        )
        position = place * units + unit if temporal else unit * length + place
        found.append((sink and unit == 0, position, token))
    # The sink's tokens come first: among themselves, and the others, by position.
    found.sort(key=lambda entry: (not entry[0], entry[1]))
    size = method.block_size
    return [found[i : i + size] for i in range(0, len(found), size)]


def kept_by(method, grid, width, *, temporal):
    """Blocks as lists of tokens of the sequence, and which blocks each one keeps."""
    blocks = video_blocks(method, grid, temporal=temporal)
    rows = [
        {
            r
            for r, keys in enumerate(blocks)
            if any(sunk or abs(own - place) < width
                   for _, own, _ in block for sunk, place, _ in keys)
        }
        for block in blocks
    ]  # fmt: skip
    return [[grid.video_start + token for _, _, token in block] for block in blocks], rows


def masks_of(method, call):
    """Token masks of a call all of whose heads are spatial, and all temporal."""
    grid = call.grid
    width = grid.video_tokens - grid.tokens * math.sqrt(1 - method.density)
    width = max(1, math.floor(width + 1e-9))
    batch, _, heads, _ = call.query.shape
    found = []
    for temporal in (False, True):
        blocks, rows = kept_by(method, grid, width, temporal=temporal)
        found.append(tokens_kept(call, blocks, [[rows] * heads] * batch))
    return found


def padded(call):
    """Every key but padded text, for every query."""
    return tokens_kept(call, [], [[[]] * call.query.shape[2]] * call.query.shape[0])


def row_errors(method, call, masks):
    """Mean squared errors of both kinds on the drawn rows: ``[2][batch, heads]``."""
    rows = method.sampled_rows(call.layer, call.step, call.grid.video_tokens)
    rows = rows + call.grid.video_start
    dense, _ = masked_attention(call.query, call.key, call.value, padded(call), call.scale)
    return [
        (masked_attention(call.query, call.key, call.value, mask, call.scale)[0] - dense)[:, rows]
        .square()
        .mean((1, 3))
        for mask in masks
    ]


@given(
    runs(num_steps=3), block_sizes, shares, st.booleans(), st.sampled_from([1, 3, 500]),
    st.integers(1, 2),
)  # fmt: skip
def test_a_run_keeps_what_the_naive_one_keeps(calls, block_size, density, sink, rows, refresh):
    method = SVG(density, sink, rows, refresh, block_size=block_size)
    temporal = None
    for call in calls:
        plan, output = run(method, call, NaiveOps())
        plan.validate()
        masks = masks_of(method, call)
        if call.step % refresh == 0:
            errors = row_errors(method, call, masks)
            temporal = errors[1] < errors[0]
            near = (errors[1] - errors[0]).abs() < 1e-9  # the same blocks, but for rounding
            temporal = torch.where(near, call.state["kinds"].bool(), temporal)
        wanted = torch.where(temporal[..., None, None], masks[1], masks[0])
        batch, tokens, heads, _ = call.query.shape
        assert torch.equal(token_mask(plan, batch, heads, tokens, tokens), wanted)
        right, _ = masked_attention(call.query, call.key, call.value, wanted, call.scale)
        torch.testing.assert_close(output, right)


def structured(grid, *, temporal, seed=0):
    """Make a call whose queries look at keys of their own patch (or of their own frame)."""
    call = make_call(grid, seed, 1, heads=1, num_steps=9)
    random = torch.Generator().manual_seed(seed)
    frame = torch.arange(grid.video_tokens) // grid.frame_tokens
    place = torch.arange(grid.video_tokens) % grid.frame_tokens
    group = place if temporal else frame
    code = torch.nn.functional.normalize(
        torch.randn(int(group.max()) + 1, 8, generator=random, dtype=torch.float64), dim=-1
    )
    span = slice(grid.video_start, grid.video_start + grid.video_tokens)
    for tensor in (call.query, call.key):
        tensor[:, span] = 8 * code[group][None, :, None]
    return call


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("sink", [True, False])
def test_heads_that_look_along_patches_are_found_and_others_too(sink, text_first):
    grid = LatentsGrid(6, 6, 8, 5, text_first)
    method = SVG(0.3, sink, 32, block_size=8)
    one, two = structured(grid, temporal=False), structured(grid, temporal=True)
    for name in ("query", "key", "value"):
        both = torch.cat([getattr(one, name), getattr(two, name)], 2)  # head 0, head 1
        setattr(one, name, torch.cat([both, both.flip(2)]))  # and the other way in sample 1
    one.heads = (0, 1)
    plan, _ = run(method, one, NaiveOps())
    assert one.state["kinds"].tolist() == [[0, 1], [1, 0]]
    assert plan.q_permutation.shape == (2, 2, 293)
    raster = torch.arange(293)
    assert torch.equal(plan.q_permutation[0, 0], raster)
    assert torch.equal(plan.q_permutation[1, 1], raster)
    assert not torch.equal(plan.q_permutation[0, 1], raster)


def test_the_sink_is_the_first_frame_in_both_orders():
    grid = LatentsGrid(5, 4, 8, 3)
    for temporal in (False, True):
        call = structured(grid, temporal=temporal)
        plan, _ = run(SVG(0.2, True, 16, block_size=8), call, NaiveOps())
        assert call.state["kinds"].tolist() == [[int(temporal)]]
        mask = token_mask(plan, 1, 1, 163, 163)[0, 0]
        assert mask[:, :32].all()
        assert not mask[:160, 32:160].all()


def test_rows_are_drawn_over_the_whole_video_and_by_seed_layer_and_step():
    method = SVG(rows=2000)
    rows = method.sampled_rows(3, 4, 75600)
    assert torch.equal(rows, method.sampled_rows(3, 4, 75600))
    for other in ((4, 4), (3, 5)):
        assert not torch.equal(rows, method.sampled_rows(*other, 75600))
    assert not torch.equal(rows, SVG(rows=2000, seed=1).sampled_rows(3, 4, 75600))
    by_frame = (rows // 3600).bincount(minlength=21).double() / 2000
    assert (by_frame - 1 / 21).abs().max() < 0.025  # 5 standard deviations
    assert method.sampled_rows(0, 0, 7).tolist() == list(range(7))
    assert SVG(seed=2**31 - 1).sampled_rows(99, 99, 50).max() < 50


def test_values_that_are_not_finite_do_not_make_heads_temporal():
    call = structured(LatentsGrid(4, 4, 4), temporal=False)
    call.value[:, 5] = torch.nan
    method = SVG(0.3, False, 8, block_size=4)
    method.plan(call, NaiveOps())
    assert call.state["kinds"].tolist() == [[0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_judged_in_fp32(dtype):
    half, wide = (make_call(LatentsGrid(3, 4, 4, 2), 4) for _ in range(2))
    for name in ("query", "key", "value"):
        rounded = getattr(half, name).to(dtype)
        setattr(half, name, rounded)
        setattr(wide, name, rounded.double())
    bands = SVG(0.3, block_size=4).bands(half)
    errors = band_errors(half, bands, torch.arange(48))
    assert errors.dtype == torch.float32
    torch.testing.assert_close(errors.double(), band_errors(wide, bands, torch.arange(48)))
    assert errors.min() > 0


def test_a_choice_lives_for_its_steps_and_bands_are_built_once():
    state, shared = {}, {}
    made = []
    for step in (2, 3, 4, 5, 1):
        call = make_call(LatentsGrid(3, 4, 4), step, step=step, num_steps=9, state=state,
                         shared=shared)  # fmt: skip
        SVG(0.3, refresh=3, block_size=4).plan(call, NaiveOps())
        made.append(state["made"])
        built = [key for key in shared if key[0] == "svg"]
        assert len(built) == 1
    assert made == [2, 2, 2, 5, 1]


# Tokens on each side that the released scripts come to, before they are rounded to blocks of 128:
# down (HunyuanVideo, CogVideoX) or up (Wan, Cosmos).
@pytest.mark.parametrize(
    ("grid", "density", "published", "down"),
    [
        (LatentsGrid(33, 45, 80, 256), 0.25, 15616, True),  # HunyuanVideo 720p
        (LatentsGrid(33, 30, 45, 256), 0.20, 4352, True),  # HunyuanVideo 480 x 720
        (LatentsGrid(11, 48, 85, 226, text_first=True), 0.25, 5760, True),  # CogVideoX 1.5
        (LatentsGrid(21, 45, 80), 0.30, 12416, False),  # Wan 720p
        (LatentsGrid(21, 30, 52), 0.30, 5376, False),  # Wan 480p
        (LatentsGrid(16, 44, 80), 0.25, 7552, False),  # Cosmos
    ],
)
def test_widths_are_the_published_ones(grid, density, published, down):
    blocks = band_width(grid, density) / 128
    assert (math.floor(blocks) if down else math.ceil(blocks)) * 128 == published
    assert band_width(grid, 1.0) == grid.video_tokens
    assert band_width(LatentsGrid(1, 2, 2, 500), 0.1) == 1


@pytest.mark.parametrize("text", [0, 226, 256, 512])
@pytest.mark.parametrize("density", [0.2, 0.25, 0.3, 0.5])
def test_the_window_beside_the_released_codes(text, density):
    grid = LatentsGrid(33, 45, 80, text)
    size, released = grid.tokens, grid.tokens * (1 - (1 - density + 2 * text / grid.tokens) ** 0.5)
    wider = text * ((1 - density) ** -0.5 - 1)  # to first order in text
    assert abs(band_width(grid, density) - released - wider) <= 1 + 2 * text**2 / size
    if (text, density) == (256, 0.25):  # HunyuanVideo at 720p
        assert band_width(grid, density) == 15_694
        assert int(released) // 128 * 128 == 15_616  # what its script runs


@pytest.mark.parametrize(("sink", "published"), [(False, 0.302), (True, 0.340)])
def test_wan_720p_has_the_published_density_and_little_memory(sink, published):
    grid = LatentsGrid(21, 45, 80)
    call = make_call(LatentsGrid(1, 1, 1), heads=2, scale=0.125)
    call.grid = grid
    shape = (1, grid.tokens, 2, 16)
    call.query, call.key, call.value = (torch.randn(shape) for _ in range(3))
    method = SVG(0.3, sink)
    plan = method.plan(call, Backends())
    assert plan.density().mean().item() == pytest.approx(published, abs=0.005)
    # Temporal heads too: the very same count of band pairs, and the sink's.
    bands = method.bands(call)
    pairs = bands.mask.double().mean((1, 2))
    assert pairs[1].item() == pytest.approx(published, abs=0.012)
    assert plan.nbytes < 8 * 2**20


def test_planning_never_reads_the_device():
    grid = LatentsGrid(5, 9, 8, 6)
    call = make_call(LatentsGrid(1, 1, 1))
    call.grid, call.text_valid = grid, torch.empty(2, dtype=torch.int64, device="meta")
    for name in ("query", "key", "value"):  # a tensor without values: reading one raises
        setattr(call, name, torch.empty(2, grid.tokens, 2, 8, device="meta"))
    plan = SVG(0.3, block_size=16).plan(call, NaiveOps())
    assert plan.kv_indices.device.type == "meta"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"density": 0.0}, r"density must lie in \(0, 1\], got 0.0; try 0.3"),
        ({"density": math.nan}, r"density must lie in \(0, 1\], got nan"),
        ({"rows": 0}, "rows must be a whole number in .1, 4096., got 0; try 64"),
        ({"refresh": 0}, "refresh must be a whole number in .1, 1000000., got 0"),
        ({"seed": 2**31}, r"seed must lie in \[0, 2 \*\* 31\), got 2147483648"),
        ({"block_size": 2000}, r"block_size must be a token count in \[1, 1024\], got 2000"),
    ],
)
def test_out_of_range(params, message):
    with pytest.raises(StrategyError, match=message):
        SVG(**params)
