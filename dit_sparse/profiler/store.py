# SPDX-License-Identifier: Apache-2.0
"""What was measured, on disk: one file per (prompt, seed), each written whole or not at all.

A process that is killed loses the unit it was in and nothing else; the next one goes on. Units do
not depend on each other, so the order and the number of processes change nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_sparse.profiler.errors import ProfileError
from dit_sparse.reading import load_json

if TYPE_CHECKING:
    from collections.abc import Mapping

SETUP = "setup.json"
MAX_BYTES = 512 * 2**20  # a unit holds every head, candidate and band of a model


class Store:
    """A folder with ``setup.json``, ``unit-<number>.json`` and what else is measured once.

    Args:
        folder: Where; made by ``open``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, setup: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Make the folder, or check that what it holds was measured with the same setup.

        Args:
            setup: Plain data that says what is measured.
            fresh: Drop what is there.

        Raises:
            ProfileError: It holds other measurements (names the key), or cannot be written.
        """
        wanted = json.loads(json.dumps(setup, allow_nan=False))
        if fresh and (self.folder / SETUP).is_file():
            shutil.rmtree(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ProfileError(
                f"{self.folder}: cannot be made: {error.strerror or error}"
            ) from error
        found = self.read(SETUP)
        if found is None:
            if any(self.folder.iterdir()):
                raise ProfileError(
                    f"{self.folder}: has files but no {SETUP}, so it is not a profiler's; name "
                    "another output"
                )
            self.write(SETUP, wanted)
        elif found != wanted:
            keys = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
            raise ProfileError(
                f"{self.folder}: holds measurements with another {', '.join(keys)}; ask for a "
                "fresh start to drop them, or name another output"
            )

    def read(self, name: str) -> dict[str, Any] | None:
        """Read a file; None: it is not there."""
        path = self.folder / name
        try:
            found = load_json(path, MAX_BYTES)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ProfileError(
                f"{path}: cannot be read: {error}; delete it, it is measured anew"
            ) from error
        if not isinstance(found, dict):
            raise ProfileError(f"{path}: wanted a JSON object; delete it, it is measured anew")
        return found

    def write(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a file whole or not at all."""
        path = self.folder / name
        scratch = path.with_name(f".{name}.{os.getpid()}")
        try:
            with scratch.open("w", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(data, allow_nan=False, separators=(",", ":")) + "\n")
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except OSError as error:
            raise ProfileError(f"{path}: cannot be written: {error.strerror or error}") from error
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)

    def unit(self, number: int, band: int | None = None) -> dict[str, Any] | None:
        """Read one unit (of one band, where these are measured apart); None: not measured."""
        return self.read(_name(number, band))

    def write_unit(self, number: int, data: Mapping[str, Any], band: int | None = None) -> None:
        """Keep one unit."""
        self.write(_name(number, band), data)


class Memory(Store):
    """A store that is gone with the process."""

    def __init__(self) -> None:
        super().__init__(Path())
        self._files: dict[str, str] = {}

    def open(self, setup: Mapping[str, Any], *, fresh: bool = False) -> None:  # noqa: ARG002
        """Begin empty."""
        self._files.clear()

    def read(self, name: str) -> dict[str, Any] | None:
        """Read as from a file."""
        found: dict[str, Any] | None = json.loads(self._files.get(name, "null"))
        return found

    def write(self, name: str, data: Mapping[str, Any]) -> None:
        """Write as to a file."""
        self._files[name] = json.dumps(data, allow_nan=False)


def _name(number: int, band: int | None) -> str:
    return f"unit-{number:05d}.json" if band is None else f"unit-{number:05d}-band-{band}.json"
