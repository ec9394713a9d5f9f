# SPDX-License-Identifier: Apache-2.0
"""A call does not make the host wait: no blocking copy to the device, no read from it.

Every method, and strategies that mix methods within a layer, run on a simulated device that counts
both. The portable kernel reads each new plan's counts, once; nothing else may read. Plans and
index tensors are made in the first calls of a geometry; afterwards nothing is copied either.
"""

import pytest
import torch

from dit_sparse.attach.runtime import Runtime
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.kernels import portable
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.methods import METHODS, method_class
from dit_sparse.strategy import Strategy
from tests.fake_device import FakeDevice

GRID, HEADS, STEPS = LatentsGrid(2, 4, 4, 6), 4, 4
MIXED = {
    "interleaved": [([0, 2], "radial"), ([1, 3], "pooled")],
    "one launch": [([0, 2], "pooled"), ([1, 3], "xattention")],
    "with dense heads": [([1, 3], "svg2")],
    "three": [([0, 3], "gna"), ([1], "adaspa"), ([2], "blade")],
}
PLANS_ONCE = {"dense", "gna", "radial", "window"}


def strategy_of(name):
    if name not in MIXED:
        return Strategy.coerce(name, **dict(method_class(name).example), dense_warmup_steps=0)
    rules = [
        {"heads": heads, "method": method, "params": dict(method_class(method).example)}
        for heads, method in MIXED[name]
    ]
    return Strategy.coerce({"schema_version": 1, "name": "mixed", "rules": rules})


def generation(name, device):
    """Run a generation up to its last step, at whose end densities are read; yield each step."""
    runtime = Runtime(strategy_of(name), num_layers=1, num_heads=HEADS)
    random = torch.Generator().manual_seed(0)
    for step in range(STEPS - 1):
        shape = (1, GRID.tokens, HEADS, 16)
        tensors = [torch.randn(shape, generator=random).to(device.device) for _ in range(3)]
        device.clear()
        runtime.attend(*tensors, grid=GRID, layer=0, step=step, num_steps=STEPS)
        assert runtime.records[-1].reason is None
        yield step
    assert set(runtime.report().kernels) <= {"portable", "model's own"}


@pytest.mark.parametrize("name", [*METHODS, *MIXED])
def test_no_call_waits_for_the_device(name, monkeypatch):
    plans = []  # read by the portable kernel in this call
    cut = portable._cut
    monkeypatch.setattr(portable, "_cut", lambda *a: plans.append(1) or cut(*a))
    monkeypatch.setattr(Backends, "_canary", lambda *_: None)
    with FakeDevice("mps") as device, torch.no_grad():
        for step in generation(name, device):
            if step:
                assert not device.copies, (step, device.copies)
                assert device.reads.total() <= len(plans), (step, device.reads)
                assert not (name in PLANS_ONCE and plans)
            plans.clear()
