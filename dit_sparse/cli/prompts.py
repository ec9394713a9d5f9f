# SPDX-License-Identifier: Apache-2.0
"""Prompts to measure on: built-in ones, or a text file."""

from __future__ import annotations

from pathlib import Path

from dit_sparse.cli.console import UserError

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
    """Read a file of prompts, or take built-in ones; ``#`` starts a comment."""
    if text.isascii() and text.isdigit():
        if not 1 <= int(text) <= len(PROMPTS):
            raise UserError(f"--prompts {text}: there are 1 to {len(PROMPTS)} built-in prompts")
        return PROMPTS[: int(text)]
    try:
        lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {text}: not UTF-8 text") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--prompts {text:.200}: cannot be read: {reason}") from error
    found = [line.partition("#")[0].strip() for line in lines]
    if any("\0" in line for line in found):
        raise UserError(f"--prompts {text}: not a text file")
    if not any(found):
        raise UserError(f"--prompts {text}: holds no prompt; write one a line")
    return tuple(line for line in found if line)
