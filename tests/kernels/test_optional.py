# SPDX-License-Identifier: Apache-2.0
"""The optional backends: what they say where they cannot run, and how they translate plans.

Neither cuDNN's nor FlashInfer's kernels run here; stand-ins compute what their documentation
says, so that a plan's way there and back is tested. On a GPU the canary checks the real ones.
"""

import math
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import KernelError
from dit_sparse.kernels import cudnn, flashinfer, flex
from dit_sparse.kernels.canary import check_kernel, compare
from dit_sparse.kernels.dispatch import BY_NAME_ONLY, KERNELS, Backends
from tests.plans import cases, inputs_for

OPTIONAL = ["flex", "cudnn", "flashinfer"]
CPU = torch.device("cpu")


def small(lengths=(64, 64, 20)):
    layout = BlockLayout.from_lengths(list(lengths))
    return BlockPlan.full(layout, layout)


@pytest.mark.parametrize("name", OPTIONAL)
def test_is_in_the_table_and_never_chosen_unasked(name):
    assert KERNELS[name] == f"dit_sparse.kernels.{name}"
    assert name in BY_NAME_ONLY
    with pytest.raises(KernelError, match=f"{name}: needs a"):
        Backends(name).attend(*inputs_for(small(), 1, 1, 64, 0, torch.float32), small(), 1.0)


@pytest.mark.parametrize(
    ("kernel", "query", "plan", "words"),
    [
        (flex, torch.zeros(1, 148, 1, 8), small(), ["CUDA or ROCm", "LSE", "head_dim >= 16"]),
        (flex, torch.zeros(1, 148, 1, 64).double(), small(), ["float64"]),
        (
            flex,
            torch.zeros(1, 1040, 1, 64),
            small([1] * 40 + [1000]),
            ["equal query", "equal key"],
        ),
        (
            cudnn,
            torch.zeros(1, 148, 1, 72),
            small(),
            ["NVIDIA", "cudnn-frontend", "float32", "72"],
        ),
        (flashinfer, torch.zeros(1, 148, 1, 72), small(), ["flashinfer-python", "float32", "72"]),
    ],
)
def test_reasons_name_what_is_missing(kernel, query, plan, words):
    reasons = "\n".join(kernel.reasons_against(query, plan))
    for word in words:
        assert word in reasons


@pytest.mark.parametrize("kernel", [cudnn, flashinfer])
@given(case=cases())
@settings(max_examples=10)
def test_plans_that_are_not_understood_are_refused(kernel, case):
    plan = case[0]
    reasons = "\n".join(kernel.reasons_against(torch.zeros(1, 8, 1, 64), plan))
    assert ("bit tiles" in reasons) == (plan.partial is not None)
    assert ("log weights" in reasons) == (plan.kv_log_weight is not None)


def by_lists(q, k, v, score_mod, mask, scale, options):
    """Stand in for the compiled function: blocks by the lists, ``mask_mod`` in partial ones."""
    q_size, kv_size = mask.BLOCK_SIZE
    (batch, heads, q_slots, _), kv_slots = q.shape, k.shape[2]
    assert q_size % options["BLOCK_M"] == kv_size % options["BLOCK_N"] == 0
    assert (q_slots % q_size, kv_slots % kv_size) == (0, 0)
    b, h = torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None, None]
    i, j = torch.arange(q_slots)[:, None], torch.arange(kv_slots)
    full = torch.zeros(batch, heads, q_slots // q_size, kv_slots // kv_size, dtype=torch.bool)
    some = full.clone()
    for kept, counts, lists in (
        (some, mask.kv_num_blocks, mask.kv_indices),
        (full, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        live = torch.arange(lists.shape[-1]) < counts[..., None]
        for at in live.expand_as(kept).nonzero().tolist():
            lead = at[0] % lists.shape[0], at[1] % lists.shape[1]
            kept[at[0], at[1], at[2], int(lists[lead][at[2], at[3]])] = True
    some, full = (x.repeat_interleave(q_size, 2) for x in (some, full))
    some, full = (x.repeat_interleave(kv_size, 3) for x in (some, full))
    score = q.double() @ k.double().transpose(-1, -2) * scale
    if score_mod is not None:
        score = score_mod(score, b, h, i, j)
    score = score.masked_fill(~(full | some & mask.mask_mod(b, h, i, j)), -math.inf)
    output = score.softmax(-1).nan_to_num() @ v.double()
    return output.to(q.dtype), score.logsumexp(-1)


@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=15)
def test_flex_translates_every_plan(case, dtype):
    plan, batch, heads, seed = case
    tensors = inputs_for(plan, batch, heads, 16, seed, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "_flex", by_lists)
        output, lse = flex.attend(*tensors, plan, 0.3)
    exact = Backends("reference").attend(*tensors, plan, 0.3)
    torch.testing.assert_close(output, exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, exact[1], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_torchs_own_function_takes_the_translation(monkeypatch):
    """Uncompiled it heeds ``mask_mod`` and ``score_mod`` only, so every block is kept here."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    layout = BlockLayout.from_lengths([40, 64, 23])
    weight = torch.randn(1, 2, 127)
    plan = replace(BlockPlan.full(layout, layout), kv_log_weight=weight)
    bits = torch.rand(127, 127) < 0.8
    for chosen in (plan, BlockPlan.from_token_mask(bits[None, None], layout, layout)):
        tensors = inputs_for(chosen, 2, 2, 16, 0, torch.float32)
        output, lse = flex.attend(*tensors, chosen, 0.3)
        exact = Backends("reference").attend(*tensors, chosen, 0.3)
        torch.testing.assert_close(output, exact[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lse, exact[1], rtol=1e-4, atol=1e-4)


def test_flex_keeps_whole_blocks_apart_from_those_it_must_mask():
    layout = BlockLayout.from_lengths([64, 64, 20])
    mask = torch.tensor([[[[1, 0, 1], [0, 0, 0], [1, 1, 1]]]], dtype=torch.bool)
    plan = BlockPlan.from_block_mask(mask, layout, layout)
    form = flex.padded(plan, 64, 64)
    found = flex.block_mask(plan, form, 192, 192)
    assert found.full_kv_num_blocks[0, 0].tolist() == [1, 0, 2]
    assert found.kv_num_blocks[0, 0].tolist() == [1, 0, 1]
    assert found.full_kv_indices[0, 0, 2, :2].tolist() == [0, 1]
    assert found.kv_indices[0, 0, 0, 0] == 2


def bsa(q, k, v, index, number, sizes, counts, *, sparse_block_size, softmax_scale, **options):
    """Stand in for ``cudnn.BSA.block_sparse_attention_forward``."""
    assert options == {"allow_empty_block_nums": True, "layout": "bshd"}
    assert number is None
    assert index.is_contiguous()
    assert index.dtype == counts.dtype == sizes.dtype == torch.int32
    batch, slots, heads, _ = q.shape
    assert slots % sparse_block_size == 0
    assert index.shape[:3] == counts.shape == (batch, heads, slots // sparse_block_size)
    sizes = sizes.expand(batch, heads, -1)
    assert sizes.shape[-1] == k.shape[1] // sparse_block_size
    block = torch.arange(k.shape[1]) // sparse_block_size
    filled = torch.arange(k.shape[1]) % sparse_block_size < sizes[..., block]
    kept = torch.zeros(*counts.shape, sizes.shape[-1], dtype=torch.bool)
    for b, h, i in torch.ones_like(counts).nonzero().tolist():
        kept[b, h, i, index[b, h, i, : counts[b, h, i]].long()] = True
    mask = kept.repeat_interleave(sparse_block_size, 2)[..., block] & filled[:, :, None]
    return plain(q, k, v, mask, softmax_scale)


def plain(q, k, v, mask, scale):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    score = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    output = torch.where(mask, score.softmax(-1), 0).nan_to_num() @ v
    return output.transpose(1, 2), score.logsumexp(-1).float()


class Wrapper:
    """Stand in for ``flashinfer.sparse.VariableBlockSparseAttentionWrapper``."""

    def __init__(self, workspace):
        assert workspace.dtype == torch.uint8

    def plan(self, mask, rows, columns, q_heads, kv_heads, head_dim, *, sm_scale, q_data_type):
        assert rows.dtype == columns.dtype == torch.int32
        assert mask.shape == (kv_heads, rows.shape[1], columns.shape[1])
        assert len(set(rows.sum(1).tolist())) == len(set(columns.sum(1).tolist())) == 1
        self.mask = torch.stack(
            [
                m.repeat_interleave(r.long(), 0).repeat_interleave(c.long(), 1)
                for m, r, c in zip(mask, rows, columns, strict=True)
            ]
        )
        self.scale = sm_scale

    def run(self, q, k, v, *, return_lse):
        o, lse = plain(*(x[:, :, None] for x in (q, k, v)), self.mask[:, None], self.scale)
        return o[:, :, 0].to(q.dtype), lse[:, 0] / math.log(2)


@pytest.fixture
def stand_ins(monkeypatch):
    fake = ModuleType("cudnn")
    fake.BSA = ModuleType("cudnn.BSA")
    fake.BSA.block_sparse_attention_forward = bsa
    sparse = ModuleType("flashinfer.sparse")
    sparse.VariableBlockSparseAttentionWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "cudnn", fake)
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.sparse", sparse)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(flashinfer, "WORKSPACE", 8)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("kernel", [cudnn, flashinfer])
def test_documented_calls_give_the_plans_result(kernel):
    @given(case=cases(partial=False, log_weight=False))
    @settings(max_examples=15)
    def every_plan(case):
        plan, batch, heads, seed = case
        tensors = inputs_for(plan, batch, heads, 8, seed, torch.float64)
        output, lse = kernel.attend(*tensors, plan, 0.3)
        exact = Backends("reference").attend(*tensors, plan, 0.3)
        torch.testing.assert_close(output, exact[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(lse, exact[1], rtol=1e-5, atol=1e-5)

    every_plan()
    assert check_kernel(kernel, CPU, torch.float64, 16) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_the_device(name, dtype):
    plan = small([128] * 5 + [77]).to("cuda")
    tensors = [x.cuda() for x in inputs_for(plan, 2, 3, 128, 0, dtype)]
    reasons = dict(Backends().explain("cuda", dtype))[name]
    if reasons:
        pytest.skip("; ".join(reasons))
    output, lse = Backends(name).attend(*tensors, plan, 128**-0.5)
    assert compare(*tensors, plan, 128**-0.5, output, lse) is None
