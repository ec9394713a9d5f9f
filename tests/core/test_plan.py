# SPDX-License-Identifier: Apache-2.0
"""Plans: exact there and back, a true density, and a clear word for each way to be malformed."""

import copy
import math
import pickle
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import DitSparseError, PlanError
from dit_sparse.kernels.dispatch import Backends
from tests.kernels.test_reference import kept_keys, shared
from tests.plans import cases, inputs_for, lengths
from tests.strategies import generator, seeds

LISTS = ("kv_indices", "kv_num_blocks")


def same(left, right):
    ours, theirs = left.tensors(), right.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@given(cases())
def test_density_is_the_naive_count(case):
    plan, _, _, _ = case
    for i_batch in range(plan.batch):
        for i_head in range(plan.heads):
            kept = sum(len(found) for found in kept_keys(plan, i_batch, i_head).values())
            queries = sum(shared(plan.q.lengths, i_batch, i_head))
            keys = sum(shared(plan.kv.lengths, i_batch, i_head))
            density = float(plan.density()[i_batch, i_head])
            if queries * keys:
                assert math.isclose(density, kept / (queries * keys))


def test_pooled_keys_count_as_what_they_are():
    q, kv = BlockLayout.from_lengths([8, 8]), BlockLayout.from_lengths([8, 8, 4])
    mask = torch.tensor([[[[True, False, True], [False, True, True]]]])
    plan = BlockPlan.from_block_mask(mask, q, kv, dense_keys=16)
    assert float(plan.density()) == pytest.approx((8 + 4) / 16)


@given(cases())
def test_a_block_mask_comes_back(case):
    plan, _, _, _ = case
    mask = plan.block_mask()
    again = BlockPlan.from_block_mask(mask, plan.q, plan.kv)
    assert torch.equal(again.block_mask(), mask)
    assert again.kv_indices.shape[-1] == max(1, int(plan.kv_num_blocks.max()))
    replace(plan, **{n: getattr(again, n) for n in LISTS}, partial=None, tiles=None).validate()


@given(cases())
def test_the_complement_keeps_what_the_plan_drops(case):
    plan, _, _, _ = case
    rest = plan.complement().validate()
    for i_batch in range(plan.batch):
        for i_head in range(plan.heads):
            keys = sum(shared(plan.kv.lengths, i_batch, i_head))
            kept, dropped = (kept_keys(x, i_batch, i_head) for x in (plan, rest))
            for query, slots in kept.items():
                assert not set(slots) & set(dropped[query])
                assert len(slots) + len(dropped[query]) == keys


@given(lengths, lengths, st.sampled_from([0.1, 0.5, 0.9, 1.0]), seeds)
def test_a_token_mask_comes_back(q_lengths, kv_lengths, share, seed):
    q, kv = BlockLayout.from_lengths(q_lengths), BlockLayout.from_lengths(kv_lengths)
    mask = torch.rand(2, 2, q.slots, kv.slots, generator=generator(seed)) < share
    plan = BlockPlan.from_token_mask(mask, q, kv).validate()
    for i_batch in range(2):
        for i_head in range(2):
            for token, found in kept_keys(plan, i_batch, i_head).items():
                wanted = mask[i_batch, i_head, token].nonzero().flatten().tolist()
                assert [key for key, _ in found] == wanted
    assert torch.allclose(plan.density(), mask.double().mean((-1, -2)))


def test_a_full_plan_keeps_everything():
    layout = BlockLayout.from_lengths([5, 5, 2])
    plan = BlockPlan.full(layout, layout).validate()
    assert plan.complete
    assert plan.block_mask().all()
    assert float(plan.density()) == 1.0
    assert "12 x 12 tokens, 3 x 3 blocks of up to 5 x 5, heads 1, density 1.000" in plan.summary()


def test_a_summary_gives_the_range_over_heads():
    layout = BlockLayout.from_lengths([4, 4])
    mask = torch.tensor([[[[True, True]] * 2, [[True, False]] * 2]])
    plan = BlockPlan.from_block_mask(mask, layout, layout)
    assert plan.summary().endswith("heads 2, density 0.750 (0.500-1.000)")


def test_a_plan_is_frozen():
    plan = BlockPlan.full(BlockLayout.from_lengths([4]), BlockLayout.from_lengths([4]))
    with pytest.raises(FrozenInstanceError):
        plan.complete = False


def test_key_lengths_can_be_exchanged():
    layout = BlockLayout.from_lengths([4, 4])
    shorter = BlockLayout(layout.starts, torch.tensor([[[4, 1]]], dtype=torch.int32), 8, 4)
    plan = BlockPlan.full(layout, layout).with_keys(shorter)
    assert plan.kv is shorter
    assert float(plan.density()) == 1.0  # of the keys that are there
    assert plan.with_keys(shorter) is plan
    other = BlockLayout(layout.starts, torch.tensor([[[4, 2]]], dtype=torch.int32), 8, 4)
    for wanted in (other, layout, other, other):  # two guidance branches, one text each
        assert plan.with_keys(wanted).kv is wanted
    assert plan.with_keys(other) is plan.with_keys(other)
    with pytest.raises(PlanError, match="2 blocks over 8 slots, got 1 over 8"):
        plan.with_keys(BlockLayout.from_lengths([8]))


def test_shared_storage_is_counted_once():
    layout = BlockLayout.from_lengths([4, 4])
    plan = BlockPlan.full(layout, layout)
    assert plan.nbytes == 4 * (2 + 2 + 2 + 2)  # starts, lengths, one row of indices, counts


@given(case=cases())
def test_a_saved_plan_comes_back(tmp_path_factory, case):
    plan, _, _, _ = case
    path = tmp_path_factory.mktemp("plans") / "plan.safetensors"
    plan.save(path)
    again = BlockPlan.load(path)
    assert same(plan, again)
    for field in fields(BlockPlan):
        if field.name in {"q_tokens", "kv_tokens", "dense_keys", "complete"}:
            assert getattr(again, field.name) == getattr(plan, field.name)
    for ours, theirs in ((plan.q, again.q), (plan.kv, again.kv)):
        assert (ours.slots, ours.max_length, ours.spread) == (
            theirs.slots,
            theirs.max_length,
            theirs.spread,
        )
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@given(case=cases())
def test_a_plan_that_was_used_is_copied_and_pickled(case):
    plan, batch, heads, seed = case
    plan.density()
    Backends().attend(*inputs_for(plan, batch, heads, 4, seed, torch.float32), plan, 0.5)
    for again in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert same(plan, again)
        torch.testing.assert_close(again.density(), plan.density(), rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def saved(tmp_path):
    layout = BlockLayout.from_lengths([4, 4, 3])
    path = tmp_path / "plan.safetensors"
    BlockPlan.full(layout, layout).save(path)
    return path


def test_a_file_that_is_no_plan_is_refused(tmp_path, saved):
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"not a plan")
    with pytest.raises(PlanError, match=r"other\.safetensors: not a valid safetensors"):
        BlockPlan.load(path)
    path.write_bytes(saved.read_bytes()[:-9])
    with pytest.raises(PlanError, match=r"other\.safetensors: not a valid safetensors"):
        BlockPlan.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(PlanError, match=r"format must be 'dit_sparse\.plan/1', got None"):
        BlockPlan.load(path)
    with pytest.raises(FileNotFoundError):
        BlockPlan.load(tmp_path / "nowhere.safetensors")


GOOD = {
    "format": "dit_sparse.plan/1",
    "complete": "0",
    "q_tokens": "",
    "kv_tokens": "",
    "dense_keys": "",
    "q": "11 4 1",
    "kv": "11 4 1",
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metadata": {"q": "11 4"}}, "damaged plan file"),
        ({"metadata": {"q": "eleven 4 1"}}, "damaged plan file"),
        ({"metadata": {"kv_tokens": "x"}}, "damaged plan file"),
        ({"metadata": {"format": "dit_sparse.plan/2"}}, "format must be"),
        ({"metadata": {"kv": "9 4 1"}}, "kv blocks exceed the 9 slots"),
        ({"drop": "kv_indices"}, "damaged plan file"),
        ({"drop": "q.starts"}, "damaged plan file"),
        ({"add": {"extra": torch.zeros(1)}}, r"unknown tensors \['extra'\]"),
        ({"add": {"kv_indices": torch.full((1, 1, 3, 3), 9, dtype=torch.int32)}}, r"\[0, 3\)"),
        ({"add": {"kv_indices": torch.zeros(1, 1, 3, 3)}}, "must be int32"),
        ({"add": {"q.lengths": torch.ones(1, 1, 3)}}, "must be int32"),
    ],
)
def test_a_damaged_file_is_named_with_its_fault(saved, change, words):
    tensors = load_file(saved)
    tensors.pop(change.get("drop"), None)
    tensors |= change.get("add", {})
    save_file(tensors, saved, metadata=GOOD | change.get("metadata", {}))
    with pytest.raises(PlanError, match=words) as error:
        BlockPlan.load(saved)
    assert str(saved) in str(error.value)


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr("dit_sparse.core.plan_file.save_file", lambda *_, **__: 1 / 0)
    layout = BlockLayout.from_lengths([2])
    with pytest.raises(ZeroDivisionError):
        BlockPlan.full(layout, layout).save(saved)
    assert saved.read_bytes() == before
    assert len(list(saved.parent.iterdir())) == 1


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def layout(starts, sizes, slots, longest=4):
    return BlockLayout(ints(*starts)[None, None], ints(*sizes)[None, None], slots, longest)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_indices": ints(0, 1, 0, 3).view(1, 1, 2, 2)}, r"kv_indices must lie in \[0, 2\)"),
        ({"kv_indices": ints(0, 1, -1, 1).view(1, 1, 2, 2)}, r"kv_indices must lie in \[0, 2\)"),
        ({"kv_indices": ints(1, 0, 0, 1).view(1, 1, 2, 2)}, "must be in ascending order"),
        ({"kv_indices": ints(1, 1, 0, 1).view(1, 1, 2, 2)}, "must be in ascending order"),
        ({"kv_num_blocks": ints(2, 3).view(1, 1, 2)}, r"kv_num_blocks must lie in \[0, 2\]"),
        ({"kv_num_blocks": ints(2, -1).view(1, 1, 2)}, r"kv_num_blocks must lie in \[0, 2\]"),
        ({"q": layout([0, 3], [4, 4], 8)}, "q blocks overlap"),
        ({"kv": layout([0, 3], [4, 4], 8)}, "kv blocks overlap"),
        ({"kv": layout([0, 4], [4, 5], 8)}, r"kv.lengths must lie in \[0, 4\]"),
        ({"kv": layout([0, 4], [4, -1], 8)}, r"kv.lengths must lie in \[0, 4\]"),
        ({"kv": layout([0, 5], [4, 4], 8)}, "kv blocks exceed the 8 slots"),
        ({"kv": layout([-1, 4], [4, 4], 8)}, "kv blocks exceed the 8 slots"),
        ({"q": layout([0, 4], [4, 3], 8)}, "q blocks must cover every token"),
        ({"q_tokens": 7}, "q has 8 slots for 7 tokens"),
        ({"q_permutation": torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])}, "every token exactly once"),
        ({"q_permutation": torch.tensor([0, 1, 2, 3, 4, 5, 6, -1])}, "q blocks cover padding"),
        ({"q_permutation": torch.arange(8), "q_tokens": 9}, "every token exactly once"),
        ({"kv_permutation": torch.tensor([0, 1, 2, 3, 4, 5, 6, 8])}, r"lie in \[-1, 8\)"),
        ({"kv_permutation": torch.tensor([0, 1, 2, 3, 4, 5, 6, -2])}, r"lie in \[-1, 8\)"),
        ({"kv_permutation": torch.tensor([0, 1, 2, 3, 4, 5, 5, 7])}, "a token at most once"),
        ({"partial": ints(-1, 1, -1, -1).view(1, 1, 2, 2)}, r"partial must lie in \[-1, 1\)"),
        ({"partial": ints(-1, -3, -1, -1).view(1, 1, 2, 2)}, r"partial must lie in \[-1, 1\)"),
    ],
)
def test_validate_names_the_fault(change, words):
    plan = BlockPlan(
        layout([0, 4], [4, 4], 8),
        layout([0, 4], [4, 4], 8),
        ints(0, 1, 0, 1).view(1, 1, 2, 2),
        ints(2, 2).view(1, 1, 2),
    ).validate()
    if "partial" in change:
        change = change | {"tiles": torch.zeros(1, 4, 1, dtype=torch.int32)}
    change = {k: v[None, None] if k.endswith("permutation") else v for k, v in change.items()}
    with pytest.raises(PlanError, match=words):
        replace(plan, **change).validate()


def test_entries_behind_the_count_need_not_ascend():
    block = layout([0, 4], [4, 4], 8)
    plan = BlockPlan(block, block, ints(1, 0, 0, 0).view(1, 1, 2, 2), ints(1, 0).view(1, 1, 2))
    assert plan.validate() is plan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_indices": torch.zeros(1, 2, 2, dtype=torch.int32)}, "kv_indices must be"),
        ({"kv_indices": torch.zeros(1, 1, 2, 2)}, "must be int32"),
        ({"kv_num_blocks": torch.zeros(1, 1, 2)}, "must be int32"),
        ({"q": layout([0], [4], 4)}, r"query block of the layout \(1\), got 2"),
        ({"partial": ints(0, 0, 0, 0).view(1, 1, 2, 2)}, "pass both or neither"),
        (
            {
                "partial": torch.zeros(1, 1, 2, 1, dtype=torch.int32),
                "tiles": torch.zeros(1, 4, 1, dtype=torch.int32),
            },
            "like kv_indices",
        ),
        (
            {
                "partial": torch.zeros(1, 1, 2, 2, dtype=torch.int32),
                "tiles": torch.zeros(1, 4, 2, dtype=torch.int32),
            },
            r"tiles must be int32 \[count, 4, 1\]",
        ),
        ({"q_permutation": torch.arange(8)}, "q_permutation must be torch.int64"),
        ({"kv_permutation": torch.arange(7)[None, None]}, "kv_permutation must be torch.int64"),
        ({"kv_log_weight": torch.zeros(1, 1, 8, dtype=torch.float64)}, "must be torch.float32"),
        (
            {
                "q_permutation": torch.arange(8).expand(1, 3, 8),
                "kv_log_weight": torch.zeros(1, 2, 8),
            },
            r"must have the same heads, got \[2, 3\]",
        ),
        ({"kv_log_weight": torch.zeros(1, 1, 8, device="meta")}, "must be on one device"),
    ],
)
def test_a_plan_of_the_wrong_form_cannot_be_made(change, words):
    plan = BlockPlan(
        layout([0, 4], [4, 4], 8),
        layout([0, 4], [4, 4], 8),
        ints(0, 1, 0, 1).view(1, 1, 2, 2),
        ints(2, 2).view(1, 1, 2),
    )
    with pytest.raises(PlanError, match=words) as error:
        replace(plan, **change)
    assert isinstance(error.value, DitSparseError)


def test_a_block_mask_of_the_wrong_form_is_refused():
    block = layout([0, 4], [4, 4], 8)
    for mask in (torch.ones(1, 1, 2, 2), torch.ones(2, 2, dtype=torch.bool)):
        with pytest.raises(PlanError, match="block_mask must be bool"):
            BlockPlan.from_block_mask(mask, block, block)
