# SPDX-License-Identifier: Apache-2.0
"""What ``dit-sparse inspect`` does for the map of a strategy or of a model."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_sparse.cli.console import OUT, UserError, progress, say
from dit_sparse.cli.inspect_heads import Asked, prepare, read_grid, seeded
from dit_sparse.cli.shape import Shape, shape_of
from dit_sparse.errors import DitSparseError

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.inspect import Atlas
    from dit_sparse.profiler.stored import Stored
    from dit_sparse.strategy import Strategy

USUAL_PROMPT = "a big red circle moving right over a gray plain background"
LARGEST_PAGE = 5_000_000  # bytes; candidates of a huge model are left out above it


def draw_strategy(asked: Asked, strategy: Strategy, path: Path, output: Path) -> None:
    """Map a strategy: who does what, what is known of it, and what it keeps."""
    from dit_sparse.forecast.counted import grid_of
    from dit_sparse.inspect import layout_of, strategy_atlas
    from dit_sparse.inspect.fill import draw_attention, draw_choices, draw_run

    if asked.model is not None and asked.prompt is None:
        raise UserError("--model requires --prompt")
    where = None if asked.grid is None else read_grid(asked.grid, text_first=asked.text_first)
    stored, trouble = _stored(strategy, path)
    shape = shape_of(
        (strategy,),
        asked.model,
        layers=asked.layers,
        heads=asked.heads,
        steps=asked.steps or (None if stored is None else stored.num_steps),
        files=(path,),
    )
    if stored is not None and (shape.layers, shape.heads) != (stored.layers, stored.heads):
        size = f"{stored.layers} layers x {stored.heads} heads"
        trouble = f"{stored.folder.name} is not used: it was measured for {size}"
        stored = None
    layout = layout_of(
        strategy,
        layers=shape.layers,
        heads=shape.heads,
        num_steps=shape.num_steps,
        stages=shape.stages,
        stored=stored,
    )
    with progress() as bars:
        shown = _Shown(bars)
        atlas = strategy_atlas(strategy, layout, stored)
        _describe(atlas, strategy, shape, stored, trouble)
        if where is not None or strategy.grid is not None:
            grid = grid_of(strategy) if where is None else where
            draw_choices(atlas, grid, made_up=where is not None, progress=shown)
        else:
            _no_grid(atlas)
        if asked.model is not None:
            pipe, arguments, _ = prepare(asked, steps=shape.num_steps)
            ran = draw_attention(atlas, pipe, seeded(arguments, asked.seed), shown)
            draw_run(atlas, pipe, strategy, seeded(arguments, asked.seed), shown)
            _of_run(atlas, asked, ran, strategy)
    _finish(atlas, output, strategy.name)


def draw_model(asked: Asked, output: Path) -> None:
    """Map what a model looks at by itself, dense."""
    from dit_sparse.inspect.atlas import Layout
    from dit_sparse.inspect.fill import draw_attention, equal_bands, model_atlas

    assert asked.model is not None
    usual = asked.prompt is None
    name = Path(asked.model).name
    asked = replace(asked, prompt=asked.prompt or USUAL_PROMPT)
    shape = shape_of((), asked.model, steps=asked.steps)
    pipe, arguments, count = prepare(asked)
    stages = tuple(
        name for name in ("transformer", "transformer_2") if getattr(pipe, name, None) is not None
    )
    layout = Layout(stages, equal_bands(asked.bands, count), shape.layers, shape.heads)
    atlas = model_atlas(f"{name}: where its heads attend", layout)
    with progress() as bars:
        ran = draw_attention(atlas, pipe, seeded(arguments, asked.seed), _Shown(bars))
    _of_run(atlas, asked, ran, None)
    if usual:
        atlas.notes.append("The prompt is built in; use --prompt to change it.")
    atlas.notes.append(
        "One prompt, one seed and one step per band: an illustration, not a measurement."
    )
    _finish(atlas, output, name)


def _stored(strategy: Strategy, path: Path) -> tuple[Stored | None, str]:
    """Read the measurements beside a file, or say why they are not used."""
    from dit_sparse.profiler.stored import beside, fits, read_stored

    folder = beside(path)
    try:
        stored = read_stored(folder)
    except DitSparseError as error:
        return None, str(error)
    if stored is None:
        return None, ""
    if (why := fits(stored, strategy)) is not None:
        return None, f"{folder.name} is not used: {why}"
    return stored, ""


def _describe(
    atlas: Atlas, strategy: Strategy, shape: Shape, stored: Stored | None, trouble: str
) -> None:
    """Say what the strategy is for, how it was found, and what is not known."""
    model = "any model" if strategy.model is None else ", ".join(strategy.model.classes)
    grid = strategy.grid
    size = "any size"
    if grid is not None:
        text = f" + {grid.text} text" if grid.text else ""
        size = f"made for {grid.frames} x {grid.height} x {grid.width}{text} tokens"
    atlas.lines.append(f"for {model}, {size}")
    atlas.lines.append(
        f"{shape.layers} layers x {shape.heads} heads, {shape.num_steps} steps: {shape.source}"
    )
    receipt = strategy.receipt
    if receipt.published:
        atlas.notes.append(
            "Published settings, not measured here: error and time saved are unknown."
        )
    if not shape.known:
        atlas.notes.append(f"Layers and heads: {shape.source}.")
    if trouble:
        atlas.notes.append(trouble)
        say(trouble)
    elif stored is None and not receipt.published:
        atlas.notes.append(
            "There are no measurements next to the file (profile stores them in "
            "<name>.measured), so errors and times of individual heads are unknown."
        )
    facts = receipt.model_dump(mode="json")
    measured = facts.pop("measured")
    atlas.facts += [(key.replace("_", " "), f"{value:g}") for key, value in measured.items()]
    for key, value in facts.items():
        told = _plain(value)
        if told and key != "published":
            atlas.facts.append((key, told))
    schedule = strategy.schedule.model_dump(mode="json")
    told = ", ".join(f"{k.replace('_', ' ')} {_plain(v) or 'none'}" for k, v in schedule.items())
    atlas.facts.append(("schedule", told))


def _of_run(atlas: Atlas, asked: Asked, grid: LatentsGrid, strategy: Strategy | None) -> None:
    model = Path(asked.model or "")
    name = model.name if model.is_dir() else asked.model  # a page tells no folders
    atlas.facts.append(("observed run", f"{name}, prompt {asked.prompt!r}, seed {asked.seed}"))
    atlas.facts.append(("tokens of the observed run", str(grid)))
    if strategy is None:
        atlas.lines.append(
            f"{grid} tokens, {atlas.layout.layers} layers x {atlas.layout.heads} heads, "
            f"{atlas.layout.bands[-1].of} steps"
        )
        return
    made = strategy.grid
    sides = (grid.frames, grid.height, grid.width)
    if made is not None and (made.frames, made.height, made.width) != sides:
        atlas.notes.append(
            f"The pictures show a run at {grid} tokens; the strategy was made for {made.frames} "
            f"x {made.height} x {made.width}."
        )


def _no_grid(atlas: Atlas) -> None:
    for choice in atlas.choices:
        choice.why = choice.why or "the strategy has no grid; set --grid or --model"


def _finish(atlas: Atlas, output: Path, name: str) -> None:
    """Write what was asked for, whole or not at all, and say where."""
    from dit_sparse.core.video import write_png
    from dit_sparse.inspect import draw_poster, page
    from dit_sparse.strategy.files import write_text

    if atlas.pictures.left_out:
        atlas.notes.append(
            f"{atlas.pictures.left_out} pictures were omitted to limit the page size."
        )
    poster = draw_poster(atlas)
    name = re.sub(r"[^\w.+ -]", "_", name).lstrip(".")[:100] or "map"  # of others: no path
    folder = output.suffix == "" or output.is_dir()
    if folder:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"-o {output}: cannot be created as a folder: {error.strerror}"
            ) from error
    made = []
    if folder or output.suffix.lower() == ".html":
        path = output / f"{name}.html" if folder else output
        text = page(atlas, _address(poster))
        if len(text.encode()) > LARGEST_PAGE and atlas.candidates is not None:
            atlas.candidates = None
            atlas.notes.append("The tables of candidates were omitted to limit the page size.")
            text = page(atlas, _address(poster))
        write_text(path, text)
        made.append(path)
    if folder or output.suffix.lower() == ".png":
        path = output / f"{name}.png" if folder else output
        try:
            write_png(path, poster)
        except OSError as error:
            raise UserError(f"-o {path}: cannot be written: {error.strerror or error}") from error
        made.append(path)
    for note in atlas.notes:
        say(note)
    for path in made:
        OUT.print(str(path), highlight=False, soft_wrap=True)


def _address(picture: Any) -> str:
    data = io.BytesIO()
    picture.quantize(64).save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return "" if value is None else str(value)


class _Shown:
    """Feeds the bars: one for each kind of work."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)
