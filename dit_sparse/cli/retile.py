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
        str, typer.Argument(help="A strategy file, shipped strategy or Hub repository.")
    ],
    height: Annotated[
        int | None,
        typer.Option(min=16, max=16384, help="Pixels.", show_default="unchanged"),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=16, max=16384, help="Pixels.", show_default="unchanged"),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="Frames.", show_default="unchanged"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder, Hub id or known name of the model, used to convert pixels to tokens.",
            show_default="inferred from the file",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New strategy file (.json).")
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            help="A file written by profile at the new size: compare with it, using its "
            "measurements. Its size is used if none is given."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output file.")
    ] = False,
    debug: Debug = False,  # noqa: ARG001  (read by ``guarded``)
) -> None:
    """Fit a strategy to another size, and say what was scaled, what stays, what is extrapolated.

    Windows in tokens and numbers of clusters grow with the grid; shares and thresholds stay.
    What was measured at the old size is dropped: nothing was measured at the new one.
    """
    if output is None and check is None:
        raise UserError(
            "-o is missing; give the strategy file to write, or use --check alone, which writes "
            "nothing"
        )
    if all(side is None for side in (height, width, frames)) and check is None:
        raise UserError("the new size is missing; give --height, --width or --frames")
    if output is not None:
        _check_output(output, overwrite=overwrite)
    with ERR.status("re-tiling"):
        from dit_sparse.forecast.counted import grid_of
        from dit_sparse.profiler.retiling import refit

        found, path = load_strategy(strategy)
        if found.grid is None:
            raise UserError(
                f"{strategy}: grid: missing, so there is nothing to rescale; the strategy runs "
                "at any size unchanged"
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
        raise UserError(f"-o {output}: must be a .json file")
    if output.is_dir():
        raise UserError(f"-o {output}: is a folder; give a file name")
    if not output.absolute().parent.is_dir():
        raise UserError(f"-o {output}: the folder does not exist; create it first")
    if output.exists() and not overwrite:
        raise UserError(f"-o {output}: already exists; add --overwrite to replace it")


def _grid(
    strategy: Strategy, shape: Shape, height: int | None, width: int | None, frames: int | None
) -> LatentsGrid:
    """Turn pixels and frames into tokens; a side that is not given stays as it is."""
    from dit_sparse.forecast.counted import grid_of
    from dit_sparse.pipelines.known import KNOWN_MODELS
    from dit_sparse.pipelines.size import model_size

    if shape.config is None or not shape.known:  # of one class, but of what compression?
        raise UserError(
            f"{strategy.name}: the model is unknown, so pixels cannot be converted to tokens; "
            f"give --model with a folder, a Hub id or a known name ({', '.join(KNOWN_MODELS)})"
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
        raise UserError(f"--check {path}: has no grid; give a file written by dit-sparse profile")
    stored = read_stored(beside(path))
    if stored is None:
        raise UserError(
            f"--check {path}: no measurements in {beside(path)}, the folder that profile writes "
            "next to its output"
        )
    if (why := fits(stored, found)) is not None:
        raise UserError(f"--check {path}: {beside(path)} does not belong to this file: {why}")
    return found, stored


def _tell(made: Retiled, old: Strategy, grid: LatentsGrid) -> None:
    assert old.grid is not None
    was = f"{old.grid.frames} x {old.grid.height} x {old.grid.width}"
    text = f" + {old.grid.text} text" if old.grid.text else ""
    OUT.print(f"{was}{text} -> {grid} tokens", highlight=False)
    if made.strategy.grid == old.grid:
        OUT.print("This is the strategy's own size: nothing changes.")
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
            raise UserError(f"--check {path}: {key} does not match: {b}, expected {a}")
    if (why := fits(stored, made)) is not None:
        raise UserError(f"--check {path}: cannot be used to evaluate {made.name}: {why}")
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("")
    for heading in ("error", "density", "predicted time", "choices measured at this size"):
        table.add_column(heading, justify="right")
    was = old.receipt.measured
    gain = was.get("predicted_attention_speedup")
    at_home = [was.get("relative_error"), was.get("density"), None if gain is None else 1 / gain]
    table.add_row(
        f"{old.name}, from its receipt",
        *("unknown" if v is None else f"{v:.3f}" for v in at_home),
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
        f"Based on the measurements for {path.name}: {stored.units} generations of "
        f"{stored.num_steps} steps at {stored.grid} tokens. Error: root mean square of the "
        "relative error of head outputs. Time: self-attention as a fraction of dense; "
        f"{stored.timing}.",
        highlight=False,
    )
