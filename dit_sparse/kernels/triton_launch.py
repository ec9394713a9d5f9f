# SPDX-License-Identifier: Apache-2.0
"""From a plan's tensors to a kernel's arguments, and a launch as data.

A launch can be run, or compiled ahead of time for a chip that is not there: the tests do both
from the same arguments.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch

from dit_sparse.kernels.triton_blocks import Lists, Rows, Side
from dit_sparse.kernels.triton_target import Tiling, precision

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.grid import BlockLayout

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


def rows_of(tensor: Tensor) -> Rows:
    """Describe ``[batch, seq, heads, head_dim]`` to a kernel."""
    return Rows(tensor, *tensor.stride())


def owned_side(
    layout: BlockLayout, permutation: Tensor | None, own: int, weight: Tensor | None = None
) -> tuple[Side, int]:
    """Describe the side whose tiles programs own, ``own`` rows each, with its log weights.

    Returns:
        The side, and how many tiles there are.
    """
    parts = -(-layout.max_length // own)
    tiles = tile_table(layout, own) if parts > MAX_PARTS and not layout.spread else None
    count = layout.blocks * parts if tiles is None else tiles.shape[2]
    return _side(layout, permutation, weight, tiles, parts), count


def walked_side(
    layout: BlockLayout, permutation: Tensor | None = None, weight: Tensor | None = None
) -> Side:
    """Describe the side that programs walk, with its log weights."""
    return _side(layout, permutation, weight, None, 0)


def _side(
    layout: BlockLayout,
    permutation: Tensor | None,
    weight: Tensor | None,
    tiles: Tensor | None,
    parts: int,
) -> Side:
    starts, lengths = None if layout.spread else packed(layout.starts), packed(layout.lengths)
    tensors = (starts, lengths, packed(permutation), packed(weight), tiles)
    strides = tuple(stride for tensor in tensors for stride in strides_of(tensor))
    return Side(*tensors, layout.blocks, layout.max_length, parts, *strides)


def lists_of(
    counts: Tensor, indices: Tensor, partial: Tensor | None, bits: Tensor | None
) -> Lists:
    """Describe block lists ``[batch|1, heads|1, blocks(, cap)]`` to a kernel."""
    indices, partial = packed(indices), packed(partial)
    strides = strides_of(counts, 3) + strides_of(indices, 3) + strides_of(partial, 3)
    return Lists(counts, indices, partial, bits, *strides)


def factors(scale: float, *, weighted: bool) -> dict[str, float]:
    """Split ``scale`` as ``triton_scores.py`` wants it: ``scale``, ``factor`` and ``drift``."""
    exact = math.log2(math.e) * (1.0 if weighted else scale)
    factor = float(torch.tensor(exact, dtype=torch.float32))
    drift = exact / factor - 1 if factor else 0.0  # a factor below float32 makes all scores 0
    return {"scale": scale, "factor": factor, "drift": drift}


def tile_constants(head_dim: int, dtype: torch.dtype, tiling: Tiling) -> dict[str, Any]:
    """Name the constants that every kernel over tiles of queries and keys has."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_dim(head_dim),
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "PRECISION": precision(dtype),
    }


def padded_dim(head_dim: int) -> int:
    """Return the width that head_dim is padded to: a power of two that ``tl.dot`` takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


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
