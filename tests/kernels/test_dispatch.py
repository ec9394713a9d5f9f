# SPDX-License-Identifier: Apache-2.0
"""Choosing a kernel: it explains itself, refuses clearly, and checks a kernel before its use."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from dit_sparse.bench import Shape, run_bench
from dit_sparse.core.grid import BlockLayout, LatentsGrid
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import KernelError, PlanError
from dit_sparse.kernels import cpu
from dit_sparse.kernels import dispatch as module
from dit_sparse.kernels.canary import Kind, compare, small_plan
from dit_sparse.kernels.dispatch import BY_NAME_ONLY, KERNELS, Backends
from dit_sparse.kernels.triton_target import forward_tiling
from tests import tiny
from tests.strategies import attention_inputs

LAYOUT = BlockLayout.from_lengths([16, 16, 7])
PLAN = BlockPlan.from_block_mask(torch.eye(3, dtype=torch.bool)[None, None], LAYOUT, LAYOUT)


def inputs(dtype=torch.float32):
    return attention_inputs(0, 2, 39, 3, 16, dtype)


@pytest.fixture
def fake(monkeypatch):
    """A kernel of our own making in the table: returns the module to put things into."""
    made = ModuleType("dit_sparse_fake_kernel")
    made.reasons_against = lambda _query, _plan: []
    made.attend = cpu.attend
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setitem(KERNELS, "fake", made.__name__)
    return made


def test_the_cpu_kernel_answers_on_the_cpu():
    ops = Backends()
    assert ops.last_kernel is None
    output, lse = ops.attend(*inputs(), PLAN, 0.25)
    assert ops.last_kernel in {"native", "cpu"}
    assert output.shape == (2, 39, 3, 16)
    assert lse.shape == (2, 3, 39)
    mass = ops.block_mass(*inputs()[:2], lse, LAYOUT, LAYOUT, 0.25)
    assert mass.shape == (2, 3, 3, 3)
    assert mass.dtype == torch.float32
    # The LSE is of this plan: what it keeps, one block a row, has all of the mass.
    wanted = LAYOUT.lengths.float().expand(2, 3, 3)
    torch.testing.assert_close(mass.diagonal(dim1=-2, dim2=-1), wanted)


def test_nothing_is_imported_before_it_is_needed(monkeypatch):
    monkeypatch.setitem(KERNELS, "broken", "dit_sparse_there_is_no_such_kernel")
    ops = Backends()
    ops.attend(*inputs(), PLAN, 0.25)
    assert "broken" not in ops._modules
    reasons = dict(ops.explain())["broken"]
    assert reasons == [
        "needs the package dit_sparse_there_is_no_such_kernel, which is not installed"
    ]


def test_a_missing_file_of_ours_is_a_bug_and_not_a_fallback(monkeypatch):
    monkeypatch.setitem(KERNELS, "broken", "dit_sparse.kernels.there_is_no_such_kernel")
    with pytest.raises(ModuleNotFoundError):
        Backends().explain()


def test_explain_names_every_kernel():
    found = dict(Backends().explain("cpu", torch.float32))
    assert list(found) == list(KERNELS)
    assert found["cpu"] == []
    assert dict(Backends().explain("cpu", torch.complex64))["cpu"][0].startswith("computes")
    assert set(KERNELS) > BY_NAME_ONLY


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_explain_says_that_a_device_is_not_there():
    for reasons in dict(Backends().explain("cuda")).values():
        assert "does not support cuda" in reasons[0]


def test_an_unknown_kernel_is_refused():
    with pytest.raises(KernelError, match="unknown kernel 'fast'; available: "):
        Backends("fast")


def test_a_kernel_asked_for_by_name_answers():
    ops = Backends("reference")
    output, lse = ops.attend(*inputs(torch.bfloat16), PLAN, 0.25)
    assert ops.last_kernel == "reference"
    assert (output.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_a_kernel_that_cannot_is_not_replaced_in_silence(fake):
    fake.reasons_against = lambda _query, _plan: ["likes no Fridays", "needs a bigger chip"]
    with pytest.raises(KernelError) as error:
        Backends("fake").attend(*inputs(), PLAN, 0.25)
    assert "fake: likes no Fridays\n  fake: needs a bigger chip" in str(error.value)
    Backends().attend(*inputs(), PLAN, 0.25)
    fake.reasons_against = lambda _query, _plan: []
    with pytest.raises(KernelError, match="fake: does not implement block_mass"):
        Backends("fake").block_mass(*inputs()[:2], torch.zeros(2, 3, 39), LAYOUT, LAYOUT, 0.25)


def test_gradients_are_never_dropped_in_silence(fake):
    query, key, value = inputs()
    key.requires_grad_()
    with pytest.raises(KernelError, match="fake: does not compute gradients"):
        Backends("fake").attend(query, key, value, PLAN, 0.25)
    with torch.no_grad():
        Backends("fake").attend(query, key, value, PLAN, 0.25)
    fake.HAS_BACKWARD = True
    output, _ = Backends("fake").attend(query, key, value, PLAN, 0.25)
    output.sum().backward()
    assert key.grad is not None


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda o, e: (o * 1.001, e), "output differs by"),
        (lambda o, e: (o, e * 0.6931), "lse differs by"),
        (lambda o, e: (o, e.nan_to_num(neginf=0.0)), "lse has NaN or inf at other positions"),
        (lambda o, e: (o.double(), e), "output is torch.float64"),
        (lambda o, e: (torch.full_like(o, torch.nan), e), "output has NaN or inf"),
    ],
)
def test_a_wrong_kernel_is_found_before_its_first_use(fake, spoil, words):
    fake.attend = lambda *call: spoil(*cpu.attend(*call))
    with pytest.raises(KernelError, match=words) as error:
        Backends("fake").attend(*inputs(), PLAN, 0.25)
    for part in ("kernel 'fake'", "head_dim 16", "torch.float32 on cpu", torch.__version__):
        assert part in str(error.value)


def test_the_check_is_made_once_for_each_device_dtype_head_dim_and_kind_of_plan(fake, monkeypatch):
    calls = []
    check = module.check_once
    monkeypatch.setattr(module, "check_once", lambda *a: calls.append(a[2:]) or check(*a))
    ops = Backends("fake")
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        ops.attend(*inputs(dtype), PLAN, 0.25)
    order = torch.arange(39)[None, None]
    ops.attend(*inputs(), replace(PLAN, kv_permutation=order), 0.25)
    ops.attend(*inputs(), replace(PLAN, kv_permutation=order.flip(-1)), 0.25)
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    assert [call[:3] for call in calls] == [(torch.device("cpu"), d, 16) for d in dtypes]
    assert [call[3].kv_permuted for call in calls] == [False, False, True]


@pytest.mark.parametrize("flag", range(2, len(Kind._fields)))
def test_the_checks_plan_is_of_the_calls_kind(flag):
    """So it has the call's own tiling (of the same longest blocks), and runs the same code."""
    for lengths in ((16, 96), (1000, 128), (77, 33)):
        kind = Kind(*lengths)
        kind = kind._replace(**{Kind._fields[flag]: not kind[flag]})
        plan = small_plan(torch.device("cpu"), kind).validate()
        assert Kind.of(plan) == Kind(*Kind()[:4], *kind[4:])
        assert (plan.q.max_length, plan.kv.max_length) == lengths
        wanted = kind._replace(q_length=min(lengths[0], 384 + 1000 % 128))
        assert Kind.of(plan.to("meta")) == wanted
        for target, plain in (("sm_80", True), ("sm_90", False), ("gfx942", True)):
            call = forward_tiling(target, torch.bfloat16, 128, *lengths, plain=plain)
            assert call == forward_tiling(target, torch.bfloat16, 128, *wanted[:2], plain=plain)


def test_a_kernel_that_is_wrong_on_one_kind_of_plan_alone_is_found(fake):
    def attend(query, key, value, plan, scale):
        output, lse = cpu.attend(query, key, value, plan, scale)
        return output * (1 + (plan.kv_permutation is not None)), lse

    fake.attend = attend
    ops, order = Backends("fake"), torch.arange(39)[None, None]
    ops.attend(*inputs(), PLAN, 0.25)
    with pytest.raises(KernelError, match=r"kv_permuted=True.*: output differs by"):
        ops.attend(*inputs(), replace(PLAN, kv_permutation=order), 0.25)


def changed(index, change):
    def spoil(tensors):
        tensors[index] = change(tensors[index])

    return spoil


@pytest.mark.parametrize(
    ("spoil", "scale", "words"),
    [
        (changed(0, lambda x: x[0]), 0.25, "seq_len, heads, head_dim], got query"),
        (changed(1, lambda x: x[:, :5]), 0.25, "key and value must have the same shape"),
        (changed(0, lambda x: x[..., :8]), 0.25, "agree on batch, heads and head_dim"),
        (changed(0, lambda x: x[:, :, :1]), 0.25, "agree on batch, heads and head_dim"),
        (changed(0, lambda x: x[:, :0]), 0.25, "no dimension may be 0"),
        (changed(1, lambda x: x.double()), 0.25, "same dtype, got torch.float32, torch.float64"),
        (changed(2, lambda x: x.to("meta")), 0.25, "same device, got cpu, cpu, meta"),
        (changed(0, lambda x: x), float("nan"), "scale must be finite, got nan"),
        (changed(0, lambda x: x), float("inf"), "scale must be finite, got inf"),
    ],
)
def test_wrong_inputs_are_named(spoil, scale, words):
    tensors = list(inputs())
    spoil(tensors)
    with pytest.raises(KernelError, match=words):
        Backends().attend(*tensors, PLAN, scale)


def plan_for(batch, heads):
    mask = torch.eye(3, dtype=torch.bool).expand(batch, heads, 3, 3)
    return BlockPlan.from_block_mask(mask, LAYOUT, LAYOUT)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (
            BlockPlan.full(BlockLayout.from_lengths([38]), LAYOUT),
            r"38 query and 39 key tokens, query \(2, 39, 3, 16\) has 39, key 39",
        ),
        (BlockPlan.full(LAYOUT, BlockLayout.from_lengths([40])), "39 query and 40 key tokens"),
        (plan_for(3, 1), "batch size 3 and 1 heads"),
        (plan_for(1, 2), "batch size 1 and 2 heads"),
        (PLAN.to("meta"), "the plan is on meta, query on cpu"),
    ],
)
def test_a_plan_for_another_call_is_refused(plan, words):
    with pytest.raises(PlanError, match=words):
        Backends().attend(*inputs(), plan, 0.25)


@pytest.mark.parametrize(
    ("lse", "q", "words"),
    [
        (torch.zeros(2, 39, 3), LAYOUT, r"lse must be \[batch, heads, seq_len\] = \(2, 3, 39\)"),
        (torch.zeros(2, 3, 39), BlockLayout.from_lengths([5]), "query layout is for 5 tokens"),
        (
            torch.zeros(2, 3, 39),
            BlockLayout(LAYOUT.starts.expand(1, 2, 3), LAYOUT.lengths.expand(1, 2, 3), 39, 16),
            r"query layout is for \(1, 2\)",
        ),
    ],
)
def test_block_mass_of_other_sizes_is_refused(lse, q, words):
    query, key, _ = inputs()
    with pytest.raises(KernelError, match=words):
        Backends().block_mass(query, key, lse, q, LAYOUT, 0.25)


@pytest.fixture(scope="module")
def small_bench():
    return {
        "shapes": (Shape("tiny", LatentsGrid(1, 10, 25), 2, 16),),
        "block_sizes": (32,),
        "densities": (0.5,),
        "threads": (1,),
        "repeats": 2,
        "memory": False,
    }


def test_bench_reports_ratios(tmp_path, small_bench):
    report = run_bench(**small_bench, command="dit-sparse bench")
    assert len(report.measurements) == 2  # random and local
    for found in report.measurements:
        assert found.fault is None
        assert found.clock == "thread"
        assert found.efficiency == pytest.approx(found.speedup * found.density)
        assert 0.4 < found.density < 0.6
    report.save(tmp_path / "bench.json")
    assert '"efficiency"' in (tmp_path / "bench.json").read_text(encoding="utf-8")
    assert report.table().row_count == 2
    assert report.environment["python"]


def test_bench_prints_no_speed_of_a_wrong_result(fake, small_bench, monkeypatch):
    fake.attend = lambda *call: (cpu.attend(*call)[0] * 1.1, cpu.attend(*call)[1])
    monkeypatch.setattr(module, "check_once", lambda *_: None)
    for found in run_bench(**small_bench, kernels=("fake",)).measurements:
        assert "output differs" in found.fault
        assert found.sparse_ms is None
        assert found.efficiency is None


@pytest.mark.parametrize("seed", range(5))
def test_the_allowance_for_exponentials_is_what_they_can_move(seed):
    """Weights off by up to e each, against the values' signs; the sum itself nearly cancels."""
    e, layout = 4e-7, BlockLayout.from_lengths([16])
    plan = BlockPlan.full(layout, layout)
    query, key = (tiny.normal(1, 16, 1, 4, seed=seed + i) for i in (0, 10))
    sign = torch.tensor([1.0, -1.0]).repeat(8)[:, None]
    value = (sign * (2 + 0.1 * tiny.normal(16, 4, seed=seed))).reshape(1, 16, 1, 4)
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * 0.01
    weights = (scores.exp() * (1 + e * sign.double().flatten()))[0, 0]
    lse = weights.sum(-1).log().float()[None, None]
    moved = (weights / weights.sum(-1, keepdim=True)) @ value[0, :, 0].double()
    output = moved.float().reshape(1, 16, 1, 4)
    given = query, key, value, plan, 0.01, output, lse
    assert compare(*given, e) is None
    assert "output differs" in compare(*given, e / 10)
    assert "output differs" in compare(*given)
