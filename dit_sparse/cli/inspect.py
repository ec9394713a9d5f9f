# SPDX-License-Identifier: Apache-2.0
"""``dit-sparse inspect``: a picture of what each head reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_sparse.cli.console import OUT, Debug, UserError, progress

if TYPE_CHECKING:
    from dit_sparse.grid import LatentsGrid
    from dit_sparse.inspect import HeadView
    from dit_sparse.strategy import Strategy

EXAMPLES = (
    "dit-sparse inspect radial svg svg2 blade --grid 9x30x52 --heads 1 -o methods.png",
    "dit-sparse inspect hunyuan-video.720p.svg --grid 33x45x80+256 --step 10 -o svg.png",
    "dit-sparse inspect adaspa --model samples/wan-tiny --prompt 'a red circle' -o adaspa.png",
)
GRID = re.compile(r"(\d+)x(\d+)x(\d+)(?:\+(\d+))?")


def run(
    strategies: Annotated[
        list[str],
        typer.Argument(
            metavar="STRATEGY...",
            help="A shipped strategy, a file, a Hub repository or a method's name; several are "
            "drawn under each other.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file; replaced.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Pipeline folder or Hub id to run; needs --prompt.",
            show_default="none: synthetic queries and keys on --grid",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the model is to show.")] = None,
    grid: Annotated[
        str | None,
        typer.Option(help="Without a model: FRAMESxHEIGHTxWIDTH[+TEXT] in tokens."),
    ] = None,
    text_first: Annotated[
        bool, typer.Option("--text-first", help="Text stands before the video.")
    ] = False,
    heads: Annotated[
        int, typer.Option(min=1, max=256, help="Without a model: heads of the layer.")
    ] = 4,
    head_dim: Annotated[
        int, typer.Option(min=1, max=512, help="Without a model: width of a head.")
    ] = 64,
    layers: Annotated[
        int, typer.Option(min=1, max=1000, help="Without a model: layers of the model.")
    ] = 40,
    layer: Annotated[int, typer.Option(min=0, help="Which layer, from 0.")] = 0,
    step: Annotated[
        int | None,
        typer.Option(min=0, help="Which step, from 0.", show_default="the middle of the run"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Steps of the run.", show_default="the model's, or 20"),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            help="FRAME,ROW,COLUMN of the query token to look from.", show_default="the middle"
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting or a param."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise, or of the content.")] = 0,
    debug: Debug = False,  # noqa: ARG001  (read by ``guarded``)
) -> None:
    """Draw which tokens each head of a layer reads at a step.

    With a model the pipeline runs and its own choices are drawn. Without one the content is
    synthetic: static methods are drawn exactly, dynamic ones as they choose on it.
    """
    from dit_sparse.cli.generate import key_values
    from dit_sparse.inspect import draw_views
    from dit_sparse.strategy import Strategy
    from dit_sparse.video import write_png

    if (model is None) == (grid is None):
        raise UserError("give either --model with --prompt, or --grid")
    if output.suffix.lower() != ".png" or not output.absolute().parent.is_dir():
        raise UserError(f"{output}: wanted the name of a .png file in a folder that exists")
    if options and len(strategies) > 1:
        raise UserError("--set is for one strategy; several are drawn as they are")
    asked = [Strategy.coerce(name, **key_values(options or [])) for name in strategies]
    found: list[HeadView] = []
    if model is not None:
        found, where, at, count = _of_model(model, prompt, asked, layer, step, steps, token, seed)
        note = f"{model}, prompt {prompt!r}, seed {seed}"
    else:
        where = _grid(grid or "", text_first=text_first)
        count = steps or 20
        at = count // 2 if step is None else step
        if layer >= layers or at >= count:
            raise UserError(f"--layer {layer} of {layers}, --step {at} of {count}: count from 0")
        size = (heads, head_dim, layers)
        found = _synthetic(asked, where, size, layer, at, count, _token(token, where), seed)
        note = "synthetic queries and keys: what a dynamic method keeps is no model's"
    names = ", ".join(each.name for each in asked)
    if not found:
        raise UserError(
            f"{names}: layer {layer} is dense at step {at} of {count}; try another --step or "
            "--layer"
        )
    title = f"{names}: layer {layer}, step {at} of {count}, {where} tokens"
    write_png(output, draw_views(found, where, title, note, _token(token, where)))
    for view in found:
        OUT.print(f"head {view.head}: {view.method}, density {view.density:.1%}", highlight=False)
    OUT.print(f"{output}", highlight=False)


def _grid(text: str, *, text_first: bool) -> LatentsGrid:
    from dit_sparse.grid import LatentsGrid

    match = GRID.fullmatch(text)
    if match is None:
        raise UserError(f"--grid {text!r}: wanted FRAMESxHEIGHTxWIDTH[+TEXT], e.g. 21x30x52+256")
    frames, height, width, words = (int(part or 0) for part in match.groups())
    return LatentsGrid(frames, height, width, words, text_first and words > 0)


def _token(text: str | None, grid: LatentsGrid) -> tuple[int, int, int] | None:
    if text is None:
        return None
    parts = text.split(",")
    size = (grid.frames, grid.height, grid.width)
    if len(parts) != 3 or not all(p.strip().isdecimal() for p in parts):
        raise UserError(f"--token {text!r}: wanted FRAME,ROW,COLUMN, e.g. 0,10,20")
    frame, row, column = (int(part) for part in parts)
    if frame >= size[0] or row >= size[1] or column >= size[2]:
        raise UserError(f"--token {text}: outside of {grid}; count from 0")
    return frame, row, column


def _synthetic(
    strategies: list[Strategy],
    grid: LatentsGrid,
    size: tuple[int, int, int],
    layer: int,
    step: int,
    num_steps: int,
    token: tuple[int, int, int] | None,
    seed: int,
) -> list[HeadView]:
    """Play one layer of each strategy; ``size`` is (heads, head_dim, layers)."""
    from dit_sparse.inspect import observe_synthetic

    found = []
    with progress() as bars:
        for strategy in strategies:
            task = bars.add_task(strategy.name, total=step + 1)
            found += observe_synthetic(
                strategy,
                grid,
                heads=size[0],
                head_dim=size[1],
                num_layers=size[2],
                layer=layer,
                step=step,
                num_steps=num_steps,
                token=token,
                seed=seed,
                progress=lambda done, total, task=task: bars.update(  # type: ignore[misc]
                    task, completed=done, total=total
                ),
            )
    return found


def _of_model(
    model: str,
    prompt: str | None,
    strategies: list[Strategy],
    layer: int,
    step: int | None,
    steps: int | None,
    token: str | None,
    seed: int,
) -> tuple[list[HeadView], LatentsGrid, int, int]:
    """Run the pipeline; its views, its grid, the step and how many there were."""
    import torch

    from dit_sparse.cli.source import SampleDefaults, Settings, call_arguments, load, local_folder
    from dit_sparse.inspect import observe_pipeline

    if prompt is None:
        raise UserError("--model needs --prompt")
    folder = local_folder(model)
    defaults = SampleDefaults() if folder is None else SampleDefaults.read(folder)
    settings: dict[str, Any] = Settings(num_inference_steps=steps).over(defaults)
    there = torch.cuda.is_available()
    pipe = load(model, "cuda" if there else "cpu", torch.bfloat16 if there else torch.float32)
    arguments = call_arguments(pipe, prompt, settings)
    count = int(arguments.get("num_inference_steps", 50))
    at = count // 2 if step is None else step
    arguments["output_type"] = "latent"
    at_token: list[int] | None = None
    if token is not None:
        at_token = [int(part) for part in token.split(",") if part.strip().isdecimal()]
        if len(at_token) != 3:
            raise UserError(f"--token {token!r}: wanted FRAME,ROW,COLUMN, e.g. 0,10,20")
    place = None if at_token is None else (at_token[0], at_token[1], at_token[2])
    found: list[HeadView] = []
    for strategy in strategies:
        generator = torch.Generator().manual_seed(seed)
        views, grid = observe_pipeline(
            pipe, strategy, arguments | {"generator": generator}, layer=layer, step=at, token=place
        )
        found += views
    return found, grid, at, count
