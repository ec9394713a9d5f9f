# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernel: each instruction set, threads, every freedom of a plan, what it declines."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.backends import Backends
from dit_sparse.canary import compare
from dit_sparse.errors import KernelError
from dit_sparse.grid import BlockLayout
from dit_sparse.kernels import native, reference
from dit_sparse.plan import BlockPlan
from tests.plans import cases, inputs_for

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUT = BlockLayout.from_lengths([20, 13, 9])
PLAN = BlockPlan.from_block_mask(torch.tensor([[[[True, False, True]] * 3]]), LAYOUT, LAYOUT)

try:
    SETS = native.instruction_sets()
except KernelError as error:
    pytest.skip(str(error), allow_module_level=True)
if "avx2" in SETS:
    SETS = [*SETS, "wide"]  # what AVX-512 runs, compiled for AVX2

# Widths that leave a rest of every vector and panel, and those of the models.
head_dims = st.sampled_from([1, 3, 8, 17, 24, 40, 48, 64, 72, 128])


@pytest.fixture(params=[1, 2])
def _threads(request, monkeypatch):
    monkeypatch.setattr(native, "WORTH_A_THREAD", 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def check(name, case, head_dim, dtype):
    plan, batch, heads, seed = case
    tensors = inputs_for(plan, batch, heads, head_dim, seed, dtype)
    scale = head_dim**-0.5
    output, lse = native.attend(*tensors, plan, scale, name)
    assert compare(*tensors, plan, scale, output, lse, native.EXP_ERROR) is None


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("name", SETS)
@given(case=cases(), head_dim=head_dims, dtype=st.sampled_from(DTYPES))
def test_every_instruction_set_stays_within_twice_the_plain_error(name, case, head_dim, dtype):
    check(name, case, head_dim, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
@settings(max_examples=5000)
@given(case=cases(), head_dim=head_dims, dtype=st.sampled_from(DTYPES))
def test_5000_plans_stay_within_twice_the_plain_error(name, case, head_dim, dtype):
    check(name, case, head_dim, dtype)
