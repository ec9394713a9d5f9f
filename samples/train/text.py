# SPDX-License-Identifier: Apache-2.0
"""Make the tokenizer (one token per known word) and the frozen random text encoder."""

import string

import torch
from data import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, TEXTURES
from torch import Tensor
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

TEXT_DIM = 64
CAPTION_TOKENS = 16  # the longest caption has 12 words and an end token
PIPELINE_TOKENS = 512  # WanPipeline pads every prompt with zeros to this length
SEED = 0


def make_tokenizer() -> T5TokenizerFast:
    """Build the tokenizer; words it does not know are spelt out in single characters."""
    words = {"a", "over", "background", *COLOURS, *BACKGROUNDS, *SHAPES, *TEXTURES, *SIZES}
    words |= {word for motion in MOTIONS for word in motion.split()}
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}
    pieces |= {f"▁{word}": -1.0 for word in sorted(words)}
    characters = string.ascii_letters + string.digits + ".,-!'"
    pieces |= {"▁": -6.0} | dict.fromkeys(characters, -8.0)
    vocab = list(pieces.items())
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=PIPELINE_TOKENS)


def make_text_encoder(tokenizer: T5TokenizerFast) -> UMT5EncoderModel:
    """Build the encoder with random weights: with so few words, distinct vectors suffice."""
    torch.manual_seed(SEED)
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    return UMT5EncoderModel(config).eval().requires_grad_(requires_grad=False)


class Prompts:
    """Turn captions into what the transformer's cross-attention reads during training.

    WanPipeline zeroes the embeddings of padding and passes no mask, so 500 equal zero keys take
    part in the softmax. n equal keys weigh exactly as much as m of them with log(n / m) added to
    their scores: the short form with that bias is the same function at a thirtieth of the keys.
    """

    def __init__(self) -> None:
        """Make tokenizer and encoder once."""
        self.tokenizer = make_tokenizer()
        self.encoder = make_text_encoder(self.tokenizer)

    @torch.no_grad()
    def __call__(
        self, captions: list[str], padded_to: int = PIPELINE_TOKENS
    ) -> tuple[Tensor, Tensor]:
        """Return embeddings ``[batch, CAPTION_TOKENS, TEXT_DIM]`` and bias ``[batch, 1, 1, ...]``.

        Args:
            captions: At most ``CAPTION_TOKENS - 2`` known words each.
            padded_to: Sequence length whose padding is imitated.
        """
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt"
        )
        mask = tokens.attention_mask
        hidden = self.encoder(tokens.input_ids, mask).last_hidden_state * mask[..., None]
        length = mask.sum(dim=1, keepdim=True)  # [batch, 1]
        log_count = ((padded_to - length) / (CAPTION_TOKENS - length)).log()
        bias = torch.where(mask.bool(), torch.zeros(()), log_count)
        return hidden, bias[:, None, None]
