# SPDX-License-Identifier: Apache-2.0
"""Sparse-vDiT's patterns against masks written out from token coordinates alone."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dit_sparse
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.errors import StrategyError
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.methods.sparse_vdit import PATTERNS, SparseVDiT
from dit_sparse.strategy import Strategy
from tests import tiny
from tests.methods.chosen import block_sizes, valid_keys
from tests.methods.naive import NaiveOps, make_call, masked_attention, run, token_mask
from tests.strategies import text_lengths, valid_text_lengths

sizes = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 6))
patterns = st.sampled_from(PATTERNS)
shares = st.sampled_from(["0.05", "0.19", "0.36", "0.51", "0.75", "1.0"])
spans = st.lists(
    st.sampled_from([("0", "0.1"), ("0.25", "0.5"), ("0.9", "1"), ("0.5", "0.501")]),
    min_size=1, max_size=2,
)  # fmt: skip


def order_of(grid, pattern):
    """Video tokens in the pattern's order."""
    place = list(product(range(grid.frames), range(grid.height), range(grid.width)))
    numbers = range(grid.video_tokens)
    if pattern != "multi_diagonal":
        return list(numbers)
    if grid.frames > 1:
        return sorted(numbers, key=lambda n: (place[n][1], place[n][2], place[n][0]))
    return sorted(numbers, key=lambda n: (place[n][2], place[n][1]))


def width_of(share, tokens):
    """Largest w for which a band keeps at most the share: (n - w)^2 >= (1 - share) n^2."""
    return max(
        w for w in range(tokens + 1) if (tokens - w) ** 2 >= (1 - Fraction(share)) * tokens**2
    )


def near(fraction, count):
    """Round half up."""
    return int(Fraction(fraction) * count + Fraction(1, 2))


def columns_of(whole, parts, grid):
    """Key tokens under the stripes."""
    frame = grid.height * grid.width
    found = set()
    for starts, (count, repeats) in (
        (whole, (grid.video_tokens, 1)),
        (parts, (frame, grid.frames)),
    ):
        for start, stop in starts:
            first = min(near(start, count), count - 1)
            last = max(near(stop, count), first + 1)
            found |= {r * count + t for r in range(repeats) for t in range(first, last)}
    return found


def keeps(pattern, grid, settings):
    """Give the token rule in slots of the pattern's order: ``(query, key) -> bool``."""
    if pattern == "vertical_stripe":
        columns = columns_of(settings["stripes"], settings["frame_stripes"], grid)
        return lambda _, key: key in columns
    if pattern in {"full", "skip"}:
        return lambda *_: pattern == "full"
    width = width_of(settings[f"{pattern}_density"], grid.video_tokens)
    return lambda query, key: abs(query - key) <= width


def oracle(pattern, call, i_batch, settings, size):
    """Which pairs one head keeps in one sample: bool ``[tokens, tokens]``."""
    grid, rule, order = (
        call.grid,
        keeps(pattern, call.grid, settings),
        order_of(call.grid, pattern),
    )
    blocks = [range(i, min(i + size, len(order))) for i in range(0, len(order), size)]
    start = grid.video_start
    mask = torch.zeros(grid.tokens, grid.tokens, dtype=torch.bool)
    for one, two in product(blocks, repeat=2):
        if any(rule(q, k) for q, k in product(one, two)):
            columns = [start + order[k] for k in two]
            for q in one:
                mask[start + order[q], columns] = True
    living = valid_keys(call, i_batch)
    video = range(start, start + grid.video_tokens)
    mask[:, [t for t in living if t not in video]] = True
    for t in set(range(grid.tokens)) - set(video):
        mask[t, living] = True
    return mask


@st.composite
def cases(draw):
    """Draw a method of any patterns, its settings as decimals, and a call."""
    heads = draw(st.integers(1, 4))
    named = draw(st.one_of(patterns, st.lists(patterns, min_size=1, max_size=5).map(tuple)))
    settings = {
        "diagonal_density": draw(shares), "multi_diagonal_density": draw(shares),
        "stripes": draw(spans), "frame_stripes": draw(st.one_of(st.just([]), spans)),
    }  # fmt: skip
    size = draw(block_sizes)
    method = SparseVDiT(
        named,
        *(float(settings[f"{name}diagonal_density"]) for name in ("", "multi_")),
        *(
            tuple((float(a), float(b)) for a, b in settings[k])
            for k in ("stripes", "frame_stripes")
        ),
        size,
    )
    text, batch = draw(text_lengths), draw(st.integers(1, 2))
    grid = LatentsGrid(*draw(sizes), text, draw(st.booleans()))
    valid = draw(valid_text_lengths(text, batch)) if text and draw(st.booleans()) else None
    call = make_call(
        grid, 5, batch, heads, text_valid=None if valid is None else torch.tensor(valid)
    )
    per_head = [
        named if isinstance(named, str) else named[h] if h < len(named) else "full"
        for h in range(heads)
    ]
    wanted = torch.stack(
        [
            torch.stack([oracle(name, call, b, settings, size) for name in per_head])
            for b in range(batch)
        ]
    )
    return method, call, wanted


@given(cases())
def test_kept_pairs_are_those_of_the_patterns(case):
    method, call, wanted = case
    plan = method.plan(call, NaiveOps()).validate()
    batch, tokens, heads, _ = call.query.shape
    assert plan.heads in {1, heads}
    assert plan.partial is None
    assert torch.equal(token_mask(plan, batch, heads, tokens, tokens), wanted)
    living = torch.tensor([len(valid_keys(call, b)) for b in range(batch)])[:, None]
    cost = wanted.sum((-1, -2)) / (tokens * living)
    torch.testing.assert_close(plan.density().expand(batch, heads), cost.double())


@given(cases())
def test_all_heads_of_a_layer_run_in_one_launch(case):
    method, call, wanted = case
    plan = method.plan(call, None)
    output, lse = Backends("cpu").attend(call.query, call.key, call.value, plan, call.scale)
    exact, exact_lse = masked_attention(call.query, call.key, call.value, wanted, call.scale)
    nothing = ~wanted.any(-1)
    exact[nothing.transpose(1, 2)] = 0  # a row that keeps nothing gives zero, and LSE -inf
    torch.testing.assert_close(output, exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(nothing, lse == -torch.inf)


@pytest.mark.parametrize("size", [(3, 4, 5), (1, 6, 7)])
@pytest.mark.parametrize("first", [False, True])
def test_five_patterns_in_one_layer(size, first):
    grid = LatentsGrid(*size, 5, first)
    settings = {
        "diagonal_density": "0.19", "multi_diagonal_density": "0.36",
        "stripes": [("0.1", "0.2")], "frame_stripes": [("0.5", "0.6")],
    }  # fmt: skip
    method = SparseVDiT(PATTERNS, 0.19, 0.36, ((0.1, 0.2),), ((0.5, 0.6),), 4)
    call = make_call(grid, 2, 1, 5, text_valid=torch.tensor([3]))
    plan = method.plan(call, None).validate()
    found = token_mask(plan, 1, 5, grid.tokens, grid.tokens)[0]
    for head, name in enumerate(PATTERNS):
        assert torch.equal(found[head], oracle(name, call, 0, settings, 4)), name


@pytest.mark.parametrize("text", [0, 6])
def test_a_skipped_head_gives_zero_or_reads_the_text_alone(text):
    grid = LatentsGrid(3, 4, 5, text)
    valid = torch.tensor([2, 0]) if text else None
    call = make_call(grid, 1, 2, 3, text_valid=valid)
    _, output = run(SparseVDiT(("full", "skip", "skip"), block_size=8), call, NaiveOps())
    video = slice(0, grid.video_tokens)
    if not text:
        plan = SparseVDiT("skip", block_size=8).plan(call, None)
        output, lse = Backends("cpu").attend(call.query, call.key, call.value, plan, call.scale)
        assert not output.any()
        assert bool((lse == -torch.inf).all())
        assert float(plan.density()) == 0
        return
    q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
    words = slice(grid.video_tokens, grid.video_tokens + 2)
    weight = (q @ k[:, :, words].transpose(-1, -2) * call.scale).softmax(-1)
    text_alone = (weight @ v[:, :, words]).transpose(1, 2)
    torch.testing.assert_close(output[:1, video, 1:], text_alone[:1, video, 1:])
    plan = SparseVDiT("skip", block_size=8).plan(call, None)
    ours, _ = Backends("cpu").attend(call.query, call.key, call.value, plan, call.scale)
    assert not ours[1, video].any()  # all of this sample's text is padding


@given(sizes, block_sizes, patterns, st.data())
def test_more_density_keeps_a_superset(size, block_size, pattern, data):
    low, high = sorted(data.draw(st.tuples(shares, shares)), key=float)
    call = make_call(LatentsGrid(*size))
    narrow, wide = (
        SparseVDiT(pattern, float(s), float(s), block_size=block_size)
        .plan(call, None)
        .block_mask()
        for s in (low, high)
    )
    assert bool((narrow <= wide).all())


@given(sizes, block_sizes, text_lengths, st.booleans())
def test_patterns_that_keep_everything_are_dense(size, block_size, text, first):
    grid = LatentsGrid(*size, text, first)
    call = make_call(grid, 0, 2, 3)
    method = SparseVDiT(
        ("full", "diagonal", "multi_diagonal", "vertical_stripe"), 1.0, 1.0,
        stripes=((0.0, 1.0),), block_size=block_size,
    )  # fmt: skip
    plan, output = run(method, call, NaiveOps())
    assert plan.complete
    everything = torch.ones(2, 3, grid.tokens, grid.tokens, dtype=torch.bool)
    dense, _ = masked_attention(call.query, call.key, call.value, everything, call.scale)
    torch.testing.assert_close(output, dense)


def test_heads_are_named_by_the_models_numbers():
    method = SparseVDiT(("skip", "diagonal", "full", "vertical_stripe"), block_size=4)
    assert method.of_heads((3, 1, 7)) == ("vertical_stripe", "diagonal", "full")
    call = make_call(LatentsGrid(4, 3, 5), 0, 1, 2)
    call.heads = (0, 3)
    plan = method.plan(call, None)
    assert plan.density()[0].tolist()[0] == 0
    alone = SparseVDiT("vertical_stripe", block_size=4).plan(call, None)
    assert float(plan.density()[0, 1]) == float(alone.density()[0, 0]) > 0


@pytest.mark.parametrize("density", [0.2, 0.25, 0.5])
@pytest.mark.parametrize("size", [(33, 45, 80), (21, 30, 52), (1, 64, 64)])
def test_bands_are_as_dense_as_they_are_told(size, density):
    call = make_call(LatentsGrid(2, 1, 1), heads=3)
    call.grid = LatentsGrid(*size)
    method = SparseVDiT(
        ("diagonal", "multi_diagonal", "vertical_stripe"), density, density, ((0.0, density),)
    )
    plan = method.plan(call, None)
    blocks = -(-call.grid.video_tokens // 128)
    # In units of tokens a row's band grows by less than 3 blocks: its width 2 w + 1 becomes
    # (2 d + 1) * 128 with d = floor((w - 1) / 128) + 1. A stripe grows by less than one.
    assert bool((plan.density() >= density - 1e-4).all())
    assert bool((plan.density() <= density + 3 / blocks).all())


def test_layers_share_the_lists_whatever_their_patterns(monkeypatch):
    built = []
    original = SparseVDiT.kept

    def counted(self, grid, pattern):
        built.append(pattern)
        return original(self, grid, pattern)

    monkeypatch.setattr(SparseVDiT, "kept", counted)
    shared, grid = {}, LatentsGrid(4, 5, 6, 5)
    mixes = [("skip", "diagonal"), ("multi_diagonal", "full"), ("full", "full"), "vertical_stripe"]
    for step, (layer, named) in product(range(3), enumerate(mixes)):
        valid = torch.tensor([step])  # another prompt's padding needs no new lists
        call = make_call(grid, layer=layer, step=step, text_valid=valid, shared=shared)
        SparseVDiT(named, block_size=8).plan(call, None)
    assert sorted(built) == sorted(PATTERNS)
    SparseVDiT("skip", block_size=8).plan(make_call(LatentsGrid(4, 5, 7), shared=shared), None)
    assert len(built) == 2 * len(PATTERNS)


def test_what_is_shared_depends_on_the_settings():
    shared, grid = {}, LatentsGrid(4, 5, 6, 3)
    for params in (
        {"patterns": ("diagonal", "skip")},
        {"patterns": ("diagonal", "skip"), "diagonal_density": 0.6},
        {"patterns": ("multi_diagonal", "vertical_stripe")},
        {"patterns": ("vertical_stripe", "multi_diagonal"), "stripes": ((0.3, 0.4),)},
        {"patterns": ("vertical_stripe", "multi_diagonal"), "frame_stripes": ((0.3, 0.4),)},
        {"patterns": ("diagonal", "skip"), "block_size": 4},
    ):
        method = SparseVDiT(**{"block_size": 8} | params)
        one = method.plan(make_call(grid, shared=shared), None)
        other = method.plan(make_call(grid), None)  # with nothing remembered
        assert torch.equal(
            token_mask(one, 1, 2, grid.tokens, grid.tokens),
            token_mask(other, 1, 2, grid.tokens, grid.tokens),
        )


@pytest.mark.parametrize("valid", [None, torch.tensor([3, 5])])
def test_planning_never_waits_for_the_device(valid):
    # A meta tensor has no values: whatever read one would raise.
    call = make_call(LatentsGrid(4, 5, 6, 7), batch=2, heads=5)
    call.query, call.key, call.value = (x.to("meta") for x in (call.query, call.key, call.value))
    call.text_valid = None if valid is None else valid.to("meta")
    plan = SparseVDiT(PATTERNS, block_size=8).plan(call, None)
    assert plan.device.type == "meta"
    assert plan.query_length == call.grid.tokens


def test_hunyuan_720p_holds_lists_only():
    call = make_call(LatentsGrid(2, 1, 1), heads=24)
    call.grid = LatentsGrid(33, 45, 80, 256)
    heads = tuple(PATTERNS[head % 5] for head in range(24))
    plan = SparseVDiT(heads).plan(call, None)
    held = [value for value in call.shared.values() if isinstance(value, tuple)]
    lists = sum(x.nbytes for value in held for x in value if isinstance(x, torch.Tensor))
    assert 0 < lists < 24 * 2**20  # for all layers together
    assert plan.nbytes < 128 * 2**20  # while the call lasts: lists up to the widest head's


def test_a_layer_of_five_patterns_is_one_launch_in_a_real_pipeline():
    pipe, args = tiny.wan()
    pipe.set_progress_bar_config(disable=True)
    rules = [
        {"layers": [0], "method": "sparse_vdit",
         "params": {"patterns": ["multi_diagonal", "vertical_stripe"], "block_size": 8}},
        {"layers": [1], "method": "sparse_vdit",
         "params": {"patterns": ["diagonal", "skip"], "block_size": 8}},
    ]  # fmt: skip
    strategy = Strategy.from_dict({"schema_version": 1, "name": "mixed", "rules": rules})
    launches = []
    with dit_sparse.sparse_attention(pipe, strategy, strict=True) as handle:
        attend = handle.backends.attend
        handle.backends.attend = lambda *args: launches.append(1) or attend(*args)
        latents = tiny.run(pipe, args)
        rows = handle.report().rows
    assert latents.isfinite().all()
    assert len(launches) == len(rows) == 2 * 2 * tiny.STEPS  # layers, guidance passes, steps
    assert all(0 < row["density"] < 1 for row in rows)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"patterns": "spiral"}, "patterns must be one of, .* skip, .*; got 'spiral'"),
        ({"patterns": ("full", "x")}, "patterns must be .*; got 'x'"),
        ({"patterns": ()}, r"patterns must be .*; got \[\]"),
        ({"diagonal_density": 0.0}, r"diagonal_density must lie in \(0, 1\], got 0.0; try 0.25"),
        ({"multi_diagonal_density": 1.1}, r"multi_diagonal_density must lie in \(0, 1\], got 1.1"),
        ({"stripes": ((0.5, 0.5),)}, r"stripes must contain pairs .*got \[0.5, 0.5\]"),
        ({"stripes": ((0.5, 1.5),)}, r"stripes must contain pairs .*got \[0.5, 1.5\]"),
        (
            {"frame_stripes": ((-0.1, 0.5),)},
            r"frame_stripes must contain pairs .*got \[-0.1, 0.5\]",
        ),
        (
            {"patterns": "vertical_stripe", "stripes": ()},
            "vertical_stripe requires stripes or frame",
        ),
        ({"block_size": 0}, r"block_size must be a token count in \[1, 1024\], got 0"),
    ],
)
def test_bad_params(params, message):
    with pytest.raises(StrategyError, match=message):
        SparseVDiT(**params)
