# SPDX-License-Identifier: Apache-2.0
"""Text that others wrote: refuse control characters when it is read, show them when it is printed.

An escape sequence in a file's text could rewrite the terminal that prints it; so none is read.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES = 64 * 2**20  # of a JSON file of ours; the largest known ones have a few MiB
# C0 and C1 controls but tab and line feed, lone surrogates, and the marks that reorder a line.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""Write control characters as escapes (``\x1b``), so that a terminal does not obey them."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def control_in(text: str) -> str | None:
    r"""Find the first control character, written as an escape (``\x1b``); None: there is none."""
    found = _CONTROL.search(text)
    return None if found is None else visible(found[0])


def refuse_controls(data: Any) -> None:
    """Raise ``ValueError`` where a text in plain data, a key too, has a control character."""
    waiting = [("", data)]
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, str) and (mark := control_in(value)) is not None:
            at = f"{where.lstrip('.')}: " if where else ""
            raise ValueError(f"{at}control character {mark} in a text; remove this character")
        if isinstance(value, dict):
            for key, item in value.items():
                if isinstance(key, str) and (mark := control_in(key)) is not None:
                    raise ValueError(f"control character {mark} in key {visible(key)!r:.80}")
                waiting.append((f"{where}.{key}", item))
        elif isinstance(value, list | tuple):
            waiting += [(f"{where}[{i}]", item) for i, item in enumerate(value)]


def load_text(path: Path, most: int = MAX_BYTES) -> str:
    """Read UTF-8 text of at most ``most`` bytes; ``ValueError`` says why not."""
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"larger than {most / 2**20:.3g} MiB")
    return data.decode("utf-8-sig")


def load_json(path: Path, most: int = MAX_BYTES) -> Any:
    """Read JSON without control characters; ``ValueError`` or ``OSError`` where it cannot be."""
    try:
        found = json.loads(load_text(path, most))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    refuse_controls(found)
    return found
