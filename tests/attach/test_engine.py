# SPDX-License-Identifier: Apache-2.0
"""The engine between strategy, methods and kernels, watched on a real pipeline."""

from __future__ import annotations

import json

import pytest
import torch

import dit_sparse
from dit_sparse.methods.radial import Radial
from tests import tiny

RADIAL = {"form": "paper", "decay_factor": 0.3, "block_size": 8}
ADASPA = {"density": 0.4, "block_size": 8, "search_steps": [0.0, 0.5]}


def rule(method, params, **where):
    return {"method": method, "params": params, **where}


def mixed(*rules, **schedule):
    strategy = dit_sparse.Strategy(name="mixed").to_dict()
    strategy |= {"rules": list(rules)}
    strategy["schedule"] |= schedule
    return dit_sparse.Strategy.from_dict(strategy)


@pytest.fixture(scope="module")
def wan():
    pipe, args = tiny.wan()
    pipe.set_progress_bar_config(disable=True)
    return pipe, args, tiny.run(pipe, args)


def rows_of(pipe, args, strategy, **options):
    with dit_sparse.sparse_attention(pipe, strategy, strict=True, **options) as handle:
        latents = tiny.run(pipe, args)
        return latents, handle.report()


def test_heads_of_one_layer_may_use_different_methods(wan):
    pipe, args, stock = wan
    strategy = mixed(rule("radial", RADIAL, heads=[0]), rule("adaspa", ADASPA, heads=[1]))
    _, report = rows_of(pipe, args, strategy, probe=4)
    assert all(row["methods"] == {"radial": [0], "adaspa": [1]} for row in report.rows)
    # A head's result depends on its own rule only: the output of head 0 is that of radial alone.
    seen = {}
    for name, profile in (("mixed", strategy), ("radial", mixed(rule("radial", RADIAL)))):
        with dit_sparse.sparse_attention(pipe, profile) as handle:
            site = handle._sites[0]
            handle.at(0, 4)
            query, key, value = (tiny.normal(1, 72, 2, 12, seed=i) for i in range(3))
            seen[name] = handle.attention(
                site, query, key, value, None, (3, 4, 6, 0), None, lambda *_: 1 / 0
            )
    assert torch.equal(seen["mixed"][:, :, 0], seen["radial"][:, :, 0])
    assert not torch.equal(seen["mixed"][:, :, 1], seen["radial"][:, :, 1])
    only_dense = mixed(rule("dense", {}, heads=[0]), rule("dense", {}, heads=[1]))
    assert torch.equal(rows_of(pipe, args, only_dense)[0], stock)


def test_dense_heads_beside_sparse_ones(wan):
    pipe, args, stock = wan
    latents, report = rows_of(pipe, args, mixed(rule("radial", RADIAL, heads=[1])))
    assert all(row["methods"] == {"dense": [0], "radial": [1]} for row in report.rows)
    assert all(0.5 < row["density"] < 1 for row in report.rows)
    assert not torch.equal(latents, stock)


def test_the_schedule_is_the_same_for_every_method(wan):
    pipe, args, _ = wan
    for method in (rule("radial", RADIAL), rule("adaspa", {**ADASPA, "search_steps": [0.0]})):
        strategy = mixed(method, dense_warmup_steps=1, dense_last_steps=0.25, dense_layers=[1])
        _, report = rows_of(pipe, args, strategy)
        sparse = {(row["layer"], row["step"]) for row in report.rows if row["density"] < 1}
        first = 2 if method["method"] == "adaspa" else 1  # its search step is dense
        assert sparse == {(0, step) for step in range(first, 3)}


def test_a_run_that_is_all_dense_says_so(wan):
    pipe, args, stock = wan
    with pytest.warns(UserWarning, match="'radial' had no effect, because its schedule .*4 steps"):
        latents, report = rows_of(pipe, args, "radial", dense_warmup_steps=9, **RADIAL)
    assert torch.equal(latents, stock)
    assert "keeps every call of this run dense" in report.summary()


def test_stages_can_differ():
    pipe, args = tiny.wan(two_stages=True)
    pipe.set_progress_bar_config(disable=True)
    strategy = mixed(rule("radial", RADIAL, stage="transformer_2"))
    _, report = rows_of(pipe, args, strategy)
    used = {(row["stage"], *row["methods"]) for row in report.rows}
    assert used == {("transformer", "dense"), ("transformer_2", "radial")}
    one_stage, _ = tiny.wan()
    with pytest.raises(dit_sparse.StrategyError, match="transformer_2"):
        one_stage.enable_sparse_attention(strategy)


def test_a_static_plan_is_built_once_per_geometry(wan, monkeypatch):
    pipe, args, _ = wan
    handle = pipe.enable_sparse_attention("radial", **RADIAL)
    planned = []
    plan = Radial.plan

    def watched(self, call, ops):
        made = plan(self, call, ops)
        planned.append(made.kv_indices.data_ptr())
        return made

    monkeypatch.setattr(Radial, "plan", watched)
    tiny.run(pipe, args)
    tiny.run(pipe, args)
    assert len(planned) == 2 * 16
    assert len(set(planned)) == 1
    assert handle.state_size() > 0  # the one plan, shared by all layers and steps
    pipe.disable_sparse_attention()


def test_the_report_is_strict_json(wan):
    pipe, args, _ = wan
    _, report = rows_of(pipe, args, "adaspa", probe=3, **ADASPA)
    text = json.dumps(report.as_dict(), allow_nan=False)
    data = json.loads(text)
    assert data["calls"] == len(report.rows) == 16
    assert 0 < data["density"] < 1
    assert 0 < data["worst_recall"] <= data["recall"] <= 1
    assert data["kernels"]
    assert "layer" in str(report)


@pytest.mark.parametrize("start", ["probed", "plain"])
def test_probing_does_not_change_the_result(wan, start):
    pipe, args, _ = wan
    order = [0, 5] if start == "plain" else [5, 0]
    one, other = (rows_of(pipe, args, "adaspa", probe=probe, **ADASPA)[0] for probe in order)
    assert torch.equal(one, other)


def test_training_stays_dense_and_says_so(wan):
    pipe, _, _ = wan
    model = pipe.transformer
    with dit_sparse.sparse_attention(model, "radial", **RADIAL) as handle:
        handle.at(0, 2)
        output = model(
            hidden_states=tiny.normal(1, 16, 3, 8, 12),
            timestep=torch.tensor([500]),
            encoder_hidden_states=tiny.normal(1, 512, 32),
        ).sample
        output.mean().backward()
        reasons = handle.report().reasons
    assert any("gradients" in reason for reason in reasons)
    model.zero_grad()


def test_tokens_beyond_the_grid_stay_dense_and_say_so(wan):
    pipe, _, _ = wan
    with dit_sparse.sparse_attention(pipe.transformer, "radial", **RADIAL) as handle:
        handle.at(0, 2)
        query = tiny.normal(1, 80, 2, 12)
        output = handle.attention(
            handle._sites[0], query, query, query, None, (3, 4, 6, 0), None, lambda q, k, v: q
        )
        assert output is query
        assert any("80" in reason for reason in handle.report().reasons)


def test_a_bare_transformer_without_a_clock_says_so(wan):
    pipe, _, _ = wan
    with dit_sparse.sparse_attention(pipe.transformer, "radial", **RADIAL) as handle:
        query = tiny.normal(1, 72, 2, 12)
        call = (handle._sites[0], query, query, query, None, (3, 4, 6, 0), None, lambda q, k, v: q)
        handle.attention(*call)
        assert any("handle.at" in reason for reason in handle.report().reasons)
        with pytest.raises(ValueError, match="num_steps"):
            handle.at(4, 4)
