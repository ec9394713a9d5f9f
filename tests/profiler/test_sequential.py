# SPDX-License-Identifier: Apache-2.0
"""Choices that are propagated while measuring: by step bands, and layer by layer."""

import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import dit_sparse
from dit_sparse.profiler import Bands, ProfileError, Store, Wish, profile
from dit_sparse.profiler.build import rules_of
from dit_sparse.profiler.candidates import parse_candidates
from dit_sparse.profiler.capture import BRANCHES, Capture, Measuring, capture
from dit_sparse.profiler.greedy import Greedy
from dit_sparse.profiler.measure import Meter
from dit_sparse.strategy import Strategy
from tests import tiny

STATIC = "pooled:block_size=8:density=0.25,sparse_vdit:patterns=diagonal:block_size=8"
SEARCHING = "pooled:block_size=8:density=0.25,adaspa:density=0.4:block_size=8"
PATTERNS = ",".join(
    f"sparse_vdit:patterns={pattern}:block_size=8"
    for pattern in (
        "skip",
        "diagonal:diagonal_density=0.3",
        "multi_diagonal:multi_diagonal_density=0.4",
        "vertical_stripe",
    )
)
HALVES = Bands((0.0, 0.5, 1.0))
STEPS = 6


def search(pipe, args, **changes):
    pipe.set_progress_bar_config(disable=True)
    call = {
        "arguments": {"num_inference_steps": STEPS},
        "candidates": SEARCHING,
        "bands": HALVES,
        "wish": Wish(target=0.5),
        "costs": "assumed",
        "check": False,
        **changes,
    }
    return profile(pipe, [args], **call)


def made():
    pipe, args = tiny.wan()
    return tiny.stretch(pipe), args


@pytest.fixture(scope="module")
def wan():
    return made()


class Queries:
    """Remembers the queries of the conditional pass of one generation, by (layer, step)."""

    def __init__(self):
        self.seen = {}

    def __call__(self, call, plan, method):
        if call.branch in BRANCHES and len(call.heads) == 2:
            self.seen[call.layer, call.step] = call.query.clone()


def queries_under(pipe, args, strategy):
    listener = Queries()
    with dit_sparse.enable(pipe, strategy) as handle:
        handle.watch = listener
        tiny.run(pipe, args, num_inference_steps=STEPS)
    return listener.seen


def seen_by_meter(monkeypatch):
    """Let the meter remember the queries that it measures."""
    found = {}
    plain = Meter.measure

    def measure(self, call, first_step):
        found[call.layer, call.step] = call.query.clone()
        return plain(self, call, first_step)

    monkeypatch.setattr(Meter, "measure", measure)
    return found


def test_a_band_is_measured_on_what_the_bands_before_it_produce(wan, monkeypatch):
    """The oracle is a plain generation under the rules of the first band alone."""
    pipe, args = wan
    measured = seen_by_meter(monkeypatch)
    found = search(pipe, args, sequential="bands")
    first = {key: chosen for key, chosen in found.choices.items() if key[2] == 0}
    assert any(any(chosen) for chosen in first.values())
    rules = rules_of(first, found.candidates, HALVES)
    wanted = queries_under(pipe, args, Strategy(name="first", rules=rules))
    dense = queries_under(pipe, args, Strategy.single("dense"))
    assert set(measured) == {(layer, step) for layer in (0, 1) for step in (0, 2, 3, 5)}
    for (layer, step), query in measured.items():
        whole = dense if step < 3 else wanted
        assert torch.equal(query, whole[layer, step])
    assert not torch.equal(dense[0, 3], wanted[0, 3])


def test_every_band_keeps_the_target(wan):
    found = search(*wan, sequential="bands", wish=Wish(target=0.3))
    assert all(row.steps == 3 for row in found.rows.values())
    for band in (0, 1):
        cells = [(row, found.choices[key]) for key, row in found.rows.items() if key[2] == band]
        errors = [row.error[np.arange(2), chosen] for row, chosen in cells]
        assert np.mean(errors) <= 0.3**2 * (1 + 1e-9)
    assert "up to the band's beginning" in found.strategy.receipt.note
    assert found.strategy.rules


def test_bands_without_sparse_choices_are_measured_as_ever(wan):
    """A target of 0 leaves all dense: then the order of measuring changes nothing."""
    plain = search(*wan, wish=Wish(target=0.0))
    bands = search(*wan, wish=Wish(target=0.0), sequential="bands")
    assert bands.choices == plain.choices
    for key, row in plain.rows.items():
        assert np.array_equal(row.error, bands.rows[key].error)
        assert row.steps == bands.rows[key].steps


def test_short_runs_and_two_stages_in_bands():
    pipe, args = tiny.wan(two_stages=True)
    found = search(tiny.stretch(pipe), args, sequential="bands")
    assert {key[0] for key in found.choices} == {"transformer", "transformer_2"}
    assert sum(row.steps for key, row in found.rows.items() if key[1] == 0) == STEPS
    bands = Bands((0.0, 0.3, 0.6, 1.0))
    few = search(*made(), sequential="bands", arguments={"num_inference_steps": 1}, bands=bands)
    assert {key[2] for key in few.rows} == {i for i, s in enumerate(bands.steps(1)) if s}


def vdit(pipe, args, **changes):
    """The paper's search: its patterns, its rule, one band for each step."""
    edges = tuple(step / STEPS for step in range(STEPS + 1))
    rule = Wish(rule="sparse-vdit", weight=0.4, epsilon=0.62)
    return search(pipe, args, **{
        "candidates": PATTERNS, "bands": Bands(edges), "wish": rule,
        "sequential": "layers", "sample": 0, **changes,
    })  # fmt: skip


def test_each_layer_is_measured_on_what_the_layers_before_it_pass_on(wan, monkeypatch):
    """With a band for each step the search's own choices are the strategy: running it is the
    oracle for every input that was measured.
    """
    pipe, args = wan
    measured = seen_by_meter(monkeypatch)
    found = vdit(pipe, args)
    assert len(set(found.choices.values())) > 1
    inputs = {}

    def remember(call, plan, method):
        if call.branch in BRANCHES:
            for head, query in zip(call.heads, call.query.unbind(2), strict=True):
                inputs[call.layer, call.step, head] = query.clone()

    with dit_sparse.enable(pipe, found.strategy) as handle:
        handle.watch = remember
        tiny.run(pipe, args, num_inference_steps=STEPS)
    for (layer, step), query in measured.items():
        for head in range(2):
            torch.testing.assert_close(
                query[:, :, head], inputs[layer, step, head], rtol=1e-3, atol=1e-4
            )
    dense = queries_under(pipe, args, Strategy.single("dense"))
    apart = [not torch.allclose(q, dense[at], rtol=1e-2, atol=1e-2) for at, q in measured.items()]
    assert any(apart)


def test_the_papers_rule_decides_on_propagated_errors(wan):
    found = vdit(*wan)
    for key, row in found.rows.items():
        total = np.sqrt(row.error[:, 1:]) + 0.4 * row.density[:, 1:]
        best = tuple(0 if line.min() > 0.62 else 1 + int(line.argmin()) for line in total)
        assert found.choices[key] == best
    assert vdit(*wan).strategy == found.strategy


def test_what_methods_remember_ends_with_the_band(wan, monkeypatch):
    """Else a search of the first band would serve the second, as it does in no strategy."""
    held, plain = {}, Greedy._compute

    def compute(self, call, chosen, ops):
        held.setdefault(self._band, []).append(len(self._states))
        return plain(self, call, chosen, ops)

    monkeypatch.setattr(Greedy, "_compute", compute)
    rule = Wish(rule="sparse-vdit", epsilon=10.0)  # takes it wherever it was seen sparse
    search(*wan, sequential="layers", wish=rule, sample=0,
           candidates="adaspa:density=0.4:block_size=8")  # fmt: skip
    assert set(held) == {0, 1}
    assert held[0][0] == held[1][0] == 0
    assert max(held[0]) > 0


@pytest.mark.parametrize("family", ["cogvideox", "hunyuan_video", "flux", "pixart_sigma"])
def test_layers_in_other_families(family):
    """Text, masks and batched guidance pass through the greedy path too."""
    pipe, args = tiny.PIPELINES[family]()
    before = tiny.run(pipe, args, num_inference_steps=2)
    found = search(pipe, args, arguments={"num_inference_steps": 2}, bands=Bands((0.0, 1.0)),
                   sequential="layers", candidates=STATIC, wish=Wish(target=0.9))  # fmt: skip
    assert found.rows
    assert torch.equal(tiny.run(pipe, args, num_inference_steps=2), before)


def test_a_wish_that_layers_cannot_decide_is_refused(wan):
    with pytest.raises(ProfileError, match="each layer chooses separately"):
        search(*wan, sequential="layers", wish=Wish(budget=0.5))
    with pytest.raises(ProfileError, match="sequential must be one of none, bands, layers"):
        search(*wan, sequential="heads")


def test_a_store_holds_for_one_wish(wan, tmp_path):
    store = Store(tmp_path / "store")
    first = search(*wan, sequential="bands", store=store)
    again = search(*wan, sequential="bands", store=store)
    assert again.strategy == first.strategy
    with pytest.raises(ProfileError, match=r"wish\.target: 0\.5, now 0\.2.*--fresh"):
        search(*wan, sequential="bands", store=store, wish=Wish(target=0.2))


@dataclass
class Process:
    """One of several processes; they wait for each other."""

    process_index: int
    num_processes: int
    barrier: threading.Barrier

    def wait_for_everyone(self):
        self.barrier.wait(timeout=120)


def test_processes_decide_together(tmp_path):
    """Two at once, each with a pipeline of its own, write what one alone does."""
    alone = search(*made(), sequential="bands", seeds=(0, 1, 2), store=Store(tmp_path / "alone"))
    barrier, found, failed = threading.Barrier(2), {}, []
    pipelines = made(), made()  # weights are drawn from a generator that threads share

    def run(index):
        pipe, args = pipelines[index]
        try:
            found[index] = search(
                pipe, args, sequential="bands", seeds=(0, 1, 2),
                store=Store(tmp_path / "joint"), state=Process(index, 2, barrier),
            )  # fmt: skip
        except BaseException as error:  # noqa: BLE001  (raised in the test's own thread below)
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert found[1] is None
    assert found[0].strategy == alone.strategy
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
                for name in ("alone", "joint"))  # fmt: skip
    assert one == two
    assert {"chosen-0.json", "chosen-1.json", "unit-00002-band-1.json"} <= set(one)


def test_a_generation_ends_with_its_band(wan):
    pipe, args = wan
    steps = []
    how = Measuring(parse_candidates(STATIC), HALVES)
    plain = pipe.transformer.forward

    def forward(*given, **more):
        steps.append(1)
        return plain(*given, **more)

    pipe.transformer.forward = forward
    try:
        unit = capture(pipe, {**args, "num_inference_steps": STEPS}, 0, how, band=0)
    finally:
        del pipe.transformer.forward
    assert len(steps) == 2 * 3 + 1  # two passes a step, and the first of the next band
    assert unit["steps"] == {"transformer": [0, 1, 2]}
    assert dit_sparse.current(pipe) is None
    assert isinstance(Capture(how).unit()["calls"], list)
