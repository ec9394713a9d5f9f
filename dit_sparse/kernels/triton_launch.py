# SPDX-License-Identifier: Apache-2.0
"""From a plan's tensors to a kernel's arguments, and a launch as data.

A launch can be run, or compiled ahead of time for a chip that is not there: the tests do both
from the same arguments.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.grid import BlockLayout

MAX_PARTS = 2  # blocks of more tiles than this get a table of tiles, where lengths may differ


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch.

    Args:
        kernel: The ``triton.jit`` function.
        grid: Programs along the three axes.
        arguments: Every argument of the kernel by name, constants included.
        warps: Warps per program (of 32 lanes; 64 on AMD).
        stages: Depth of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler; from Triton 3.10 on, fused multiply-adds must be asked for."""
        return {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }

    def run(self) -> None:
        """Launch on the device that the arguments live on."""
        if 0 in self.grid:
            return
        device = next(a.device for a in self.arguments.values() if isinstance(a, torch.Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.options)


def strides_of(tensor: Tensor | None, dims: int = 2) -> tuple[int, ...]:
    """Return the leading ``dims`` strides, 0 where that dimension is shared (size 1)."""
    if tensor is None:
        return (0,) * dims
    return tuple(
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape[:dims], tensor.stride()[:dims], strict=True)
    )


def alignment(*tensors: Tensor) -> int:
    """Return a power of two that divides all row and head offsets; 1 where Triton sees it."""
    strides = [stride for t in tensors for stride in t.stride()[:3]]
    if all(stride % 16 == 0 for stride in strides):
        return 1
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


@overload
def packed(tensor: Tensor) -> Tensor: ...
@overload
def packed(tensor: Tensor | None) -> Tensor | None: ...
def packed(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor with stride 1 along its last dimension; a copy only where it has not."""
    if tensor is None or tensor.shape[-1] == 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def side_arguments(
    side: str,
    layout: BlockLayout,
    permutation: Tensor | None,
    own_block: int | None,
    *,
    weight: Tensor | None = None,
    table: bool = True,
) -> tuple[dict[str, Any], int]:
    """Describe one side of a plan to a kernel.

    Args:
        side: "q" or "kv": the prefix of the arguments' names.
        layout: Its blocks.
        permutation: Its permutation.
        own_block: Rows of the tile that one program owns; None where programs walk this side.
        weight: Its log weights (only for a side that is walked).
        table: Whether programs may find their tile through a table.

    Returns:
        Arguments by name, and how many tiles there are (0 where programs walk this side).
    """
    starts, lengths = packed(layout.starts), packed(layout.lengths)
    permutation, weight = packed(permutation), packed(weight)
    arguments: dict[str, Any] = {
        f"p_{side}_starts": starts,
        f"p_{side}_lengths": lengths,
        f"p_{side}_permutation": permutation,
        f"{side}_max": layout.max_length,
    }
    strides = strides_of(starts) + strides_of(lengths) + strides_of(permutation)
    if own_block is None:
        arguments[f"p_{side}_weight"] = weight
        arguments[f"{side}_strides"] = strides + strides_of(weight)
        return arguments, 0
    parts = -(-layout.max_length // own_block)
    listed, tiles = None, layout.blocks * parts
    if table and parts > MAX_PARTS and not layout.spread:
        listed = tile_table(layout, own_block)
        tiles = listed.shape[2]
    arguments[f"p_{side}_tiles"] = listed
    arguments[f"{side}_parts"] = parts
    arguments[f"{side}_strides"] = strides + strides_of(listed)
    return arguments, tiles


def tile_table(layout: BlockLayout, own_block: int) -> Tensor:
    """List (block, part) of every tile of blocks of very unequal length, without a device read.

    Returns:
        int32 ``[batch|1, heads|1, tiles, 2]``; ``tiles`` is an upper bound, and the rows behind
        the last tile name a block that does not exist.
    """
    parts = (layout.lengths + own_block - 1) // own_block  # [batch|1, heads|1, blocks]
    ends = parts.cumsum(-1, dtype=torch.int32)
    bound = min(layout.slots // own_block + layout.blocks, 2**31 - 1)
    tile = torch.arange(bound, dtype=torch.int32, device=layout.device)
    tile = tile.expand(*ends.shape[:2], bound).contiguous()
    block = torch.searchsorted(ends.contiguous(), tile, right=True, out_int32=True)
    first = torch.cat([ends.new_zeros(*ends.shape[:2], 1), ends], -1)  # of each block, and behind
    return torch.stack([block, tile - first.gather(-1, block.long())], -1)


def list_arguments(counts: Tensor, indices: Tensor, partial: Tensor | None) -> dict[str, Any]:
    """Describe block lists ``[batch|1, heads|1, blocks(, cap)]`` to a kernel."""
    indices, partial = packed(indices), packed(partial)
    return {
        "p_counts": counts,
        "p_indices": indices,
        "p_partial": partial,
        "list_strides": strides_of(counts, 3) + strides_of(indices, 3) + strides_of(partial, 3),
    }
