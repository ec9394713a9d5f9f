# SPDX-License-Identifier: Apache-2.0
"""Generate dense and sparse clips for prompts and seeds, compare each pair, keep what is done.

A folder holds everything: ``pairs/p000-s0/dense.mkv`` and its ``dense.json``, likewise each
strategy's and the noise floor's. The JSON file is written last, so where it stands the clip is
whole; a run that was killed goes on from there. Each arm carries a fingerprint of all it depends
on: what was made with other settings is never taken for the same.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_sparse.core.reading import load_json
from dit_sparse.quality.catalogue import now_there
from dit_sparse.quality.clips import file_hash, open_clip
from dit_sparse.quality.comparison import compare
from dit_sparse.quality.errors import QualityInputError
from dit_sparse.quality.evaluation_setup import (
    DENSE,
    FLOOR,
    SCHEMA_VERSION,
    Generator,
    Job,
    Made,
    Setup,
)
from dit_sparse.quality.files import plain, replace_text, writing
from dit_sparse.quality.recording import store
from dit_sparse.quality.report import write_comparison
from dit_sparse.quality.versions import versions
from dit_sparse.strategy.identity import changed, text_digest

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
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None  # not there, or not whole

    def keep(self, setup: Setup, arm: str, job: Job, made: Made) -> dict[str, Any]:
        """Store a clip; its facts last."""
        folder = self.folder(job)
        with writing(folder):
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


def open_store(root: Path, setup: Setup, *, fresh: bool = False) -> Store:
    """Make the folder, or continue in one that holds clips of the same inputs.

    Args:
        root: The folder.
        setup: What the evaluation is of; it may have other prompts, seeds and strategies.
        fresh: Drop the clips and reports of an earlier evaluation.

    Raises:
        QualityInputError: It is a file, cannot be written, or holds clips of other inputs.
    """
    path = root / SETUP
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        if fresh and path.exists():
            shutil.rmtree(root / "pairs", ignore_errors=True)
            path.unlink()
    if path.exists():
        before = _recorded(path)
        whole = before.get("schema_version") == SCHEMA_VERSION
        inputs = {key: before.get(key) for key in ("call", "fps", "floor")} if whole else None
        if inputs is not None and isinstance(before.get("identity"), dict):
            inputs |= before["identity"]
        if (why := changed(inputs, setup.shared(), "clips")) is not None:
            raise QualityInputError(f"{root}: {why}")
    replace_text(path, json.dumps(plain(setup.as_dict()), indent=2, ensure_ascii=False) + "\n")
    return Store(root)


def _recorded(path: Path) -> dict[str, Any]:
    """Read an earlier evaluation's setup."""
    try:
        before = load_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise QualityInputError(
            f"{path}: cannot be read: {error}; add --fresh to delete the clips of this "
            "evaluation and start again, or choose another folder with -o"
        ) from error
    if not isinstance(before, dict):
        raise QualityInputError(
            f"{path}: must contain a JSON object, got {type(before).__name__}; add --fresh to "
            "delete the clips of this evaluation and start again, or choose another folder with "
            "-o"
        )
    return before


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

    Kept beside the clips: measured again only where a clip, its facts, what to measure or a
    version changed, or where something that a row wanted (weights, say) has been installed since.
    """
    folder = place.folder(job)
    dense, other = (place.done(setup, each, job) for each in (DENSE, arm))
    if dense is None or other is None:
        raise QualityInputError(
            f"{folder}: has no finished {DENSE if dense is None else arm} clip"
        )
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
    }
    device = str(setup.about.get("device", "cpu"))
    clips = [each["file"]["sha256"] for each in (dense, other)]
    asked = text_digest(
        [clips, setup.metrics, setup.every, setup.fps, context, device, versions()]
    )
    page = folder / f"vs-{arm}"
    try:
        before = load_json(page / "report.json")
        same = before["context"]["asked"] == asked
        rows = before["metrics"].items()
        if same and not now_there(name for name, row in rows if "skipped" in row["status"]):
            return dict(before)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # not measured yet, or not like this
    context["asked"] = asked
    found = compare(
        folder / dense["file"]["exact"],
        folder / other["file"]["exact"],
        metrics=setup.metrics,
        every=setup.every,
        fps=setup.fps,
        device=device,
        context={key: value for key, value in context.items() if value not in (None, {})},
    )
    write_comparison(found, page)
    return found.to_dict()


def _ratio(dense: dict[str, Any], other: dict[str, Any], key: str) -> float | None:
    if not dense.get(key) or not other.get(key):
        return None
    return float(dense[key] / other[key])
