# SPDX-License-Identifier: Apache-2.0
"""Reports: one page a person can read, strict JSON, and Markdown for logs, in one folder."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dit_sparse.quality.errors import QualityInputError
from dit_sparse.quality.files import write_json, write_text, writing
from dit_sparse.quality.report import comparison, evaluation, markdown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dit_sparse.quality.comparison import Comparison
    from dit_sparse.quality.summary import Summary

NAMES = ("report.json", "report.md", "report.html")
VIDEOS = ("pair.mp4", "difference.mp4")


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Say before any work that a report could not be written there.

    Raises:
        QualityInputError: It is a file, cannot be made, or holds a report already.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QualityInputError(
            f"{folder}: cannot be created as a report folder: {error.strerror or error}"
        ) from error
    there = [name for name in NAMES if (folder / name).exists()]
    if there and not overwrite:
        raise QualityInputError(
            f"{folder}: already contains {', '.join(there)}; add --overwrite to replace them, or "
            "choose another folder with -o"
        )


def write_comparison(found: Comparison, folder: str | Path) -> list[str]:
    """Write the report of one pair; give the names of its files.

    Everything is made in a hidden folder and moved when all is there, ``report.html`` last.
    """
    place = Path(folder)
    with writing(place), _scratch(place) as name:
        scratch = Path(name)
        write_json(scratch / "report.json", found.to_dict())
        write_text(scratch / "report.md", markdown.comparison(found))
        write_text(scratch / "report.html", comparison.page(found, scratch))
        return publish(scratch, place)


def write_evaluation(found: Summary, folder: str | Path) -> list[str]:
    """Write the report of an evaluation into its folder; give the names of its files."""
    place = Path(folder)
    with writing(place), _scratch(place) as name:
        scratch = Path(name)
        write_json(scratch / "report.json", found.to_dict())
        write_text(scratch / "report.md", evaluation.markdown(found))
        write_text(scratch / "report.html", evaluation.page(found, place, scratch))
        return publish(scratch, place)


@contextlib.contextmanager
def _scratch(place: Path) -> Iterator[str]:
    """Make a hidden folder in ``place``, and make that too."""
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".report-", dir=place) as name:
        yield name


def publish(scratch: Path, place: Path) -> list[str]:
    """Move all files of ``scratch`` to ``place``; remove an earlier report's videos."""
    made = sorted(path.name for path in scratch.iterdir())
    for name in VIDEOS:
        if name not in made:
            (place / name).unlink(missing_ok=True)
    for name in sorted(made, key=lambda name: name == "report.html"):
        (scratch / name).replace(place / name)
    return sorted(made, key=lambda name: (name not in NAMES, name))
