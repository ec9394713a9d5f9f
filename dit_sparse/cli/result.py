# SPDX-License-Identifier: Apache-2.0
"""Put the numbers of a request together: the content of ``result.json``."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_sparse.quality import psnr, psnr_pooled, ssim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dit_sparse.attach.report import Report
    from dit_sparse.cli.arms import Arm, Runs
    from dit_sparse.core.video import Frames
    from dit_sparse.quality import Scores

    Watch = Callable[[Frames, str], Iterable[Any]]

SCHEMA_VERSION = 1
HOW = (
    "One process, one attachment, one seed, one dense kernel. The dense run uses the same "
    'engine with the method "dense", which is the model\'s own attention. A warm-up (1 step '
    "dense; 1 or 4 steps sparse without the schedule's dense steps) precedes the dense run "
    "and the sparse run; the time of the sparse run includes planning. Total: the whole "
    "pipeline call, from text encoder to decoder. Recall is measured in a separate sparse "
    "run, so no time includes probing. Quality is measured on the raw frames, rounded to 8 "
    "bits, not on the mp4 files."
)


def measure(runs: Runs, watch: Watch) -> dict[str, Scores]:
    """Compare the sparse frames with the dense ones, by name; empty where there are none.

    Args:
        runs: What ran.
        watch: Wraps frames in a progress bar; takes them and a label.
    """
    if runs.dense is None:
        return {}
    one, other = runs.dense.frames, runs.sparse.frames
    return {
        "psnr": psnr(one, watch(other, "PSNR")),
        "psnr_pooled": psnr_pooled(one, other),
        "ssim": ssim(one, watch(other, "SSIM")),
    }


def summarise(runs: Runs, scores: dict[str, Scores], probe: int) -> dict[str, Any]:
    """Give the measured part of ``result.json``."""
    sparse, dense = runs.sparse, runs.dense
    return {
        "arms": {
            "dense": None if dense is None else _arm(dense),
            "sparse": {
                **_arm(sparse),
                "by_layer": _by_layer(sparse.report),
                "sparse_kernel_warmed_up": runs.warmed_up,
                "guarantee": sparse.report.guarantee,
            },
        },
        "speedup": None if dense is None else _speedup(dense, sparse),
        "density": _density(sparse.report),
        "recall": None if runs.probed is None else _recall(runs.probed.report, probe),
        "quality": {name: score.as_dict() for name, score in scores.items()} or None,
        "repeat": None if runs.probed is None else _repeat(sparse.frames, runs.probed.frames),
        "how_measured": HOW,
    }


def _arm(arm: Arm) -> dict[str, Any]:
    report = arm.report
    frames, height, width = arm.frames.shape[:3]
    return {
        "total_seconds": arm.seconds,
        "processor_seconds": arm.processor_seconds,
        "attention_seconds": report.attention_ms / 1e3,
        "kernels": report.kernels,
        "dense_against_the_strategy": report.reasons,
        "native_kernel_missing": report.native_missing or None,
        "steps": report.num_steps,
        "grid": report.grid,
        "attention_calls": len(report.rows),
        "state_bytes_peak": report.peak_state_bytes,
        "gpu_bytes_peak": arm.peak_gpu_bytes,
        "output": {"frames": frames, "height": height, "width": width},
    }


def _speedup(dense: Arm, sparse: Arm) -> dict[str, float | None]:
    """Divide dense time by sparse time; above 1, sparse is faster."""
    attention = sparse.report.attention_ms
    return {
        "total": dense.seconds / sparse.seconds,
        "processor": dense.processor_seconds / sparse.processor_seconds,
        "attention": dense.report.attention_ms / attention if attention else None,
    }


def sparse_rows(report: Report) -> list[dict[str, Any]]:
    """Give the calls that left something out; a method's search steps are not among them."""
    return [row for row in report.rows if row["density"] < 1]


def _density(report: Report) -> dict[str, Any]:
    rows = sparse_rows(report)
    return {
        "overall": report.density,
        "sparse_calls": mean_of(row["density"] for row in rows),
        "sparse_call_count": len(rows),
        "call_count": len(report.rows),
        "definition": "computed share of (query, key) pairs, mean over attention calls: all of "
        "them (dense ones count 1), and those below 1",
    }


def _recall(report: Report, probe: int) -> dict[str, Any]:
    found = [row["recall"] for row in sparse_rows(report) if row["recall"] is not None]
    return {
        "mean": mean_of(found),
        "worst": min(found, default=None),
        "probed_rows": probe,
        "probed_calls": len(found),
        "definition": "share of the dense softmax mass that the kept keys hold, on random query "
        "rows of each sparse call; mean and worst over calls, each the mean over its rows, heads "
        "and samples",
    }


def _repeat(one: Frames, other: Frames) -> dict[str, Any]:
    gap = np.abs(one.astype(np.int16) - other.astype(np.int16))
    return {
        "identical": not gap.any(),
        "largest_difference": int(gap.max()),
        "definition": "frames of the timed sparse run against those of the probed one, levels "
        "of 255: what the same settings give twice",
    }


def _by_layer(report: Report) -> list[dict[str, Any]]:
    layers: defaultdict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in report.rows:
        layers[row["stage"], row["layer"]].append(row)
    return [
        {
            "stage": stage,
            "layer": layer,
            "calls": len(rows),
            "sparse_calls": sum(row["density"] < 1 for row in rows),
            "density": mean_of(row["density"] for row in rows),
            "attention_seconds": sum(row["ms"] for row in rows) / 1e3,
        }
        for (stage, layer), rows in sorted(layers.items())
    ]


def mean_of(values: Iterable[float]) -> float | None:
    """Average; None where there is nothing."""
    found: Sequence[float] = list(values)
    return fmean(found) if found else None
