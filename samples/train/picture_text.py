# SPDX-License-Identifier: Apache-2.0
"""Make the pictures' text side: a frozen T5 encoder whose heads read a word's neighbours.

With several objects a bag of words does not say which colour belongs to which shape. Here every
head of the one layer looks a fixed number of words back or ahead (T5's relative position bias,
set by hand) through random weights, so a word's vector tells its neighbours too. What no word is
near to stays equal: all paddings but the first few after the prompt have one and the same vector,
with any padded length, and may be collapsed (see `text.padding_bias`).
"""

import torch
from captions import vocabulary
from text import CLIP_TOKENS, SEED, frozen, make_clip, make_tokenizer
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

WIDTH = 128
OFFSETS = (-6, -5, -4, -3, -2, -1, 1, 2, 3, 4)  # one head each; beside them a word reads itself
SHARE = 0.5  # of a neighbour in a word's vector, beside 1 of the word itself
BUCKETS = 32  # T5's relative positions: 0 to 7 back exactly, ahead from 16 on
CAPTION_TOKENS = 36  # a picture's longest caption has 28 words and an end token, then paddings
POOLED = 64

__all__ = ["CAPTION_TOKENS", "CLIP_TOKENS", "POOLED", "WIDTH", "PictureText", "make_encoder"]


def make_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """Build the encoder; each head attends to its neighbour, or to the word itself at the ends."""
    torch.manual_seed(SEED)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=32,
        d_ff=64,
        num_layers=1,
        num_heads=len(OFFSETS),
        relative_attention_num_buckets=BUCKETS,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = T5EncoderModel(config)
    attention = model.encoder.block[0].layer[0].SelfAttention
    nn.init.zeros_(attention.q.weight)  # positions alone decide
    nn.init.normal_(attention.v.weight, std=WIDTH**-0.5)
    nn.init.normal_(attention.o.weight, std=SHARE * config.d_kv**-0.5)
    before = OFFSETS.index(-1) * config.d_kv  # the word before a shape is its colour
    attention.o.weight.data[:, before : before + config.d_kv] *= 2
    table = torch.full((BUCKETS, len(OFFSETS)), -40.0)
    table[0] = 0.0
    for head, offset in enumerate(OFFSETS):
        table[-offset if offset < 0 else BUCKETS // 2 + offset, head] = 40.0
    attention.relative_attention_bias.weight.data.copy_(table)
    return frozen(model)


class PictureText:
    """Tokenizers and frozen encoders of the picture families."""

    def __init__(self, length: int = 512) -> None:
        """Make T5's side, which pads to ``length``, and CLIP's."""
        self.tokenizer = make_tokenizer(vocabulary(), length)
        self.encoder = make_encoder(self.tokenizer)
        clip: tuple[CLIPTokenizer, CLIPTextModel] = make_clip(vocabulary(), POOLED)
        self.clip_tokenizer, self.clip_encoder = clip

    @torch.no_grad()
    def __call__(self, captions: list[str], *, masked: bool) -> tuple[Tensor, Tensor]:
        """Return embeddings ``[batch, CAPTION_TOKENS, WIDTH]`` and the mask of the words.

        Args:
            captions: At most 28 known words each.
            masked: Whether the pipeline gives the encoder the mask (PixArt) or not (FLUX).
        """
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt"
        )
        mask = tokens.attention_mask if masked else None
        return self.encoder(tokens.input_ids, mask).last_hidden_state, tokens.attention_mask

    @torch.no_grad()
    def pooled(self, captions: list[str]) -> Tensor:
        """Return CLIP's pooled embeddings ``[batch, POOLED]``."""
        tokens = self.clip_tokenizer(
            captions, padding="max_length", max_length=CLIP_TOKENS, return_tensors="pt"
        )
        pooled: Tensor = self.clip_encoder(tokens.input_ids).pooler_output
        return pooled
