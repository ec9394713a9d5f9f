# SPDX-License-Identifier: Apache-2.0
"""Read a text file of prompts; every command and trainer reads it alike."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dit_sparse.core.reading import control_in
from dit_sparse.errors import PromptsError

if TYPE_CHECKING:
    from pathlib import Path


def read_prompt_file(path: Path) -> tuple[str, ...]:
    r"""Read one prompt a line, UTF-8; empty lines and comments are skipped.

    A comment is a line that begins with ``#``, elsewhere in a line ``#`` is text. ``\#`` at the
    beginning stands for a prompt that begins with ``#``. Only LF, CR LF and CR end a line.

    Returns:
        The prompts; none where the file has none.

    Raises:
        PromptsError: It cannot be read, or is no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # which turns every end of line into LF
    except UnicodeDecodeError as error:
        raise PromptsError(f"{path}: cannot be read: not UTF-8 text") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptsError(f"{path!s:.200}: cannot be read: {reason}") from error
    found = []
    for number, line in enumerate((line.strip() for line in text.split("\n")), 1):
        if line.startswith("#") or not line:
            continue
        if (mark := control_in(line)) is not None:
            raise PromptsError(
                f"{path}: line {number}: control character {mark} in a prompt; remove this "
                "character"
            )
        found.append(re.sub(r"^\\(\\*#)", r"\1", line))
    return tuple(found)
