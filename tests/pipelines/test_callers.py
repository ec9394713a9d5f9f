# SPDX-License-Identifier: Apache-2.0
"""Who runs a transformer: pipelines that share it, threads, loops, and switching in the middle."""

from __future__ import annotations

import itertools
import threading

import diffusers
import pytest
import torch

import dit_sparse
from tests import tiny

ADASPA = {"density": 0.4, "block_size": 8, "search_steps": (0.0, 0.5)}  # remembers over steps


def build(family):
    pipe, args = tiny.PIPELINES[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, args


def sibling(pipe, *, scheduler=True):
    """Another pipeline on the same transformer, by default with a scheduler of its own."""
    other = type(pipe).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    if scheduler:
        other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return other


def at_once(*runs, times=3):
    """Run pipelines in a thread each; returns what each gave, or raises what one raised."""
    results, errors = [[] for _ in runs], []

    def work(i):
        try:
            for _ in range(times):
                results[i].append(tiny.run(*runs[i]))
        except BaseException as error:  # noqa: BLE001  (raised again below)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("family", ["wan", "cogvideox", "flux", "pixart_sigma"])
def test_two_pipelines_share_a_transformer(family):
    """One sparse, one not, each with its scheduler: both as if the other were not there."""
    pipe, args = build(family)
    stock = tiny.run(pipe, args)
    other = sibling(pipe)
    handle = pipe.enable_sparse_attention("adaspa", strict=True, **ADASPA)
    sparse = tiny.run(pipe, args)
    assert not torch.equal(sparse, stock)
    own = handle.report()

    assert torch.equal(tiny.run(other, args), stock)  # without threads
    report = handle.report()
    assert (len(report.rows), report.reasons) == (len(own.rows), {})  # still the own run's
    (reason,) = report.others
    assert f"another {type(pipe).__name__} shares this transformer" in reason
    assert f"not replaced x {report.others[reason]}" in report.summary()

    ours, theirs = at_once((pipe, args), (other, args))
    assert all(torch.equal(each, sparse) for each in ours)
    assert all(torch.equal(each, stock) for each in theirs)
    assert not handle.report().reasons


@pytest.mark.parametrize("same", [True, False])
def test_one_scheduler_without_a_state_in_two_threads(same):
    """DDIM keeps nothing but its schedule, so stock diffusers allows it; runs share nothing."""
    pipe, args = build("pixart_ddim")
    other = pipe if same else sibling(pipe, scheduler=False)
    handle = pipe.enable_sparse_attention("adaspa", strict=True, **ADASPA)
    sparse = tiny.run(pipe, args)
    for results in at_once((pipe, args), (other, args)):
        assert all(torch.equal(each, sparse) for each in results)
    assert not handle.report().reasons


@pytest.mark.parametrize("again", [False, True])
def test_switched_by_another_thread_in_the_middle_of_a_call(again):
    pipe, args = build("wan")
    stock = tiny.run(pipe, args)
    handle = pipe.enable_sparse_attention("adaspa", strict=True, **ADASPA)
    calls = itertools.count()

    def switch():
        pipe.disable_sparse_attention()
        if again:
            pipe.enable_sparse_attention("adaspa", strict=True, **ADASPA)

    def watch(*_):
        if next(calls) == 9:  # a method has planned, and its state is not measured yet
            thread = threading.Thread(target=switch)
            thread.start()
            thread.join()

    handle.watch = watch
    assert tiny.run(pipe, args).isfinite().all()
    assert next(calls) > 9
    if again:
        steps = {row["step"] for row in pipe.sparse_attention.report().rows}
        assert steps == {2, 3}
        pipe.disable_sparse_attention()
    assert torch.equal(tiny.run(pipe, args), stock)


def test_enabled_in_the_middle_of_a_pass():
    """The rest of that pass stays dense, and is no error where dense fallback is one."""
    pipe, args = build("wan")

    def enable(*_):
        hook.remove()
        pipe.enable_sparse_attention("adaspa", strict=True, **ADASPA)

    hook = pipe.transformer.blocks[1].register_forward_pre_hook(enable)
    tiny.run(pipe, args)
    report = pipe.sparse_attention.report()
    ((reason, count),) = report.reasons.items()
    assert "enabled during this pass" in reason
    assert count == 1
    assert report.sparse_rows
    pipe.disable_sparse_attention()


def test_a_loop_beside_the_pipeline():
    """A loop over the pipeline's scheduler is sparse; one over another scheduler is not."""
    pipe, args = build("wan")
    handle = pipe.enable_sparse_attention("gna", window=(2, 3, 3), tile=(2, 2, 2))
    foreign = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.7)
    for scheduler, sparse in ((pipe.scheduler, True), (foreign, False)):
        scheduler.set_timesteps(4)
        latents = tiny.normal(1, 16, 3, 8, 12)
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                velocity = pipe.transformer(
                    latents, timestep[None], args["prompt_embeds"], return_dict=False
                )[0]
                latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        rows = handle.report().rows[-8:]
        assert [row["density"] < 1 for row in rows] == [sparse] * 8
        if sparse:
            assert [row["step"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
        else:
            assert all("runs in a custom loop" in row["reason"] for row in rows)


def test_each_thread_sets_its_own_step():
    pipe, args = build("wan")
    model = pipe.transformer
    inputs = (tiny.normal(1, 16, 3, 8, 12), torch.tensor([500]), args["prompt_embeds"])
    both = threading.Barrier(2)
    with dit_sparse.sparse_attention(model, "gna", window=(2, 3, 3), tile=(2, 2, 2)) as handle:
        steps = {}

        def loop(first):
            steps[threading.get_ident()] = seen = {first}
            handle.at(first, 4)
            both.wait()
            with torch.no_grad():
                model(*inputs)
            assert len(seen) == 1

        handle.watch = lambda call, *_: steps[threading.get_ident()].add(call.step)
        threads = [threading.Thread(target=loop, args=(first,)) for first in (0, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(steps.values(), key=min) == [{0}, {2}]
        with torch.no_grad():
            model(*inputs)  # here nobody set one
        assert any("in the same thread" in why for why in handle.report().reasons)
