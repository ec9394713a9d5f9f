# SPDX-License-Identifier: Apache-2.0
"""Random calls and plans that use the whole contract, and how far a kernel may be off.

The oracle here is written from a plan's tensors alone, token by token; it shares nothing with
``dit_sparse/kernels``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.kernels.triton_target import Tiling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# bfloat16 is wrong in Triton's interpreter, without a word: it is tested on a GPU only.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")
TILINGS = [Tiling(16, 16), Tiling(32, 16), Tiling(16, 32), Tiling(64, 64)]


class Call:
    """A problem: inputs, plan, scale, tiling. (Hypothesis prints every field of a dataclass.)"""

    def __init__(self, query, key, value, plan, scale, tiling):
        self.query, self.key, self.value = query, key, value
        self.plan, self.scale, self.tiling = plan, scale, tiling

    def __repr__(self) -> str:
        """Say what differs from call to call, without the tensors."""
        return (
            f"{self.query.dtype} {tuple(self.query.shape)} {self.query.stride()}, "
            f"{self.tiling}, scale {self.scale}: {self.plan.summary()}"
        )

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    plan: BlockPlan
    scale: float
    tiling: Tiling


def draw_layout(draw, rng, leading, side, small):
    """Draw blocks: uniform with a tail, or of any lengths, with gaps and empty ones on request."""
    kind = draw(st.sampled_from(["spread", "uneven", "per head"]))
    blocks = draw(st.integers(1, 3 if small else 4))
    longest = draw(st.sampled_from([5, 16, 23] if small else [5, 16, 23, 32, 40]))
    if kind == "spread":
        tail = int(torch.randint(1, longest + 1, (), generator=rng))
        return BlockLayout.from_lengths([longest] * (blocks - 1) + [tail])
    shape = leading if kind == "per head" else (1, 1)
    lengths = torch.randint(0, longest + 1, (*shape, blocks), generator=rng, dtype=torch.int32)
    gap = torch.zeros_like(lengths)
    slots = longest * blocks
    if side == "kv":  # keys in no block take no part
        gap = torch.randint(0, 3, lengths.shape, generator=rng, dtype=torch.int32)
        slots += 2 * blocks
    else:  # every query lies in a block: the last takes what is left, through the permutation
        lengths[..., 0].clamp_(min=1)
    starts = ((lengths + gap).cumsum(-1) - lengths).int()
    return BlockLayout(starts, lengths, slots, longest)


def draw_permutation(rng, layout, leading, tokens, whole):
    """Draw which token stands in each covered slot; slots outside of blocks are padding."""
    shape = torch.broadcast_shapes(layout.starts.shape[:2], leading)
    permutation = torch.full((*shape, layout.slots), -1, dtype=torch.int64)
    for i_batch in range(shape[0]):
        for i_head in range(shape[1]):
            pick = (i_batch % layout.starts.shape[0], i_head % layout.starts.shape[1])
            covered = torch.zeros(layout.slots, dtype=torch.bool)
            for start, length in zip(layout.starts[pick], layout.lengths[pick], strict=True):
                covered[start : start + length] = True
            count = int(covered.sum())
            order = torch.randperm(tokens, generator=rng)[:count]
            assert not whole or count == tokens
            permutation[i_batch, i_head, covered] = order
    return permutation


def even_out(layout):
    """Give every (sample, head) as many covered query slots, by one more block."""
    total = layout.lengths.sum(-1)
    most = int(total.max())
    lengths = torch.cat([layout.lengths, (most - total)[..., None].int()], -1)
    starts = (lengths.cumsum(-1) - lengths).int()
    longest = max(layout.max_length, int(lengths.max()))
    return BlockLayout(starts, lengths, most + 3, longest), most


@st.composite
def calls(draw, extras=True, small=False):
    """Draw a call whose plan may use anything that the contract has."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    shapes = [(1, 1), (1, 2), (2, 1)] if small else [(1, 1), (1, 2), (2, 1), (2, 3)]
    batch, heads = draw(st.sampled_from(shapes))
    leading = draw(st.sampled_from([(1, 1), (1, heads), (batch, 1), (batch, heads)]))
    head_dim = draw(st.sampled_from([16, 72] if small else [16, 32, 48, 64, 72, 80, 96, 128]))
    dtype = draw(st.sampled_from(DTYPES))
    q, kv = (draw_layout(draw, rng, leading, side, small) for side in ("q", "kv"))
    q_tokens, kv_tokens = q.slots, kv.slots
    q_permutation = kv_permutation = None
    if not q.spread or (extras and draw(st.booleans())):
        if not q.spread:
            q, q_tokens = even_out(q)
        q_permutation = draw_permutation(rng, q, leading, q_tokens, whole=True)
    if extras and draw(st.booleans()):
        kv_tokens += 5
        kv_permutation = draw_permutation(rng, kv, leading, kv_tokens, whole=False)
    kept = torch.rand(*leading, q.blocks, kv.blocks, generator=rng)
    mask = kept < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    plan = BlockPlan.from_block_mask(
        mask,
        q,
        kv,
        q_permutation=q_permutation,
        kv_permutation=kv_permutation,
        q_tokens=q_tokens,
        kv_tokens=kv_tokens,
    )
    if extras and draw(st.booleans()):
        plan = with_tiles(rng, plan)
    if extras and draw(st.booleans()):
        weight = torch.randn(*leading, kv.slots, generator=rng)
        weight[torch.rand(weight.shape, generator=rng) < 0.1] = -torch.inf
        plan = replace(plan, kv_log_weight=weight)
    plan.validate()
    sizes = ((q_tokens, 3), (kv_tokens, 2), (kv_tokens, 3))
    order = draw(st.sampled_from([(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3), (0, 3, 2, 1)]))
    tensors = []
    for tokens, spare in sizes:  # strides of a fused projection, or of [batch, heads, seq, ...]
        shape = [(batch, tokens, heads + spare, head_dim)[axis] for axis in order]
        whole = torch.randn(shape, generator=rng).to(dtype).to(DEVICE)
        tensors.append(whole.permute([order.index(i) for i in range(4)])[:, :, spare:])
    tiling = draw(st.sampled_from(TILINGS))
    return Call(*tensors, plan.to(DEVICE), draw(st.sampled_from([0.3, 1.0, -0.2])), tiling)


def with_tiles(rng, plan):
    """Turn some kept blocks of a plan into partial ones, with zeros behind short blocks' ends."""
    words = -(-plan.kv.max_length // 32)
    count = 3
    tiles = torch.randint(
        -(2**31), 2**31, (count, plan.q.max_length, words), generator=rng, dtype=torch.int64
    ).int()
    tiles[0, ::2] = 0
    partial = torch.randint(-1, count, plan.kv_indices.shape, generator=rng, dtype=torch.int32)
    return replace(plan, tiles=tiles, partial=partial)


def oracle_mask(plan, batch, heads):
    """Spell out which query token reads which key token, and the keys' log weights."""
    plan = plan.to("cpu")
    mask = torch.zeros(batch, heads, plan.query_length, plan.key_length, dtype=torch.bool)
    bias = torch.zeros(batch, heads, 1, plan.key_length, dtype=torch.float64)
    for i_batch in range(batch):
        for i_head in range(heads):

            def here(tensor, i_batch=i_batch, i_head=i_head):
                return tensor[min(i_batch, tensor.shape[0] - 1), min(i_head, tensor.shape[1] - 1)]

            q_slots = _slots(here(plan.q.starts), here(plan.q.lengths))
            kv_slots = _slots(here(plan.kv.starts), here(plan.kv.lengths))
            if plan.q_permutation is not None:
                q_token = here(plan.q_permutation)
            else:
                q_token = torch.arange(plan.q.slots)
            if plan.kv_permutation is not None:
                kv_token = here(plan.kv_permutation)
            else:
                kv_token = torch.arange(plan.kv.slots)
            for i_q, slots_q in enumerate(q_slots):
                for i_entry in range(int(here(plan.kv_num_blocks)[i_q])):
                    slots_kv = kv_slots[int(here(plan.kv_indices)[i_q, i_entry])]
                    tile = torch.ones(len(slots_q), len(slots_kv), dtype=torch.bool)
                    if plan.partial is not None and here(plan.partial)[i_q, i_entry] >= 0:
                        words = plan.tiles[here(plan.partial)[i_q, i_entry].item()]
                        for i in range(len(slots_q)):
                            for j in range(len(slots_kv)):
                                tile[i, j] = bool(int(words[i, j // 32]) >> (j % 32) & 1)
                    mask[i_batch, i_head][q_token[slots_q][:, None], kv_token[slots_kv]] = tile
            if plan.kv_log_weight is not None:
                weight = here(plan.kv_log_weight).double()
                for slots_kv in kv_slots:
                    bias[i_batch, i_head, 0, kv_token[slots_kv]] = weight[slots_kv]
    return mask & (bias != -torch.inf), bias.clamp(min=-1e300)


def _slots(starts, lengths):
    spans = zip(starts.tolist(), lengths.tolist(), strict=True)
    return [torch.arange(start, start + length) for start, length in spans]


def eager(query, key, value, mask, bias, scale, dtype):
    """Attend in ``dtype``, step by step, as a person would write it: output, LSE."""
    q, k, v = (x.cpu().to(dtype).transpose(1, 2) for x in (query, key, value))
    score = product(q, k.mT) * scale + bias.to(dtype)
    score = score.masked_fill(~mask, -torch.inf)
    empty = ~mask.any(-1, keepdim=True)
    peak = score.amax(-1, keepdim=True).masked_fill(empty, 0)
    weight = (score - peak).exp()
    total = weight.sum(-1, keepdim=True)
    output = product(weight / total.masked_fill(empty, 1), v)
    lse = (total.log() + peak).squeeze(-1)
    return output.transpose(1, 2), lse


def product(a, b):
    """Multiply matrices; in float32 term after term, as an accumulator of a kernel adds them.

    A BLAS adds in a tree where it likes to, and its error is then several times smaller.
    """
    if a.dtype != torch.float32:
        return a @ b
    total = 0.0
    for i in range(a.shape[-1]):
        total = total + a[..., i : i + 1] * b[..., i : i + 1, :]
    return total


def carried_roundings(inputs, grad_output, grad_lse, output, lse, mask, bias, scale):
    """Say how far gradients may be off because of what the forward pass hands over, rounded.

    Nobody can compute them better from these: the LSE is a float32 number, so every weight of a
    row has its rounding error; the output has its dtype's, and with it ``D = rowsum(dO * O)``.
    Eager autograd keeps the weights instead. To first order, largest element of dQ, dK and dV.
    """
    q, k, v, grad, out = (
        x.detach().cpu().double().transpose(1, 2) for x in (*inputs, grad_output, output)
    )
    lse = lse.detach().cpu().double().nan_to_num(neginf=0.0)[..., None]
    weight = ((q @ k.mT * scale + bias).masked_fill(~mask, -torch.inf) - lse).exp()
    off = lse.abs() * torch.finfo(torch.float32).eps / 2  # of a weight, as a share of it
    off_delta = (grad * out).abs().sum(-1, keepdim=True) * torch.finfo(output.dtype).eps / 2
    delta = (grad * out).sum(-1, keepdim=True) - grad_lse.detach().cpu().double()[..., None]
    off_score = weight * ((grad @ v.mT - delta).abs() * off + off_delta) * abs(scale)
    return (
        (off_score @ k.abs()).max(),
        (off_score.mT @ q.abs()).max(),
        ((weight * off).mT @ grad.abs()).max(),
    )


def assert_close(found, wanted, same_dtype, dtype, carried=0.0, name=""):
    """Check the error: twice the eager error in that dtype, and one rounding of the result.

    For gradients ``carried`` is what ``carried_roundings`` says.

    The eager error is taken over the whole tensor: where it is 0 by chance, one element's own
    would ask for more than the dtype can say.
    """
    found, wanted, same_dtype = (x.detach().cpu().double() for x in (found, wanted, same_dtype))
    assert found.shape == wanted.shape
    special = ~wanted.isfinite()
    torch.testing.assert_close(found[special], wanted[special], equal_nan=True)
    assert found[~special].isfinite().all()
    if special.all():
        return
    wanted, found, same_dtype = wanted[~special], found[~special], same_dtype[~special]
    eager_error = (same_dtype - wanted).abs().nan_to_num().max()
    rounding = torch.finfo(dtype).eps * wanted.abs().max()
    error = (found - wanted).abs().max()
    allowed = 2 * (eager_error + rounding + carried)
    assert error <= allowed, (name, error, eager_error, rounding, carried)
