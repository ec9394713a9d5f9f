# SPDX-License-Identifier: Apache-2.0
"""A guarantee watches heads: what is wrong is caught, said and dense again, nothing else moves."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import dit_sparse
from dit_sparse.attach.envelope import Envelope, _Place, without
from dit_sparse.attach.guarantee import Guarantee
from dit_sparse.attach.probe import dense_output, relative_error, spread_rows
from dit_sparse.cli import app
from dit_sparse.methods import method_class
from tests import tiny
from tests.pipelines.test_conformance import graph
from tests.pipelines.test_families import SPARSE
from tests.strategies import attention_inputs, batches, generator, head_counts, seeds

RADIAL = SPARSE["radial"]
EVERYTHING = 10_000  # rows: more than any tiny call has, so that an estimate is exact
SURE = {"rows": EVERYTHING, "every": 1}
GRID = (3, 4, 6, 9)  # frames, rows, columns, text
TOKENS = 81


@pytest.fixture(scope="module")
def wan():
    pipe, args = tiny.wan()
    pipe.set_progress_bar_config(disable=True)
    return pipe, args, tiny.run(pipe, args)


def exact(query, key, value, scale, valid=None):
    """Dense attention ``[batch, tokens, heads, dim]`` in float64, written out."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * scale
    for i_batch, count in enumerate(valid or ()):
        scores[i_batch, :, :, count:] = -math.inf
    weight = (scores - scores.amax(-1, keepdim=True)).exp()
    weight = weight / weight.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", weight, value.double())


def spoil(monkeypatch, method, where, how=lambda x: 50 * x):
    """Make a method wrong: ``how`` changes the output of the heads that ``where`` names."""
    cls = method_class(method)
    finish = cls.finish

    def wrong(self, call, output, lse, ops):
        output = finish(self, call, output, lse, ops)
        for i, head in enumerate(call.heads):
            if where(call, head):
                output[:, :, i] = how(output[:, :, i])
        return output

    monkeypatch.setattr(cls, "finish", wrong)


def listen(handle):
    """Collect what goes into and comes out of every attention call."""
    seen, attention = [], handle.attention

    def watched(site, query, key, value, mask, *rest):
        output = attention(site, query, key, value, mask, *rest)
        record = handle.records[-1]
        place = (record.stage, record.layer, record.branch, record.step)
        seen.append((place, query.clone(), key.clone(), value.clone(), output.clone()))
        return output

    handle.attention = watched
    return seen


@pytest.fixture(scope="module")
def bare():
    """A pipeline with three heads, for ``play``."""
    return tiny.pixart()[0]


# --- the estimate ---


@given(
    seed=seeds,
    batch=batches,
    heads=head_counts,
    video=st.integers(1, 20),
    text=st.integers(0, 9),
    data=st.data(),
)
def test_the_error_on_all_rows_is_the_error(seed, batch, heads, video, text, data):
    tokens = video + text
    valid = data.draw(st.lists(st.integers(0, text), min_size=batch, max_size=batch))
    query, key, value = attention_inputs(seed, batch, tokens, heads, 8)
    output = torch.randn(query.shape, generator=generator(seed), dtype=torch.float64)
    living = [video + count for count in valid]
    wanted = exact(query, key, value, 0.3, living)
    rows = spread_rows(tokens, tokens + 3, generator(seed))
    args = (video, torch.tensor(valid) if text else None)
    found = dense_output(query.float(), key.float(), value.float(), rows, 0.3, *args)
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    error, spread = relative_error(output.float(), found, rows, *args)
    for i, count in enumerate(living):
        for head in range(heads):
            lost = (output[i, :count, head] - wanted[i, :count, head]).norm()
            truth = float(lost / wanted[i, :count, head].norm())
            assert float(error[i, head]) == pytest.approx(truth, rel=1e-4)
    assert not spread.any()  # nothing was left to chance


@given(seed=seeds, tokens=st.integers(1, 3000), count=st.integers(1, 300))
def test_rows_are_spread_over_the_sequence(seed, tokens, count):
    rows = spread_rows(tokens, count, generator(seed))
    assert torch.equal(rows, spread_rows(tokens, count, generator(seed)))
    assert len(rows) == min(tokens, count)
    assert torch.equal(rows, rows.sort().values)
    assert 0 <= int(rows[0]) <= int(rows[-1]) < tokens
    if count < tokens:
        stretch = torch.arange(count) * tokens / count
        assert bool((rows >= stretch.floor()).all())
        assert bool((rows <= stretch + tokens / count).all())


def test_every_row_is_drawn_as_often_as_any_other():
    tokens, count, draws = 37, 10, 8_000  # 10 does not divide 37
    random = generator(0)
    seen = torch.zeros(tokens)
    for _ in range(draws):
        seen += torch.bincount(spread_rows(tokens, count, random), minlength=tokens)
    share = count / tokens
    deviation = math.sqrt(share * (1 - share) / draws)
    assert (seen / draws - share).abs().max() < 5 * deviation


def drawn(count, draws, tilt):
    """Estimates, their standard errors and the truth, on 2,000 rows of uneven error."""
    tokens, random = 2000, generator(1)
    rows_off = torch.rand(tokens, 1, 1, generator=random) * 0.5
    rows_off += tilt * torch.linspace(0, 1, tokens)[:, None, None]
    right = torch.randn(1, tokens, 1, 16, generator=random)
    output = right + rows_off * torch.randn(1, tokens, 1, 16, generator=random)
    truth = float((output - right).norm() / right.norm())
    found = []
    for _ in range(draws):
        rows = spread_rows(tokens, count, random)
        error, spread = relative_error(output, right[:, rows], rows, 0, None)
        found.append((float(error), float(spread)))
    error, spread = torch.tensor(found).T
    return error, spread, truth


@pytest.mark.parametrize("tilt", [0.0, 1.0])
@pytest.mark.parametrize(("count", "share"), [(16, 0.936), (64, 0.950)])
def test_the_standard_error_says_how_far_off_an_estimate_is(count, share, tilt):
    """Within twice of it lies the share that Student's t has there (15 and 63 degrees)."""
    draws = 500
    error, spread, truth = drawn(count, draws, tilt)
    inside = ((error - truth).abs() <= 2 * spread).float().mean()
    assert inside > share - 3 * math.sqrt(share * (1 - share) / draws)
    assert abs(error.mean() - truth) < 4 * error.std() / math.sqrt(draws) + 0.5 * truth / count
    if not tilt:  # nothing is gained by stretches there: the two agree
        assert spread.mean() == pytest.approx(float(error.std()), rel=0.15)


def test_more_rows_are_surer():
    spreads = [float(drawn(count, 50, 0.0)[1].mean()) for count in (16, 64, 256)]
    assert spreads[0] / spreads[1] == pytest.approx(2, rel=0.15)
    assert spreads[1] / spreads[2] == pytest.approx(2, rel=0.15)


# --- whose turn it is ---


@given(seed=seeds, heads=st.integers(1, 40), every=st.integers(1, 9), data=st.data())
def test_no_head_waits_for_long(seed, heads, every, data):
    place = _Place(generator(seed))
    calls = 12 * every
    turns = [place.turn([(0, "m", tuple(range(heads)))], every) for _ in range(calls)]
    assert turns[0] == tuple(range(heads))  # everybody at once, when it begins
    later = turns[1:]
    assert abs(sum(map(len, later)) - heads * len(later) / every) < 1
    for head in range(heads):
        at = [i for i, turn in enumerate(turns) if head in turn]
        assert max(b - a for a, b in zip(at, [*at[1:], calls], strict=True)) <= 2 * every
    assert place.turn([(1, "n", tuple(range(heads)))], every) == turns[0]  # another rule's first
    gone = data.draw(st.integers(0, heads - 1))
    rest = tuple(head for head in range(heads) if head != gone)
    after = [place.turn([(0, "m", rest)], every) for _ in range(3 * every)]
    assert all(gone not in turn for turn in after)


def test_turns_are_not_in_step_with_a_methods_refresh():
    """A head must not always be probed at the same age of what a method remembers."""
    every = period = 4
    place = _Place(generator(0))
    turns = [place.turn([(0, "m", (0, 1, 2, 3))], every) for _ in range(200)]
    for head in range(4):
        ages = {i % period for i, turn in enumerate(turns) if head in turn}
        assert ages == set(range(period))


# --- bad input ---


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (0, "(0, 1]"),
        (-0.3, "(0, 1]"),
        (30, "30 %"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (True, "True"),
        ("lpips<=0.2", '"receipt"'),
        ("0.3", "'0.3'"),
        ([0.3], "[0.3]"),
        (torch.tensor(0.3), "tensor"),
        ("receipt", "receipt.measured.relative_error"),
    ],
)
def test_bad_guarantees_are_refused_before_any_work(wan, wanted, words):
    pipe, args, stock = wan
    before = graph(pipe)
    with pytest.raises(dit_sparse.StrategyError) as error:
        pipe.enable_sparse_attention("radial", guarantee=wanted, **RADIAL)
    assert words in str(error.value)
    assert "guarantee" in str(error.value)
    assert graph(pipe) == before
    assert pipe.sparse_attention is None
    assert torch.equal(tiny.run(pipe, args), stock)


@pytest.mark.parametrize(
    "fields",
    [
        {"rows": 1},
        {"rows": 64.0},
        {"rows": True},
        {"every": 0},
        {"seed": -1},
        {"factor": 0.0},
        {"factor": math.nan},
        {"factor": "3"},
    ],
)
def test_bad_settings_are_refused(fields):
    with pytest.raises(dit_sparse.StrategyError, match=f"guarantee: {next(iter(fields))}"):
        Guarantee(limit=0.3, **fields)


def measured(**figures):
    data = dit_sparse.Strategy.single("radial", **RADIAL).to_dict()
    data["receipt"]["measured"] = figures
    return dit_sparse.Strategy.from_dict(data)


def test_the_receipt_gives_the_limit(wan):
    pipe, _, _ = wan
    assert Guarantee().bound(measured(relative_error=0.1)) == pytest.approx(0.3)
    assert Guarantee(factor=1.5).bound(measured(relative_error=0.1)) == pytest.approx(0.15)
    assert Guarantee().bound(measured(relative_error=0.9)) == 1.0
    assert Guarantee(limit=0.2).bound(measured(relative_error=0.9)) == 0.2
    with pytest.raises(dit_sparse.StrategyError, match="receipt contains density"):
        Guarantee().bound(measured(density=0.3))
    with pytest.raises(dit_sparse.StrategyError, match="above 0"):
        Guarantee().bound(measured(relative_error=0.0))
    strategy = measured(relative_error=0.2)
    with dit_sparse.sparse_attention(pipe, strategy, guarantee="receipt") as handle:
        assert handle.report().guarantee["limit"] == pytest.approx(0.6)
        assert handle.report().guarantee["from"] == "receipt"
    with pytest.raises(
        dit_sparse.StrategyError, match="changed from"
    ):  # no longer what was measured
        pipe.enable_sparse_attention(strategy, guarantee="receipt", decay_factor=0.2)


# --- nothing is wrong ---


@pytest.mark.parametrize("name", ["wan", "hunyuan_video_guided", "cogvideox", "flux"])
def test_a_guarantee_that_holds_changes_nothing(name):
    pipe, args = tiny.PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    options = SPARSE["adaspa"]
    with dit_sparse.sparse_attention(pipe, "adaspa", strict=True, **options):
        plain = tiny.run(pipe, args)
    with dit_sparse.sparse_attention(pipe, "adaspa", guarantee=1.0, **options) as handle:
        state = torch.get_rng_state()
        watched = tiny.run(pipe, args)
        assert torch.equal(torch.get_rng_state(), state)
        first = handle.report()
        again = tiny.run(pipe, args)
        second = handle.report()
    assert torch.equal(watched, plain)
    assert torch.equal(again, plain)
    assert first.guarantee == second.guarantee
    found = first.guarantee
    assert found["probes"] >= found["heads"] > 0
    assert 0 < found["worst_kept"] < 1
    assert found["returned"] == []
    assert "guarantee 1 held" in first.summary()
    for row in first.rows:  # a call that keeps all is not probed
        assert row["density"] < 1 or row["error"] is None
    assert {row["error"] is None for row in first.sparse_rows if row["step"] == 1} == {False}
    json.dumps(first.as_dict(), allow_nan=False)


def test_the_reported_error_is_the_error(wan):
    pipe, args, _ = wan
    with dit_sparse.sparse_attention(
        pipe, "svg2", guarantee=Guarantee(1.0, **SURE), **SPARSE["svg2"]
    ) as handle:
        seen = listen(handle)
        tiny.run(pipe, args)
        rows = {(r["stage"], r["layer"], r["branch"], r["step"]): r for r in handle.report().rows}
    assert len(seen) == len(rows)
    for place, query, key, value, output in seen:
        right = exact(query, key, value, query.shape[-1] ** -0.5)
        lost = (output.double() - right).square().sum((1, 3)) / right.square().sum((1, 3))
        assert rows[place]["error"] == pytest.approx(float(lost.max().sqrt()), rel=1e-3)


# --- one head is wrong ---


def test_a_wrong_head_is_caught_at_once_and_only_it_goes_dense(wan, monkeypatch):
    pipe, args, _ = wan
    spoil(monkeypatch, "radial", lambda call, head: (call.layer, head) == (1, 1) and call.step > 1)
    with dit_sparse.sparse_attention(
        pipe, "radial", guarantee=Guarantee(1.0, every=1), **RADIAL
    ) as handle:
        seen = listen(handle)
        latents = tiny.run(pipe, args)
        report = handle.report()
    assert latents.isfinite().all()
    left = report.guarantee["returned"]
    assert [(e["layer"], e["branch"], e["head"], e["step"]) for e in left] == [
        (1, "cond", 1, 2),
        (1, "uncond", 1, 2),
    ]
    assert all(each["method"] == "radial" and each["error"] > 10 for each in left)
    for row in report.rows:
        back = row["layer"] == 1 and row["step"] >= 2
        assert row["methods"] == ({"radial": [0], "dense": [1]} if back else {"radial": [0, 1]})
        assert row["returned"] == ([1] if back else [])
        ours = set(row["kernels"]) - {"model's own"}
        assert ours in ({"native"}, {"cpu"})
        assert ("model's own" in row["kernels"]) == back
    density = {row["density"] for row in report.rows if row["layer"] == 0}
    (one,) = density
    assert {round(r["density"], 9) for r in report.rows if 1 in r["returned"]} == {
        round((1 + one) / 2, 9)
    }
    for (_, layer, _, step), query, key, value, output in seen:
        right = exact(query, key, value, query.shape[-1] ** -0.5)
        lost = (output.double() - right).square().sum((0, 1, 3)).sqrt()
        assert lost[0] > 1e-3  # still sparse
        assert (lost[1] < 1e-5) == (layer == 1 and step >= 2)
    text = report.summary()
    assert "2 of 8 heads went back to dense" in text
    assert "layer 1 head 1 (cond), radial, from step 2" in text
    json.dumps(report.as_dict(), allow_nan=False)


def play(pipe, profile, steps, *, guarantee=None, heads=3, batch=1):
    """Run one layer's calls on given queries, keys and values; sparse outputs and the report."""
    found = []
    with dit_sparse.sparse_attention(pipe, profile, guarantee=guarantee) as handle:
        for step in range(steps):
            handle.at(step, steps)
            shape = (batch, TOKENS, heads, 12)
            q, k, v = (tiny.normal(*shape, seed=100 * step + i) for i in range(3))
            v = v + 4  # dropping keys then costs less than everything
            site = handle._sites[0]
            args = (site, q, k, v, None, GRID, None, dense)
            found.append((handle.attention(*args).clone(), dense(q, k, v)))
        return found, handle.report(), handle


def dense(query, key, value):
    parts = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2)


def test_the_limit_is_where_heads_part(bare):
    profile = dit_sparse.Strategy.single("radial", **RADIAL)
    ((output, _), *_), _, _ = play(bare, profile, 2)
    query, key, value = (tiny.normal(1, TOKENS, 3, 12, seed=i) for i in range(3))
    right = exact(query, key, value + 4, 12**-0.5)
    lost = (output.double() - right).square().sum((0, 1, 3)) / right.square().sum((0, 1, 3))
    errors = lost.sqrt()
    low, high = sorted(errors.tolist())[1:]
    assert high > 1.01 * low
    for limit, leave in (
        (1.001 * high, 0),
        (0.999 * high, 1),
        (1.001 * low, 1),
        (0.999 * low, 2),
    ):
        _, report, _ = play(bare, profile, 2, guarantee=Guarantee(limit, **SURE))
        first = {each["head"] for each in report.guarantee["returned"] if each["step"] == 0}
        assert first == {i for i, error in enumerate(errors) if error > limit}
        assert len(first) == leave


COMPENSATED = {
    "svg2": {"refresh": 2},
    "sparse_vdit": {"patterns": ("diagonal", "multi_diagonal", "full")},
}


@pytest.mark.parametrize("method", sorted(SPARSE))
def test_what_others_remember_stays_right_when_a_head_leaves(bare, monkeypatch, method):
    """The heads that stay give what they gave when nobody left, to the bit with our own kernel."""
    profile = dit_sparse.Strategy.single(
        method, **{**SPARSE[method], **COMPENSATED.get(method, {})}
    )
    plain, _, _ = play(bare, profile, 8)
    # A head that keeps everything is not off: the middle one is spoilt after it was finished.
    spoil(monkeypatch, method, lambda call, head: head == 1 and call.step >= 3)
    watched, report, handle = play(bare, profile, 8, guarantee=Guarantee(1.0, **SURE))
    (left,) = report.guarantee["returned"]
    assert left["head"] == 1
    first = left["step"]
    assert first < 6  # and so it was dense for a while, over refreshes too
    # torch's matrix products may round a head otherwise where fewer heads are beside it.
    rounding = 0.0 if "native" in report.kernels else 8 * torch.finfo(torch.float32).eps
    for step, ((one, _), (other, right)) in enumerate(zip(plain, watched, strict=True)):
        for head in (0, 2):
            moved = (one[:, :, head] - other[:, :, head]).abs().max()
            assert moved <= rounding * one.abs().max(), (step, head)
        if step >= first:
            assert torch.equal(other[:, :, 1], dense_head(right, 1))
        elif step < 3:
            assert torch.equal(one[:, :, 1], other[:, :, 1])
    assert not handle.memory.states


def dense_head(right, head):
    return right[:, :, head]


def rule(method, params, **where):
    return {"method": method, "params": params, **where}


def mixed(*rules):
    data = dit_sparse.Strategy(name="mixed").to_dict()
    return dit_sparse.Strategy.from_dict({**data, "rules": list(rules)})


def test_a_head_of_a_joint_launch_may_leave(bare, monkeypatch):
    profile = mixed(
        rule("radial", RADIAL, heads=[0, 2]), rule("pooled", SPARSE["pooled"], heads=[1])
    )
    plain, _, _ = play(bare, profile, 4)
    spoil(monkeypatch, "radial", lambda call, head: head == 0 and call.step >= 1)
    watched, report, _ = play(bare, profile, 4, guarantee=Guarantee(1.0, **SURE))
    assert [(each["head"], each["method"]) for each in report.guarantee["returned"]] == [
        (0, "radial")
    ]
    for step, ((one, _), (other, right)) in enumerate(zip(plain, watched, strict=True)):
        assert torch.equal(one[:, :, 1:], other[:, :, 1:])
        assert torch.equal(other[:, :, 0], (right if step else one)[:, :, 0])
    wanted = {"radial": [2], "pooled": [1], "dense": [0]}
    assert [row["methods"] for row in report.rows[1:]] == [wanted] * 3


def test_heads_that_were_dense_anyway_stay_so(bare, monkeypatch):
    profile = mixed(rule("radial", RADIAL, heads=[0, 2]))
    plain, _, _ = play(bare, profile, 4)
    spoil(monkeypatch, "radial", lambda call, head: head == 2 and call.step >= 1)
    watched, report, _ = play(bare, profile, 4, guarantee=Guarantee(1.0, **SURE))
    for step, ((one, _), (other, right)) in enumerate(zip(plain, watched, strict=True)):
        assert torch.equal(one[:, :, 0], other[:, :, 0])
        assert torch.equal(other[:, :, 1], right[:, :, 1])
        assert torch.equal(other[:, :, 2], (right if step else one)[:, :, 2])
    assert [row["methods"] for row in report.rows[2:]] == [{"radial": [0], "dense": [1, 2]}] * 2
    assert [row["returned"] for row in report.rows] == [[], [2], [2], [2]]


@pytest.mark.parametrize("method", ["radial", "gna", "pooled", "svg"])
def test_a_head_that_left_is_not_computed_twice(bare, monkeypatch, method):
    """The kernel gets a plan in which it keeps nothing; the others' lists are as they were."""
    plans = {}

    def run(guarantee):
        found = plans[guarantee is not None] = []
        with dit_sparse.sparse_attention(
            bare, method, guarantee=guarantee, **SPARSE[method]
        ) as handle:
            handle.watch = lambda _, plan, __: found.append(plan) if plan is not None else None
            query = tiny.normal(1, TOKENS, 3, 12)
            for step in range(4):
                handle.at(step, 4)
                handle.attention(
                    handle._sites[0], query, query, query + 4, None, GRID, None, dense
                )

    run(None)
    spoil(monkeypatch, method, lambda call, head: head == 1 and call.step == 1)
    run(Guarantee(1.0, **SURE))
    for step, (one, other) in enumerate(zip(plans[False], plans[True], strict=True)):
        mask = one.block_mask().expand(-1, 3, -1, -1).clone()
        if step > 1:
            mask[:, 1] = False
        assert torch.equal(other.validate().block_mask().expand(-1, 3, -1, -1), mask)
    layout = plans[True][0].q
    full = dit_sparse.BlockPlan.full(layout, layout)
    assert without(full, (0, 1, 2), {1}) is full  # what it gives is remembered, for all heads


def test_two_rules_of_one_method_are_both_reported(bare):
    other = {**RADIAL, "decay_factor": 0.5}
    profile = mixed(rule("radial", RADIAL, heads=[0]), rule("radial", other, heads=[2]))
    _, report, _ = play(bare, profile, 1)
    assert report.rows[0]["methods"] == {"radial": [0, 2], "dense": [1]}


def test_where_all_heads_leave_the_call_is_the_models_own(wan, monkeypatch):
    pipe, args, _ = wan
    spoil(monkeypatch, "adaspa", lambda call, _: call.layer == 1)
    with dit_sparse.sparse_attention(pipe, "adaspa", guarantee=1.0, **SPARSE["adaspa"]) as handle:
        held = []
        handle.watch = lambda call, *_: held.append(
            (call.layer, call.step, sorted(place[1] for place in handle.memory.states))
        )
        tiny.run(pipe, args)
        report = handle.report()
    rows = [row for row in report.rows if row["layer"] == 1 and row["step"] >= 1]
    assert all(row["methods"] == {"dense": [0, 1]} and row["density"] == 1 for row in rows)
    assert all(row["methods"] == {"adaspa": [0, 1]} for row in report.rows if row["layer"] == 0)
    assert all(1 not in layers for layer, step, layers in held if step == 3)  # nothing is kept


def test_one_wrong_sample_takes_the_head_back_for_the_batch(bare, monkeypatch):
    profile = dit_sparse.Strategy.single("radial", **RADIAL)

    def second(output):
        return torch.cat([output[:1], 50 * output[1:]])

    spoil(monkeypatch, "radial", lambda _, head: head == 2, second)
    found, report, _ = play(bare, profile, 2, guarantee=Guarantee(1.0, **SURE), batch=2)
    assert [each["head"] for each in report.guarantee["returned"]] == [2]
    output, right = found[0]
    assert torch.equal(output[:, :, 2], right[:, :, 2])


@pytest.mark.parametrize(("branch", "other"), [("cond", "uncond"), ("uncond", "cond")])
def test_guidance_branches_are_watched_apart(wan, monkeypatch, branch, other):
    pipe, args, _ = wan
    spoil(monkeypatch, "radial", lambda call, head: head == 0 and call.branch == branch)
    with dit_sparse.sparse_attention(pipe, "radial", guarantee=1.0, **RADIAL) as handle:
        tiny.run(pipe, args)
        rows = handle.report().rows
    assert {tuple(row["returned"]) for row in rows if row["branch"] == branch} == {(0,)}
    assert {tuple(row["returned"]) for row in rows if row["branch"] == other} == {()}


def test_stages_are_watched_apart(monkeypatch):
    pipe, args = tiny.wan(two_stages=True)
    pipe.set_progress_bar_config(disable=True)
    spoil(monkeypatch, "radial", lambda call, head: head == 0 and call.stage == "transformer")
    with dit_sparse.sparse_attention(pipe, "radial", guarantee=1.0, **RADIAL) as handle:
        tiny.run(pipe, args)
        rows = handle.report().rows
    back = {(row["stage"], tuple(row["returned"])) for row in rows}
    assert back == {("transformer", (0,)), ("transformer_2", ())}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_output_that_is_not_finite_breaks_the_guarantee(wan, monkeypatch, value):
    pipe, args, _ = wan
    spoil(monkeypatch, "radial", lambda _, head: head == 1, lambda x: x.fill_(value))
    with dit_sparse.sparse_attention(pipe, "radial", guarantee=1.0, **RADIAL) as handle:
        latents = tiny.run(pipe, args)
        report = handle.report()
    assert latents.isfinite().all()
    assert {each["head"] for each in report.guarantee["returned"]} == {1}
    assert "error not finite" in report.summary()
    json.dumps(report.as_dict(), allow_nan=False)


def test_the_next_generation_starts_anew(wan, monkeypatch):
    pipe, args, _ = wan
    with dit_sparse.sparse_attention(pipe, "radial", **RADIAL):
        plain = tiny.run(pipe, args)
    with dit_sparse.sparse_attention(pipe, "radial", guarantee=1.0, **RADIAL) as handle:
        with monkeypatch.context() as once:
            spoil(once, "radial", lambda _, head: head == 1)
            broken = tiny.run(pipe, args)
            assert handle.report().guarantee["returned"]
        assert torch.equal(tiny.run(pipe, args), plain)
        assert not handle.report().guarantee["returned"]
    assert not torch.equal(broken, plain)


def test_padding_of_the_text_does_not_count_and_text_does(monkeypatch):
    pipe, args = tiny.hunyuan_video(valid=11)
    pipe.set_progress_bar_config(disable=True)
    for row, left in ((-1, False), (-16, True)):  # of 16 text tokens behind the video

        def how(output, row=row):
            output[:, row] = 1e4
            return output

        with monkeypatch.context() as here:
            spoil(here, "radial", lambda _, head: head == 0, how)
            with dit_sparse.sparse_attention(
                pipe, "radial", guarantee=Guarantee(1.0, **SURE), **RADIAL
            ) as handle:
                tiny.run(pipe, args)
                assert bool(handle.report().guarantee["returned"]) is left


def test_dense_heads_beside_a_method_that_waits(bare):
    """No group has a plan there: a search that is due later, dense heads beside it."""
    late = {**SPARSE["adaspa"], "search_steps": (0.5,)}
    found, report, _ = play(bare, mixed(rule("adaspa", late, heads=[1])), 4, guarantee=0.5)
    assert torch.equal(*found[0])
    assert report.rows[0]["density"] == 1
    assert report.rows[3]["density"] < 1


def test_nothing_to_probe_is_said(wan):
    pipe, args, stock = wan
    with dit_sparse.sparse_attention(pipe, "dense", guarantee=0.1) as handle:
        assert torch.equal(tiny.run(pipe, args), stock)
        assert "guarantee 0.1: no sparse calls, no probes" in handle.summary()


def test_many_returns_are_counted_in_the_summary_and_listed_in_the_report(wan):
    pipe, args, _ = wan
    with dit_sparse.sparse_attention(pipe, "radial", guarantee=1e-6, **RADIAL) as handle:
        latents = tiny.run(pipe, args)
        report = handle.report()
    assert len(report.guarantee["returned"]) == 8
    assert "8 of 8 heads" in report.summary()
    assert "and 3 more" in report.summary()
    assert torch.equal(latents, wan[2])  # all of it was computed anew, dense


@pytest.mark.slow
def test_a_compiled_model_keeps_its_guarantee(monkeypatch):
    torch._dynamo.reset()
    pipe, args = tiny.wan()
    pipe.set_progress_bar_config(disable=True)
    spoil(monkeypatch, "adaspa", lambda call, head: (call.layer, head) == (1, 1))
    options = {"guarantee": 1.0, "strict": True, **SPARSE["adaspa"]}
    with dit_sparse.sparse_attention(pipe, "adaspa", **options) as handle:
        eager, wanted = tiny.run(pipe, args), handle.report().guarantee
    torch._dynamo.utils.counters.clear()
    pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager", fullgraph=True)
    with dit_sparse.sparse_attention(pipe, "adaspa", **options) as handle:
        compiled, found = tiny.run(pipe, args), handle.report().guarantee
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
    assert wanted["returned"]
    assert [(e["layer"], e["head"], e["step"]) for e in found["returned"]] == [
        (e["layer"], e["head"], e["step"]) for e in wanted["returned"]
    ]
    assert torch.allclose(compiled, eager, rtol=0, atol=1e-5 * eager.abs().max().item())


def test_an_envelope_of_its_own_seed_draws_other_rows(bare):
    assert Envelope(Guarantee(0.3), 0.3)._places == {}
    profile = dit_sparse.Strategy.single("radial", **RADIAL)
    errors = []
    for seed in (0, 0, 1):
        wanted = Guarantee(1.0, rows=8, every=1, seed=seed)
        _, report, _ = play(bare, profile, 2, guarantee=wanted)
        errors.append([row["error"] for row in report.rows])
    assert errors[0] == errors[1] != errors[2]


SMALL = ["--height", "64", "--width", "64", "--frames", "9", "--steps", "2", "--threads", "1"]


def generate(root, output, guarantee):
    radial = ["--strategy", "radial", "--set", "block_size=16", "--set", "decay_factor=0.2"]
    arguments = ["generate", root / "samples" / "wan-tiny", "a red circle moving right", *radial]
    arguments += ["-o", output, *SMALL, "--probe", "0", "--guarantee", guarantee]
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_the_command_line_keeps_a_guarantee(root, tmp_path):
    result = generate(root, tmp_path / "out", "0.0001")
    assert result.exit_code == 0, result.output
    assert "heads went back to dense" in " ".join(result.stdout.split())
    found = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert found["request"]["guarantee"] == 0.0001
    assert found["arms"]["sparse"]["guarantee"]["returned"]


@pytest.mark.parametrize("wanted", ["0", "1.5", "nan", "lpips", "receipt"])
def test_the_command_line_refuses_before_it_loads_anything(root, tmp_path, monkeypatch, wanted):
    monkeypatch.setattr("dit_sparse.cli.perform.load", lambda *_: 1 / 0)
    result = generate(root, tmp_path / "out", wanted)
    assert result.exit_code == 2
    assert "guarantee" in result.stderr
    assert not (tmp_path / "out").exists()
