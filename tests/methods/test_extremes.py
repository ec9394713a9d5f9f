# SPDX-License-Identifier: Apache-2.0
"""Numbers at the ends of what a field may hold: refused, or planned without an exception."""

from __future__ import annotations

import dataclasses
import sys
import typing
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.errors import StrategyError
from dit_sparse.kernels import reference
from dit_sparse.methods import METHODS, method_class
from dit_sparse.methods.params import build_method, params_of
from tests.methods.naive import NaiveOps, make_call, run

WHOLE = st.sampled_from(
    [-1, 0, 1, 2, 3, 4, 1023, 1024, 1025, 9973, 2**15, 10**6, 2**31 - 1, 2**31, 2**53 + 1,
     2**63 - 1, 2**63, 10**19, 10**400]
)  # fmt: skip
REAL = st.sampled_from(
    [-1.0, -5e-324, -0.0, 0.0, 5e-324, 2.2250738585072014e-308, 1e-300, 1e-40, 1e-9, 0.2, 0.5,
     1 - 2**-53, 1.0, 1 + 2**-52, 2.0, 1e9, 1e40, 1e300, 1.7976931348623157e308, 3, 10**400]
)  # fmt: skip
GRIDS = st.sampled_from(
    [
        LatentsGrid(1, 1, 1),
        LatentsGrid(1, 5, 7),
        LatentsGrid(3, 1, 1, 4),
        LatentsGrid(5, 3, 4, 3, text_first=True),
        LatentsGrid(9, 2, 3),
    ]
)


def of_type(hint):
    """Draw JSON values of a field's type, numbers at the ends."""
    args = typing.get_args(hint)
    if hint is bool:
        return st.booleans()
    if hint is int:
        return WHOLE
    if hint is float:
        return REAL
    if hint is str or typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(args or ("radial", "gna", "pooled", "window"))
    if typing.get_origin(hint) is tuple:
        if args[-1] is Ellipsis:
            return st.lists(of_type(args[0]), max_size=3)
        return st.tuples(*map(of_type, args)).map(list)
    if typing.get_origin(hint) is dict:  # the params of another method
        return st.one_of(*map(params_for, ("radial", "gna", "pooled", "window")))
    return st.one_of(*map(of_type, args))  # a union


def params_for(name):
    """Draw one or two of a method's params: with all of them nearly every draw is refused."""
    cls = method_class(name)
    written = SimpleNamespace(__annotations__={f.name: f.type for f in dataclasses.fields(cls)})
    hints = typing.get_type_hints(written, vars(sys.modules[cls.__module__]))
    if not hints:
        return st.just({})
    names = st.lists(st.sampled_from(sorted(hints)), max_size=2, unique=True)
    return names.flatmap(
        lambda drawn: st.fixed_dictionaries({key: of_type(hints[key]) for key in drawn})
    )


class ReferenceOps(NaiveOps):
    """Attend by the reference kernel, which takes bit tiles too."""

    def attend(self, query, key, value, plan, scale):
        return reference.attend(query, key, value, plan, scale)


def plan_a_run(method, grid, batch):
    state, shared, ops = {}, {}, ReferenceOps()
    for step in range(4):
        call = make_call(grid, step, batch, step=step, num_steps=4, state=state, shared=shared)
        plan, output = run(method, call, ops)
        if plan is not None:
            plan.validate()
            assert bool(output.isfinite().all())


@pytest.mark.parametrize("name", sorted(METHODS))
@given(data=st.data())
def test_extreme_params_are_refused_or_plan(name, data):
    params = data.draw(params_for(name))
    try:
        method = build_method(name, params)
    except StrategyError:
        return
    assert build_method(name, params_of(method)) == method
    plan_a_run(method, data.draw(GRIDS), 1)
