# SPDX-License-Identifier: Apache-2.0
"""Read a text file of prompts; every command and trainer reads it alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dit_sparse.errors import PromptsError
from dit_sparse.reading import control_in

if TYPE_CHECKING:
    from pathlib import Path


def read_prompt_file(path: Path) -> tuple[str, ...]:
    """Read one prompt a line, UTF-8; ``#`` starts a comment, empty lines do not count.

    Returns:
        The prompts; none where the file has none.

    Raises:
        PromptsError: It cannot be read, or is no text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise PromptsError(f"{path}: cannot be read: not UTF-8 text") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptsError(f"{path!s:.200}: cannot be read: {reason}") from error
    found = [line.partition("#")[0].strip() for line in lines]
    for number, line in enumerate(found, 1):
        if (mark := control_in(line)) is not None:
            raise PromptsError(
                f"{path}: line {number}: control character {mark} in a prompt; remove it"
            )
    return tuple(line for line in found if line)
