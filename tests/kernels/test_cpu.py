# SPDX-License-Identifier: Apache-2.0
"""What the CPU kernel promises beyond the contract: dense bit for bit, workers, bounded memory."""

import math
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.bench import measure_peak_memory
from dit_sparse.core.grid import BlockLayout, LatentsGrid
from dit_sparse.core.plan import BlockPlan
from dit_sparse.kernels import cpu, cpu_fused, cpu_mass, cpu_rows, cpu_tiles, portable, reference
from dit_sparse.kernels.canary import compare
from dit_sparse.kernels.cpu_rows import piece_length, pieces_of, rows_of, slots_of
from tests.plans import cases, inputs_for, sides
from tests.strategies import attention_inputs, batches, generator, head_counts, seeds


@pytest.fixture(params=[0, 1 << 20], ids=["tiles by row", "tiles held"])
def _small_limits(monkeypatch, request):
    """Make every path of the kernel run on small inputs: workers, pieces, big calls."""
    monkeypatch.setattr(cpu, "WORTH_A_THREAD", 1.0)
    monkeypatch.setattr(cpu, "GATHERED", 1 << 12)
    monkeypatch.setattr(cpu, "Q_ROWS", 16)
    monkeypatch.setattr(cpu, "BIG_CALL", 8)
    monkeypatch.setattr(cpu, "FEWEST_KEYS", 5)
    monkeypatch.setattr(cpu_rows, "WHOLE_BLOCKS", 2)
    monkeypatch.setattr(cpu_tiles, "TILES_HELD", request.param)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def dense(query, key, value, scale):
    return torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=scale
    ).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@given(tokens=st.integers(1, 300), block=st.integers(1, 64), seed=seeds)
def test_a_complete_plan_is_dense_attention_bit_for_bit(dtype, tokens, block, seed):
    query, key, value = attention_inputs(seed, 2, tokens, 3, 16, dtype)
    layout = LatentsGrid(1, 1, tokens).layout(block)
    output, _ = cpu.attend(query, key, value, BlockPlan.full(layout, layout), 0.25)
    assert torch.equal(output, dense(query, key, value, 0.25))


def test_a_complete_plan_leaves_padding_out_and_is_dense_on_the_rest():
    layout = BlockLayout.from_lengths([16, 16, 8])
    shorter = BlockLayout(
        layout.starts, torch.tensor([[[16, 5, 0]]], dtype=torch.int32), 40, 16, spread=True
    )
    query, key, value = attention_inputs(0, 2, 40, 3, 16, torch.float32)
    output, _ = cpu.attend(query, key, value, BlockPlan.full(layout, shorter), 0.25)
    assert torch.equal(output, dense(query, key[:, :21], value[:, :21], 0.25))


@pytest.mark.usefixtures("_small_limits")
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_every_path_stays_within_twice_the_plain_error(case, dtype):
    plan, batch, heads, seed = case
    tensors = inputs_for(plan, batch, heads, 8, seed, dtype)
    output, lse = cpu.attend(*tensors, plan, 0.3)
    assert compare(*tensors, plan, 0.3, output, lse, cpu.EXP_ERROR) is None
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [1, 2])
@given(case=cases(log_weight=False))
def test_nan_under_a_partial_tile_reaches_the_queries_that_keep_it(which, bad, case):
    plan, batch, heads, seed = case
    tensors = list(inputs_for(plan, batch, heads, 8, seed, torch.float32))
    tensors[0], tensors[1] = tensors[0].abs(), tensors[1].abs()
    tensors[which][:, plan.key_length // 2] = bad
    output, _ = cpu.attend(*tensors, plan, 0.3)
    exact, _ = reference.attend(*tensors, plan, 0.3)
    assert torch.equal(output.isfinite(), exact.isfinite())


@pytest.mark.usefixtures("_small_limits")
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_workers_write_in_the_callers_mode(mode):
    layout = BlockLayout.from_lengths([16, 16, 7])
    plan = BlockPlan.from_block_mask(torch.eye(3, dtype=torch.bool)[None, None], layout, layout)
    with mode():
        tensors = inputs_for(plan, 1, 4, 8, 0, torch.float32)
        output, lse = cpu.attend(*tensors, plan, 0.3)
    assert compare(*tensors, plan, 0.3, output, lse, cpu.EXP_ERROR) is None


@pytest.mark.usefixtures("_small_limits")
def test_an_error_in_a_worker_is_raised_and_ends_the_others(monkeypatch):
    calls = []

    def fail(*_args, **_kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError
        time.sleep(0.05)
        raise KeyError

    monkeypatch.setattr(cpu_fused, "_sdpa", fail)
    monkeypatch.setattr(cpu._Heads, "_work", keep_going(cpu._Heads._work))
    layout = BlockLayout.from_lengths([16] * 40)
    plan = BlockPlan.from_block_mask(torch.eye(40, dtype=torch.bool)[None, None], layout, layout)
    with pytest.raises(ZeroDivisionError):
        cpu.attend(*inputs_for(plan, 1, 1, 8, 0, torch.float32), plan, 0.3)
    assert len(calls) < 40
    assert torch.get_num_threads() == 3


def keep_going(work):
    """Make a worker that goes on after KeyError, as one that does not fail would."""

    def worker(head, queue):
        while queue:
            try:
                work(head, queue)
            except KeyError:  # noqa: PERF203
                continue

    return worker


def test_threads_that_start_later_have_all_their_threads(monkeypatch):
    monkeypatch.setattr(cpu, "WORTH_A_THREAD", 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    layout = BlockLayout.from_lengths([16] * 3)
    plan = BlockPlan.from_block_mask(torch.eye(3, dtype=torch.bool)[None, None], layout, layout)
    cpu.attend(*inputs_for(plan, 1, 1, 8, 0, torch.float32), plan, 0.3)
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    assert found == [2]


def test_autocast_changes_nothing():
    # The one place where torch casts by itself: keys that are not finite, under a partial tile.
    layout = BlockLayout.from_lengths([16, 16, 7])
    mask = torch.ones(39, 39, dtype=torch.bool).tril()[None, None]
    plan = BlockPlan.from_token_mask(mask, layout, layout)
    tensors = inputs_for(plan, 1, 4, 8, 0, torch.float32)
    tensors[2][:, 38] = math.nan
    wanted, _ = cpu.attend(*tensors, plan, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = cpu.attend(*tensors, plan, 0.3)
    assert torch.equal(output[:, :38], wanted[:, :38])


def test_a_short_last_block_is_gathered():
    layout = BlockLayout.from_lengths([16, 16, 16, 7])
    mask = torch.tensor([[True, False, True, True], [True, True, False, True]] * 2)
    plan = BlockPlan.from_block_mask(mask[None, None], layout, layout)
    tensors = inputs_for(plan, 2, 1, 8, 0, torch.float32)  # one head: whole blocks are gathered
    output, lse = cpu.attend(*tensors, plan, 0.3)
    assert compare(*tensors, plan, 0.3, output, lse, cpu.EXP_ERROR) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("keys", [1, 3, 15, 16, 40])
def test_what_is_not_finite_is_not_lost_as_torch_loses_it(dtype, bad, keys):
    plan = BlockPlan.full(BlockLayout.from_lengths([5]), BlockLayout.from_lengths([keys]))
    query, key, value = inputs_for(plan, 1, 2, 8, 0, dtype)
    key[:, keys // 2] = bad
    output, _ = cpu.attend(query.abs(), key, value, plan, 0.3)
    assert output.isnan().all()
    if math.isnan(bad):
        output, _ = cpu.attend(query, torch.full_like(key, bad), value, plan, 0.3)
        assert output.isnan().all()


def test_what_a_key_holds_that_counts_zero_times_does_not_matter():
    layout = BlockLayout.from_lengths([16, 16])
    weight = torch.zeros(1, 1, 32)
    weight[..., [3, 20]] = -math.inf
    plan = replace(BlockPlan.full(layout, layout), kv_log_weight=weight)
    tensors = inputs_for(plan, 1, 2, 8, 0, torch.float32)
    wanted, _ = cpu.attend(*tensors, plan, 0.3)
    for x in tensors[1:]:
        x[:, [3, 20]] = math.nan
    output, lse = cpu.attend(*tensors, plan, 0.3)
    assert torch.equal(output, wanted)
    assert lse.isfinite().all()


def test_a_row_with_a_partial_block_is_joined_to_no_other():
    layout = BlockLayout.from_lengths([16, 16])
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    mask[..., :16] = True
    mask[..., 20:, 16:20] = True
    plan = BlockPlan.from_token_mask(mask, layout, layout)
    tensors = inputs_for(plan, 1, 1, 8, 0, torch.float32)
    output, lse = cpu.attend(*tensors, plan, 0.3)
    assert compare(*tensors, plan, 0.3, output, lse, cpu.EXP_ERROR) is None


def test_a_last_dimension_with_a_stride_is_read_right():
    layout = BlockLayout.from_lengths([16, 16, 7])
    plan = BlockPlan.from_block_mask(torch.eye(3, dtype=torch.bool)[None, None], layout, layout)
    tensors = inputs_for(plan, 1, 4, 8, 0, torch.float32)
    strange = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in tensors]
    assert strange[0].stride(-1) != 1
    for got, wanted in zip(
        cpu.attend(*strange, plan, 0.3), cpu.attend(*tensors, plan, 0.3), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_equal_lists_share_a_row_and_blocks_side_by_side_a_span():
    layout = BlockLayout.from_lengths([8] * 6)
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    mask[..., :2, :3] = True
    mask[..., 3, :3] = True
    mask[..., 4, [0, 1, 4, 5]] = True
    rows = rows_of(BlockPlan.from_block_mask(mask, layout, layout), 0, 0)
    assert [(row.q, row.kv) for row in rows] == [
        ([(0, 16), (24, 32)], [(0, 24)]),
        ([(32, 40)], [(0, 16), (32, 48)]),
    ]


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=5),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 24),
    st.integers(0, 23),
    st.integers(0, 40),
)
def test_pieces_are_the_spans(gaps, unit, rest, cut):
    rows = []
    for row in gaps:
        spans, at = [], 0
        for gap, length in row:
            at += gap * unit
            spans.append((at, at + length * unit))
            at += length * unit
        rows.append(spans)
    slots = max(spans[-1][1] for spans in rows) + rest % unit
    rows = [
        [*spans[:-1], (spans[-1][0], slots if spans[-1][1] + unit > slots else spans[-1][1])]
        for spans in rows
    ]
    length = piece_length(rows, slots)
    assert length == 1 or length >= 8
    assert length == 1 or length % unit == 0  # the longest, so a multiple of what they have
    for spans in rows:
        found = pieces_of(spans, length, slots)
        if length == 1:
            assert found is None
            continue
        pieces, left = found
        told = [slot for piece in pieces for slot in range(piece * length, (piece + 1) * length)]
        told += range(slots - left, slots)
        assert told == slots_of(spans).tolist()
        first, last = spans[0]
        if first < cut < last and cut % length:  # spans cut elsewhere are no whole pieces
            assert pieces_of([(first, cut)], length, slots) is None
            assert pieces_of([(cut, last)], length, slots) is None


@pytest.mark.parametrize("kernel", [cpu, portable])
@given(st.data(), batches, head_counts, seeds, st.sampled_from([torch.float32, torch.bfloat16]))
def test_block_mass_equals_the_reference(kernel, data, batch, heads, seed, dtype):
    (q, _, _), (kv, _, _) = (
        data.draw(sides(batch, heads, is_query=side)) for side in (True, False)
    )
    random = generator(seed)
    query = torch.randn(batch, q.slots, heads, 8, generator=random).to(dtype)
    key = torch.randn(batch, kv.slots, heads, 8, generator=random).to(dtype)
    score = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * 0.4
    lse = score.logsumexp(-1).float()
    lse[..., 0] = -math.inf
    mass = kernel.block_mass(query, key, lse, q, kv, 0.4)
    assert mass.dtype == torch.float32
    exact = reference.block_mass(query, key, lse, q, kv, 0.4)
    # Plain fp32 makes the same sums; its error, twice, and one rounding.
    plain = torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float()) * 0.4
    term_error = ((plain - lse[..., None]).exp() - (score - lse[..., None]).exp()).abs()
    term_error[lse == -math.inf] = 0
    allowed = 2 * (float(term_error.sum((-1, -2)).max()) + 2**-23 * float(exact.max()))
    assert float((mass - exact).abs().max()) <= allowed


def test_block_mass_in_pieces_equals_at_once(monkeypatch):
    layout = BlockLayout.from_lengths([20, 13, 9])
    query, key, _ = attention_inputs(0, 1, 42, 2, 8, torch.float32)
    score = torch.einsum("bqhd,bkhd->bhqk", query, key)
    wanted = cpu.block_mass(query, key, score.logsumexp(-1), layout, layout, 1.0)
    torch.testing.assert_close(wanted.sum(-1), layout.lengths.float().expand(1, 2, 3))
    monkeypatch.setattr(cpu_mass, "BUDGET", 42 * 4 * 5)
    got = cpu.block_mass(query, key, score.logsumexp(-1), layout, layout, 1.0)
    torch.testing.assert_close(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 8])
def test_peak_memory_at_32k_tokens_is_bounded(threads):
    found = measure_peak_memory(heads=2, density=0.06, threads=threads, kernel="cpu").extra_mib
    assert 16 < found < 64  # at least the head that it lays out
