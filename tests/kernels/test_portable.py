# SPDX-License-Identifier: Apache-2.0
"""The kernel for any device: its chunks change nothing, and a device without float64 runs it.

That it keeps the contract of every kernel is tested in ``test_contract.py``, its gradients in
``test_cpu_backward.py``, its block mass in ``test_cpu.py``.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.kernels import portable, reference
from dit_sparse.kernels.dispatch import Backends
from tests.fake_device import FakeDevice
from tests.plans import cases, inputs_for


@given(case=cases())
@settings(max_examples=10)
def test_small_chunks_change_nothing(case):
    plan, batch, heads, seed = case
    tensors = inputs_for(plan, batch, heads, 16, seed, torch.float64)
    wanted = portable.attend(*tensors, plan, 0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "Q_ROWS", 3)
        patch.setattr(portable, "budget", lambda _: 5000)
        got = portable.attend(*tensors, plan, 0.3)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def plan_of(kind):
    layout = BlockLayout.from_lengths([20, 16, 7])
    plan = BlockPlan.from_block_mask(torch.ones(1, 2, 3, 3).tril().bool(), layout, layout)
    if kind == "tiles":
        bits = torch.rand(1, 2, 43, 43) < 0.5
        return BlockPlan.from_token_mask(bits, layout, layout)
    order = torch.randperm(43)[None, None]
    weight = torch.randn(1, 1, 43)
    return replace(plan, q_permutation=order, kv_permutation=order, kv_log_weight=weight)


@pytest.mark.parametrize("kind", ["tiles", "permuted"])
def test_a_device_without_float64_and_where_reading_waits(kind):
    plan = plan_of(kind)
    tensors = inputs_for(plan, 2, 2, 16, 0, torch.float32)
    wanted = portable.attend(*tensors, plan, 0.3)
    ops = Backends()
    with FakeDevice("mps") as device, torch.no_grad():
        query, key, value = (x.to("mps") for x in tensors)
        there = plan.to("mps")
        for _ in range(2):  # the first time checks the kernel, and reads the plan
            device.clear()
            got = ops.attend(query, key, value, there, 0.3)
            mass = ops.block_mass(query, key, got[1], there.q, there.q, 0.3)
        assert not device.reads + device.copies
    assert ops.last_kernel == "portable"
    exact = reference.block_mass(*tensors[:2], wanted[1], plan.q, plan.q, 0.3)
    for one, other in zip((*got, mass), (*wanted, exact.float()), strict=True):
        torch.testing.assert_close(one.elem, other, rtol=1e-4, atol=1e-4)
