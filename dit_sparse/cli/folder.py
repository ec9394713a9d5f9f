# SPDX-License-Identifier: Apache-2.0
"""The folder that a run writes: all of its files or none, and nothing else in it is touched."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_sparse.cli.console import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULT = "result.json"
OWN = ("dense.mp4", "sparse.mp4", "dense.png", "sparse.png", "strip.png", RESULT)


@contextlib.contextmanager
def staged(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Check and make ``folder`` before any work; move what was staged into it at the end.

    Files are made in a hidden folder beside their final places and moved when all are there,
    ``result.json`` last: where it stands, the files around it belong to it. After an exception
    everything is as it was.

    Args:
        folder: Where results go.
        overwrite: Replace an earlier result, whose files that this run does not make are removed.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"-o {folder}: not a folder; choose another output folder") from error
    except OSError as error:
        raise UserError(f"-o {folder}: cannot be created: {error.strerror or error}") from error
    there = [name for name in OWN if (folder / name).exists()]
    if there and not overwrite:
        raise UserError(
            f"-o {folder}: already contains {', '.join(there)}; add --overwrite to replace them, "
            "or choose another folder"
        )
    try:
        with tempfile.TemporaryDirectory(prefix=".dit-sparse-", dir=folder) as scratch:
            yield Path(scratch)
            new = sorted(path.name for path in Path(scratch).iterdir() if path.is_file())
            assert set(new) <= set(OWN), new
            (folder / RESULT).unlink(missing_ok=True)
            for name in sorted(new, key=lambda name: name == RESULT):
                (Path(scratch) / name).replace(folder / name)
            for name in set(there) - set(new):
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"-o {folder}: cannot be written: {error.strerror or error}") from error
    finally:
        if made:
            with contextlib.suppress(OSError):  # not empty: it holds the result
                folder.rmdir()


def plain(value: Any) -> Any:
    """Make a value fit for strict JSON: a number that is not finite becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
