# SPDX-License-Identifier: Apache-2.0
"""What was measured, on disk: one file per (prompt, seed), each written whole or not at all.

A process that is killed loses the unit it was in and nothing else; the next one goes on. Units do
not depend on each other, so the order and the number of processes change nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_sparse.core.reading import load_json
from dit_sparse.errors import DitSparseError
from dit_sparse.methods.params import build_method, params_of
from dit_sparse.profiler.candidates import Candidate
from dit_sparse.profiler.errors import ProfileError
from dit_sparse.profiler.schema import check_schema
from dit_sparse.strategy.identity import changed

if TYPE_CHECKING:
    from collections.abc import Mapping

SETUP, LISTED = "setup.json", "shortlist.json"
MAX_BYTES = 512 * 2**20  # a unit holds every head, candidate and band of a model
OURS = re.compile(
    r"\.?(setup|shortlist|unit-\d{5}(-band-\d+)?|costs|chosen-\d+|check-\w+)\.json(\.\d+)?"
)


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
            ProfileError: It holds measurements of other inputs (names them), or cannot be written.
        """
        wanted = json.loads(json.dumps(setup, allow_nan=False))
        self._make(fresh=fresh)
        found = self.read(SETUP)
        if found is None:
            self.write(SETUP, wanted)
            return
        complete = "pipeline" in found or "pipeline" not in wanted
        if (why := changed(found if complete else None, wanted, "measurements")) is not None:
            raise ProfileError(f"{self.folder}: {why}")

    def _make(self, *, fresh: bool) -> None:
        """Make the folder; refuse one whose files are not a profiler's."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = {path.name for path in self.folder.iterdir()}
            ours = {name for name in names if OURS.fullmatch(name)}
            if SETUP not in names and names > ours:
                raise ProfileError(
                    f"{self.folder}: has no {SETUP}, so its files were not written by the "
                    "profiler; choose another output"
                )
            for name in ours if fresh else ():
                (self.folder / name).unlink()
        except OSError as error:
            raise ProfileError(
                f"{self.folder}: cannot be created: {error.strerror or error}"
            ) from error
        if ours and SETUP not in names and not fresh:
            raise ProfileError(
                f"{self.folder}: has measurements but no {SETUP}, which says what they are of; "
                "add --fresh (fresh=True) to drop them, or name another output"
            )

    def read(self, name: str) -> dict[str, Any] | None:
        """Read a file; None: it is not there."""
        path = self.folder / name
        try:
            found = load_json(path, MAX_BYTES)
            if not isinstance(found, dict):
                raise TypeError(f"wanted a JSON object, got {type(found).__name__}")  # noqa: TRY301
            check_schema(name, found)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            remedy = "delete this file to measure it again"
            if name == SETUP:
                remedy = (
                    "it says what the folder's measurements are of: add --fresh (fresh=True) to "
                    "drop them, or name another output"
                )
            raise ProfileError(f"{path}: cannot be read: {error}; {remedy}") from error
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


def listed(store: Store) -> tuple[Candidate, ...] | None:
    """Read the shortlist; None: the search has none.

    Raises:
        ProfileError: It cannot be read, or names a method or params that this version refuses.
    """
    if (found := store.read(LISTED)) is None:
        return None
    candidates = []
    for each in found["candidates"]:
        try:
            method = build_method(each["method"], each["params"])
        except DitSparseError as error:
            raise ProfileError(
                f"{store.folder / LISTED}: {each['name']:.80}: {error}; add --fresh (fresh=True) "
                "to measure again"
            ) from error
        candidates.append(Candidate(each["name"], each["method"], params_of(method)))
    return tuple(candidates)


def _name(number: int, band: int | None) -> str:
    return f"unit-{number:05d}.json" if band is None else f"unit-{number:05d}-band-{band}.json"
