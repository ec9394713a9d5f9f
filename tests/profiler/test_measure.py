# SPDX-License-Identifier: Apache-2.0
"""Measuring one call: against plain masked softmax in float64, and without any S x S tensor."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_sparse.core.call import AttentionCall
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.profiler.candidates import Candidate, parse_candidates, resolve
from dit_sparse.profiler.errors import ProfileError
from dit_sparse.profiler.measure import Meter, memory_bound
from tests.strategies import attention_inputs, seeds


def call_of(grid, seed=0, heads=2, dim=8, step=0, num_steps=10, layer=0, valid=None, batch=1):
    query, key, value = attention_inputs(seed, batch, grid.tokens, heads, dim, torch.float32)
    return AttentionCall(
        2 * query,
        key,
        value,
        grid,
        dim**-0.5,
        text_valid=None if valid is None else torch.tensor([valid] * batch),
        layer=layer,
        heads=tuple(range(heads)),
        step=step,
        num_steps=num_steps,
    )


def token_mask(plan, heads):
    """Spell a plan out over tokens, pair by pair of blocks."""
    found = torch.zeros(heads, plan.query_length, plan.key_length, dtype=torch.bool)
    for h in range(heads):
        q_order, k_order = (
            torch.arange(side.slots) if order is None else order[0, h % order.shape[1]]
            for side, order in ((plan.q, plan.q_permutation), (plan.kv, plan.kv_permutation))
        )
        at = h % plan.kv_indices.shape[1]
        for i in range(plan.q.blocks):
            of = h % plan.q.starts.shape[1]
            qs, ql = int(plan.q.starts[0, of, i]), int(plan.q.lengths[0, of, i])
            for e in range(int(plan.kv_num_blocks[0, at, i])):
                j = int(plan.kv_indices[0, at, i, e])
                of = h % plan.kv.starts.shape[1]
                ks, kl = int(plan.kv.starts[0, of, j]), int(plan.kv.lengths[0, of, j])
                cell = torch.ones(ql, kl, dtype=torch.bool)
                tile = -1 if plan.partial is None else int(plan.partial[0, at, i, e])
                if tile >= 0:
                    words = plan.tiles[tile].long()
                    for a in range(ql):
                        for b in range(kl):
                            cell[a, b] = bool((words[a, b // 32] >> (b % 32)) & 1)
                rows, columns = q_order[qs : qs + ql], k_order[ks : ks + kl]
                found[h][rows[:, None], columns] = cell
    return found


def oracle(call, mask, dense_mask):
    """Relative error, recall and density of each head, by full matrices in float64."""
    q, k, v = (x[0].double().transpose(0, 1) for x in (call.query, call.key, call.value))
    scores = q @ k.transpose(1, 2) * call.scale
    weight = scores.masked_fill(~dense_mask, -torch.inf).softmax(-1)
    dense = weight @ v
    sparse = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num() @ v
    error = (sparse - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)
    recall = (weight * mask).sum(-1).mean(-1)
    density = mask.double().mean((1, 2)) / dense_mask.double().mean()
    return error, recall, density


STATIC = (
    "radial:block_size=8:decay_factor=0.1:sink=false",
    "gna:window=[3,3,3]:tile=[2,2,4]",
    "sparse_vdit:patterns=multi_diagonal:block_size=16",
    "sparse_vdit:patterns=skip:block_size=16",
    "pooled:block_size=16:density=0.4",
)


@pytest.mark.parametrize("text", STATIC)
@pytest.mark.parametrize(
    ("grid", "valid"),
    [(LatentsGrid(4, 5, 6), None), (LatentsGrid(5, 4, 5, 9), 5), (LatentsGrid(1, 7, 9), None)],
)
def test_error_recall_and_density_are_those_of_the_mask(text, grid, valid):
    (candidate,) = resolve(parse_candidates(text), grid)
    call = call_of(grid, valid=valid)
    _, (found,) = Meter([candidate]).measure(call, 0)
    plan = candidate.instance.plan(call, Backends())
    dense = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    if valid is not None:
        dense[:, grid.text_start + valid :] = False
    if "skip" in text and valid is None:
        assert found.error == [1.0, 1.0]
        assert found.recall == found.density == [0.0, 0.0]
        return
    error, recall, density = oracle(call, token_mask(plan, 2), dense)
    torch.testing.assert_close(torch.tensor(found.error).double(), error, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found.recall).double(), recall, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found.density).double(), density, rtol=1e-5, atol=0)
    keys = float(dense.double().mean())  # computed counts all pairs, density those that are valid
    assert all(c >= d * keys * 0.99999 for c, d in zip(found.computed, found.density, strict=True))
    assert float(error.max()) > 1e-3


@given(seed=seeds, level=st.sampled_from([0.25, 0.5]), layer=st.integers(0, 3))
def test_a_search_sees_the_first_call_and_later_calls_reuse_it(seed, level, layer):
    grid, block = LatentsGrid(4, 4, 4), 8
    text = f"adaspa:density={level}:block_size={block}"
    (candidate,) = resolve(parse_candidates(text), grid)
    meter = Meter([candidate])
    first, later = (call_of(grid, seed + i, step=3 + i, layer=layer) for i in (0, 4))
    _, (searched,) = meter.measure(first, 3)
    assert searched.searched
    assert searched.density == [1.0, 1.0]
    assert max(searched.error) < 1e-5
    _, (found,) = meter.measure(later, 3)
    assert not found.searched
    q, k = (x[0].double().transpose(0, 1) for x in (first.query, first.key))
    weight = (q @ k.transpose(1, 2) * first.scale).softmax(-1)
    mass = weight.unflatten(2, (-1, block)).unflatten(1, (-1, block)).sum((2, 4))
    kept = mass.topk(max(1, round(level * mass.shape[-1])), -1).indices
    blocks = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, kept, value=True)
    mask = blocks.repeat_interleave(block, 1).repeat_interleave(block, 2)
    error, recall, density = oracle(later, mask, torch.ones_like(mask[0]))
    torch.testing.assert_close(torch.tensor(found.error).double(), error, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found.recall).double(), recall, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found.density).double(), density, rtol=1e-5, atol=0)


def test_a_refreshing_method_is_measured_at_its_age():
    """Re-ttention by its formula, on a step that would be a refresh if steps were told raw."""
    grid = LatentsGrid(4, 4, 4)
    mask_params = '{"block_size":8,"decay_factor":0.2,"sink":false}'
    text = f"rettention:refresh=4:ramp=0.1:clamp=false:mask_params={mask_params}"
    (candidate,) = resolve(parse_candidates(text), grid)
    meter = Meter([candidate])
    first, later = call_of(grid, 1, step=2), call_of(grid, 2, step=7)  # age 5 is age 2 of a round
    meter.measure(first, 2)
    _, (found,) = meter.measure(later, 2)
    assert not found.searched
    mask_method = candidate.instance._mask(first)
    mask = token_mask(mask_method.plan(first, Backends()), 2)

    def attend(call, keep):
        q, k, v = (x[0].double().transpose(0, 1) for x in (call.query, call.key, call.value))
        scores = (q @ k.transpose(1, 2) * call.scale).masked_fill(~keep, -torch.inf)
        return scores.softmax(-1) @ v, scores.logsumexp(-1)[..., None]

    everything = torch.ones_like(mask)
    (dense, lse), (some, some_lse) = attend(first, everything), attend(first, mask)
    rho = (some_lse - lse).exp()
    now = (rho + 0.1) * attend(later, mask)[0] + dense - rho * some
    wanted = attend(later, everything)[0]
    error = (now - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    torch.testing.assert_close(torch.tensor(found.error).double(), error, rtol=1e-3, atol=1e-5)


def test_power_is_the_mean_square_of_the_dense_output():
    grid = LatentsGrid(2, 5, 5)
    call = call_of(grid, batch=2)
    power, _ = Meter([]).measure(call, 0)
    q, k, v = (x.double().transpose(1, 2) for x in (call.query, call.key, call.value))
    dense = (q @ k.transpose(2, 3) * call.scale).softmax(-1) @ v
    torch.testing.assert_close(
        torch.tensor(power).double(), dense.square().mean((0, 2, 3)), rtol=1e-4, atol=0
    )


def test_layers_have_their_own_states_and_forget_drops_them():
    grid = LatentsGrid(4, 4, 4)
    (candidate,) = resolve(parse_candidates("adaspa:density=0.25:block_size=8"), grid)
    meter = Meter([candidate])
    for layer in (0, 1):
        _, (found,) = meter.measure(call_of(grid, layer=layer), 0)
        assert found.searched
    assert meter.state_bytes > 0
    assert len(meter.states) == 2
    meter.forget()
    assert meter.state_bytes == 0
    assert not meter.states


def test_too_much_state_is_refused():
    grid = LatentsGrid(4, 4, 4)
    (candidate,) = resolve(parse_candidates("adaspa:density=0.25:block_size=8"), grid)
    with pytest.raises(ProfileError, match=r"remove adaspa:density=0\.25"):
        Meter([candidate], state_limit=10).measure(call_of(grid), 0)


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation gave."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.most = max(self.most, leaf.numel())
        return result


@pytest.mark.parametrize(
    "text",
    ["radial:block_size=64@0.25", "adaspa:density=0.25:block_size=64", "svg2@0.25"],
)
def test_no_tensor_is_s_times_s(text):
    grid = LatentsGrid(8, 16, 32)
    call = call_of(grid, heads=1, dim=16)
    (candidate,) = resolve(parse_candidates(text), grid)
    with Largest() as seen:
        Meter([candidate]).measure(call, 0)
    assert 0 < seen.most < grid.tokens**2 / 4


WIDE = "quick,rettention,svg2@0.25,svg2:compensate=means@0.25,centroid@0.25,blade@0.25,gna@0.25"
MEMORY = """
import sys
from pathlib import Path
import torch
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.profiler.candidates import parse_candidates, resolve
from dit_sparse.profiler.measure import Meter, memory_bound
sys.path.insert(0, sys.argv[1])
from tests.profiler.test_measure import call_of

STATUS = Path("/proc/self/status")
def memory():
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))

torch.set_num_threads(1)
for frames in (1, 6):
    grid = LatentsGrid(frames, 32, 32)
    found = resolve(parse_candidates(sys.argv[2]), grid)
    calls = [call_of(grid, heads=2, dim=64, step=step) for step in (0, 2)]
    Path("/proc/self/clear_refs").write_text("5")
    before, _ = memory()
    meter = Meter(found, sample=int(sys.argv[3]) or None)
    for call in calls:
        meter.measure(call, 0)
    _, peak = memory()
print(peak - before, memory_bound(call) + meter.state_bytes, 4 * grid.tokens**2)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("candidates", "sample"),
    [("radial:block_size=128,pooled:density=0.25", 0), (WIDE, 16)],
)
def test_memory_stays_within_the_bound(root, candidates, sample):
    command = [sys.executable, "-c", MEMORY, str(root), candidates, str(sample)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken, bound, square = map(int, done.stdout.split())
    kernel = 48 << 20  # kernels/cpu.py: LAID_OUT and GATHERED
    assert taken <= bound + kernel < square


def test_a_candidate_that_declines_is_dense():
    grid = LatentsGrid(2, 3, 3)
    last = call_of(grid, step=9)  # a search on the last step could serve nothing
    (candidate,) = resolve(parse_candidates("sparsed:density=0.5:block_size=4"), grid)
    assert isinstance(candidate, Candidate)
    _, (found,) = Meter([candidate]).measure(last, 9)
    assert found.error == [0.0, 0.0]
    assert found.density == found.computed == [1.0, 1.0]
    assert memory_bound(last) > 0
