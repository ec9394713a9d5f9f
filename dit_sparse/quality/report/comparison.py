# SPDX-License-Identifier: Apache-2.0
"""The page of one pair."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dit_sparse.core.pages import render
from dit_sparse.core.video import DIFFERENCE_FULL
from dit_sparse.quality.report import pictures
from dit_sparse.quality.report.charts import curve, number

if TYPE_CHECKING:
    from markupsafe import Markup

    from dit_sparse.quality.clips import Clip
    from dit_sparse.quality.comparison import Comparison
    from dit_sparse.quality.scores import Scores

TEMPLATE = Path(__file__).parent / "templates" / "comparison.html"
CURVES = ("psnr", "psnr_temporal", "ssim", "lpips_alex", "lpips_vgg", "vmaf")
BETTER = {"higher": "higher", "lower": "lower", "one": "near 1", "zero": "near 0"}
KIND = {
    "arrays": "raw frames, as they were handed over",
    "lossless": "lossless file: every byte as it was made",
    "lossy": "lossy file: what is measured includes its compression",
}


class Tile(NamedTuple):
    """One large number at the top."""

    name: str
    value: str
    unit: str = ""
    more: str = ""


def page(found: Comparison, folder: Path) -> str:
    """Write the page; large videos go into ``folder``."""
    video = int(found.settings["frames_compared"]) > 1 and min(_size(found.dense)) > 1
    told = found.context
    title = told.get("prompt") or f"{_name(found.dense)} and {_name(found.sparse)}"
    return render(
        TEMPLATE,
        kind="quality of one pair",
        title=title,
        subtitle=subtitle(told),
        passed=found.passed,
        # A pair of an evaluation: its gates are held against medians, on that page.
        verdicts=None
        if "asked" in told and not found.verdicts
        else [(str(v), v.passed) for v in found.verdicts],
        notes=found.notes,
        tiles=tiles(found),
        pair=pictures.side_by_side(found, folder) if video else None,
        gap=pictures.difference_video(found, folder) if video else None,
        pixelated=found.dense.width <= pictures.CELL / 2,
        curves=_curves(found),
        strip=pictures.strip(found),
        full=DIFFERENCE_FULL,
        rows=[shown(row) for row in found.rows.values()],
        context=[(key.replace("_", " "), _plain(value)) for key, value in told.items()],
        how=_how(found),
    )


def subtitle(context: dict[str, Any]) -> list[str]:
    """Give the lines below the title: what ran."""
    keys = ("model", "strategy", "seed", "device")
    parts = [f"{key} {context[key]}" for key in keys if context.get(key) is not None]
    return [" · ".join(parts)] if parts else []


def tiles(found: Comparison) -> list[Tile]:
    """Give the numbers at the top, those that there are."""
    context = found.context
    made = []
    if isinstance(context.get("speedup"), int | float):
        made.append(
            Tile("speed-up", f"{context['speedup']:.2f}", "x", "whole call, dense / sparse")
        )
    if isinstance(context.get("density"), int | float):
        made.append(
            Tile("density", f"{100 * context['density']:.0f}", "%", "of attention computed")
        )
    names = (
        ("psnr", "PSNR"),
        ("ssim", "SSIM"),
        ("lpips_alex", "LPIPS"),
        ("vmaf", "VMAF"),
        ("motion_ratio", "motion kept"),
        ("sharpness_ratio", "sharpness kept"),
    )
    for name, label in names:
        row = found.rows.get(name)
        if row is None or row.value is None:
            continue
        more = ""
        if row.worst is not None and len(row.per_frame) > 1:
            more = f"worst {number(row.worst)} at frame {row.worst_frame}"
        made.append(Tile(label, number(row.value), row.unit, more))
    return made


def shown(row: Scores) -> dict[str, str | None]:
    """Give a row of the table in words."""

    def told(value: float | None) -> str:
        return "" if value is None else number(value)

    worst = told(row.worst)
    if worst and len(row.per_frame) > 1:
        worst = f"{worst} ({row.worst_frame})"
    own = None
    if row.dense is not None and row.sparse is not None:
        own = f"dense {row.dense:.5f}, sparse {row.sparse:.5f}"
    return {
        "name": row.name,
        "value": told(row.value),
        "unit": row.unit,
        "median": told(row.median),
        "worst": worst,
        "spread": told(row.spread),
        "better": BETTER[row.better],
        "status": row.status,
        "reason": row.reason,
        "definition": row.definition,
        "source": row.source,
        "own": own,
    }


def _curves(found: Comparison) -> list[tuple[str, str, Markup]]:
    fps = found.dense.fps or found.sparse.fps
    made = []
    for name in CURVES:
        row = found.rows.get(name)
        if row is None or len(row.per_frame) < 2:
            continue
        assert row.median is not None
        assert row.worst_frame is not None
        drawing = curve(
            row.per_frame, row.first, row.step, row.median, row.worst_frame, row.unit, fps
        )
        unit = f", {row.unit}" if row.unit else ""
        made.append((f"{name}{unit} ({BETTER[row.better]} is better)", row.definition, drawing))
    return made


def _how(found: Comparison) -> list[tuple[str, str]]:
    settings = found.settings
    told = []
    for label, clip in (("dense", found.dense), ("sparse", found.sparse)):
        rate = "" if clip.fps is None else f", {clip.fps:g} frames per second"
        hashed = "" if clip.sha256 is None else f", sha256 {clip.sha256[:16]}"
        about = f"{KIND[clip.kind]} ({clip.detail}{hashed})"
        size = f"{clip.frames} frames of {clip.width} x {clip.height}{rate}"
        told.append((label, f"{clip.name}: {size}; {about}"))
    told.append(("frames compared", str(settings["frames_compared"])))
    if settings["every"] > 1:
        told.append(("expensive metrics", f"every {settings['every']}th frame"))
    told.append(("time", f"{settings['seconds']:.1f} s"))
    versions = (f"{name} {each}" for name, each in settings["versions"].items() if each)
    told.append(("versions", ", ".join(versions)))
    return told


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def _name(clip: Clip) -> str:
    return clip.name.replace("\\", "/").rstrip("/").split("/")[-1]


def _size(clip: Clip) -> tuple[int, int]:
    return clip.height, clip.width
