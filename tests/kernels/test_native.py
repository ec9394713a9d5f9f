# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernel: instruction sets, threads, every freedom of a plan, what it declines."""

import itertools
import math
import time
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.bench import measure_peak_memory
from dit_sparse.core.call import AttentionCall
from dit_sparse.core.grid import BlockLayout, LatentsGrid
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import KernelError, NativeUnavailable
from dit_sparse.kernels import cpu, native, native_library, reference
from dit_sparse.kernels.canary import (
    RACE_MOST_ROUNDS,
    RACE_ROUNDS,
    RACE_TOKENS,
    compare,
    torch_is_faster,
)
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.methods import method_class
from tests.plans import cases, inputs_for, sides
from tests.strategies import attention_inputs, batches, generator, head_counts, seeds

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLANS = 500  # for each instruction set; 5,000 passed once, in four minutes
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


@pytest.fixture(params=["one thread", "two of torch's threads", "two threads of our own"])
def _threads(request, monkeypatch):
    monkeypatch.setattr(native, "WORTH_A_THREAD", 1.0)
    count = 1 if request.param == "one thread" else 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    if request.param == "two threads of our own":  # torch without OpenMP
        monkeypatch.setattr(native, "_openmp", lambda: None)


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
@settings(max_examples=PLANS)
@given(case=cases(), head_dim=head_dims, dtype=st.sampled_from(DTYPES))
def test_many_plans_stay_within_twice_the_plain_error(name, case, head_dim, dtype):
    check(name, case, head_dim, dtype)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_errors_do_not_add_up_along_a_row_of_many_keys(name, head_dim):
    """A rounding made once for every chunk of keys would exceed the bound at this length."""
    q, kv = BlockLayout.from_lengths([64]), BlockLayout.from_lengths([128] * 160)
    plan = BlockPlan.from_block_mask(torch.ones(1, 1, 1, 160, dtype=torch.bool), q, kv)
    random = generator(0)
    query, key, value = (
        torch.randn(1, tokens, 1, head_dim, generator=random) for tokens in (64, 20_480, 20_480)
    )
    scale = head_dim**-0.5
    output, lse = native.attend(query, key, value, plan, scale, name)
    assert compare(query, key, value, plan, scale, output, lse, native.EXP_ERROR) is None


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("name", SETS)
@given(data=st.data(), batch=batches, heads=head_counts, seed=seeds, dtype=st.sampled_from(DTYPES))
def test_block_mass_equals_the_reference(name, data, batch, heads, seed, dtype):
    (q, _, _), (kv, _, _) = (
        data.draw(sides(batch, heads, is_query=side)) for side in (True, False)
    )
    random = generator(seed)
    query = torch.randn(batch, q.slots, heads, 8, generator=random).to(dtype)
    key = torch.randn(batch, kv.slots, heads, 8, generator=random).to(dtype)
    score = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * 0.4
    lse = score.logsumexp(-1).float()
    lse[..., 0] = -math.inf
    mass = native.block_mass(query, key, lse, q, kv, 0.4, name)
    exact = reference.block_mass(query, key, lse, q, kv, 0.4)
    plain = torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float()) * 0.4
    error = ((plain - lse[..., None]).exp() - (score - lse[..., None]).exp()).abs()
    error[lse == -math.inf] = 0
    allowed = 2 * (float(error.sum((-1, -2)).max()) + 2**-23 * float(exact.max()))
    allowed += native.EXP_ERROR * float(exact.max())
    assert float((mass - exact).abs().max()) <= allowed


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("name", SETS)
@given(case=cases(), dtype=st.sampled_from(DTYPES))
def test_mass_summed_on_the_way_is_the_weight_of_each_block_pair(name, case, dtype):
    plan, batch, heads, seed = case
    tensors = inputs_for(plan, batch, heads, 8, seed, dtype)
    output, lse, mass = native.attend_with_mass(*tensors, plan, 0.3, name)
    for got, wanted in zip((output, lse), native.attend(*tensors, plan, 0.3, name), strict=True):
        assert torch.equal(got, wanted)
    q, k = (x.double().transpose(1, 2) for x in tensors[:2])
    for i_batch, i_head in itertools.product(range(batch), range(heads)):
        mask, bias = reference.token_mask(plan, i_batch, i_head)
        score = (q[i_batch, i_head] @ k[i_batch, i_head].T) * 0.3 + bias
        weight = torch.where(mask, score, -math.inf).softmax(-1).nan_to_num(0.0)
        q_block, kv_block = (
            token_blocks(layout, permutation, tokens, i_batch, i_head)
            for layout, permutation, tokens in (
                (plan.q, plan.q_permutation, plan.query_length),
                (plan.kv, plan.kv_permutation, plan.key_length),
            )
        )
        exact = q_block.T @ weight @ kv_block
        torch.testing.assert_close(mass[i_batch, i_head].double(), exact, rtol=1e-4, atol=1e-5)


def token_blocks(layout, permutation, tokens, i_batch, i_head):
    """Say in which block each token lies: ``[tokens, blocks]`` of 0 and 1."""

    def own(x):
        return x[i_batch % x.shape[0], i_head % x.shape[1]].tolist()

    token = list(range(layout.slots)) if permutation is None else own(permutation)
    inside = torch.zeros(tokens, layout.blocks, dtype=torch.float64)
    for block, (start, length) in enumerate(
        zip(own(layout.starts), own(layout.lengths), strict=True)
    ):
        for slot in range(start, start + length):
            inside[token[slot], block] = 1.0
    return inside


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_no_ordinary_number_is_the_torch_kernels(which, bad):
    tensors = list(inputs_for(PLAN, 1, 2, 16, 0, torch.float32))
    tensors[which][:, 3] = bad
    assert native.attend(*tensors, PLAN, 0.25) is None
    for ops in (Backends(), Backends("native")):
        output, lse = ops.attend(*tensors, PLAN, 0.25)
        assert ops.last_kernel == "cpu"
        for got, wanted in zip((output, lse), cpu.attend(*tensors, PLAN, 0.25), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_infinity_in_16_bits_is_seen(dtype):
    tensors = list(inputs_for(PLAN, 1, 2, 16, 0, dtype))
    assert native.attend(*tensors, PLAN, 0.25) is not None
    for bad in (math.nan, math.inf, -math.inf):
        tensors[2][0, 30, 1, 15] = bad
        assert native.attend(*tensors, PLAN, 0.25) is not None  # token 30 is dropped
        tensors[2][0, 19, 1, 15] = bad
        assert native.attend(*tensors, PLAN, 0.25) is None
        tensors[2][0, 19, 1, 15] = 0.0


def test_block_mass_of_what_is_not_finite_is_the_torch_kernels():
    query, key, _ = inputs_for(PLAN, 1, 2, 16, 0, torch.float32)
    key[:, 3] = math.nan
    lse = torch.zeros(1, 2, 42)
    ops = Backends()
    mass = ops.block_mass(query, key, lse, LAYOUT, LAYOUT, 0.25)
    assert ops.last_kernel == "cpu"
    assert mass[..., 0].isnan().all()
    assert mass[..., 1:].isfinite().all()


def test_an_unknown_instruction_set_is_refused():
    tensors = inputs_for(PLAN, 1, 2, 16, 0, torch.float32)
    with pytest.raises(KernelError, match=r"one of avx2, avx512, neon, wide, got 'mmx'"):
        native.attend(*tensors, PLAN, 0.25, "mmx")


def test_asked_for_by_name_without_its_library_it_raises(monkeypatch):
    def missing():
        raise NativeUnavailable("no library for this machine")

    monkeypatch.setattr(native_library, "load", missing)
    tensors = inputs_for(PLAN, 1, 2, 16, 0, torch.float32)
    with pytest.raises(KernelError, match="native: no library for this machine"):
        Backends("native").attend(*tensors, PLAN, 0.25)
    ops = Backends()
    ops.attend(*tensors, PLAN, 0.25)
    assert ops.last_kernel == "cpu"


@pytest.mark.parametrize(
    ("slow_rounds", "rounds", "winner"),
    [(0, RACE_ROUNDS, "native"), (8, 9, "native"), (RACE_MOST_ROUNDS, RACE_MOST_ROUNDS, "cpu")],
)
def test_the_faster_kernel_is_chosen_once(monkeypatch, slow_rounds, rounds, winner):
    """Rounds that another program made slow decide nothing."""
    calls = []

    def slow(*args):
        calls.append(args)
        time.sleep(0.05 if len(calls) <= slow_rounds else 0.0)
        return original(*args)

    original, quick = native.attend, cpu.attend
    monkeypatch.setattr(native, "attend", slow)
    monkeypatch.setattr(cpu, "attend", lambda *args: (time.sleep(0.01), quick(*args))[1])
    monkeypatch.setattr(
        "dit_sparse.kernels.dispatch.torch_is_faster", cache(torch_is_faster.__wrapped__)
    )
    tensors = inputs_for(PLAN, 1, 2, 16, 0, torch.float32)
    for _ in range(2):  # another pipeline's asks no more
        ops = Backends()
        ops.attend(*tensors, PLAN, 0.25)
        assert ops.last_kernel == winner
    timed = [args for args in calls if args[0].shape[1] == RACE_TOKENS]
    assert len(timed) == rounds
    assert {args[0].shape[-1] for args in calls} == {16}


@pytest.mark.parametrize("method", ["adaspa", "sparsed"])
def test_a_first_search_gets_its_block_sums_from_the_dense_pass(monkeypatch, method):
    asked = []
    monkeypatch.setattr(native, "block_mass", lambda *args: asked.append(args))
    monkeypatch.setattr(cpu, "block_mass", lambda *args: asked.append(args))
    grid = LatentsGrid(4, 8, 8, 7)
    query, key, value = attention_inputs(0, 2, grid.tokens, 3, 16, torch.float32)
    call = AttentionCall(query, key, value, grid, 0.25, heads=(0, 1, 2), step=4, num_steps=10)
    chosen, ops = method_class(method)(block_size=16), Backends("native")
    plan = chosen.plan(call, ops)
    output, lse = ops.attend(query, key, value, plan, 0.25)
    chosen.finish(call, output, lse, ops)
    assert not asked
    exact = reference.block_mass(query, key, lse, plan.q, plan.kv, 0.25)
    found = torch.cat(
        [
            ops.block_mass(query[:, :, h], key[:, :, h], lse[:, h], plan.q, plan.kv, 0.25)
            for h in (slice(0, 2), slice(2, 3))
        ],
        1,
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    later = chosen.plan(replace(call, step=5), ops)
    assert later.density().max() < 1
    assert not asked


def test_the_block_sums_are_those_of_their_own_call_only():
    tensors = inputs_for(PLAN, 2, 3, 16, 0, torch.float32)
    ops = Backends("native")
    plan = BlockPlan.full(LAYOUT, LAYOUT, measured=True)
    _, lse = ops.attend(*tensors, plan, 0.25)
    query, key, _ = tensors
    wanted = ops.block_mass(query, key, lse.clone(), LAYOUT, LAYOUT, 0.25)
    torch.testing.assert_close(ops.block_mass(query, key, lse, LAYOUT, LAYOUT, 0.25), wanted)
    other = BlockLayout.from_lengths([21, 21])
    for q, kv, scale in ((other, LAYOUT, 0.25), (LAYOUT, other, 0.25), (LAYOUT, LAYOUT, 0.5)):
        found = ops.block_mass(query, key, lse, q, kv, scale)
        exact = reference.block_mass(query, key, lse, q, kv, scale)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    again = ops.block_mass(2 * query, key, lse, LAYOUT, LAYOUT, 0.25)  # an old LSE, new queries
    exact = reference.block_mass(2 * query, key, lse, LAYOUT, LAYOUT, 0.25)
    torch.testing.assert_close(again.double(), exact, rtol=1e-5, atol=1e-5)
    turned = ops.block_mass(query.flip(2), key.flip(2), lse.flip(1), LAYOUT, LAYOUT, 0.25)
    torch.testing.assert_close(turned, wanted.flip(1))
    ops.attend(*tensors, PLAN, 0.25)
    assert ops._measured is None


@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="torch has no OpenMP")
def test_work_is_done_by_torchs_own_threads(monkeypatch):
    monkeypatch.setattr(native, "WORTH_A_THREAD", 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(native, "Thread", None)
    started = []
    parallel = native._openmp()

    def count(*args):
        started.append(args[2])
        parallel(*args)

    monkeypatch.setattr(native, "_openmp", lambda: count)
    tensors = inputs_for(PLAN, 1, 2, 16, 0, torch.float32)
    output, lse = native.attend(*tensors, PLAN, 0.25)
    assert started == [2]
    assert compare(*tensors, PLAN, 0.25, output, lse, native.EXP_ERROR) is None


@pytest.mark.slow
def test_peak_memory_at_32k_tokens_is_that_of_each_threads_scratch():
    found = measure_peak_memory(heads=1, density=0.06, threads=2, kernel="native")
    assert found.kernel == "native"
    assert found.extra_mib < 4  # a copy of one of the inputs would be 16
