# SPDX-License-Identifier: Apache-2.0
"""What ``dit-sparse inspect`` does for a picture of one layer's heads."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dit_sparse.cli.console import OUT, UserError, progress

if TYPE_CHECKING:
    from pathlib import Path

    from dit_sparse.cli.lora import Lora
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.inspect import HeadView
    from dit_sparse.strategy import Strategy

GRID = re.compile(r"(\d{1,6})x(\d{1,6})x(\d{1,6})(?:\+(\d{1,6}))?")


@dataclass(frozen=True)
class Asked:
    """What a person asked to see; None: as usual.

    Args:
        model: Folder or Hub id to run.
        prompt: What it is to show.
        grid: FRAMESxHEIGHTxWIDTH[+TEXT], without a model.
        text_first: Text stands before the video.
        heads: Of a layer.
        head_dim: Width of a head, without a model.
        layers: Of the model.
        layer: Which one.
        step: Which one.
        steps: Of the run.
        token: FRAME,ROW,COLUMN of the query to look from.
        seed: Of the noise, or of made-up content.
        size: Pixels and frames of a run, by the pipeline's names.
        bands: Of the map of a model.
        call: Other arguments of the pipeline's call.
        loras: Adapters to merge in.
    """

    model: str | None = None
    prompt: str | None = None
    grid: str | None = None
    text_first: bool = False
    heads: int | None = None
    head_dim: int = 64
    layers: int | None = None
    layer: int = 0
    step: int | None = None
    steps: int | None = None
    token: str | None = None
    seed: int = 0
    size: tuple[int | None, int | None, int | None] = (None, None, None)
    bands: int = 3
    call: dict[str, Any] = field(default_factory=dict)
    loras: tuple[Lora, ...] = ()


def draw_heads(asked: Asked, strategies: list[Strategy], output: Path) -> None:
    """Draw which tokens each head of a layer reads at a step."""
    from dit_sparse.core.video import write_png
    from dit_sparse.inspect import draw_views

    found: list[HeadView] = []
    if asked.model is not None:
        found, where, at, count = _of_model(asked, strategies)
        note = f"{asked.model}, prompt {asked.prompt!r}, seed {asked.seed}"
    else:
        where = read_grid(asked.grid or "", text_first=asked.text_first)
        count = asked.steps or 20
        at = count // 2 if asked.step is None else asked.step
        layers = asked.layers or 40
        if asked.layer >= layers or at >= count:
            raise UserError(
                f"--layer {asked.layer} and --step {at} must be below {layers} layers and "
                f"{count} steps; both count from 0"
            )
        found = _synthetic(asked, strategies, where, layers, at, count)
        note = "synthetic queries and keys: dynamic choices do not represent a model"
    names = ", ".join(each.name for each in strategies)
    if not found:
        raise UserError(
            f"{names}: layer {asked.layer} is dense at step {at} of {count}; choose another "
            "--step or --layer"
        )
    title = f"{names}: layer {asked.layer}, step {at} of {count}, {where} tokens"
    write_png(output, draw_views(found, where, title, note, _token(asked.token, where)))
    for view in found:
        OUT.print(f"head {view.head}: {view.method}, density {view.density:.1%}", highlight=False)
    OUT.print(f"{output}", highlight=False)


def prepare(asked: Asked, steps: int | None = None) -> tuple[Any, dict[str, Any], int]:
    """Load the model; give it, the arguments of its call without noise, and its steps."""
    import torch

    from dit_sparse.cli.source import SampleDefaults, Settings, call_arguments, load, local_folder

    assert asked.model is not None
    if asked.prompt is None:
        raise UserError("--model requires --prompt")
    folder = local_folder(asked.model)
    defaults = SampleDefaults() if folder is None else SampleDefaults.read(folder)
    height, width, frames = asked.size
    settings: dict[str, Any] = Settings(
        height, width, frames, num_inference_steps=asked.steps or steps, call=asked.call
    ).over(defaults)
    there = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if there else ("cpu", torch.float32)
    pipe = load(asked.model, device, dtype, asked.loras)
    pipe.set_progress_bar_config(disable=True)
    arguments = call_arguments(pipe, asked.prompt, settings)
    arguments["output_type"] = "latent"
    return pipe, arguments, int(arguments.get("num_inference_steps", 50))


def seeded(arguments: dict[str, Any], seed: int) -> dict[str, Any]:
    """Add the noise: the same for every run."""
    import torch

    return arguments | {"generator": torch.Generator().manual_seed(seed)}


def read_grid(text: str, *, text_first: bool) -> LatentsGrid:
    """Read FRAMESxHEIGHTxWIDTH[+TEXT]."""
    from dit_sparse.core.grid import MAX_TOKENS, LatentsGrid

    match = GRID.fullmatch(text)
    if match is None:
        raise UserError(
            f"--grid {text!r:.80}: must be FRAMESxHEIGHTxWIDTH[+TEXT], e.g. 21x30x52+256"
        )
    frames, height, width, words = (int(part or 0) for part in match.groups())
    found = LatentsGrid(frames, height, width, words, text_first and words > 0)
    if found.tokens > MAX_TOKENS:
        raise UserError(
            f"--grid {text}: has {found.tokens:,} tokens; the maximum is {MAX_TOKENS:,}"
        )
    return found


def _token(text: str | None, grid: LatentsGrid) -> tuple[int, int, int] | None:
    if text is None:
        return None
    parts = text.split(",")
    size = (grid.frames, grid.height, grid.width)
    if len(parts) != 3 or not all(p.strip().isdecimal() for p in parts):
        raise UserError(f"--token {text!r}: must be FRAME,ROW,COLUMN, e.g. 0,10,20")
    frame, row, column = (int(part) for part in parts)
    if frame >= size[0] or row >= size[1] or column >= size[2]:
        raise UserError(f"--token {text}: outside the grid {grid}; indices count from 0")
    return frame, row, column


def _synthetic(
    asked: Asked,
    strategies: list[Strategy],
    grid: LatentsGrid,
    layers: int,
    step: int,
    num_steps: int,
) -> list[HeadView]:
    """Play one layer of each strategy."""
    from dit_sparse.inspect import observe_synthetic

    found = []
    with progress() as bars:
        for strategy in strategies:
            task = bars.add_task(strategy.name, total=step + 1)
            found += observe_synthetic(
                strategy,
                grid,
                heads=asked.heads or 4,
                head_dim=asked.head_dim,
                num_layers=layers,
                layer=asked.layer,
                step=step,
                num_steps=num_steps,
                token=_token(asked.token, grid),
                seed=asked.seed,
                progress=lambda done, total, task=task: bars.update(  # type: ignore[misc]
                    task, completed=done, total=total
                ),
            )
    return found


def _of_model(
    asked: Asked, strategies: list[Strategy]
) -> tuple[list[HeadView], LatentsGrid, int, int]:
    """Run the pipeline; its views, its grid, the step and how many there were."""
    from dit_sparse.inspect import observe_pipeline

    parts = [] if asked.token is None else asked.token.split(",")
    if asked.token is not None and (
        len(parts) != 3 or not all(part.strip().isdecimal() for part in parts)
    ):
        raise UserError(f"--token {asked.token!r}: must be FRAME,ROW,COLUMN, e.g. 0,10,20")
    place = (int(parts[0]), int(parts[1]), int(parts[2])) if parts else None
    pipe, arguments, count = prepare(asked)
    at = count // 2 if asked.step is None else asked.step
    found: list[HeadView] = []
    for strategy in strategies:
        views, grid = observe_pipeline(
            pipe, strategy, seeded(arguments, asked.seed), layer=asked.layer, step=at, token=place
        )
        found += views
    return found, grid, at, count
