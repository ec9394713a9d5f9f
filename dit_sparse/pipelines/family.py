# SPDX-License-Identifier: Apache-2.0
"""What must be known of a model family: where its attention is and where its tokens stand."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    Shape = tuple[int, int, int, int]  # frames, height, width (tokens), text tokens
    Reader = Callable[[Any, dict[str, Any]], Shape | None]


# What torch.compile, FSDP and activation checkpointing put around a module within a model.
WRAPPERS = re.compile(r"\._(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)(?=\.|$)")


def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Make a tensor that has a shape and no data."""
    return torch.empty(size, dtype=dtype, device="meta")


@dataclass(frozen=True, slots=True)
class Unsized:
    """Stands in for the example of a row that has none.

    Args:
        reason: Half a sentence: what counting would have to know that no config tells.
    """

    reason: str

    def __call__(self, *_: Any) -> NoReturn:
        """Refuse."""
        raise UnsupportedError(f"cannot be counted without data: {self.reason}")


def _served(_: Any) -> None:
    """Refuse nothing: every config of the class can be served."""


def _as_it_is(_: Any) -> dict[str, Any]:
    """Change nothing: the class itself runs with nothing but torch."""
    return {}


UNKNOWN = Unsized("its forward arguments are unknown")


@dataclass(frozen=True, slots=True)
class Usual:
    """What a family's Diffusers pipeline makes where it is told no size.

    Args:
        height: Pixels.
        width: Pixels.
        num_frames: Frames; 1: it makes pictures, never videos.
        num_steps: Denoising steps.
    """

    height: int = 1024
    width: int = 1024
    num_frames: int = 1
    num_steps: int = 50


def heads_of(module: Any) -> int:
    """Read how many heads an attention module has; diffusers gives the number three names."""
    for name in ("heads", "num_heads", "num_attention_heads"):
        if isinstance(found := getattr(module, name, None), int):
            return found
    raise UnsupportedError(
        f"{type(module).__name__} has no attribute with its number of heads; this version of "
        "diffusers may use another name, please report it"
    )


def head_dim_of(module: Any, config: Any) -> int | None:
    """Read how wide a head of an attention module is; None where neither it nor the config says.

    Args:
        module: The attention module.
        config: Of the transformer.
    """
    if isinstance(inner := getattr(module, "inner_dim", None), int):
        return inner // heads_of(module)
    for holder in (module, config):
        for name in ("head_dim", "dim_head", "attention_head_dim"):
            if isinstance(found := getattr(holder, name, None), int):
                return found
    return None


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table of families.

    Args:
        name: Short name for reports.
        attention: Pattern of the module paths of the main self-attention, matched whole.
        shape: ``(config, forward arguments by name) -> (frames, height, width, text)`` in tokens,
            or None where this pass cannot be placed on a grid (it stays dense). "Text" is all
            that is no video and is always computed: a prompt, registers, audio, history frames.
            Runs inside compiled graphs too: shapes and plain arithmetic only, beside what
            ``shape_inputs`` names.
        text_free: The sequence never holds text.
        text_first: The text stands before the video in the joint sequence.
        text_padding: The model's mask hides padded text, nothing else.
        text_varies: Calls of one pass hold between none and all of the text (padding cut out
            sample by sample, layers of the video alone): what is there beside the video is text.
        per_sample: The processor calls attention once for each sample of the batch.
        timestep: Forward argument that tells the scheduler's timestep, or a thousandth of it; ""
            where the model is told another time (1 - t / 1000, say).
        batched_cfg: The pipeline runs both guidance branches as one batch, and does not say so.
        shape_inputs: Forward arguments that ``shape`` reads values from (a device read); while
            the very same objects come again, the shape is not computed anew. Beside these it may
            read the length of ``encoder_hidden_states``, and nothing else.
        example: ``(config, latent frames, latent height, latent width, text tokens)`` -> forward
            arguments without data (device "meta"), one sample; with data where ``shape`` or the
            model reads values. ``Unsized`` where a config cannot tell them.
        stands_in: ``config -> keys`` that give a model of the same size which runs with nothing
            but torch; counted in its place.
        text_tokens: Text tokens that its pipeline passes where it is not told, or the most of
            them where they are as many as the prompt's: of the first text argument, which
            ``example`` is given.
        usual: What its pipeline makes where it is told no size.
        compression: Pixels of a latent pixel's side, and frames of a latent frame, in its VAE.
        refuses: ``config -> reason`` why a checkpoint of this class cannot be served, or None.
        pipelines: Names of the Diffusers pipelines that run this class.
        note: What stays dense in its pipelines, in one sentence.
    """

    name: str
    attention: str
    shape: Reader
    text_free: bool = False
    text_first: bool = False
    text_padding: bool = False
    text_varies: bool = False
    per_sample: bool = False
    timestep: str = "timestep"
    batched_cfg: bool = False
    shape_inputs: tuple[str, ...] = ()
    example: Callable[[Any, int, int, int, int], dict[str, Any]] = UNKNOWN
    stands_in: Callable[[Any], dict[str, Any]] = _as_it_is
    text_tokens: int = 512
    usual: Usual = Usual()
    compression: tuple[int, int] = (8, 4)
    refuses: Callable[[Any], str | None] = _served
    pipelines: tuple[str, ...] = ()
    note: str = ""

    def attention_modules(self, transformer: nn.Module) -> list[tuple[str, Any]]:
        """List the main self-attention modules in the order of their layers."""
        # A wrapped module has two paths that are one without the wrapper: the inner one counts.
        paths = {WRAPPERS.sub("", path): each for path, each in transformer.named_modules()}
        pattern = re.compile(self.attention)
        found = [(path, module) for path, module in paths.items() if pattern.fullmatch(path)]
        if not found:
            raise UnsupportedError(
                f"{type(transformer).__name__} has no module that matches {self.attention!r}; "
                "this version of diffusers may use another name, please report it"
            )
        return found

    def grid(self, shape: Shape, tokens: int | None = None) -> LatentsGrid:
        """Make the latents grid from what ``shape`` returned.

        Args:
            shape: (frames, height, width, text) of the pass.
            tokens: Length of this call's sequence, which tells the text where it varies.
        """
        frames, height, width, text = shape
        if self.text_varies and tokens is not None:
            beside = tokens - frames * height * width
            text = beside if 0 <= beside <= text else text
        return LatentsGrid(frames, height, width, text, self.text_first and text > 0)

    @property
    def grid_source(self) -> str:
        """Say where the grid is read, for people: the first line of what reads it."""
        about = getattr(self.shape, "about", None) or inspect.getdoc(self.shape) or ""
        return str(about).split("\n")[0].removeprefix("Read ").rstrip(".").replace("``", "`")
