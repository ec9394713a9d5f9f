# SPDX-License-Identifier: Apache-2.0
"""Queries and keys with structure, made from token coordinates alone: no model is needed.

Random numbers have no structure: every choice of blocks is as good as any other, and a top-p rule
keeps nearly all. Here the score of two tokens falls with their distance on the grid, so that a
method has something to choose. It stands in for no model: it shows shapes and costs, not quality.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.grid import LatentsGrid

# Reach of a head's attention along (frames, height, width), as shares of the grid; heads take
# these in turn: within a frame, along time, all around, rows, everything.
REACHES = (
    (0.02, 0.15, 0.15),
    (0.9, 0.04, 0.04),
    (0.2, 0.1, 0.1),
    (0.1, 0.03, 0.9),
    (9.0, 9.0, 9.0),
)
PEAK = 9.0  # score of a token with itself above that of tokens far away


def structured_inputs(
    grid: LatentsGrid,
    heads: int,
    head_dim: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make query, key and value for one sample.

    Random Fourier features of a Gaussian kernel over coordinates (Rahimi and Recht 2007, "Random
    Features for Large-Scale Kernel Machines"): with f(x) = sqrt(2) cos(W x + b), W ~ N(0, 1 /
    reach^2), the mean of f(x) f(y) over features is about exp(-|x - y|^2 / (2 reach^2)). Text
    tokens and values are normal noise.

    Args:
        grid: Where the tokens stand.
        heads: Number of heads; they differ in how far they reach along each axis.
        head_dim: Width of a head.
        seed: Of all random numbers.
        device: Where the tensors are put; they are drawn on the CPU, so they are the same.
        dtype: Of the tensors.

    Returns:
        Three tensors ``[1, tokens, heads, head_dim]``.
    """
    random = torch.Generator().manual_seed(seed)
    axes = [
        torch.arange(count, dtype=torch.float32) / count
        for count in (grid.frames, grid.height, grid.width)
    ]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)  # [video, 3]
    key = torch.randn(grid.tokens, heads, head_dim, generator=random)
    value = torch.randn(grid.tokens, heads, head_dim, generator=random)
    video = slice(grid.video_start, grid.video_start + grid.video_tokens)
    for head in range(heads):
        reach = torch.tensor(REACHES[head % len(REACHES)])
        frequency = torch.randn(3, head_dim, generator=random) / reach[:, None]
        phase = torch.rand(head_dim, generator=random) * 2 * math.pi
        features = (place @ frequency + phase).cos() * math.sqrt(2)
        key[video, head] = features
    query = key * (PEAK / math.sqrt(head_dim))
    return (
        query[None].to(device, dtype),
        key[None].to(device, dtype),
        value[None].to(device, dtype),
    )
