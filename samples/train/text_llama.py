# SPDX-License-Identifier: Apache-2.0
"""Make HunyuanVideo's Llama tokenizer and a frozen random Llama that reads its prompt template.

HunyuanVideoPipeline puts a fixed instruction in front of every prompt and cuts off the first
``crop_start`` = 95 tokens of the encoding, the length of that instruction for the real tokenizer.
This tokenizer has one token for the first part of the instruction and spells the rest, with the
border chosen so that it is 95 tokens here too.
"""

from collections.abc import Iterable

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from text import CHARACTERS, SEED, TEXT_DIM, frozen, word_merges
from transformers import AddedToken, LlamaConfig, LlamaModel, LlamaTokenizerFast

MARKS = ("<|start_header_id|>", "<|end_header_id|>", "\n\n")
UNKNOWN, BEGIN, END_OF_TURN, PAD = "<unk>", "<|begin_of_text|>", "<|eot_id|>", "<|pad|>"
CROP_START = DEFAULT_PROMPT_TEMPLATE["crop_start"]
TEMPLATE = DEFAULT_PROMPT_TEMPLATE["template"]


def _tokenizer(words: Iterable[str], phrase: str) -> LlamaTokenizerFast:
    """Build the tokenizer with ``phrase`` as one token."""
    merges = word_merges((f"▁{word}" for word in words), "")
    pieces = [UNKNOWN, BEGIN, END_OF_TURN, PAD, "▁", *CHARACTERS, ":", *map("".join, merges)]
    tokenizer = LlamaTokenizerFast(
        vocab={piece: number for number, piece in enumerate(dict.fromkeys(pieces))},
        merges=merges,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        padding_side="right",  # the transformer takes the valid tokens to stand first
    )
    marks = [AddedToken(mark, normalized=False) for mark in (*MARKS, phrase)]
    tokenizer.add_tokens(marks)
    return tokenizer


def make_llama_tokenizer(words: Iterable[str]) -> LlamaTokenizerFast:
    """Build the tokenizer: one token per known word, the template's front `CROP_START` tokens."""
    words = sorted(words)
    front = TEMPLATE.split("{}")[0]
    instruction = front.split(MARKS[2])[1].split(END_OF_TURN)[0]
    for spelt in range(1, len(instruction)):
        tokenizer = _tokenizer(words, instruction[:-spelt])
        if len(tokenizer(front).input_ids) == CROP_START:
            return tokenizer
    message = f"no border makes the template's front {CROP_START} tokens; use other words"
    raise ValueError(message)


def make_llama(tokenizer: LlamaTokenizerFast, width: int = TEXT_DIM) -> LlamaModel:
    """Build the encoder with random weights; the pipeline reads what its first layer gives."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=width**-0.5 / 2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaModel(config)
    torch.nn.init.normal_(model.embed_tokens.weight)
    return frozen(model)
