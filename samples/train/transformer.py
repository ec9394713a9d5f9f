# SPDX-License-Identifier: Apache-2.0
"""Make the transformer, its starting weights and its training-time cross-attention."""

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from latents import CHANNELS
from text import TEXT_DIM
from torch import Tensor, nn

HEADS, HEAD_DIM, LAYERS = 4, 48, 6


def make_transformer(seed: int = 0) -> WanTransformer3DModel:
    """Build it so that every layer starts as the identity and the output starts at zero."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=2 * HEADS * HEAD_DIM,
        num_layers=LAYERS,
        cross_attn_norm=True,
        rope_max_seq_len=128,
    )
    zeros = [model.proj_out.weight, model.proj_out.bias]
    zeros += [*model.condition_embedder.time_proj.parameters()]
    for block in model.blocks:
        zeros += [block.attn1.to_out[0].weight, block.attn2.to_out[0].weight]
        zeros += [block.ffn.net[2].weight]
        shifts_and_scales, gates = [0, 1, 3, 4], [2, 5]
        block.scale_shift_table.data[:, shifts_and_scales] *= 0.1
        block.scale_shift_table.data[:, gates] = 0.5
    for param in zeros:
        nn.init.zeros_(param)
    return model


class BiasedCrossAttention(WanAttnProcessor):
    """diffusers' processor plus the bias that stands for collapsed padding (see ``text.py``)."""

    bias: Tensor | None = None  # set before each forward, shared by all layers

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,  # noqa: ARG002, the pipeline never passes one
        rotary_emb: Tensor | None = None,
    ) -> Tensor:
        """Attend to the text with the bias added to the scores."""
        bias = BiasedCrossAttention.bias.to(hidden_states.dtype)
        return super().__call__(attn, hidden_states, encoder_hidden_states, bias, rotary_emb)


def collapse_padding(model: WanTransformer3DModel) -> None:
    """Let every layer's cross-attention read the short form of the padded text."""
    for block in model.blocks:
        block.attn2.set_processor(BiasedCrossAttention())
