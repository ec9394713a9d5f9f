# SPDX-License-Identifier: Apache-2.0
"""Tile sizes and launch options for each kind of GPU.

What a compiler says without a GPU (registers, spills, shared memory: ``docs/benchmarks/aot.json``)
rules options out; which of the rest is fastest is a question for a GPU, so every launcher takes a
``Tiling`` and a sweep needs no change here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dit_sparse.errors import KernelError

if TYPE_CHECKING:
    from dit_sparse.core.grid import BlockLayout
    from dit_sparse.core.plan import BlockPlan

# Bytes of shared memory (LDS on AMD) that one program may have, by kind of GPU.
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx90a": 65_536,
    "gfx942": 65_536,
    "gfx950": 163_840,
    "gfx1100": 65_536,
    "gfx1201": 65_536,
}
AMPERE = ("sm_80", "sm_86", "sm_89", "sm_120")  # mma.sync; Ada and desktop Blackwell have it too
CDNA = ("gfx90a", "gfx942", "gfx950")
RDNA = ("gfx1100", "gfx1201")
SMALLEST_TILE = 16  # tl.dot takes no smaller one


@dataclass(frozen=True, slots=True)
class Tiling:
    """Rows and columns of a tile, and how a program is run.

    Args:
        block_m: Query rows of a tile, a power of two >= 16.
        block_n: Key columns of a tile, likewise.
        warps: Warps per program.
        stages: Depth of the software pipeline; 1 = none.
        copy_engine: Use the Hopper kernel (``triton_hopper.py``) instead of the pointer kernel.
        specialize: There, split warps into loading and computing ones.
    """

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 2
    copy_engine: bool = False
    specialize: bool = False


def target_of(device: torch.device) -> str:
    """Name the kind of GPU, a key of ``SHARED_MEMORY``; "sm_80" on the CPU (the interpreter).

    Raises:
        KernelError: There is no such kind; ``reasons_against_device`` has the reason.
    """
    if device.type != "cuda":
        return "sm_80"
    if reasons := reasons_against_device(device):
        raise KernelError("triton's kernels cannot run on this GPU:\n" + "\n".join(reasons))
    if torch.version.hip is not None:
        return amd_target(torch.cuda.get_device_properties(device).gcnArchName)
    return nvidia_target(*torch.cuda.get_device_capability(device))


def reasons_against_device(device: torch.device) -> list[str]:
    """Say why no kernel of this package runs on a CUDA or ROCm device; empty: they run."""
    if torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(device).gcnArchName
        known = ", ".join((*CDNA, "gfx11xx", "gfx120x"))
        return [] if amd_target(arch) else [f"needs an AMD GPU of {known}, got {arch}"]
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return [f"needs compute capability 8.0 (Ampere) or newer, got {major}.{minor}"]
    return []


def nvidia_target(major: int, minor: int) -> str:
    """Name the kind of an NVIDIA GPU of compute capability 8.0 or newer."""
    if major == 8:
        return {6: "sm_86", 9: "sm_89"}.get(minor, "sm_80")
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")


def amd_target(arch: str) -> str:
    """Name the kind of an AMD GPU, "" where there is none for it.

    Args:
        arch: As torch has it, with features: "gfx942:sramecc+:xnack-".
    """
    name = arch.partition(":")[0]
    families = {**{name: name for name in CDNA}, "gfx11": "gfx1100", "gfx120": "gfx1201"}
    return next((kind for start, kind in families.items() if name.startswith(start)), "")


def precision(dtype: torch.dtype) -> str | None:
    """Return ``input_precision`` of ``tl.dot``: float32 is computed as such, not as TF32.

    None for 16 bits, where it has no meaning; most AMD targets do not even accept "tf32".
    """
    return "ieee" if dtype == torch.float32 else None


def fit(block: int, longest: int) -> int:
    """Shrink a tile to blocks that are shorter than it."""
    while block > SMALLEST_TILE and block // 2 >= longest:
        block //= 2
    return block


def rows_for(block: int, longest: int) -> int:
    """Choose the tile height that wastes fewest rows on blocks of ``longest``."""
    block = fit(block, longest)
    half = block // 2
    wasted = {size: -longest % size for size in (block, half) if size >= 64 or size == block}
    return min(wasted, key=lambda size: (wasted[size], -size))


def forward_tiling(
    target: str, dtype: torch.dtype, head_dim: int, q_max: int, kv_max: int, *, plain: bool = True
) -> Tiling:
    """Choose the forward kernel's tiling.

    Args:
        target: See ``target_of``.
        dtype: Of query, key and value.
        head_dim: Columns.
        q_max: Longest query block.
        kv_max: Longest key block.
        plain: No permutation, bit tiles or weights, which take registers.
    """
    wide, widest = head_dim > 64, head_dim > 128
    if dtype == torch.float32:
        tiling = Tiling(32 if wide else 64, 32, 8, 2)
        if target in RDNA:
            tiling = Tiling(16, 16, 8, 1)
        elif target in CDNA:
            tiling = Tiling(16 if widest else tiling.block_m, 32, 4, 1)
        elif widest:
            tiling = Tiling(16, 16, 8, 1)
    elif target in RDNA:
        tiling = Tiling(32, 16, 8, 1) if widest else Tiling(64, 32, 8, 1)
    elif target in CDNA:
        tiling = Tiling(64 if widest else 128, 64, 4, 1 if widest else 2)
    elif target in AMPERE:
        tiling = Tiling(128, 64, 8, 3)
        if widest:
            tiling = Tiling(64, 64 if target == "sm_80" else 32, 8, 2)
    elif target == "sm_90":
        tiling = Tiling(128, 32 if widest else 128 if plain else 64, 8, 2)
    else:
        tiling = Tiling(128, 32 if widest else 64 if wide else 128, 8, 2)
    block_m, block_n = rows_for(tiling.block_m, q_max), fit(tiling.block_n, kv_max)
    warps = tiling.warps
    if block_m < tiling.block_m:  # fewer rows, fewer warps: 4 share 64 rows
        warps = 4
        block_n = min(block_n, 64)
    return Tiling(block_m, block_n, warps, tiling.stages)


def backward_tilings(
    target: str, dtype: torch.dtype, head_dim: int, q_max: int, kv_max: int, *, plain: bool = True
) -> tuple[Tiling, Tiling]:
    """Choose the tilings of the query kernel and of the key kernel of the backward pass.

    Each owns one tile and walks the other side; see ``forward_tiling`` for the arguments.
    """
    if dtype == torch.float32:
        own, other, warps = (32, 32, 4) if head_dim > 64 else (64, 32, 8)
    elif target in CDNA and (head_dim > 64 or not plain):
        own, other, warps = 64, 32, 4
    elif target in CDNA:
        own, other, warps = 64, 64, 4
    elif target in RDNA:
        own, other, warps = 32, 16, 4
    elif head_dim > 128:
        own, other, warps = 64, 32, 8
    elif target in AMPERE:
        own, other, warps = 128, (64 if plain else 32) // (2 if head_dim > 64 else 1), 8
    else:
        own, other, warps = 128, 64 if plain or head_dim <= 64 else 32, 8
    stages = 1 if target in CDNA + RDNA or head_dim > 128 else 2
    return (
        Tiling(rows_for(own, q_max), fit(other, kv_max), warps, stages),
        Tiling(fit(other, q_max), rows_for(own, kv_max), warps, stages),
    )


def mass_tiling(target: str, dtype: torch.dtype, head_dim: int, q_max: int, kv_max: int) -> Tiling:
    """Choose the tiling of the block mass kernel; see ``forward_tiling`` for the arguments."""
    return forward_tiling(target, dtype, head_dim, q_max, kv_max, plain=False)


def means_tiling(target: str, dtype: torch.dtype, head_dim: int, q_max: int, means: int) -> Tiling:
    """Choose the tiling of the kernel that adds means; see ``forward_tiling`` for the arguments.

    It holds a mask and a weight for each key besides the tiles, so these are narrower.
    """
    tiling = forward_tiling(target, dtype, head_dim, q_max, means, plain=False)
    if dtype == torch.float32:
        return tiling
    block_m = min(tiling.block_m, 64) if head_dim > 128 else tiling.block_m
    # 32 keys take all 255 registers of these, and sometimes spill.
    narrow = target == "gfx1100" or (target in AMPERE and head_dim > 64)
    block_n = min(tiling.block_n, 16 if narrow else 32)
    return replace(tiling, block_m=block_m, block_n=block_n, stages=min(tiling.stages, 2))


def kmeans_tiling(target: str, dtype: torch.dtype, head_dim: int, clusters: int) -> Tiling:
    """Choose the tiling of the k-means assignment: tokens by centroids."""
    if dtype == torch.float32:
        block_m, block_n, warps = 32, 32, 4
    elif target in RDNA:
        block_m, block_n, warps = 64, 32, 8
    else:
        block_m, block_n, warps = (64 if head_dim > 128 else 128), 64, 8
    stages = 1 if target in CDNA + RDNA or head_dim > 128 else 2
    return Tiling(block_m, fit(block_n, clusters), warps, stages)


def repair_tiling(tiling: Tiling) -> Tiling:
    """Return small tiles for the second pass over outputs that are not finite: it is rare."""
    return Tiling(min(32, tiling.block_m), min(32, tiling.block_n), 4, 1)


def walk_chunks(layout: BlockLayout, block: int) -> int:
    """Return how many tiles every block of a walk takes; 0 = as many as its own length needs."""
    chunks = -(-layout.max_length // block)
    return chunks if chunks <= 2 or layout.spread else 0


def peels(plan: BlockPlan, tiling: Tiling, dtype: torch.dtype) -> bool:
    """Return whether the forward kernel takes whole tiles, which need no masks, on their own.

    Not in float32, where the products hide the masks, and only where loads are pipelined: a
    second loop takes registers, which gfx1100 lacks.
    """
    if dtype == torch.float32 or tiling.stages == 1:
        return False
    whole = walk_chunks(plan.kv, tiling.block_n) * tiling.block_n == plan.kv.max_length
    return whole and plan.partial is None and plan.kv_log_weight is None
