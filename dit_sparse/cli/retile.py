# SPDX-License-Identifier: Apache-2.0
"""``dit-sparse retile``: fit a strategy file to another resolution or length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dit_sparse.cli.console import ERR, OUT, Debug, UserError, styled
from dit_sparse.cli.shape import Shape, load_strategy, shape_of

if TYPE_CHECKING:
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.profiler.retiling import Retiled
    from dit_sparse.profiler.stored import Stored
    from dit_sparse.strategy import Strategy

EXAMPLES = (
    "dit-sparse retile wan2.1-14b.720p.svg2 --height 480 --width 832 -o wan480.json",
    "dit-sparse retile mine.json --model samples/wan-tiny --frames 17 -o short.json",
    "dit-sparse retile small.json --check large.json",
)


def run(
    strategy: Annotated[
        str, typer.Argument(help="A strategy file, a shipped name or a Hub repository.")
    ],
    height: Annotated[
        int | None,
        typer.Option(min=16, max=16384, help="Pixels.", show_default="as it is"),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=16, max=16384, help="Pixels.", show_default="as it is"),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="Frames.", show_default="as it is"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder, Hub id or known name of the model: tells how many pixels a token has.",
            show_default="by the file",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The new file, .json.")
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            help="A file that profile wrote at the new size: compare with it, by what was "
            "measured for it. Its size is taken where none is given."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output file.")
    ] = False,
    debug: Debug = False,  # noqa: ARG001  (read by ``guarded``)
) -> None:
    """Fit a strategy to another size, and say what was scaled, what stays, what is extrapolated.

    Windows in tokens and numbers of clusters grow with the grid; shares and thresholds stay.
    What was measured at the old size is dropped: nothing was measured at the new one.
    """
    if output is None and check is None:
        raise UserError("-o FILE is wanted (or --check alone, which writes nothing)")
    if all(side is None for side in (height, width, frames)) and check is None:
        raise UserError("give --height, --width or --frames: what is the new size?")
    if output is not None:
        _check_output(output, overwrite=overwrite)
    with ERR.status("re-tiling"):
        from dit_sparse.forecast.counted import grid_of
        from dit_sparse.profiler.retiling import refit

        found, path = load_strategy(strategy)
        if found.grid is None:
            raise UserError(
                f"{strategy}: grid: names none, so there is nothing to scale from; it runs at any "
                "size as it is"
            )
        other = None if check is None else _other(check)
        shape = shape_of((found,), model, files=(path,))
        if height is None and width is None and frames is None:
            assert other is not None
            grid = grid_of(other[0])
        else:
            grid = _grid(found, shape, height, width, frames)
        made = refit(found, grid, count=True)
    if output is not None:
        name = output.stem
        made = replace(made, strategy=made.strategy.model_copy(update={"name": name}))
    _tell(made, found, grid)
    if other is not None:
        assert check is not None
        _compare(made.strategy, found, check, *other)
    if output is not None:
        made.strategy.save(output)
        OUT.print(str(output), highlight=False, soft_wrap=True)


def _check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that cannot be written, before any work."""
    if output.suffix.lower() != ".json":
        raise UserError(f"-o {output}: wanted the name of a .json file")
    if output.is_dir():
        raise UserError(f"-o {output}: is a folder; a file name was wanted")
    if not output.absolute().parent.is_dir():
        raise UserError(f"-o {output}: its folder does not exist")
    if output.exists() and not overwrite:
        raise UserError(f"-o {output}: is there already; add --overwrite to replace it")


def _grid(
    strategy: Strategy, shape: Shape, height: int | None, width: int | None, frames: int | None
) -> LatentsGrid:
    """Turn pixels and frames into tokens; a side that is not given stays as it is."""
    from dit_sparse.forecast.counted import grid_of
    from dit_sparse.pipelines.known import KNOWN_MODELS
    from dit_sparse.pipelines.size import model_size

    if shape.config is None or not shape.known:  # of one class, but of what compression?
        raise UserError(
            f"{strategy.name}: which model is it for? --model FOLDER, a Hub id or a known name "
            f"({', '.join(KNOWN_MODELS)}) tells how many pixels a token has"
        )
    old = grid_of(strategy)
    if height is None or width is None:
        unit = model_size(shape.config, 256, 256, 1, vae=shape.vae).grid
        height = height or old.height * (256 // unit.height)
        width = width or old.width * (256 // unit.width)
    new = model_size(shape.config, height, width, frames or 1, vae=shape.vae).grid
    return replace(
        old,
        frames=old.frames if frames is None else new.frames,
        height=new.height,
        width=new.width,
    )


def _other(path: Path) -> tuple[Strategy, Stored]:
    """Read the file that was searched at the new size, and what was measured for it."""
    from dit_sparse.profiler.stored import beside, fits, read_stored

    found, _ = load_strategy(str(path))
    if found.grid is None:
        raise UserError(f"--check {path}: names no grid; wanted a file that profile wrote")
    stored = read_stored(beside(path))
    if stored is None:
        raise UserError(
            f"--check {path}: {beside(path)} holds no measurements; it is the folder that profile "
            "keeps beside its output"
        )
    if (why := fits(stored, found)) is not None:
        raise UserError(f"--check {path}: {beside(path)} is not this file's: {why}")
    return found, stored


def _tell(made: Retiled, old: Strategy, grid: LatentsGrid) -> None:
    assert old.grid is not None
    was = f"{old.grid.frames} x {old.grid.height} x {old.grid.width}"
    text = f" + {old.grid.text} text" if old.grid.text else ""
    OUT.print(f"{was}{text} -> {grid} tokens", highlight=False)
    if made.strategy.grid == old.grid:
        OUT.print("The size is the one it was made at: nothing changes.")
    for heading, lines in (("scaled", made.scaled), ("stays", made.stays)):
        for line in lines:
            OUT.print(styled((heading, "bold"), f"  {line}"), soft_wrap=True)
    for line in made.warnings:
        OUT.print(styled(("warning", "bold yellow"), f"  {line}"), soft_wrap=True)


def _compare(made: Strategy, old: Strategy, path: Path, native: Strategy, stored: Stored) -> None:
    """Print the re-tiled strategy beside the one that was searched there."""
    from rich.table import Table

    from dit_sparse.profiler.stored import fits
    from dit_sparse.profiler.transfer import judge

    for key, a, b in (("model", made.model, native.model), ("grid", made.grid, native.grid)):
        if a is not None and b is not None and a != b:
            raise UserError(f"--check {path}: is for another {key}: {b}, not {a}")
    if (why := fits(stored, made)) is not None:
        raise UserError(f"--check {path}: cannot judge {made.name}: {why}")
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("")
    for heading in ("error", "density", "predicted time", "choices measured there"):
        table.add_column(heading, justify="right")
    was = old.receipt.measured
    gain = was.get("predicted_attention_speedup")
    at_home = [was.get("relative_error"), was.get("density"), None if gain is None else 1 / gain]
    table.add_row(
        f"{old.name}, by its own receipt",
        *("not known" if v is None else f"{v:.3f}" for v in at_home),
        "",
    )
    for label, each in ((f"{old.name}, re-tiled", made), (f"{native.name}, searched", native)):
        found = judge(each, stored)
        table.add_row(
            label,
            f"{found.error:.3f}",
            f"{found.density:.3f}",
            f"{found.time:.3f}",
            f"{found.exact:.1%}",
        )
    OUT.print()
    OUT.print(table)
    OUT.print(
        f"By what was measured for {path.name}: {stored.units} generations of "
        f"{stored.num_steps} steps at {stored.grid} tokens. Error: root of the mean squared "
        "relative error of heads' outputs. Time: of self-attention, as a share of dense; "
        f"{stored.timing}.",
        highlight=False,
    )
