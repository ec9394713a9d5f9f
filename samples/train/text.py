# SPDX-License-Identifier: Apache-2.0
"""Make tokenizers (one token per known word) and frozen random text encoders."""

import itertools
import string
from collections import Counter
from collections.abc import Iterable

import torch
from data import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, TEXTURES
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

TEXT_DIM = 64
CAPTION_TOKENS = 16  # the longest caption has 12 words and an end token
PIPELINE_TOKENS = 512  # WanPipeline pads every prompt with zeros to this length
CLIP_TOKENS = 77
SEED = 0
CHARACTERS = string.ascii_letters + string.digits + ".,-!'"


def caption_words() -> set[str]:
    """Return every word of the video captions."""
    words = {"a", "over", "background", *COLOURS, *BACKGROUNDS, *SHAPES, *TEXTURES, *SIZES}
    return words | {word for motion in MOTIONS for word in motion.split()}


def make_tokenizer(
    words: Iterable[str] | None = None, length: int = PIPELINE_TOKENS
) -> T5TokenizerFast:
    """Build T5's tokenizer; words it does not know are spelt out in single characters."""
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}
    pieces |= {f"▁{word}": -1.0 for word in sorted(caption_words() if words is None else words)}
    pieces |= {"▁": -6.0} | dict.fromkeys(CHARACTERS, -8.0)
    return T5TokenizerFast(vocab=list(pieces.items()), extra_ids=0, model_max_length=length)


def frozen(model: nn.Module) -> nn.Module:
    """Set ``model`` to inference; its weights do not train."""
    return model.eval().requires_grad_(requires_grad=False)


def make_text_encoder(tokenizer: T5TokenizerFast) -> UMT5EncoderModel:
    """Build Wan's encoder with random weights: with so few words, distinct vectors suffice."""
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
    return frozen(UMT5EncoderModel(config))


def make_t5(tokenizer: T5TokenizerFast, width: int = TEXT_DIM) -> T5EncoderModel:
    """Build T5's encoder with random weights, blind to positions: its bias table is zero.

    A pipeline that gives it no mask then pads a prompt with equal vectors.
    """
    torch.manual_seed(SEED)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        d_ff=2 * width,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = T5EncoderModel(config)
    for name, param in model.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.zeros_(param)
    return frozen(model)


def word_merges(words: Iterable[str], end: str) -> list[tuple[str, str]]:
    """Train byte-pair merges until each word is one piece; ``end`` marks its last letter.

    The most frequent pair goes first, ties go by the alphabet.
    """
    pieces = {word: [*word[:-1], word[-1] + end] for word in sorted(words)}
    merges = []
    while pairs := Counter(pair for word in pieces.values() for pair in itertools.pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in pieces.items():
            merged, position = [], 0
            while position < len(parts):
                step = 2 if tuple(parts[position : position + 2]) == best else 1
                merged.append("".join(parts[position : position + step]))
                position += step
            pieces[word] = merged
    return merges


def make_clip(words: Iterable[str], width: int = TEXT_DIM) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Build CLIP's tokenizer and its text encoder with random weights."""
    merges = word_merges(words, "</w>")
    pieces = [*CHARACTERS, *(f"{one}</w>" for one in CHARACTERS), *("".join(m) for m in merges)]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=merges,
        model_max_length=CLIP_TOKENS,
    )
    torch.manual_seed(SEED)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=1.0,
    )
    return tokenizer, frozen(CLIPTextModel(config))


def padding_bias(mask: Tensor, padded_to: int) -> Tensor:
    """Give the scores' bias ``[batch, tokens]`` that makes few padding keys weigh as many.

    n equal keys weigh exactly as much as m of them with log(n / m) added to their scores: the
    short form with that bias is the same function at a fraction of the keys.

    Args:
        mask: 1 for a prompt's own tokens, ``[batch, tokens]``; at least one 0 in each row.
        padded_to: Sequence length whose padding is imitated.
    """
    length = mask.sum(dim=1, keepdim=True)
    log_count = ((padded_to - length) / (mask.shape[1] - length)).log()
    return torch.where(mask.bool(), torch.zeros(()), log_count)


class Prompts:
    """Turn captions into what Wan's cross-attention reads during training.

    WanPipeline zeroes the embeddings of padding and passes no mask, so 500 equal zero keys take
    part in the softmax; `padding_bias` stands for most of them.
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
        return hidden, padding_bias(mask, padded_to)[:, None, None]
