# SPDX-License-Identifier: Apache-2.0
"""The parts of a plan on their own: checks of every value, and their file form (safetensors)."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dit_sparse.core.grid import BlockLayout
from dit_sparse.errors import GeometryError, PlanError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import Tensor

MAX_SLOTS = 8_000_000  # a grid of MAX_TOKENS, padded
MAX_LENGTH = 1024  # of a block, where the sequence is shorter
MAX_CHECKED = 1 << 28  # slots over all samples and heads: 2 GiB while they are counted
PLAN_FORMAT = "dit_sparse.plan/1"


def check_lists(
    index: Tensor, counts: Tensor, partial: Tensor | None, tiles: Tensor | None, kv_blocks: int
) -> None:
    """Raise ``PlanError`` at the first list entry that breaks the contract (reads the device)."""
    width = index.shape[-1]
    if counts.min() < 0 or counts.max() > width:
        raise PlanError(
            f"kv_num_blocks must lie in [0, {width}], got {int(counts.min())} to "
            f"{int(counts.max())}"
        )
    if index.numel() and (index.min() < 0 or index.max() >= kv_blocks):
        raise PlanError(
            f"kv_indices must lie in [0, {kv_blocks}), got {int(index.min())} to "
            f"{int(index.max())}"
        )
    live = torch.arange(width, device=index.device) < counts[..., None]
    if bool(((index[..., 1:] <= index[..., :-1]) & live[..., 1:]).any()):
        raise PlanError("kv_indices must be in ascending order within each query block")
    if partial is not None and tiles is not None:
        tile = partial[live]
        if tile.numel() and (tile.min() < -1 or tile.max() >= tiles.shape[0]):
            raise PlanError(
                f"partial must lie in [-1, {tiles.shape[0]}), got {int(tile.min())} to "
                f"{int(tile.max())}"
            )


def check_layout(
    side: str, layout: BlockLayout, permutation: Tensor | None, tokens: int, *, whole: bool
) -> None:
    """Raise ``PlanError`` unless the blocks of one side cover its tokens (reads the device).

    Args:
        side: "q" or "kv", for the message.
        layout: The blocks, in slots.
        permutation: Token of each slot; None: slots are tokens.
        tokens: Length of the sequence.
        whole: Whether every token must lie in a block.
    """
    starts, lengths = layout.starts.long(), layout.lengths.long()
    if lengths.min() < 0 or lengths.max() > layout.max_length:
        raise PlanError(f"{side}.lengths must lie in [0, {layout.max_length}]")
    if starts.min() < 0 or (starts + lengths).max() > layout.slots:
        raise PlanError(f"{side} blocks exceed the {layout.slots} slots")
    # +1 where a block starts, -1 behind it: the running sum is how often a slot is covered.
    change = torch.zeros((*starts.shape[:2], layout.slots + 1), dtype=torch.int64)
    ones = (lengths > 0).long().cpu()
    change.scatter_add_(-1, starts.cpu(), ones).scatter_add_(-1, (starts + lengths).cpu(), -ones)
    cover = change.cumsum(-1)[..., :-1]
    if cover.max() > 1:
        raise PlanError(f"{side} blocks overlap")
    if permutation is None:
        if tokens != layout.slots:
            raise PlanError(
                f"{side} has {layout.slots} slots for {tokens} tokens, but no permutation"
            )
        if whole and cover.min() < 1:
            raise PlanError(f"{side} blocks must cover every token")
        return
    token = permutation.cpu()
    cover = cover.expand(*torch.broadcast_shapes(cover.shape[:2], token.shape[:2]), -1)
    token = token.expand_as(cover)
    if token.min() < -1 or token.max() >= tokens:
        raise PlanError(f"{side}_permutation must lie in [-1, {tokens})")
    used = torch.where(cover > 0, token, -1)
    if bool(((cover > 0) & (token < 0)).any()):
        raise PlanError(f"{side} blocks cover padding slots")
    seen = torch.zeros((*used.shape[:2], tokens + 1), dtype=torch.int64)
    seen.scatter_add_(-1, torch.where(used < 0, tokens, used), torch.ones_like(used))
    seen = seen[..., :-1]
    if seen.max() > 1 or (whole and seen.min() < 1):
        raise PlanError(
            f"{side}_permutation must name {'every' if whole else 'a'} token "
            f"{'exactly' if whole else 'at most'} once"
        )


def check_room(key: str, value: int, most: int) -> None:
    """Refuse numbers that no plan of a real model has, before memory for them is asked for."""
    if not 1 <= value <= most:
        raise PlanError(f"{key} must lie in [1, {most:,}], got {value!r:.40}")


def write_parts(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    layouts: Mapping[str, BlockLayout],
    counts: Mapping[str, int | None],
) -> None:
    """Write a plan's parts (safetensors); a file there is replaced whole or not at all."""
    numbers = {"format": PLAN_FORMAT}
    numbers |= {name: "" if value is None else str(int(value)) for name, value in counts.items()}
    for name, layout in layouts.items():
        numbers[name] = f"{layout.slots} {layout.max_length} {int(layout.spread)}"
    target = Path(path)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    # Clones: broadcast or shared storages (one layout for both sides) cannot be saved as such.
    copies = {
        key: value.cpu().clone(memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }
    try:
        save_file(copies, scratch, metadata=numbers)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def read_parts(
    path: str | os.PathLike[str],
    known: Collection[str],
    counts: Collection[str],
    flags: Collection[str],
) -> dict[str, Any]:
    """Read what ``write_parts`` wrote: the arguments of the plan by name.

    Args:
        path: The file.
        known: Names that the plan has.
        counts: Those that are whole numbers or None.
        flags: Those that are 0 or 1; 0 in a file that does not have them.
    """
    try:
        with safe_open(path, framework="pt") as file:
            numbers = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise PlanError(f"{path}: not a valid safetensors file: {error}") from error
    if numbers.get("format") != PLAN_FORMAT:
        raise PlanError(f"{path}: format must be {PLAN_FORMAT!r}, got {numbers.get('format')!r}")
    parts: dict[str, Any] = {name: numbers.get(name, "0") == "1" for name in flags}
    for name in ("q", "kv"):
        slots, longest, spread = (int(part) for part in numbers[name].split())
        check_room(f"{name}: slots", slots, MAX_SLOTS)
        check_room(f"{name}: max_length", longest, max(slots, MAX_LENGTH))
        starts, lengths = tensors.pop(f"{name}.starts"), tensors.pop(f"{name}.lengths")
        parts[name] = BlockLayout(starts, lengths, slots, longest, bool(spread))
    if unknown := set(tensors) - set(known):
        raise PlanError(f"{path}: unknown tensors {sorted(unknown)}")
    parts |= {name: int(numbers[name]) if numbers[name] else None for name in counts}
    return parts | tensors


@contextmanager
def file_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what goes wrong with a file's content into a ``PlanError`` that names the file."""
    try:
        yield
    except (KeyError, ValueError, TypeError, RuntimeError, IndexError) as error:
        if isinstance(error, PlanError | GeometryError) and str(path) not in str(error):
            raise PlanError(f"{path}: {error}") from error
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"{path}: damaged plan file: {error!r}") from error
