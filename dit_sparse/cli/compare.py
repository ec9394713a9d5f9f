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
        Path, typer.Argument(help="The clip under test, as long and large.", show_default=False)
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
            help="Rows to measure, with commas between them, or 'all'.",
            show_default="all but lpips_vgg, dists",
            **METRICS,
        ),
    ] = None,
    gates: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            metavar="METRIC>=NUMBER",
            help="What must be reached, e.g. psnr>=25 or lpips_alex.worst<=0.2; may be given "
            "several times, or with commas. Exit code 1 where one is not.",
            show_default="none",
        ),
    ] = None,
    compat: Annotated[
        list[str] | None,
        typer.Option(
            help="Add another repository's variants under its name: svg.",
            show_default="none",
            **METRICS,
        ),
    ] = None,
    align: Annotated[
        Literal["exact", "first"],
        typer.Option(help="first: compare the frames that both have.", **METRICS),
    ] = "exact",
    every: Annotated[
        int, typer.Option(min=1, help="Costly rows look at every so many frames.", **METRICS)
    ] = 1,
    max_frames: Annotated[
        int | None,
        typer.Option(min=1, help="Look at the first frames only.", show_default="all", **METRICS),
    ] = None,
    lpips_weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NET=FILE",
            help="File of weights: alex, vgg (LPIPS) or dists, as in alex=alex.safetensors.",
            show_default="what is found on this machine",
            **METRICS,
        ),
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="Folder of a feature model for VBench's consistency rows: dino=... (a "
            "Transformers ViT), clip=... (a Transformers CLIP).",
            show_default="none",
            **METRICS,
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            min=0.1, max=240.0, help="For inputs that do not say.", show_default="as the files"
        ),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where networks run.")
    ] = "auto",
    yes: Annotated[
        bool, typer.Option("--yes", help="Measure clips above 8 gigapixels too.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier report in the folder.")
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
            raise UserError(f"{option} {text!r:.200}: wanted {' or '.join(names)}=PATH")
        if not Path(path).exists():
            raise UserError(f"{option} {text!r:.200}: {path} does not exist")
        found[name] = Path(path)
    return found
