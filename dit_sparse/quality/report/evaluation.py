# SPDX-License-Identifier: Apache-2.0
"""The page of an evaluation: strategies over prompts and seeds, speed against quality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_sparse.core.pages import render
from dit_sparse.quality.evaluation_setup import FLOOR
from dit_sparse.quality.report import pictures
from dit_sparse.quality.report.charts import Point, number, pareto
from dit_sparse.quality.report.comparison import BETTER, Tile
from dit_sparse.quality.report.markdown import escape

if TYPE_CHECKING:
    from markupsafe import Markup

    from dit_sparse.quality.scores import Scores
    from dit_sparse.quality.summary import Arm, Pair, Summary

TEMPLATE = Path(__file__).parent / "templates" / "evaluation.html"
COLUMNS = (
    ("psnr", "PSNR, dB"),
    ("psnr_temporal", "temporal PSNR, dB"),
    ("ssim", "SSIM"),
    ("lpips_alex", "LPIPS"),
    ("vmaf", "VMAF"),
    ("motion_ratio", "motion"),
    ("sharpness_ratio", "sharpness"),
)
SHOWN = 2  # clips of each strategy on the page: the worst one and the middle one
HOW = (
    "The dense and sparse clips of a pair come from one process, one attachment and one seed. "
    'The dense run uses the same engine with the method "dense", which is the model\'s own '
    "attention. Each strategy is warmed up before its first timed run, and the sparse time "
    "includes planning. Clips are stored losslessly and measured from these files; the mp4 "
    "files are for viewing."
)


def page(found: Summary, root: Path, scratch: Path) -> str:
    """Write the page; large videos go into ``scratch``."""
    first = found.arms[0].pairs[0]
    size = first.found["dense"]
    names = [
        (name, label)
        for name, label in COLUMNS
        if any(name in arm.rows and arm.rows[name].ok for arm in found.arms)
    ]
    arms = [*found.arms, *([] if found.floor is None else [found.floor])]
    setup = found.setup
    return render(
        TEMPLATE,
        kind="evaluation",
        title=f"{setup.model}: {', '.join(arm.label for arm in found.arms)}",
        subtitle=[_counted(found)],
        passed=found.passed,
        verdicts=[(f"{a.label}: {v}", v.passed) for a in found.arms for v in a.verdicts],
        notes=found.notes,
        tiles=_tiles(found),
        heads=[label for _, label in names],
        table=[_table_row(arm, names, setup.floor) for arm in arms],
        pairs=_counted(found),
        plot=_plot(found),
        clips=[_clips(arm, root, scratch) for arm in found.arms],
        pixelated=size["width"] <= pictures.CELL / 2,
        every=_every(found, names),
        meanings=[
            (name, BETTER[row.better], row.definition) for name, row in found.arms[0].rows.items()
        ],
        how=_how(found),
    )


def markdown(found: Summary) -> str:
    """Write the same numbers as Markdown."""
    verdict = {True: "**PASS**", False: "**FAIL**", None: "No gates were set."}[found.passed]
    lines = [f"# Evaluation of {escape(found.setup.model)}", "", verdict, ""]
    lines += [f"- {escape(f'{a.label}: {v}')}" for a in found.arms for v in a.verdicts]
    lines += [f"> {escape(note)}" for note in found.notes]
    heads = [label for _, label in COLUMNS]
    lines += ["", f"| strategy | speed-up | density | {' | '.join(heads)} |"]
    lines.append("|---" * (3 + len(heads)) + "|")
    arms = [*found.arms, *([] if found.floor is None else [found.floor])]
    for arm in arms:
        row = _table_row(arm, COLUMNS, found.setup.floor)
        cells = [f"{value} {worst}".strip() for value, worst in row["cells"]]
        lines.append(
            f"| {escape(row['label'])} | {row['speed']} | {row['density']} | {' | '.join(cells)} |"
        )
    lines += ["", f"Medians over {_counted(found)}; in brackets the worst pair.", ""]
    return "\n".join(lines)


def _counted(found: Summary) -> str:
    def some(count: int, what: str) -> str:
        return f"{count} {what}{'s' * (count != 1)}"

    setup = found.setup
    total = len(setup.prompts) * len(setup.seeds)
    parts = some(len(setup.prompts), "prompt"), some(len(setup.seeds), "seed")
    return f"{parts[0]} x {parts[1]} = {some(total, 'pair')}"


def _tiles(found: Summary) -> list[Tile]:
    if len(found.arms) > 1:
        return []
    (arm,) = found.arms
    made = []
    if arm.speedup is not None:
        middle, low, high = arm.speedup
        made.append(Tile("speed-up", f"{middle:.2f}", "x", f"{low:.2f} to {high:.2f}, whole call"))
    if arm.attention is not None:
        middle, low, high = arm.attention
        made.append(Tile("self-attention", f"{middle:.2f}", "x", f"{low:.2f} to {high:.2f}"))
    if arm.density is not None:
        made.append(Tile("density", f"{100 * arm.density:.0f}", "%", "of attention computed"))
    for name, label in (("psnr", "PSNR"), ("ssim", "SSIM"), ("lpips_alex", "LPIPS")):
        row = arm.rows.get(name)
        if row is not None and row.value is not None:
            floor = None if found.floor is None else found.floor.rows[name].value
            known = "" if floor is None else f", noise floor {number(floor)}"
            worst = f"worst pair {number(row.worst)}{known}" if row.worst is not None else known
            made.append(Tile(label, number(row.value), row.unit, worst))
    return made


def _table_row(
    arm: Arm, names: list[tuple[str, str]] | tuple[tuple[str, str], ...], floor: str | None
) -> dict[str, Any]:
    def cell(row: Scores | None) -> tuple[str, str]:
        if row is None or row.value is None or row.worst is None:
            return "", ""
        return number(row.value), f"({number(row.worst)})"

    speed = None if arm.label == FLOOR else arm.speedup  # another backend is no gain or loss
    return {
        "label": f"noise floor: {floor}" if arm.label == FLOOR else arm.label,
        "speed": "" if speed is None else f"{speed[0]:.2f}x",
        "range": "" if speed is None else f"{speed[1]:.2f} to {speed[2]:.2f}",
        "density": "" if arm.density is None else f"{100 * arm.density:.0f} %",
        "cells": [cell(arm.rows.get(name)) for name, _ in names],
    }


def _plot(found: Summary) -> Markup | None:
    for name, label in (("lpips_alex", "LPIPS"), ("psnr", "PSNR, dB")):
        rows = [(arm, arm.rows.get(name)) for arm in found.arms]
        points = [
            Point(arm.label, arm.speedup[0], row.value, min(row.per_frame), max(row.per_frame))
            for arm, row in rows
            if arm.speedup is not None and row is not None and row.value is not None
        ]
        if len(points) == len(found.arms):
            ground = None if found.floor is None else found.floor.rows[name].value
            return pareto(points, label, higher=name == "psnr", floor=ground)
    return None


def _clips(arm: Arm, root: Path, scratch: Path) -> dict[str, Any]:
    """Show the worst pair and the middle one."""
    from dit_sparse.quality.clips import open_clip

    chosen = {0: "the worst pair"}
    if len(arm.pairs) > 1:
        chosen[len(arm.pairs) // 2] = "the middle pair"
    made = []
    for place, why in list(chosen.items())[:SHOWN]:
        pair = arm.pairs[place]
        folder = (root / pair.page).parent.parent
        dense, other = (open_clip(_stored(folder, label)) for label in ("dense", arm.label))
        psnr = pair.value("psnr")
        told = "" if psnr is None else f", PSNR {number(psnr)} dB"
        video = dense.frames > 1
        name = f"{arm.label}-{pair.job.key}"
        made.append(
            {
                "caption": f"{why}: {pair.job.prompt}, seed {pair.job.seed}{told}",
                "page": pair.page,
                "video": pictures.pair_video(dense, other, scratch, name) if video else None,
                "still": None if video else pictures.still(dense, other),
            }
        )
    return {"label": arm.label, "clips": made}


def _stored(folder: Path, label: str) -> Path:
    return next(p for p in (folder / f"{label}.mkv", folder / f"{label}.png") if p.is_file())


def _every(found: Summary, names: list[tuple[str, str]]) -> list[dict[str, Any]]:
    def key(item: tuple[Arm, Pair]) -> float:
        return item[1].value("psnr") or 0.0

    rows = []
    for arm, pair in sorted(((a, p) for a in found.arms for p in a.pairs), key=key):
        values = [pair.value(name) for name, _ in names]
        speed = pair.found["context"].get("speedup")
        rows.append(
            {
                "prompt": pair.job.prompt,
                "seed": pair.job.seed,
                "label": arm.label,
                "page": pair.page,
                "speed": "" if speed is None else f"{speed:.2f}x",
                "cells": ["" if value is None else number(value) for value in values],
            }
        )
    return rows


def _how(found: Summary) -> list[tuple[str, str]]:
    setup = found.setup
    told = [("model", setup.model), ("how", HOW)]
    if setup.floor:
        told.append(
            ("noise floor", f"a second dense run with {setup.floor}, compared with the first")
        )
    told += [(key.replace("_", " "), _plain(value)) for key, value in setup.call.items()]
    told += [(key.replace("_", " "), _plain(value)) for key, value in setup.about.items()]
    return told


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items() if item)
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return str(value)
