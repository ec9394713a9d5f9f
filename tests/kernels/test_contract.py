# SPDX-License-Identifier: Apache-2.0
"""Every kernel of the table that runs on this machine keeps the same contract."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.kernels import reference
from dit_sparse.kernels.canary import compare
from dit_sparse.kernels.dispatch import KERNELS, Backends, exp_error
from tests.plans import cases, inputs_for
from tests.strategies import head_dims

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNNABLE = [name for name, reasons in Backends().explain(DEVICE) if not reasons]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def test_some_kernel_runs_here():
    assert set(RUNNABLE) <= set(KERNELS)
    assert set(RUNNABLE) - {"reference"}


@pytest.fixture(scope="module", params=RUNNABLE)
def backends(request):
    return Backends(request.param)


def dtypes_of(backends):
    return [
        dtype for dtype in DTYPES if not dict(Backends().explain(DEVICE, dtype))[backends.kernel]
    ]


def on_device(plan, tensors):
    return plan.to(DEVICE), [x.to(DEVICE) for x in tensors]


@given(data=st.data(), case=cases(), head_dim=head_dims)
def test_stays_within_twice_the_plain_error(backends, data, case, head_dim):
    plan, batch, heads, seed = case
    dtype = data.draw(st.sampled_from(dtypes_of(backends)))
    plan, tensors = on_device(plan, inputs_for(plan, batch, heads, head_dim, seed, dtype))
    scale = head_dim**-0.5
    output, lse = backends.attend(*tensors, plan, scale)
    assert lse.dtype == torch.float32
    assert backends.last_kernel == backends.kernel
    assert compare(*tensors, plan, scale, output, lse, exp_error(backends.kernel)) is None


@given(case=cases(), batch_first=st.booleans())
def test_takes_strides_as_they_come(backends, case, batch_first):
    plan, batch, heads, seed = case
    plan, tensors = on_device(plan, inputs_for(plan, batch, heads, 16, seed, torch.float32))
    if batch_first:  # [batch, heads, seq_len, head_dim] in memory
        moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    else:  # one fused projection
        joined = torch.cat([torch.cat([x, x], -1) for x in tensors], 1)
        ends = [0, *torch.tensor([x.shape[1] for x in tensors]).cumsum(0).tolist()]
        moved = [joined[:, a:b, :, :16] for a, b in itertools.pairwise(ends)]
    for got, wanted in zip(
        backends.attend(*moved, plan, 0.25), backends.attend(*tensors, plan, 0.25), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [1, 2])
@given(case=cases(partial=False, log_weight=False))
def test_nan_reaches_exactly_the_queries_that_keep_it(backends, which, bad, case):
    plan, batch, heads, seed = case
    tensors = list(inputs_for(plan, batch, heads, 16, seed, torch.float32))
    tensors[0], tensors[1] = tensors[0].abs(), tensors[1].abs()  # inf - inf is nowhere
    tensors[which][:, plan.key_length // 2] = bad
    plan, tensors = on_device(plan, tensors)
    output, _ = backends.attend(*tensors, plan, 0.25)
    exact, _ = reference.attend(*tensors, plan, 0.25)
    assert torch.equal(output.isfinite(), exact.isfinite())


def test_nothing_kept_gives_zero_and_minus_infinity(backends):
    layout = BlockLayout.from_lengths([20, 13])
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    for kept in ([], [0], [1]):
        mask.zero_()
        mask[..., kept, 0] = True
        plan = BlockPlan.from_block_mask(mask, layout, layout)
        plan, tensors = on_device(plan, inputs_for(plan, 2, 2, 16, 0, torch.float32))
        output, lse = backends.attend(*tensors, plan, 0.25)
        for block, rows in enumerate((slice(0, 20), slice(20, 33))):
            if block not in kept:
                assert (output[:, rows] == 0).all()
                assert (lse[..., rows] == -math.inf).all()


def test_dropped_keys_do_not_matter(backends):
    layout = BlockLayout.from_lengths([20, 13, 9])
    mask = torch.tensor([[[[True, False, True]] * 3]])
    plan = BlockPlan.from_block_mask(mask, layout, layout)
    plan, tensors = on_device(plan, inputs_for(plan, 1, 2, 16, 0, torch.float32))
    wanted = backends.attend(*tensors, plan, 0.25)
    for x in tensors[1:]:
        x[:, 20:33] = math.nan
    for got, before in zip(backends.attend(*tensors, plan, 0.25), wanted, strict=True):
        assert torch.equal(got, before)
