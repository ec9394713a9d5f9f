# SPDX-License-Identifier: Apache-2.0
"""Give the tokens of a small clip the rotary positions of the native tokens they stand for.

Positions that never trained make objects repeat. A clip of 64 pixels whose positions are spread
over the grid of 192 trains all of that grid at a ninth of its tokens.
"""

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn


def positions(tokens: int, native: int, *, causal: bool = False) -> Tensor:
    """Place ``tokens`` evenly on a native axis: the middle of the native tokens each stands for.

    Args:
        tokens: Tokens of the clip along this axis.
        native: Tokens of the native clip along this axis.
        causal: Latent frame 0 holds one video frame in every clip, so it keeps position 0 and the
            others share the rest of the axis.

    Returns:
        float64 ``[tokens]``; 0, 1, 2, ... where ``tokens == native``.
    """
    if causal:
        rest = positions(tokens - 1, native - 1) + 1
        return torch.cat([torch.zeros(1, dtype=torch.float64), rest])
    stride = native / tokens if tokens else 1.0
    return torch.arange(tokens, dtype=torch.float64) * stride + (stride - 1) / 2


class SpreadPositions(nn.Module):
    """Stands where ``WanRotaryPosEmbed`` does; equal to it at the native size."""

    def __init__(self, rope: WanRotaryPosEmbed, native: tuple[int, int, int]) -> None:
        """Take the sizes of ``rope``; ``native`` is the latents grid (frames, height, width)."""
        super().__init__()
        self.dims, self.native = (rope.t_dim, rope.h_dim, rope.w_dim), native

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each ``[1, tokens, 1, head_dim]``."""
        grid = latents.shape[2:]
        tables = []
        for axis, (dim, tokens, native) in enumerate(
            zip(self.dims, grid, self.native, strict=True)
        ):
            at = positions(tokens, native, causal=axis == 0)
            pair = get_1d_rotary_pos_embed(
                dim, at, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64
            )
            shape = [tokens if other == axis else 1 for other in range(3)]
            tables.append([part.view(*shape, dim).expand(*grid, dim) for part in pair])
        cosines, sines = (torch.cat(parts, dim=-1) for parts in zip(*tables, strict=True))
        return cosines.flatten(0, 2)[None, :, None], sines.flatten(0, 2)[None, :, None]


def spread_positions(model: WanTransformer3DModel, native: tuple[int, int, int]) -> None:
    """Let ``model`` see clips of every size on the latents grid ``native``."""
    model.rope = SpreadPositions(model.rope, native)
