# SPDX-License-Identifier: Apache-2.0
"""``dit-sparse diff``: what two strategies do differently."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_sparse.cli.console import ERR, OUT, Debug, say
from dit_sparse.cli.shape import Shape, load_strategy, shape_of

if TYPE_CHECKING:
    from dit_sparse.profiler.differences import Change

EXAMPLES = (
    "dit-sparse diff mine.json yours.json",
    "dit-sparse diff wan2.1-14b.720p.svg wan2.1-14b.720p.svg2",
    "dit-sparse diff mine.json yours.json --model samples/wan-tiny --json",
)
SHOWN = 60  # rows of the table


def run(
    one: Annotated[
        str,
        typer.Argument(help="A strategy file, shipped strategy, Hub repository or method."),
    ],
    two: Annotated[str, typer.Argument(help="The strategy to compare with.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder, Hub id or known name of the model, used to determine the number of "
            "layers and heads.",
            show_default="inferred from the file",
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Number of layers of the model.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, max=256, help="Number of heads per layer.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            help="Number of steps of a generation; step bands are fractions of it.",
        ),
    ] = None,
    receipt: Annotated[
        bool,
        typer.Option(
            help="Also compare the receipts: how the strategies were found, and what was measured."
        ),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,  # noqa: ARG001  (read by ``guarded``)
) -> None:
    """Say what two strategies do differently, by layer, heads and steps.

    Compared is what they do, not how their rules are split; names and library versions are not
    compared. Exit code: 0 no difference, 1 some, 2 trouble.
    """
    with ERR.status("comparing"):
        from dit_sparse.profiler.differences import about, changes

        (a, a_path), (b, b_path) = load_strategy(one), load_strategy(two)
        shape = shape_of(
            (a, b), model, layers=layers, heads=heads, steps=steps, files=(a_path, b_path)
        )
        told = changes(
            a,
            b,
            layers=shape.layers,
            heads=shape.heads,
            num_steps=shape.num_steps,
            stages=shape.stages,
        )
        parts = ("model", "grid", "receipt") if receipt else ("model", "grid")
        other = about(a, b, parts)
    if as_json:
        OUT.file.write(json.dumps(_plain(one, two, shape, told, other), indent=1) + "\n")
    else:
        _show(one, two, shape, told, other)
        if not shape.known:
            say(f"{shape.layers} layers x {shape.heads} heads: {shape.source}")
    if told or other:
        raise typer.Exit(1)


def _plain(
    one: str, two: str, shape: Shape, told: list[Change], other: list[tuple[str, str, str]]
) -> dict[str, Any]:
    from dataclasses import asdict

    choices = []
    for each in told:
        plain = asdict(each)
        for side in ("one", "other"):
            method, params = plain.pop(side)
            plain["two" if side == "other" else "one"] = {"method": method, "params": params}
        choices.append(plain)
    return {
        "one": one,
        "two": two,
        "same": not told and not other,
        "layers": shape.layers,
        "heads": shape.heads,
        "num_steps": shape.num_steps,
        "layers_and_heads_from": shape.source,
        "about": [{"key": key, "one": a, "two": b} for key, a, b in other],
        "choices": choices,
    }


def _show(
    one: str, two: str, shape: Shape, told: list[Change], other: list[tuple[str, str, str]]
) -> None:
    from rich.table import Table

    from dit_sparse.profiler.differences import ranges

    if not told and not other:
        OUT.print("No difference.")
        return
    if other:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for heading in ("", one, two):
            table.add_column(heading, overflow="fold")
        for key, a, b in other:
            table.add_row(key.replace("_", " "), a, b)
        OUT.print(table)
        OUT.print()
    if not told:
        OUT.print("All heads use the same method and params at every step.")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    staged = len(shape.stages) > 1
    for heading in (*(("stage",) if staged else ()), "layers", "heads", "steps", one, two):
        table.add_column(heading, overflow="fold")
    for each in told[:SHOWN]:
        a, b = _apart(each)
        where = (ranges(each.layers), ranges(each.heads), ranges(each.steps))
        table.add_row(*((each.stage,) if staged else ()), *where, a, b)
    OUT.print(table)
    if len(told) > SHOWN:
        OUT.print(f"... and {len(told) - SHOWN} more rows; use --json to list all")
    count = sum(len(c.layers) * len(c.heads) * len(c.steps) for c in told)
    every = shape.layers * shape.heads * shape.num_steps * len(shape.stages)
    OUT.print(f"{count / every:.1%} of all (head, step) pairs differ", highlight=False)


def _apart(change: Change) -> tuple[str, str]:
    """Write both sides: params that are not as usual; of one method only those that differ."""
    from dit_sparse.methods.params import method_text

    (a_name, a), (b_name, b) = change.one, change.other
    if a_name != b_name:
        return method_text((a_name, a), short=True), method_text((b_name, b), short=True)
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return (
        method_text((a_name, {k: a[k] for k in keys if k in a})),
        method_text((b_name, {k: b[k] for k in keys if k in b})),
    )
