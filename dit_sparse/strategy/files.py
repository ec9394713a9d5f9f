# SPDX-License-Identifier: Apache-2.0
"""Strategy files on disk and in the package: strict JSON in, atomic JSON out."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dit_sparse.errors import StrategyError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

CONFIG_NAME = "sparse_strategy.json"
MAX_BYTES = 16 * 2**20  # a rule per head of the largest model, three bands: about 1 MiB


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise StrategyError(f"duplicate key {key!r}")
        found[key] = value
    return found


def _no_constant(text: str) -> NoReturn:
    raise StrategyError(f"{text} is not a valid JSON number; use a finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise StrategyError(f"number {text:.40} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > 20:
        raise StrategyError(f"number {text[:20]}... is too large")
    return int(text)


def read_json(path: Path | Traversable, shown: str) -> dict[str, Any]:
    """Read one JSON object, refusing what ``json`` lets pass: doubled keys, NaN, 1e999.

    Args:
        path: The file.
        shown: How errors call it.
    """
    try:
        if path.is_dir():
            inside = path.joinpath(CONFIG_NAME).is_file()
            hint = (
                " (to load the strategy in this folder, use Strategy.from_pretrained)"
                if inside
                else ""
            )
            raise StrategyError(f"is a folder; give a strategy file{hint}")  # noqa: TRY301
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise StrategyError(  # noqa: TRY301
                f"larger than {MAX_BYTES >> 20} MiB, too large for a strategy file"
            )
        found = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_pairs,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
    except StrategyError as error:
        raise StrategyError(f"{shown}: {error}") from error
    except FileNotFoundError as error:
        raise StrategyError(f"{shown}: file not found") from error
    except UnicodeDecodeError as error:
        raise StrategyError(f"{shown}: not a strategy file: not valid UTF-8 text") from error
    except json.JSONDecodeError as error:
        what = "the file is empty or truncated" if error.pos >= len(error.doc.rstrip()) else error
        raise StrategyError(f"{shown}: not valid JSON: {what}") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise StrategyError(f"{shown}: cannot be read: {reason}") from error
    except RecursionError as error:
        raise StrategyError(f"{shown}: not a strategy file: nested too deeply") from error
    if not isinstance(found, dict):
        raise StrategyError(f"{shown}: must contain a JSON object, got {type(found).__name__}")
    return found


def is_there(path: Path) -> bool:
    """Say whether a path exists; one that the system cannot even look up does not."""
    try:
        return path.exists()
    except (OSError, ValueError):  # name too long, null byte
        return False


def to_text(data: dict[str, Any]) -> str:
    """Write JSON for people: one key a line, a list of plain values in one line."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    # A raw newline never stands inside a JSON string: each one here is layout, and a bracket
    # beside one is a list's own. Lists of lists, of objects or of bracketed text stay as they are.
    lists = re.compile(r"\[\n\s*([^\[\]{}]*?)\n\s*\]")
    return lists.sub(lambda found: f"[{re.sub(chr(10) + ' *', ' ', found[1])}]", text) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all; an existing file is replaced."""
    scratch: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        # mkstemp makes files for the owner alone; keep the mode of the file that is replaced.
        Path(scratch).chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
        Path(scratch).replace(path)
    except OSError as error:
        raise StrategyError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if scratch is not None:
            with contextlib.suppress(OSError):
                Path(scratch).unlink(missing_ok=True)


def shipped_names() -> tuple[str, ...]:
    """List the strategies that came with the package, by name."""
    folder = files("dit_sparse").joinpath("profiles")
    if not folder.is_dir():
        return ()
    found = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in found if name.endswith(".json")))


def shipped_file(name: str) -> Traversable | None:
    """Find the file of a shipped strategy; None where there is no such name."""
    if name not in shipped_names():
        return None
    return files("dit_sparse").joinpath("profiles").joinpath(f"{name}.json")  # one part: 3.10


def near_names(name: str, methods: tuple[str, ...]) -> str:
    """Ask whether a shipped strategy or method of a near name was meant; "" where none is near."""
    known = (*shipped_names(), *methods)
    last = name.rpartition("/")[2].removesuffix(".json")
    near = dict.fromkeys(
        (*get_close_matches(name, known, n=3), *get_close_matches(last, known, n=3))
    )
    return f"; did you mean {' or '.join(list(near)[:3])}?" if near else ""


def unknown_name(name: str, methods: tuple[str, ...]) -> StrategyError:
    """Explain what a name could have been: near names first, then all there are."""
    shipped = shipped_names()
    return StrategyError(
        "no strategy file, shipped strategy or method is named "
        f"{name!r:.80}{near_names(name, methods) or '.'} Shipped: "
        f"{', '.join(shipped) if shipped else 'none'}. Methods: {', '.join(methods)}"
    )


def explain(error: ValidationError, shown: str, keys: dict[str, tuple[str, ...]]) -> StrategyError:
    """Turn pydantic's errors into one that names the file and the key.

    Args:
        error: What pydantic found.
        shown: How the error calls the file.
        keys: The keys that each object takes, by its path without indices ("rules.").
    """
    found = error.errors()
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return StrategyError(f"{shown}: {_explain_one(found[0], keys)}{more}")


def _explain_one(detail: ErrorDetails, keys: dict[str, tuple[str, ...]]) -> str:
    loc = detail["loc"]
    kind = detail["type"]
    if kind == "extra_forbidden":
        parent = ".".join(str(part) for part in loc[:-1] if not isinstance(part, int))
        takes = keys.get(parent, ())
        near = get_close_matches(str(loc[-1]), takes, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        text = f"unknown key {loc[-1]!r}{hint}; allowed keys: {', '.join(takes)}"
        loc = loc[:-1]
    elif kind == "missing":
        text = "required key is missing"
    elif kind == "value_error":
        text = str(detail["ctx"]["error"])
    else:
        text = f"{detail['msg'][:1].lower()}{detail['msg'][1:]}, got {detail['input']!r:.80}"
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return f"{where.lstrip('.')}: {text}" if where else text
