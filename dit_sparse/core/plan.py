# SPDX-License-Identifier: Apache-2.0
"""The block plan: which key blocks each query block attends to, in which order tokens stand.

A method makes a plan, a kernel computes it; neither knows the other. The lists have the layout
that torch's ``BlockMask`` and cuDNN's block-sparse attention share. Everything is frozen data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.machine import widest_float
from dit_sparse.core.plan_file import (
    MAX_CHECKED,
    MAX_SLOTS,
    check_layout,
    check_lists,
    check_room,
    file_errors,
    read_parts,
    write_parts,
)
from dit_sparse.core.tiles import invert_tiles, pack_tiles, unpack_tiles
from dit_sparse.errors import PlanError

T = TypeVar("T")
_TENSORS = (
    "kv_indices",
    "kv_num_blocks",
    "partial",
    "tiles",
    "q_permutation",
    "kv_permutation",
    "kv_log_weight",
)
_COUNTS = ("q_tokens", "kv_tokens", "dense_keys")
_FLAGS = ("complete", "means")
_DENSITY_CHUNK = 1 << 22  # list entries looked at together


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One attention call's plan. Leading dimensions of size 1 are shared by all samples or heads.

    *Slots* are positions after ordering: ``q_permutation[..., slot] = token``. Without a
    permutation slots are tokens. The output is always in token order.

    Args:
        q: Blocks of the query side, in slots; every query token lies in exactly one.
        kv: Blocks of the key side, in slots; keys in no block (padding) take no part.
        kv_indices: Kept key blocks, ascending, int32 ``[batch|1, heads|1, q_blocks, cap]``;
            entries from ``kv_num_blocks`` on are ignored but lie in range.
        kv_num_blocks: How many are kept, int32 ``[batch|1, heads|1, q_blocks]``.
        partial: For each entry of ``kv_indices`` a row of ``tiles``, or -1 = the whole block.
        tiles: Token-level masks of partial blocks, deduplicated, as bits: int32
            ``[count, q.max_length, ceil(kv.max_length / 32)]``; bit j of word w is key 32 w + j.
        q_permutation: int64 ``[batch|1, heads|1, q.slots]``, -1 on padding slots.
        kv_permutation: The same for keys, ``[batch|1, heads|1, kv.slots]``.
        kv_log_weight: Added to the scaled scores of a key slot, natural log, fp32
            ``[batch|1, heads|1, kv.slots]``; a pooled key counts as n keys by ``+ln n``.
        q_tokens: Length of the query sequence; ``q.slots`` where None.
        kv_tokens: Length of the key sequence; ``kv.slots`` where None.
        dense_keys: Keys that dense attention would read per query, where that is not the sum of
            ``kv.lengths`` (pooled keys were appended); only ``density`` uses it.
        complete: Known to keep every block whole, so that a dense kernel may answer.
        means: Every key block that a row drops whole is read as one key instead: its mean key and
            mean value with weight n for n keys (+ ln n), in one softmax with the kept keys.
            ``Backends.attend`` adds this to what any kernel computes.
        measured: The method will ask for the block mass of this very call: a kernel that can sums
            it on the way. It changes no result, and is not saved.
    """

    q: BlockLayout
    kv: BlockLayout
    kv_indices: Tensor
    kv_num_blocks: Tensor
    partial: Tensor | None = None
    tiles: Tensor | None = None
    q_permutation: Tensor | None = None
    kv_permutation: Tensor | None = None
    kv_log_weight: Tensor | None = None
    q_tokens: int | None = None
    kv_tokens: int | None = None
    dense_keys: int | None = None
    complete: bool = False
    means: bool = False
    measured: bool = False
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check shapes, dtypes and devices; ``validate`` also reads the values."""
        _check_structure(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without what was worked out from it (``once``)."""
        return type(self), tuple(getattr(self, each.name) for each in fields(self) if each.init)

    @classmethod
    def from_block_mask(
        cls,
        block_mask: Tensor,
        q: BlockLayout,
        kv: BlockLayout,
        *,
        cap: int | None = None,
        q_permutation: Tensor | None = None,
        kv_permutation: Tensor | None = None,
        **extra: Tensor | int | None,
    ) -> BlockPlan:
        """Pack a bool mask ``[batch|1, heads|1, q_blocks, kv_blocks]``, True = computed.

        Args:
            block_mask: Kept block pairs.
            q: Layout of the query side.
            kv: Layout of the key side.
            cap: Width of the lists, at least the largest count; ``kv_blocks`` where None (on
                the CPU, where reading is free, the largest count).
            q_permutation: See the class.
            kv_permutation: See the class.
            **extra: Other fields of the class.
        """
        if block_mask.ndim != 4 or block_mask.dtype != torch.bool:
            raise PlanError(
                "block_mask must be bool [batch, heads, q_blocks, kv_blocks], got "
                f"{block_mask.dtype} {tuple(block_mask.shape)}"
            )
        counts = block_mask.sum(-1, dtype=torch.int32)
        width = block_mask.shape[-1]
        if cap is None:
            cap = max(1, int(counts.max())) if block_mask.device.type == "cpu" else width
        # Ascending lists without a sort: each kept column goes to its running count, every
        # dropped one to a spare last column.
        slot = torch.where(block_mask, block_mask.cumsum(-1) - 1, cap).clamp_(max=cap)
        column = torch.arange(width, dtype=torch.int32, device=block_mask.device)
        indices = block_mask.new_zeros((*block_mask.shape[:-1], cap + 1), dtype=torch.int32)
        indices.scatter_(-1, slot, column.expand_as(slot))
        return cls(
            q,
            kv,
            indices[..., :cap].contiguous(),
            counts,
            q_permutation=q_permutation,
            kv_permutation=kv_permutation,
            **extra,  # type: ignore[arg-type]
        )

    @classmethod
    def full(cls, q: BlockLayout, kv: BlockLayout, *, measured: bool = False) -> BlockPlan:
        """Keep every block: the plan whose result is dense attention over the laid-out keys."""
        indices = torch.arange(kv.blocks, dtype=torch.int32, device=kv.device)
        indices = indices.expand(1, 1, q.blocks, kv.blocks)
        counts = torch.full((1, 1, q.blocks), kv.blocks, dtype=torch.int32, device=kv.device)
        return cls(q, kv, indices, counts, complete=True, measured=measured)

    @classmethod
    def from_token_mask(cls, mask: Tensor, q: BlockLayout, kv: BlockLayout) -> BlockPlan:
        """Make a plan, partial tiles included, from a bool mask over slots.

        Needs memory of the mask's own size; meant for small masks and tests.

        Args:
            mask: ``[batch|1, heads|1, q.slots, kv.slots]``, True = attended.
            q: Query blocks, shared by samples and heads (leading dimensions 1).
            kv: Key blocks, likewise.
        """
        tiles, index = pack_tiles(mask, q, kv)
        plan = cls.from_block_mask(index != -2, q, kv)  # -2: nothing kept, -1: whole block
        if tiles.shape[0] == 0:
            return plan
        return replace(plan, partial=index.gather(-1, plan.kv_indices.long()), tiles=tiles)

    def once(self, key: str, build: Callable[[], T]) -> T:
        """Return what ``build`` made the first time that this plan was asked for ``key``.

        Plans are reused at every step; a kernel may keep here what it derives from one.
        """
        if key not in self._known:
            self._known[key] = build()
        found: T = self._known[key]
        return found

    @property
    def batch(self) -> int:
        """Samples that the plan tells apart; 1 = the same for all."""
        return self.once("batch", lambda: self._leading(0))

    @property
    def heads(self) -> int:
        """Heads that the plan tells apart; 1 = the same for all."""
        return self.once("heads", lambda: self._leading(1))

    @property
    def query_length(self) -> int:
        """Query tokens that the plan is for."""
        return self.q.slots if self.q_tokens is None else self.q_tokens

    @property
    def key_length(self) -> int:
        """Key tokens that the plan is for."""
        return self.kv.slots if self.kv_tokens is None else self.kv_tokens

    @property
    def device(self) -> torch.device:
        """Device of the lists."""
        return self.kv_indices.device

    @property
    def nbytes(self) -> int:
        """Bytes held by the plan's tensors (shared and broadcast ones counted once)."""
        storages = [t.untyped_storage() for t in self.tensors().values()]
        # By identity, not by address: on the "meta" device every address is 0.
        return sum({s._cdata: s.nbytes() for s in storages}.values())  # noqa: SLF001

    def _leading(self, axis: int) -> int:
        return max(t.shape[axis] for name, t in self.tensors().items() if name != "tiles")

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the plan by name, layouts included."""
        found = {
            "q.starts": self.q.starts,
            "q.lengths": self.q.lengths,
            "kv.starts": self.kv.starts,
            "kv.lengths": self.kv.lengths,
        }
        for name in _TENSORS:
            value = getattr(self, name)
            if value is not None:
                found[name] = value
        return found

    def density(self) -> Tensor:
        """Count the kept share of (query, key) pairs, ``[batch, heads]``, without a sync.

        Text, pooled keys, means (one key each) and forced blocks count as what they are; a plan
        with pooled keys can exceed what its block lists suggest, and a fully kept one with pooled
        keys exceeds 1. Counted once a plan; fp64 where the device has it.
        """
        return self.once("density", self._count_density)

    def _count_density(self) -> Tensor:
        batch, heads, blocks = self.batch, self.heads, self.q.blocks
        wide = widest_float(self.device)
        queries = self.q.lengths.expand(batch, heads, -1).to(wide)
        lengths = self.kv.lengths.expand(batch, heads, -1)
        index = self.kv_indices.expand(batch, heads, blocks, -1)
        counts = self.kv_num_blocks.expand(batch, heads, blocks)
        # Heads in chunks: at 720p the lists of one layer are hundreds of megabytes.
        chunk = max(1, _DENSITY_CHUNK // (batch * blocks * index.shape[-1]))
        pairs = torch.cat(
            [
                self._kept_pairs(
                    index[:, part],
                    counts[:, part],
                    lengths[:, part],
                    queries[:, part],
                    None if self.partial is None else self.partial.expand_as(index)[:, part],
                )
                for part in (slice(i, i + chunk) for i in range(0, heads, chunk))
            ],
            1,
        )
        keys = lengths.sum(-1).to(wide) if self.dense_keys is None else float(self.dense_keys)
        return pairs / (queries.sum(-1) * keys)

    def _kept_pairs(
        self,
        index: Tensor,
        counts: Tensor,
        lengths: Tensor,
        queries: Tensor,
        partial: Tensor | None,
    ) -> Tensor:
        """Count (query, key) pairs of some heads, ``[batch, heads]``, like ``queries``."""
        entry = torch.arange(index.shape[-1], device=self.device)
        live = entry < counts[..., None]
        size = lengths.gather(-1, index.flatten(2).long()).view_as(index) * live
        if self.means and not self.complete:  # a dropped block is read as one key
            pooled = (lengths > 0).sum(-1, keepdim=True) - (size > 0).sum(-1)
            means = (pooled * queries).sum(-1)
        else:
            means = queries.new_zeros(())
        if partial is None or self.tiles is None or not len(self.tiles):
            return (size.sum(-1) * queries).sum(-1) + means
        # A tile may reach past a short block: its bits there are 0 by construction.
        bits = unpack_tiles(self.tiles, self.kv.max_length).sum((1, 2)).to(queries.dtype)
        whole = (size * (partial < 0)).sum(-1) * queries
        cut = torch.where(live & (partial >= 0), bits[partial.clamp(min=0).long()], 0.0)
        return (whole + cut.sum(-1)).sum(-1) + means

    def block_mask(self) -> Tensor:
        """Unpack to bool ``[batch, heads, q_blocks, kv_blocks]``; partial blocks count as kept."""
        shape = (self.batch, self.heads, self.q.blocks)
        index = self.kv_indices.expand(*shape, -1).long()
        entry = torch.arange(index.shape[-1], device=self.device)
        live = entry < self.kv_num_blocks.expand(shape)[..., None]
        mask = torch.zeros((*shape, self.kv.blocks + 1), dtype=torch.bool, device=self.device)
        mask.scatter_(-1, torch.where(live, index, self.kv.blocks), value=True)
        return mask[..., :-1]

    def complement(self) -> BlockPlan:
        """Keep just the (query, key) pairs of the laid-out keys that this plan drops.

        Blocks, order and weights stay; a partial block is kept in part by both plans. Reads the
        device where tiles are cut.
        """
        mask = self.block_mask()
        if self.partial is None or self.tiles is None:
            return self._with_blocks(~mask)
        number = mask.new_full((*mask.shape[:-1], self.kv.blocks + 1), -1, dtype=torch.int32)
        entry = torch.arange(self.kv_indices.shape[-1], device=self.device)
        live = entry < self.kv_num_blocks[..., None]
        place = torch.where(live, self.kv_indices, self.kv.blocks).expand(*mask.shape[:-1], -1)
        number.scatter_(-1, place.long(), self.partial.expand_as(place))
        number = number[..., :-1].masked_fill(~mask, -1)  # the tile of each pair, else -1
        tiles, inverted = invert_tiles(self.tiles, number, self.q, self.kv)
        plan = self._with_blocks(~mask | (number >= 0))
        return replace(plan, partial=inverted.gather(-1, plan.kv_indices.long()), tiles=tiles)

    def _with_blocks(self, mask: Tensor) -> BlockPlan:
        """Make the plan of other blocks over the same layouts, every block whole."""
        return BlockPlan.from_block_mask(
            mask,
            self.q,
            self.kv,
            q_permutation=self.q_permutation,
            kv_permutation=self.kv_permutation,
            kv_log_weight=self.kv_log_weight,
            q_tokens=self.q_tokens,
            kv_tokens=self.kv_tokens,
            dense_keys=self.dense_keys,
        )

    def with_keys(self, kv: BlockLayout) -> BlockPlan:
        """Exchange the key layout for one with the same blocks but other lengths (padding cut)."""
        if kv is self.kv:
            return self
        known = self._known.get("with keys")
        if known is not None and known.kv is kv:  # every layer of a pass asks with the same one
            found: BlockPlan = known
            return found
        if kv.blocks != self.kv.blocks or kv.slots != self.kv.slots:
            raise PlanError(
                f"the new key layout must keep {self.kv.blocks} blocks over {self.kv.slots} "
                f"slots, got {kv.blocks} over {kv.slots}"
            )
        made = self._known["with keys"] = replace(self, kv=kv)
        return made

    def with_means(self) -> BlockPlan:
        """Read every block that a row drops as its mean; see ``means``."""
        if self.complete or self.means:
            return self
        return self.once("with means", lambda: replace(self, means=True))

    def to(self, device: torch.device | str) -> BlockPlan:
        """Move every tensor to ``device``."""
        moved = {
            each.name: getattr(self, each.name).to(device)
            for each in fields(self)
            if isinstance(getattr(self, each.name), Tensor | BlockLayout)
        }
        return replace(self, **moved)

    def summary(self) -> str:
        """Describe the plan in one line."""
        density = self.density()
        span = f"{density.min():.3f}-{density.max():.3f}" if density.numel() > 1 else ""
        return (
            f"{self.query_length} x {self.key_length} tokens, {self.q.blocks} x "
            f"{self.kv.blocks} blocks of up to {self.q.max_length} x {self.kv.max_length}, "
            f"heads {self.heads}, density {density.mean():.3f}" + (f" ({span})" if span else "")
        )

    def validate(self) -> BlockPlan:
        """Check every value (reads the device) and return self; ``PlanError`` names the fault."""
        check_lists(self.kv_indices, self.kv_num_blocks, self.partial, self.tiles, self.kv.blocks)
        check_layout("q", self.q, self.q_permutation, self.query_length, whole=True)
        check_layout("kv", self.kv, self.kv_permutation, self.key_length, whole=False)
        return self

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan to a safetensors file, atomically."""
        numbers = {name: getattr(self, name) for name in (*_COUNTS, *_FLAGS)}
        write_parts(path, self.tensors(), {"q": self.q, "kv": self.kv}, numbers)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> BlockPlan:
        """Read a plan that ``save`` wrote, and validate it."""
        with file_errors(path):
            known = {each.name for each in fields(cls) if each.init}
            parts = read_parts(path, known, _COUNTS, _FLAGS)
            for name in ("q_tokens", "kv_tokens"):
                check_room(name, parts[name] or 1, MAX_SLOTS)
            plan = cls(**parts)
            slots = max(plan.q.slots, plan.kv.slots, plan.query_length, plan.key_length)
            check_room("batch x heads x slots", plan.batch * plan.heads * slots, MAX_CHECKED)
            return plan.validate()


def _check_structure(plan: BlockPlan) -> None:
    counts, indices = plan.kv_num_blocks, plan.kv_indices
    if indices.ndim != 4 or counts.ndim != 3 or indices.shape[:3] != counts.shape:
        raise PlanError(
            "kv_indices must be [batch|1, heads|1, q_blocks, cap] and kv_num_blocks the same "
            f"without cap, got {tuple(indices.shape)} and {tuple(counts.shape)}"
        )
    if indices.dtype != torch.int32 or counts.dtype != torch.int32:
        raise PlanError(
            f"kv_indices and kv_num_blocks must be int32, got {indices.dtype}, {counts.dtype}"
        )
    if counts.shape[-1] != plan.q.blocks:
        raise PlanError(
            f"kv_indices must have one list per query block of the layout ({plan.q.blocks}), got "
            f"{counts.shape[-1]}"
        )
    if plan.means and plan.kv_log_weight is not None:
        raise PlanError("a plan cannot have both kv_log_weight and means; omit one of them")
    if (plan.partial is None) != (plan.tiles is None):
        raise PlanError("partial and tiles must be given together: pass both or neither")
    if plan.partial is not None and plan.tiles is not None:
        words = -(-plan.kv.max_length // 32)
        if plan.partial.shape != indices.shape or plan.partial.dtype != torch.int32:
            raise PlanError(
                f"partial must be int32 {tuple(indices.shape)} like kv_indices, got "
                f"{plan.partial.dtype} {tuple(plan.partial.shape)}"
            )
        if plan.tiles.dtype != torch.int32 or plan.tiles.shape[1:] != (plan.q.max_length, words):
            raise PlanError(
                f"tiles must be int32 [count, {plan.q.max_length}, {words}], got "
                f"{plan.tiles.dtype} {tuple(plan.tiles.shape)}"
            )
    per_slot = (
        ("q_permutation", plan.q_permutation, plan.q.slots, torch.int64),
        ("kv_permutation", plan.kv_permutation, plan.kv.slots, torch.int64),
        ("kv_log_weight", plan.kv_log_weight, plan.kv.slots, torch.float32),
    )
    for name, value, slots, dtype in per_slot:
        if value is not None and (
            value.ndim != 3 or value.shape[-1] != slots or value.dtype != dtype
        ):
            raise PlanError(
                f"{name} must be {dtype} [batch|1, heads|1, {slots}], got {value.dtype} "
                f"{tuple(value.shape)}"
            )
    tensors = plan.tensors()
    for axis, name in ((0, "batch"), (1, "heads")):
        sizes = {t.shape[axis] for key, t in tensors.items() if key != "tiles"} - {1}
        if len(sizes) > 1:
            raise PlanError(f"all parts of a plan must have the same {name}, got {sorted(sizes)}")
    devices = {str(t.device) for t in tensors.values()}
    if len(devices) > 1:
        raise PlanError(
            f"all tensors of a plan must be on one device, got {sorted(devices)}; use "
            "plan.to(device)"
        )
