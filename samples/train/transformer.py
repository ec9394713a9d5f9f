# SPDX-License-Identifier: Apache-2.0
"""Let Wan's cross-attention read the short form of padded text during training."""

from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn


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


def collapse_padding(model: nn.Module) -> None:
    """Let every layer's cross-attention read the short form of the padded text."""
    for block in model.blocks:
        block.attn2.set_processor(BiasedCrossAttention())
