# SPDX-License-Identifier: Apache-2.0
"""One measured row: its number, its definition, its worst frame, or why there is none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import numpy as np

Better = Literal["higher", "lower", "one", "zero"]
Status = Literal["ok", "n/a", "skipped", "error"]


@dataclass(frozen=True, slots=True)
class Scores:
    """One metric of a pair of clips.

    Args:
        name: As in ``--metrics`` and in gates, e.g. "psnr" or "vbench.temporal_flickering".
        definition: The formula, in words, with its source.
        unit: "dB", or empty.
        value: The headline; None where there is none.
        per_frame: One number per measured frame (per transition for temporal metrics); empty
            where the metric has none.
        identical_frames: Frames in which no pixel differs.
        reason: Why there is no value.
        better: What a good value is: "higher", "lower", near "one" or near "zero".
        status: "ok"; "n/a": the clip has no such number; "skipped": something is missing here;
            "error": the measurement failed. Given only where there is no value.
        source: What computed it, with its version; empty: the formula above, as written here.
        dense: The dense clip's own number, for metrics that each clip has by itself.
        sparse: The sparse clip's own number, likewise.
        first: Frame number of ``per_frame[0]``; 1 for transitions, which count as their later
            frame.
        step: Frames from one entry of ``per_frame`` to the next.
    """

    name: str
    definition: str
    unit: str
    value: float | None
    per_frame: tuple[float, ...] = ()
    identical_frames: int = 0
    reason: str | None = None
    better: Better = "higher"
    status: Status = "n/a"
    source: str = ""
    dense: float | None = None
    sparse: float | None = None
    first: int = 0
    step: int = 1

    @property
    def ok(self) -> bool:
        """There is a value."""
        return self.value is not None

    @property
    def worst(self) -> float | None:
        """The worst frame's number."""
        index = self._worst_index()
        return None if index is None else self.per_frame[index]

    @property
    def worst_frame(self) -> int | None:
        """Number of the worst frame, 0-based; the first of equals."""
        index = self._worst_index()
        return None if index is None else self.first + self.step * index

    @property
    def median(self) -> float | None:
        """The middle frame's number."""
        return median(self.per_frame) if self.per_frame else None

    @property
    def spread(self) -> float | None:
        """The 90th percentile over frames less the 10th."""
        if not self.per_frame:
            return None
        low, high = np.percentile(self.per_frame, (10, 90))
        return float(high - low)

    def _worst_index(self) -> int | None:
        if not self.per_frame:
            return None
        return max(range(len(self.per_frame)), key=lambda i: self._badness(self.per_frame[i]))

    def _badness(self, value: float) -> float:
        if self.better == "one":
            return abs(math.log(max(value, 1e-9)))
        if self.better == "zero":
            return abs(value)
        return value if self.better == "lower" else -value

    def as_dict(self) -> dict[str, Any]:
        """Give everything, ready for strict JSON: no NaN, no infinity."""
        return {
            "value": self.value,
            "unit": self.unit,
            "better": self.better,
            "median": self.median,
            "worst": self.worst,
            "worst_frame": self.worst_frame,
            "spread": self.spread,
            "dense": self.dense,
            "sparse": self.sparse,
            "identical_frames": self.identical_frames,
            "status": "ok" if self.reason is None else f"{self.status}: {self.reason}",
            "definition": self.definition,
            "source": self.source,
            "first_frame": self.first,
            "frame_step": self.step,
            "per_frame": list(self.per_frame),
        }
