# SPDX-License-Identifier: Apache-2.0
"""Read VBench's results, ours or made elsewhere, and sum up only what is complete."""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dit_sparse.core.reading import MAX_BYTES, load_text, refuse_controls
from dit_sparse.quality.errors import QualityInputError
from dit_sparse.quality.vbench.dimensions import DIMENSIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ENDING = "eval_results.json"
CLOSE = 0.02  # the overall number and the mean of the clips' differ by their weighting, not more


@dataclass(frozen=True)
class Score:
    """One dimension: a value, or why there is none.

    Args:
        value: In [0, 1] as VBench gives it; None where there is none.
        status: "ok", "skipped" or "error".
        reason: Why there is no value.
        videos: Each clip's own number by file name, in [0, 1].
    """

    value: float | None
    status: str = "ok"
    reason: str | None = None
    videos: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """Scores by dimension, and where they come from."""

    scores: dict[str, Score]
    source: str
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Give everything, ready for strict JSON; totals only where all 16 are there."""
        return {
            "schema_version": 1,
            "kind": "dit_sparse.vbench_results",
            "source": self.source,
            "versions": self.versions,
            "dimensions": {f"vbench.{name}": vars(score) for name, score in self.scores.items()},
            "totals": totals({n: s.value for n, s in self.scores.items()}),
        }


def totals(values: Mapping[str, float | None]) -> dict[str, float] | None:
    """Give quality, semantic and total score; None unless all 16 dimensions have a value.

    VBench's own script counts a missing dimension as 0; so does no one who reads the result.
    """
    if any(values.get(name) is None for name in DIMENSIONS):
        return None
    scores = {}
    for label, quality in (("quality", True), ("semantic", False)):
        above = below = 0.0
        for name, each in DIMENSIONS.items():
            if each.quality == quality:
                value = values[name]
                assert value is not None
                above += each.weight * (value - each.low) / (each.high - each.low)
                below += each.weight
        scores[label] = above / below
    return {**scores, "total": (4 * scores["quality"] + scores["semantic"]) / 5}


def of_runner(told: dict[str, Any], clips: set[str], *, every: bool) -> Results:
    """Check our runner's result: each dimension scored the clips that were there.

    Args:
        told: The result file.
        clips: File names.
        every: All clips count for each dimension (custom input).
    """
    scores = {}
    for name, found in told["dimensions"].items():
        if found["status"] != "ok":
            scores[name] = Score(None, found["status"], found["reason"])
            continue
        score = _score(name, found["value"], found["videos"])
        lost = sorted(clips - set(score.videos)) if every else []
        if lost and score.value is not None:
            reason = f"{len(lost)} of {len(clips)} clips were not scored, the first {lost[0]!r}"
            score = Score(None, "error", reason, score.videos)
        scores[name] = score
    return Results(scores, "official evaluator", told.get("versions", {}))


def read_results(path: str | Path) -> Results:
    """Read results made elsewhere: one ``*_eval_results.json``, a folder, or a zip of them.

    Raises:
        QualityInputError: Nothing to read there, or two files disagree.
    """
    place = Path(path)
    scores: dict[str, Score] = {}
    found = 0
    for name, text in _texts(place):
        found += 1
        try:
            told = json.loads(text)  # reads the bare NaN that VBench writes
            refuse_controls(told)
            items = {key: value for key, value in told.items() if key in DIMENSIONS}
        except (ValueError, AttributeError, RecursionError) as error:
            raise QualityInputError(f"{name}: not VBench's results: {error}") from error
        for key, value in items.items():
            score = _entry(name, key, value)
            if key in scores and scores[key] != score:
                raise QualityInputError(f"{name}: has another {key} than a file before it")
            scores[key] = score
    if not scores:
        raise QualityInputError(
            f"{place}: {found} files read, none has a dimension of VBench; wanted "
            f"*_{ENDING}, a folder or a zip of them"
        )
    return Results({name: scores[name] for name in DIMENSIONS if name in scores}, str(place))


def _entry(name: str, key: str, value: Any) -> Score:
    if isinstance(value, int | float):
        return _score(key, value, [])
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], list):
        return _score(key, value[0], value[1])
    raise QualityInputError(f"{name}: {key} should be [overall, [clips]], it is {value!r:.80}")


def _score(name: str, value: Any, videos: list[dict[str, Any]]) -> Score:
    scale = 100 if DIMENSIONS[name].percent else 1
    each: dict[str, float] = {}
    for video in videos:
        number = video.get("video_results")
        if isinstance(number, bool | int | float) and math.isfinite(number):
            each[Path(str(video.get("video_path"))).name] = float(number) / scale
    if value is None or not math.isfinite(value):
        return Score(None, "error", "no readable video", each)
    value = float(value)
    if each and abs(fmean(each.values()) - value) > CLOSE:
        reason = f"the overall number {value:.4f} is not the mean of its clips"
        return Score(None, "error", reason, each)
    return Score(value, videos=each)


def _texts(place: Path) -> Iterator[tuple[str, str]]:
    try:
        if place.is_dir():
            for path in sorted(place.rglob(f"*{ENDING}")):
                yield str(path), load_text(path)
        elif place.suffix == ".zip":
            with zipfile.ZipFile(place) as archive:
                for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
                    name = entry.filename
                    if name.endswith(".json") and "full_info" not in name:
                        yield f"{place}:{name}", _unpacked(archive, entry)
        else:
            yield str(place), load_text(place)
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise QualityInputError(f"{place}: cannot be read: {error}") from error


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> str:
    if entry.file_size > MAX_BYTES:
        raise ValueError(f"{entry.filename} is too large: {entry.file_size:,} bytes")
    return archive.read(entry).decode()
