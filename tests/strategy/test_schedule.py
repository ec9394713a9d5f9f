# SPDX-License-Identifier: Apache-2.0
"""The schedule: which steps and layers are dense whatever the rules say."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from dit_sparse.methods.steps import step_at
from dit_sparse.strategy.schedule import Schedule

fractions = st.integers(0, 999).map(lambda n: n / 1000)
amounts = st.one_of(st.integers(0, 60), fractions)


@given(fractions, st.integers(1, 1000))
@example(0.29, 50)  # 14.5 as it is written, less than that in binary
def test_fractions_are_rounded_half_up_as_they_are_written(fraction, num_steps):
    exact = Decimal(str(fraction)) * num_steps
    assert step_at(fraction, num_steps) == int(exact.quantize(Decimal(1), ROUND_HALF_UP))


@given(amounts, amounts, st.integers(1, 60), st.sets(st.integers(0, 9), max_size=4))
def test_dense_steps_and_layers(first, last, num_steps, layers):
    schedule = Schedule(
        dense_warmup_steps=first, dense_last_steps=last, dense_layers=tuple(layers)
    )
    first, last = (n if isinstance(n, int) else step_at(n, num_steps) for n in (first, last))
    for step in range(num_steps):
        for layer in range(10):
            dense = step < first or step >= num_steps - last or layer in layers
            assert schedule.is_dense(layer, step, num_steps) == dense


@pytest.mark.parametrize("num_steps", [1, 4, 8])
def test_a_warm_up_longer_than_the_run_makes_all_of_it_dense(num_steps):
    schedule = Schedule(dense_warmup_steps=12)
    assert not schedule.sparse_steps(num_steps)
    assert all(schedule.is_dense(0, step, num_steps) for step in range(num_steps))


@pytest.mark.parametrize(("f", "steps"), [(0.24, {50: 12, 8: 2, 4: 1}), (0.3, {50: 15, 5: 2})])
def test_published_fractions(f, steps):
    for num_steps, dense in steps.items():
        assert Schedule(dense_warmup_steps=f).sparse_steps(num_steps).start == dense


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dense_warmup_steps": 1.0}, "a fraction of the run in .*, got 1.0; write 1 for steps"),
        ({"dense_warmup_steps": -0.1}, "a fraction of the run"),
        ({"dense_warmup_steps": -1}, "whole number from 0 to [0-9]*, got -1"),
        ({"dense_warmup_steps": True}, "whole number from 0 to [0-9]*, got True"),
        ({"dense_warmup_steps": "2"}, "whole number from 0 to [0-9]*, got '2'"),
        ({"dense_last_steps": float("nan")}, "a fraction of the run"),
        ({"dense_last_steps": float("inf")}, "a fraction of the run"),
        ({"dense_last_steps": 10**30}, "whole number from 0"),
        ({"dense_layers": 2}, r"the first 2 are \[0, 1\]"),
        ({"dense_layers": 0}, r"the first 0 are \[\]"),
        ({"dense_layers": 40}, r"the first 40 are \[0, 1, 2, ...\]"),
        ({"dense_layers": [0, 0]}, "names 0 more than once"),
        ({"dense_layers": [-1]}, "whole number from 0 to [0-9]*, got -1"),
        ({"dense_layers": "all"}, "must be a list of indices, got 'all'"),
        ({"dense_layer": [0]}, "dense_layer"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValidationError, match=message):
        Schedule(**fields)
