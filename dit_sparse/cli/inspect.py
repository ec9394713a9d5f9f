# SPDX-License-Identifier: Apache-2.0
"""``dit-sparse inspect``: the map of a strategy or model, and pictures of what heads read."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from dit_sparse.cli.console import Debug, UserError
from dit_sparse.cli.lora import read_loras
from dit_sparse.cli.options import Call, Loras, key_values

EXAMPLES = (
    "dit-sparse inspect mine.json -o mine.html",
    "dit-sparse inspect mine.json --model samples/wan-tiny --prompt 'a red circle' -o pages",
    "dit-sparse inspect samples/wan-tiny -o atlas.html",
    "dit-sparse inspect radial svg svg2 blade --grid 9x30x52 --heads 1 -o methods.png",
    "dit-sparse inspect adaspa --model samples/wan-tiny --prompt 'a red circle' -o adaspa.png",
)
SIZE = {"rich_help_panel": "Size of a run of --model"}


def run(
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="FILE.html: the map as an interactive page. FILE.png: the map as an image or, "
            "with --grid or --model, the heads of one layer. A folder: both the page and the "
            "image. Existing files are replaced.",
            show_default=False,
        ),
    ],
    strategies: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STRATEGY|MODEL...",
            help="A strategy file, shipped strategy, Hub repository or method; or the folder of "
            "a model. Pictures of heads accept several strategies.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Pipeline folder or Hub id to run; requires --prompt if a strategy is given.",
            show_default="none, no model is run",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="Without a model: grid FRAMESxHEIGHTxWIDTH[+TEXT] in tokens, drawn with "
            "synthetic queries and keys.",
            show_default="the strategy's",
        ),
    ] = None,
    text_first: Annotated[
        bool, typer.Option("--text-first", help="Text tokens precede the video tokens.")
    ] = False,
    heads: Annotated[
        int | None,
        typer.Option(
            min=1, max=256, help="Number of heads per layer.", show_default="the model's, or 4"
        ),
    ] = None,
    head_dim: Annotated[
        int, typer.Option(min=1, max=512, help="With --grid: head dimension.")
    ] = 64,
    layers: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Number of layers.", show_default="the model's, or 40"),
    ] = None,
    layer: Annotated[int, typer.Option(min=0, help="Pictures of heads: layer to draw.")] = 0,
    step: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Pictures of heads: step to draw.",
            show_default="the middle of the run",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, max=1000, help="Number of steps of the run.", show_default="the model's"
        ),
    ] = None,
    bands: Annotated[
        int, typer.Option(min=1, max=20, help="Map of a model: number of step bands.")
    ] = 3,
    token: Annotated[
        str | None,
        typer.Option(
            help="Pictures of heads: query token, as FRAME,ROW,COLUMN.",
            show_default="the center token",
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a schedule setting or a param."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Random seed of the noise, or of the synthetic content.")
    ] = 0,
    height: Annotated[int | None, typer.Option(min=16, max=16384, help="Pixels.", **SIZE)] = None,
    width: Annotated[int | None, typer.Option(min=16, max=16384, help="Pixels.", **SIZE)] = None,
    frames: Annotated[int | None, typer.Option(min=1, max=10_000, help="Frames.", **SIZE)] = None,
    call: Call = None,
    lora: Loras = None,
    debug: Debug = False,  # noqa: ARG001  (read by ``guarded``)
) -> None:
    """Show a strategy as a map of layers, heads and step bands, or a model's own attention.

    The map tells method, density, error and time saved of every head, as far as they are known: a
    published strategy has no errors, one that was profiled here has them beside it. A click on a
    head shows the blocks it keeps, its candidates, and with --model its attention map.
    """
    from dit_sparse.cli.inspect_heads import Asked, draw_heads
    from dit_sparse.cli.inspect_map import draw_model, draw_strategy
    from dit_sparse.cli.shape import load_strategy

    names = list(strategies or [])
    if len(names) == 1 and _is_model(names[0]):
        if model is not None:
            raise UserError(f"{names[0]} and --model {model} are both models; give only one")
        model, names = names[0], []
    asked = Asked(
        model, prompt, grid, text_first, heads, head_dim, layers, layer, step, steps, token, seed,
        (height, width, frames), bands, key_values("--call", call),
        read_loras(lora),
    )  # fmt: skip
    kind = _check_output(output)
    if not names and model is None:
        raise UserError("nothing to inspect; give a strategy, a method or a model folder")
    if model is not None and grid is not None:
        raise UserError(
            "--model and --grid cannot be combined; give --model with --prompt, or --grid"
        )
    if options and len(names) > 1:
        raise UserError("--set requires exactly one strategy, got several")
    found = [load_strategy(name) for name in names]
    if options:
        found = [(found[0][0].with_options(**key_values("--set", options)), found[0][1])]
    if not found:
        draw_model(asked, output)
    elif kind == ".png" and (grid is not None or model is not None):
        draw_heads(asked, [each for each, _ in found], output)
    elif len(found) > 1:
        raise UserError(
            "a map shows one strategy, got several; to compare several, use --grid and -o FILE.png"
        )
    else:
        draw_strategy(asked, *found[0], output)


def _is_model(name: str) -> bool:
    """Tell a pipeline's folder from what names a strategy."""
    with contextlib.suppress(OSError, ValueError):  # too long or odd to be a path
        return (Path(name).expanduser() / "model_index.json").is_file()
    return False


def _check_output(output: Path) -> str:
    """Say what is to be written; refuse before any work what cannot be."""
    kind = output.suffix.lower()
    if output.is_dir() or (kind == "" and not output.exists()):
        return ""
    if kind not in {".png", ".html"}:
        raise UserError(f"-o {output}: must be a .html file, a .png file or a folder")
    if not output.absolute().parent.is_dir():
        raise UserError(f"-o {output}: the folder does not exist; create it first")
    return kind
