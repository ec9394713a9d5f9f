# SPDX-License-Identifier: Apache-2.0
"""Put pictures into a map: what choices keep, and what heads look at."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dit_sparse.inspect.atlas import Atlas, Band, Choice, Layout, Quantity
from dit_sparse.inspect.mass import SHARES, attention_mass
from dit_sparse.inspect.observe import observe_run, observe_static, observe_synthetic
from dit_sparse.inspect.pictures import kept_picture, map_side, mass_picture, seen_picture
from dit_sparse.inspect.view import views_of
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.methods.params import build_method
from dit_sparse.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Callable

    from dit_sparse.core.call import AttentionCall
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.core.plan import BlockPlan
    from dit_sparse.inspect.view import HeadView

    Progress = Callable[[str, int, int], None]

SYNTHETIC = 4096  # tokens up to which content is made up where there is no model
PLAYED, PLAYED_STEPS = 4, 6  # step and steps of a made-up run: behind every method's search
BY_CONTENT = "its choices depend on the content; use --model and --prompt to show a run"


def draw_choices(
    atlas: Atlas, grid: LatentsGrid, *, made_up: bool = False, progress: Progress | None = None
) -> None:
    """Draw what each choice keeps on a grid: static ones exactly, the others on made-up content.

    Args:
        atlas: Of a strategy.
        grid: Where the tokens stand.
        made_up: Draw methods that choose by content on synthetic queries and keys at any size;
            otherwise only up to ``SYNTHETIC`` tokens.
        progress: Called with (what, done, total).
    """
    layout, side = atlas.layout, map_side(grid.tokens)
    for number, choice in enumerate(atlas.choices):
        if choice.method == "dense":
            continue
        views = observe_static(choice.method, choice.params, grid, layout.heads, side)
        if views is not None:
            inner = build_method(choice.method, choice.params).inner
            mask = "" if inner is None else "its mask between refreshes, "
            choice.why = f"{mask}on {grid} tokens"
        elif made_up or grid.tokens <= SYNTHETIC:
            views = _played(choice, grid)
            choice.why = f"on {grid} tokens of synthetic queries and keys, not from a model"
        if not views:
            choice.why = choice.why or BY_CONTENT
        elif len(views) == 1:
            choice.kept = atlas.pictures.add(kept_picture(views[0].kept_map))
            choice.seen = atlas.pictures.add(seen_picture(views[0].seen))
        else:
            _by_head(atlas, number, views)
        if progress is not None:
            progress("drawing", number + 1, len(atlas.choices))


def draw_attention(
    atlas: Atlas, pipe: Any, arguments: dict[str, Any], progress: Progress | None = None
) -> LatentsGrid:
    """Run a pipeline dense and keep what heads look at amid each band; give the grid."""
    layout = atlas.layout
    names = {0.125: "eighth", 0.25: "quarter", 0.5: "half"}
    note = "Softmax mass of blocks of 64 tokens, exact, dense inputs, mean over query blocks."
    quantities = [
        Quantity(f"top{share:g}", f"mass in the heaviest {names[share]}",
                 [None] * layout.spots, "high", note, share=True)
        for share in SHARES
    ]  # fmt: skip
    text = Quantity("text", "mass on text", [None] * layout.spots, "", note, share=True)
    ops = Backends()
    seen = [0]
    where: list[LatentsGrid] = []

    def look(call: AttentionCall, plan: BlockPlan | None, method: str) -> None:  # noqa: ARG001
        where[:] = [call.grid]
        for head, mass in enumerate(attention_mass(call, ops)):
            spot = layout.spot(call.stage, layout.band_of(call.step), call.layer, head)
            number = atlas.pictures.add(mass_picture(mass.map))
            if number is not None:
                atlas.attention[spot] = number
            for quantity, value in zip(quantities, mass.heaviest, strict=True):
                quantity.values[spot] = float(f"{value:.4g}")
            text.values[spot] = None if mass.text is None else float(f"{mass.text:.4g}")
        seen[0] += 1
        if progress is not None:
            progress("attention", seen[0], layout.layers * len(layout.bands))

    observe_run(pipe, Strategy.single("dense"), arguments, _steps(layout), look)
    atlas.quantities += quantities
    if any(value is not None for value in text.values):
        atlas.quantities.append(text)
    return where[0]


def draw_run(
    atlas: Atlas,
    pipe: Any,
    strategy: Strategy,
    arguments: dict[str, Any],
    progress: Progress | None = None,
) -> LatentsGrid:
    """Run a pipeline with a strategy and keep what every sparse head kept; give the grid."""
    layout = atlas.layout
    seen: set[tuple[str, int, int]] = set()
    where: list[LatentsGrid] = []

    def look(call: AttentionCall, plan: BlockPlan | None, method: str) -> None:
        where[:] = [call.grid]
        seen.add((call.stage, call.layer, call.step))
        if plan is None:
            return
        for view in views_of(plan, call.heads, method, call.grid, side=map_side(call.grid.tokens)):
            spot = layout.spot(call.stage, layout.band_of(call.step), call.layer, view.head)
            for shelf, picture in ((atlas.kept, kept_picture(view.kept_map)),
                                   (atlas.seen, seen_picture(view.seen))):  # fmt: skip
                number = atlas.pictures.add(picture)
                if number is not None:
                    shelf[spot] = number
        if progress is not None:
            progress("kept blocks", len(seen), layout.layers * len(layout.bands))

    observe_run(pipe, strategy, arguments, _steps(layout), look)
    return where[0]


def model_atlas(title: str, layout: Layout) -> Atlas:
    """Begin the map of a model that nothing was chosen for."""
    return Atlas(title, [], layout)


def equal_bands(count: int, num_steps: int) -> tuple[Band, ...]:
    """Cut a run into bands of about equal length, none of them empty."""
    count = min(count, num_steps)
    edges = [i * num_steps // count for i in range(count + 1)]
    return tuple(Band(a, b, num_steps) for a, b in pairwise(edges))


def _steps(layout: Layout) -> set[int]:
    """Take the middle of each band."""
    return {(band.start + band.stop) // 2 if band.stop - band.start > 1 else band.start
            for band in layout.bands}  # fmt: skip


def _played(choice: Choice, grid: LatentsGrid) -> list[HeadView]:
    return observe_synthetic(
        Strategy.single(choice.method, **choice.params),
        grid,
        heads=1,
        head_dim=64,
        num_layers=1,
        step=PLAYED,
        num_steps=PLAYED_STEPS,
        side=map_side(grid.tokens),
    )


def _by_head(atlas: Atlas, number: int, views: list[HeadView]) -> None:
    """Heads of one choice keep different blocks (a list of patterns)."""
    density = next(q for q in atlas.quantities if q.key == "density")
    pictures = [(kept_picture(v.kept_map), seen_picture(v.seen)) for v in views]
    for spot, chosen in enumerate(atlas.choice_of):
        if chosen != number:
            continue
        if atlas.candidates is None:
            density.values[spot] = views[spot % atlas.layout.heads].density
        for shelf, picture in zip(
            (atlas.kept, atlas.seen), pictures[spot % atlas.layout.heads], strict=True
        ):
            added = atlas.pictures.add(picture)
            if added is not None:
                shelf[spot] = added
