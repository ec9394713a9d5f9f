# SPDX-License-Identifier: Apache-2.0
"""Generate dense and sparse clips for prompts and seeds, compare each pair, keep what is done.

A folder holds everything: ``pairs/p000-s0/dense.mkv`` and its ``dense.json``, likewise each
strategy's and the noise floor's. The JSON file is written last, so where it stands the clip is
whole; a run that was killed goes on from there. Each arm carries a fingerprint of all it depends
on: what was made with other settings is never taken for the same.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_sparse.quality.catalogue import now_there
from dit_sparse.quality.clips import file_hash, open_clip
from dit_sparse.quality.compare import compare
from dit_sparse.quality.errors import QualityInputError
from dit_sparse.quality.evaluation_setup import DENSE, FLOOR, Generator, Job, Made, Setup
from dit_sparse.quality.files import plain, replace_text
from dit_sparse.quality.record import store
from dit_sparse.quality.report import write_comparison
from dit_sparse.reading import load_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SETUP = "evaluation.json"


@dataclass(frozen=True)
class Store:
    """The folder of an evaluation."""

    root: Path

    def folder(self, job: Job) -> Path:
        """Give a pair's folder."""
        return self.root / "pairs" / job.key

    def done(self, setup: Setup, arm: str, job: Job) -> dict[str, Any] | None:
        """Give an arm's facts where it is finished and its file is what it was; else None."""
        try:
            path = self.folder(job) / f"{arm}.json"
            told: dict[str, Any] = load_json(path)
            exact = self.folder(job) / told["file"]["exact"]
            same = told["fingerprint"] == setup.fingerprint(arm, job)
            return told if same and file_hash(exact) == told["file"]["sha256"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # not there, or not whole

    def keep(self, setup: Setup, arm: str, job: Job, made: Made) -> dict[str, Any]:
        """Store a clip; its facts last."""
        folder = self.folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{arm}.json").unlink(missing_ok=True)
        files = store(open_clip(made.frames, arm, setup.fps), folder, arm, setup.fps)
        told = {
            "fingerprint": setup.fingerprint(arm, job),
            "prompt": job.prompt,
            "seed": job.seed,
            "arm": arm,
            "facts": plain(made.facts),
            "file": files,
        }
        replace_text(folder / f"{arm}.json", json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        return told


def open_store(root: Path, setup: Setup, *, overwrite: bool) -> Store:
    """Make the folder, or go on in one that holds the same evaluation.

    Raises:
        QualityInputError: It is a file, or holds clips of another model or other settings.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QualityInputError(
            f"{root}: cannot be a folder: {error.strerror or error}"
        ) from error
    path, told = root / SETUP, setup.as_dict()
    if path.exists() and not overwrite:
        try:
            before = load_json(path)
        except (OSError, ValueError) as error:
            raise QualityInputError(f"{path}: cannot be read: {error}; add --overwrite") from error
        now = plain(told)
        for key in ("model", "call", "fps", "floor"):
            if before.get(key) != now[key]:
                raise QualityInputError(
                    f"{root} holds an evaluation with another {_differs(key, before, now)}; name "
                    "another folder with -o, or add --overwrite to make its clips anew"
                )
    replace_text(path, json.dumps(plain(told), indent=2, ensure_ascii=False) + "\n")
    return Store(root)


def generate(
    setup: Setup,
    place: Store,
    generator: Generator,
    jobs: list[Job],
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[tuple[Job, str, bool]]:
    """Make every clip that is not there yet; yields (job, arm, it was there already)."""
    for job in jobs:
        for arm in setup.arms:
            there = place.done(setup, arm, job) is not None
            if not there:
                tell(f"{job.key} {arm}")
                place.keep(setup, arm, job, generator(arm, job.prompt, job.seed))
            yield job, arm, there


def measure(setup: Setup, place: Store, job: Job, arm: str) -> dict[str, Any]:
    """Compare one finished arm with its dense one and write the pair's page.

    Kept beside the clips: measured again only where a clip or what to measure changed, or where
    something that a row wanted (weights, say) has been installed since.
    """
    folder = place.folder(job)
    dense, other = (place.done(setup, each, job) for each in (DENSE, arm))
    if dense is None or other is None:
        raise QualityInputError(
            f"{folder}: has no finished {DENSE if dense is None else arm} clip"
        )
    asked = json.dumps(
        [dense["file"]["sha256"], other["file"]["sha256"], setup.metrics, setup.every]
    )
    page = folder / f"vs-{arm}"
    try:
        before = load_json(page / "report.json")
        same = before["context"]["asked"] == hashlib.sha256(asked.encode()).hexdigest()
        rows = before["metrics"].items()
        if same and not now_there(name for name, row in rows if "skipped" in row["status"]):
            return dict(before)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet, or not like this
    facts, base = other["facts"], dense["facts"]
    context = {
        "prompt": job.prompt,
        "seed": job.seed,
        "model": setup.model,
        "strategy": f"noise floor: {setup.floor}" if arm == FLOOR else arm,
        "speedup": _ratio(base, facts, "seconds"),
        "speedup_processor": _ratio(base, facts, "processor_seconds"),
        "speedup_attention": _ratio(base, facts, "attention_seconds"),
        "dense_seconds": base.get("seconds"),
        "sparse_seconds": facts.get("seconds"),
        "density": facts.get("density"),
        "kernels": facts.get("kernels"),
        "stayed_dense": facts.get("reasons"),
        "asked": hashlib.sha256(asked.encode()).hexdigest(),
    }
    found = compare(
        folder / dense["file"]["exact"],
        folder / other["file"]["exact"],
        metrics=setup.metrics,
        every=setup.every,
        fps=setup.fps,
        device=str(setup.about.get("device", "cpu")),
        context={key: value for key, value in context.items() if value not in (None, {})},
    )
    write_comparison(found, page)
    return found.to_dict()


def _differs(key: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name the first difference."""
    one, other = before.get(key), now[key]
    if isinstance(one, dict) and isinstance(other, dict):
        for name in (*one, *other):
            if one.get(name) != other.get(name):
                return f"{name}: {one.get(name)!r:.100}, now {other.get(name)!r:.100}"
    return f"{key}: {one!r:.100}, now {other!r:.100}"


def _ratio(dense: dict[str, Any], other: dict[str, Any], key: str) -> float | None:
    if not dense.get(key) or not other.get(key):
        return None
    return float(dense[key] / other[key])
