# SPDX-License-Identifier: Apache-2.0
"""What the transformer is told of each prompt: made once by the pipeline, kept on disk."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.core.prompts import read_prompt_file
from dit_sparse.distill.errors import DistillError
from dit_sparse.distill.files import read_tensors, write_tensors
from dit_sparse.distill.inputs import encoding_inputs
from dit_sparse.distill.record import Recording, record
from dit_sparse.errors import PromptsError
from dit_sparse.strategy.identity import pipeline_identity, text_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from dit_sparse.distill.grid import StepGrid

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")


@dataclass(frozen=True, eq=False)
class Conditions:
    """All prompts of a run.

    Args:
        first: A whole recording: grid, shapes, what all prompts share, and the first prompt.
        files: One file a prompt.
    """

    first: Recording
    files: tuple[Path, ...]

    @property
    def grid(self) -> StepGrid:
        """The levels of sampling."""
        assert self.first.grid is not None
        return self.first.grid

    def load(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Read some prompts as one batch."""
        rows = [read_tensors(self.files[i])[0] for i in indices]
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}

    def uncond(self, batch: int) -> dict[str, Tensor] | None:
        """Give the unconditional branch for a batch; None: the model is not guided by two."""
        found = self.first.uncond
        if found is None:
            return None
        return {key: value.expand(batch, *value.shape[1:]) for key, value in found.items()}


def read_prompts(path: Path) -> list[str]:
    """Read the config's file of prompts."""
    try:
        prompts = list(read_prompt_file(path))
    except PromptsError as error:
        raise DistillError(f"data.prompts: {error}") from error
    if not prompts:
        raise DistillError(f"data.prompts: {path}: contains no prompts; write one prompt per line")
    return prompts


def encode(
    pipe: Any,
    prompts: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
    folder: Path,
    *,
    steps: int,
    fingerprint: str | None = None,
    tell: Callable[[int, int], None] | None = None,
    process: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> Conditions:
    """Encode prompts that are not on disk yet; what the pipeline passes on is kept.

    Args:
        pipe: The pipeline, with its text encoders (or prompts given as embeddings).
        prompts: The call's arguments that differ, such as ``{"prompt": "a cat"}``.
        arguments: Those that all share: size, guidance.
        folder: Where the files are.
        steps: Of the sampling run whose grid is read.
        fingerprint: Of ``encoding_inputs``: another one makes other files; None: the pipeline's.
        tell: Called with (done, of how many).
        process: This process's index and the number of processes: each encodes its share.
        wait: Waits for the other processes.
    """
    first = record(pipe, {**arguments, **prompts[0]}, steps=steps)
    if fingerprint is None:
        fingerprint = encoding_inputs(pipeline_identity(pipe))
    names = [text_digest([fingerprint, arguments, prompt]) for prompt in prompts]
    files = [folder / f"prompt-{name}.safetensors" for name in names]
    todo = [i for i, path in enumerate(files) if not path.is_file()]
    mine = todo[process[0] :: process[1]]
    for done, i in enumerate(mine):
        found = (
            first
            if i == 0
            else record(pipe, {**arguments, **prompts[i]}, steps=steps, whole=False)
        )
        for key, value in found.prompt.items():
            if value.shape != first.prompt[key].shape:
                raise DistillError(
                    f"data.prompts: prompt {i} gives {key} {tuple(value.shape)}, the first one "
                    f"{tuple(first.prompt[key].shape)}; all prompts must have the same length "
                    "(the pipeline pads them)"
                )
        write_tensors(files[i], found.prompt, {})
        if tell is not None:
            tell(done + 1, len(mine))
    wait()
    return Conditions(first, tuple(files))


def free_encoders(pipe: Any) -> None:
    """Let the text encoders go: their work is on disk."""
    for name in ENCODERS:
        if getattr(pipe, name, None) is not None:
            setattr(pipe, name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
