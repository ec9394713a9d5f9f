# SPDX-License-Identifier: Apache-2.0
"""``dit-sparse compare``: two clips of one seed, dense and sparse, and every number between them.

Exit codes: 0 every gate passed (or there were none), 1 one failed, 2 the clips do not fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from dit_sparse.cli.console import OUT, Debug, UserError, progress, styled

if TYPE_CHECKING:
    from dit_sparse.quality.comparison import Comparison

EXAMPLES = (
    "dit-sparse compare out/dense.mkv out/sparse.mkv -o report --gate psnr>=25,psnr.worst>=18",
    "dit-sparse compare frames/dense frames/sparse -o report --metrics psnr,ssim --compat svg",
)
METRICS = {"rich_help_panel": "What to measure"}


def run(
    dense: Annotated[
        Path,
        typer.Argument(
            help="The reference: a video, an image, a folder of images, .npy or .npz.",
            show_default=False,
        ),
    ],
    sparse: Annotated[
        Path,
        typer.Argument(
            help="The clip to test; must have the same length and resolution.", show_default=False
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for report.html, report.json and report.md.",
            show_default=False,
        ),
    ],
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            help="Comma-separated metrics to compute, or 'all'.",
            show_default="all except lpips_vgg, dists",
            **METRICS,
        ),
    ] = None,
    gates: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            metavar="METRIC>=NUMBER",
            help="Threshold on a metric, e.g. psnr>=25 or lpips_alex.worst<=0.2; repeat the "
            "option or separate gates with commas. Exit code 1 if a gate fails.",
            show_default="none",
        ),
    ] = None,
    compat: Annotated[
        list[str] | None,
        typer.Option(
            help="Also compute the metrics as defined by another repository: svg.",
            show_default="none",
            **METRICS,
        ),
    ] = None,
    align: Annotated[
        Literal["exact", "first"],
        typer.Option(help="first: compare only the frames that both clips have.", **METRICS),
    ] = "exact",
    every: Annotated[
        int,
        typer.Option(min=1, help="Compute expensive metrics only on every N-th frame.", **METRICS),
    ] = 1,
    max_frames: Annotated[
        int | None,
        typer.Option(
            min=1, help="Compare only the first N frames.", show_default="all", **METRICS
        ),
    ] = None,
    lpips_weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NET=FILE",
            help="Weights file for alex, vgg (LPIPS) or dists, e.g. alex=alex.safetensors.",
            show_default="the files found on this machine",
            **METRICS,
        ),
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="Folder of a feature model for VBench's consistency metrics: dino=... (a "
            "Transformers ViT), clip=... (a Transformers CLIP).",
            show_default="none",
            **METRICS,
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=240.0,
            help="Frame rate for inputs that do not specify one.",
            show_default="from the files",
        ),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Device for neural metrics.")
    ] = "auto",
    yes: Annotated[
        bool, typer.Option("--yes", help="Also compare clips larger than 8 gigapixels.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing report in the folder.")
    ] = False,
    debug: Debug = False,  # noqa: ARG001  (read by ``guarded``)
) -> None:
    """Measure how far a sparse clip is from the dense one of the same seed.

    Clips are read frame by frame, so length does not matter. Exit code 0: no gate failed; 1: one
    did; 2: the clips cannot be read or do not fit each other.
    """
    from dit_sparse.cli.source import machine
    from dit_sparse.quality.comparison import compare
    from dit_sparse.quality.report import check_folder, write_comparison

    where, _ = machine(device, "auto")
    check_folder(output, overwrite=overwrite)
    with progress() as bars:
        task = bars.add_task("comparing", total=None)
        found = compare(
            dense,
            sparse,
            metrics=words(metrics),
            gates=gates or (),
            compat=words(compat) or (),
            align=align,
            every=every,
            max_frames=max_frames,
            device=where,
            weights=named_paths(lpips_weights, "--lpips-weights", ("alex", "vgg", "dists")),
            features=named_paths(features, "--features", ("dino", "clip")),
            fps=fps,
            allow_large=yes,
            watch=lambda done, total: bars.update(task, completed=done, total=total),
        )
        writing = bars.add_task("writing the report", total=1)
        files = write_comparison(found, output)
        bars.update(writing, completed=1)
    show(found)
    OUT.print(styled((f"{output}/", "dim"), f" {', '.join(files)}"), soft_wrap=True)
    if found.passed is False:
        raise typer.Exit(1)


def show(found: Comparison) -> None:
    """Print the table and the verdict."""
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for heading in ("", "value", "median", "worst", "at frame"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, row in found.rows.items():
        if row.value is None:
            table.add_row(name, row.status, "", "", "", style="dim")
            continue
        unit = f" {row.unit}" if row.unit else ""
        numbers = ["" if n is None else f"{n:.4g}" for n in (row.median, row.worst)]
        frame = "" if row.worst_frame is None else str(row.worst_frame)
        table.add_row(name, f"{row.value:.4g}{unit}", *numbers, frame)
    OUT.print()
    OUT.print(table)
    OUT.print()
    for name, row in found.rows.items():
        if row.value is None and row.status != "n/a":
            OUT.print(styled((f"{name} {row.status}: {row.reason or ''}", "dim")))
    for note in found.notes:
        OUT.print(styled(("note:", "yellow"), f" {note}"))
    for verdict in found.verdicts:
        style = "green" if verdict.passed else "bold red"
        OUT.print(styled((str(verdict), style)))


def words(given: list[str] | None) -> list[str] | None:
    """Split at commas; None stays None."""
    if given is None:
        return None
    return [word.strip() for text in given for word in text.split(",") if word.strip()]


def named_paths(given: list[str] | None, option: str, names: tuple[str, ...]) -> dict[str, Path]:
    """Read ``name=path`` pairs."""
    found = {}
    for text in given or []:
        name, equals, path = text.partition("=")
        if not equals or name not in names:
            raise UserError(f"{option} {text!r:.200}: must be {' or '.join(names)}=PATH")
        if not Path(path).exists():
            raise UserError(
                f"{option} {text!r:.200}: {path} does not exist; give an existing path"
            )
        found[name] = Path(path)
    return found
