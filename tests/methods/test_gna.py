# SPDX-License-Identifier: Apache-2.0
"""GNA's plans against its rule, written out from token coordinates alone."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.errors import StrategyError
from dit_sparse.kernels import reference
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.methods import gna
from dit_sparse.methods.gna import GNA
from dit_sparse.methods.params import build_method
from dit_sparse.methods.rettention import Rettention
from dit_sparse.methods.windows import AxisRule
from tests.methods.chosen import valid_keys
from tests.methods.naive import NaiveOps, make_call, masked_attention
from tests.strategies import text_lengths, valid_text_lengths

sizes = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 8))
tiles = st.sampled_from([(1, 1, 1), (2, 2, 2), (1, 2, 4), (3, 1, 2), (2, 3, 1), (4, 4, 8)])


@st.composite
def windows(draw):
    """Draw window, stride and dilation; many exceed the grid."""
    window = draw(st.tuples(*[st.integers(1, 6)] * 3))
    stride = tuple(draw(st.integers(1, extent)) for extent in window)
    return window, stride, draw(st.tuples(*[st.integers(1, 3)] * 3))


class Exact(NaiveOps):
    """Ops in float64 that read bit tiles too: through the reference kernel."""

    def attend(self, query, key, value, plan, scale):
        return reference.attend(query, key, value, plan, scale)


def seen(x, extent, window, stride, dilation):
    """Coordinates of one axis that ``x`` sees, cut to the axis as the docstring says."""
    dilation = min(dilation, extent)
    window = min(window, extent // dilation)
    stride = min(stride, window)
    group = [y for y in range(extent) if y % dilation == x % dilation]
    run = [i for i in range(len(group)) if i // stride == group.index(x) // stride]
    leader = run[0] + stride // 2
    while leader not in range(len(group)):
        leader -= 1
    first = leader - window // 2
    while first < 0:
        first += 1
    while first + window > len(group):
        first -= 1
    return group[first : first + window]


def oracle(method, call, i_batch):
    """Which pairs are kept in one sample: bool ``[tokens, tokens]``."""
    grid = call.grid
    extents = (grid.frames, grid.height, grid.width)
    shape = list(zip(extents, method.window, method.stride, method.dilation, strict=True))
    living = valid_keys(call, i_batch)
    video = range(grid.video_start, grid.video_start + grid.video_tokens)
    mask = torch.zeros(grid.tokens, grid.tokens, dtype=torch.bool)
    for token in range(grid.tokens):
        mask[token, [key for key in living if token not in video or key not in video]] = True
    for token, place in zip(video, product(*map(range, extents)), strict=True):
        axes = [seen(x, *axis) for x, axis in zip(place, shape, strict=True)]
        keys = [(t * grid.height + y) * grid.width + x for t, y, x in product(*axes)]
        mask[token, [key + grid.video_start for key in keys]] = True
    return mask


def drawn_call(data, size, heads=2, **fields):
    text, first = data.draw(text_lengths), data.draw(st.booleans())
    batch = data.draw(st.integers(1, 2))
    valid = (
        data.draw(valid_text_lengths(text, batch)) if text and data.draw(st.booleans()) else None
    )
    padding = None if valid is None else torch.tensor(valid)
    return make_call(
        LatentsGrid(*size, text, first), 3, batch, heads, text_valid=padding, **fields
    )


@given(sizes, windows(), tiles, st.data())
def test_kept_pairs_are_those_of_the_rule(size, rule, tile, data):
    method = GNA(*rule, tile)
    call = drawn_call(data, size)
    plan = method.plan(call, Exact()).validate()
    batch, tokens = call.query.shape[:2]
    assert plan.query_length == plan.key_length == tokens
    assert plan.heads == 1
    for i_batch in range(batch):
        wanted = oracle(method, call, i_batch)
        found, _ = reference.token_mask(plan, i_batch, 0)
        assert torch.equal(found, wanted)
        share = wanted.sum() / (tokens * len(valid_keys(call, i_batch)))
        density = plan.density().expand(batch, 1)[i_batch, 0]
        torch.testing.assert_close(density, share.double())


@given(sizes, windows(), tiles, st.data())
def test_the_result_is_attention_over_the_kept_pairs(size, rule, tile, data):
    method = GNA(*rule, tile)
    call = drawn_call(data, size)
    plan = method.plan(call, Exact())
    output, lse = Backends("cpu").attend(call.query, call.key, call.value, plan, call.scale)
    mask = torch.stack([oracle(method, call, b) for b in range(len(output))])[:, None]
    wanted, wanted_lse = masked_attention(call.query, call.key, call.value, mask, call.scale)
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


@given(sizes, windows(), tiles, st.data())
def test_whole_blocks_keep_a_superset_and_no_other_blocks(size, rule, tile, data):
    call = drawn_call(data, size)
    exact = GNA(*rule, tile).plan(call, None)
    whole = GNA(*rule, tile, exact=False).plan(call, None)
    assert whole.partial is None
    if not whole.complete and not exact.complete:
        assert torch.equal(exact.block_mask(), whole.block_mask())
    assert bool((whole.density() >= exact.density()).all())


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20), st.integers(1, 6))
def test_every_coordinate_sees_exactly_the_window(extent, window, stride, dilation):
    dilation = min(dilation, extent)
    window = min(window, extent // dilation)
    first, last = AxisRule(extent, window, min(stride, window), dilation).windows()
    assert bool((last - first + 1 == window).all())
    place = torch.arange(extent) // dilation
    assert bool(((first <= place) & (place <= last)).all())  # itself among them
    for x, (low, high) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        group = seen(x, extent, window, stride, dilation)
        assert [y // dilation for y in (group[0], group[-1])] == [low, high]


@given(sizes, tiles, st.data())
def test_a_window_as_large_as_the_grid_or_larger_is_dense(size, tile, data):
    more = data.draw(st.tuples(*[st.integers(0, 3)] * 3))
    window = tuple(n + m for n, m in zip(size, more, strict=True))
    stride = tuple(data.draw(st.integers(1, extent)) for extent in window)
    method = GNA(window, stride, tile=tile)
    call = drawn_call(data, size)
    plan = method.plan(call, None).validate()
    assert plan.complete
    assert bool((plan.density() == 1).all())
    living = torch.stack(
        [
            torch.zeros(call.grid.tokens).index_fill_(0, torch.tensor(valid_keys(call, b)), 1)
            for b in range(call.query.shape[0])
        ]
    ).bool()[:, None, None]
    output, _ = Exact().attend(call.query, call.key, call.value, plan, call.scale)
    wanted, _ = masked_attention(call.query, call.key, call.value, living, call.scale)
    torch.testing.assert_close(output, wanted)


@given(sizes, windows(), tiles, st.integers(0, 2))
def test_a_wider_window_keeps_no_fewer_pairs(size, rule, tile, axis):
    window, stride, dilation = rule
    wider = tuple(extent + 2 * (i == axis) for i, extent in enumerate(window))
    call = make_call(LatentsGrid(*size))
    narrow, wide = (GNA(w, stride, dilation, tile).plan(call, None) for w in (window, wider))
    assert bool((wide.density() >= narrow.density()).all())
    if set(stride) == {1}:  # then also a superset
        kept = [reference.token_mask(plan, 0, 0)[0] for plan in (narrow, wide)]
        assert bool((kept[0] <= kept[1]).all())


@given(windows())
def test_density_without_text_is_the_windows_share_whatever_the_stride(rule):
    window, stride, dilation = rule
    size = (7, 11, 13)
    plan = GNA(window, stride, dilation, (2, 2, 2)).plan(make_call(LatentsGrid(*size)), None)
    cut = [min(w, n // d) for w, n, d in zip(window, size, dilation, strict=True)]
    assert float(plan.density()) == pytest.approx(math.prod(cut) / math.prod(size), abs=1e-12)


@pytest.mark.parametrize("size", [(6, 10, 8), (3, 15, 16)])
def test_stride_equal_to_the_tile_is_sliding_tile_attention(size):
    # Tiles divide the grid and windows are odd numbers of tiles: no block is cut.
    tile, reach = (3, 5, 4), (1, 3, 3)
    window = tuple(t * r for t, r in zip(tile, reach, strict=True))
    method = GNA(window, tuple(map(min, tile, window)), tile=tile)
    plan = method.plan(make_call(LatentsGrid(*size)), None)
    assert plan.partial is None
    counts = [n // t for n, t in zip(size, tile, strict=True)]
    boxes = list(product(*map(range, counts)))

    def near(one, two):
        for a, b, r, count in zip(one, two, reach, counts, strict=True):
            half = min(r, count) // 2
            center = min(max(a, half), count - 1 - half) if r < count else a
            if r < count and abs(center - b) > half:
                return False
        return True

    wanted = torch.tensor([[near(one, two) for two in boxes] for one in boxes])
    assert plan.complete or torch.equal(plan.block_mask()[0, 0], wanted)
    assert not wanted.all()


@pytest.mark.parametrize(("tiles", "side", "reach"), [(6, 4, 4), (6, 4, 2), (5, 3, 2), (7, 6, 4)])
def test_an_even_number_of_tiles_is_not_sliding_tile_attention(tiles, side, reach):
    # STA keeps whole tiles, reach // 2 of them before the query's; GNA begins half a tile off.
    extent = tiles * side
    first, last = AxisRule(extent, reach * side, side, 1).windows()
    middle = range(reach // 2, tiles - reach // 2)
    sliding = [(tile - reach // 2) * side for tile in middle]
    ours = [int(first[tile * side]) for tile in middle]
    assert ours == [start + side // 2 for start in sliding]
    assert bool((last - first + 1 == reach * side).all())
    method = GNA((1, 1, reach * side), (1, 1, side), tile=(1, 1, side))
    assert method.plan(make_call(LatentsGrid(1, 1, extent)), None).partial is not None


def test_stride_equal_to_the_window_is_blocked_attention():
    plan = GNA((2, 3, 4), (2, 3, 4), tile=(2, 3, 4)).plan(make_call(LatentsGrid(4, 6, 8)), None)
    assert plan.partial is None
    assert torch.equal(plan.block_mask()[0, 0], torch.eye(8).bool())


@pytest.mark.parametrize(
    ("size", "window", "stride", "tile", "speed"),
    [
        ((1, 256, 256), (1, 80, 80), (1, 16, 16), (1, 16, 16), 10.24),  # FLUX 4K
        ((21, 45, 80), (9, 25, 24), (3, 5, 8), (3, 5, 8), 14.0),  # Wan 720p
        ((21, 45, 80), (9, 15, 24), (3, 5, 8), (3, 5, 8), 70 / 3),
        ((21, 30, 52), (9, 10, 20), (3, 10, 4), (3, 10, 4), 18.2),  # Wan 480p
    ],
)
def test_aligned_windows_reach_their_bound(size, window, stride, tile, speed):
    # facts: windows and tiles that are perfectly block-sparse, and their bounds.
    call = make_call(LatentsGrid(2, 1, 1))
    call.grid = LatentsGrid(*size)
    plan = GNA(window, stride, tile=tile).plan(call, None)
    assert plan.partial is None
    assert plan.kv.blocks / int(plan.kv_num_blocks.max()) == pytest.approx(speed, abs=0.005)
    assert 1 / float(plan.density()) == pytest.approx(speed, abs=0.005)


@pytest.mark.parametrize(
    ("size", "tile", "fitted"),
    [
        ((33, 45, 80), (4, 4, 8), (4, 4, 8)),
        ((1, 64, 64), (4, 4, 8), (1, 8, 16)),
        ((2, 64, 64), (4, 4, 8), (2, 8, 8)),
        ((1, 64, 64), (3, 5, 8), (1, 10, 8)),
        ((1, 5, 300), (4, 4, 8), (1, 4, 32)),
        ((30, 1, 1), (4, 4, 8), (16, 1, 1)),
        ((1, 1, 1), (4, 4, 8), (1, 1, 1)),
    ],
)
def test_the_tile_is_fitted_to_the_grid(size, tile, fitted):
    assert GNA(tile=tile).fitted(LatentsGrid(*size))[3] == fitted


def test_hunyuan_720p_holds_lists_and_few_tiles():
    call = make_call(LatentsGrid(2, 1, 1))
    call.grid = LatentsGrid(33, 45, 80, 256)  # nothing divides 33 and 45
    plan = GNA().plan(call, None)
    assert plan.nbytes < 16 * 2**20
    assert len(plan.tiles) < 1000
    video = 18 * 24 * 24 / (33 * 45 * 80)
    wanted = (33 * 45 * 80 * (video * 33 * 45 * 80 + 256) + 256 * call.grid.tokens) / (
        call.grid.tokens**2
    )
    assert float(plan.density()) == pytest.approx(wanted, rel=1e-9)


def test_one_long_axis_holds_no_coordinates_by_coordinates():
    call = make_call(LatentsGrid(2, 1, 1))
    call.grid = LatentsGrid(1, 1, 100_000)
    plan = GNA((1, 1, 1000)).plan(call, None)
    assert plan.kv.blocks == 782
    assert len(plan.tiles) < 600
    assert float(plan.density()) == pytest.approx(0.01)


def test_built_once_per_geometry(monkeypatch):
    built = []
    original = gna.product_plan
    monkeypatch.setattr(gna, "product_plan", lambda *a, **b: built.append(1) or original(*a, **b))
    shared, method = {}, GNA((3, 3, 3))
    for step, layer in product(range(3), range(4)):
        valid = torch.tensor([step])  # another prompt's padding needs no new plan
        grid = LatentsGrid(4, 5, 6, 5)
        method.plan(make_call(grid, layer=layer, step=step, text_valid=valid, shared=shared), None)
    assert len(built) == 1
    method.plan(make_call(LatentsGrid(4, 5, 7, 5), shared=shared), None)
    assert len(built) == 2


@pytest.mark.parametrize("valid", [None, torch.tensor([3, 5])])
def test_planning_never_waits_for_the_device(valid):
    # A meta tensor has no values: whatever read one would raise.
    call = make_call(LatentsGrid(4, 5, 6, 7), batch=2, heads=5)
    call.query, call.key, call.value = (x.to("meta") for x in (call.query, call.key, call.value))
    call.text_valid = None if valid is None else valid.to("meta")
    plan = GNA((2, 3, 3), tile=(2, 2, 2)).plan(call, None)
    assert plan.device.type == "meta"
    assert plan.query_length == call.grid.tokens


@given(sizes, windows(), st.data())
def test_as_the_mask_of_rettention(size, rule, data):
    params = dict(zip(("window", "stride", "dilation"), rule, strict=True)) | {"tile": (2, 2, 2)}
    method = Rettention("gna", params, refresh=3, ramp=0.04)
    state, first = {}, None
    call = drawn_call(data, size, step=0, num_steps=9, state=state)
    batch, _, heads, _ = call.query.shape
    mask = torch.stack([oracle(build_method("gna", params), call, b) for b in range(batch)])[
        :, None
    ]
    video = slice(call.grid.video_start, call.grid.video_start + call.grid.video_tokens)
    for step in range(5):
        call = make_call(
            call.grid, 7 + step, batch, heads, step=step, num_steps=9, state=state,
            text_valid=call.text_valid, shared=call.shared,
        )  # fmt: skip
        plan = method.plan(call, Exact())
        output, lse = Exact().attend(call.query, call.key, call.value, plan, call.scale)
        output = method.finish(call, output, lse, Exact())
        q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        living = torch.zeros(batch, 1, 1, call.grid.tokens, dtype=torch.bool)
        for b in range(batch):
            living[b, ..., valid_keys(call, b)] = True
        weight = (q @ k.transpose(-1, -2) * call.scale).exp() * living
        kept = weight * mask
        own = kept / kept.sum(-1, keepdim=True) @ v
        if step in {0, 3}:
            first = step
            ratio = kept.sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)
            dropped = (weight - kept) / weight.sum(-1, keepdim=True) @ v
            wanted = weight / weight.sum(-1, keepdim=True) @ v
        else:
            share = (ratio + (step - first - 1) * 0.04).clamp(max=1)
            wanted = own.clone()
            wanted[:, :, video] = (share * own + dropped)[:, :, video]
        torch.testing.assert_close(output, wanted.transpose(1, 2))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"window": (3, 3)},
            r"window must contain three counts .*got \[3, 3\]; try \[18, 24, 24\]",
        ),
        ({"window": (3, 0, 3)}, r"window must contain three counts from 1 to 1000000"),
        ({"dilation": (0, 1, 1)}, r"dilation must contain three counts from 1 to 1000000"),
        ({"stride": (1, 1)}, r"stride must contain three counts"),
        ({"stride": (1, 25, 1)}, r"stride must not exceed window .*got \[1, 25, 1\]"),
        ({"tile": (16, 16, 16)}, r"tile must contain at most 1024 tokens, .* = 4096; try"),
        ({"tile": (4, 4, -8)}, r"tile must contain three counts from 1 to 1000000"),
    ],
)
def test_bad_params(params, message):
    with pytest.raises(StrategyError, match=message):
        GNA(**params)
