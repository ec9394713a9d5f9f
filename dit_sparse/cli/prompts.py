# SPDX-License-Identifier: Apache-2.0
"""Prompts to measure on: built-in ones, or a text file."""

from __future__ import annotations

from pathlib import Path

from dit_sparse.cli.console import UserError
from dit_sparse.core.prompts import read_prompt_file
from dit_sparse.errors import PromptsError

# Told apart by what moves and where, for models that are to show anything.
PROMPTS = (
    "a big red circle moving right over a gray plain background",
    "a woman in a yellow raincoat walks through a busy market street in the rain",
    "waves break over black rocks at sunset, the camera drifts slowly sideways",
    "a cat jumps from a bookshelf onto a sofa and falls asleep",
    "an aerial view of a train crossing a bridge over a misty valley",
    "a close-up of hands kneading dough on a floured wooden table",
    "a paper boat floats down a narrow stream between mossy stones",
    "traffic at a crossing in a large city at night, seen from above, time-lapse",
)


def read_prompts(text: str) -> tuple[str, ...]:
    """Read a file of prompts, or take built-in ones."""
    if text.isascii() and text.isdigit():
        if not 1 <= int(text) <= len(PROMPTS):
            raise UserError(
                f"--prompts {text}: the number of built-in prompts must be from 1 to "
                f"{len(PROMPTS)}"
            )
        return PROMPTS[: int(text)]
    found = of_file(Path(text))
    if not found:
        raise UserError(f"--prompts {text}: contains no prompts; write one prompt per line")
    return found


def of_file(path: Path) -> tuple[str, ...]:
    """Read a file's prompts; an error names the option."""
    try:
        return read_prompt_file(path)
    except PromptsError as error:
        raise UserError(f"--prompts {error}") from error
