# SPDX-License-Identifier: Apache-2.0
"""``dit-sparse methods``: what can be given to ``--strategy``, what can be set, which models."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from textwrap import dedent
from typing import Annotated, Any

import typer
from rich.table import Table

from dit_sparse.cli.console import OUT, Debug, UserError, styled
from dit_sparse.cli.models import show_models

EXAMPLES = (
    "dit-sparse methods",
    "dit-sparse methods radial",
    "dit-sparse methods --models",
    "dit-sparse methods qwen --models --json",
)


def run(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Show only this method; with --models, only classes whose name contains this "
            "text.",
            show_default="all",
        ),
    ] = None,
    models: Annotated[
        bool, typer.Option("--models", help="List the supported transformer classes instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --models: print as JSON.")] = False,
    debug: Debug = False,  # noqa: ARG001  (read by ``guarded``)
) -> None:
    """List the methods with their params, the schedule's settings and the shipped strategies.

    With --models, list which transformer classes of Diffusers are served, and why others are not.
    """
    if models:
        show_models(name, as_json=as_json)
        return
    if as_json:
        raise UserError("--json requires --models: dit-sparse methods --models --json")
    from dit_sparse.methods import METHODS, method_class
    from dit_sparse.strategy.schedule import Schedule

    for method in sorted(METHODS) if name is None else [name]:
        cls: Any = method_class(method)
        OUT.print(styled((method, "bold"), f"  {cls.summary}"))
        about = arguments(cls.__doc__)
        rows = [
            (field.name, _type(field.type), _default(field), about.get(field.name, ""))
            for field in fields(cls)
        ]
        _print(rows, "no params")
    about = arguments(Schedule.__doc__)
    OUT.print(styled(("schedule", "bold"), "  settings for every strategy and method"))
    kinds = {"dense_layers": "list of int"}
    _print(
        [
            (key, kinds.get(key, "int | float"), _value(field.default), about.get(key, ""))
            for key, field in Schedule.model_fields.items()
        ]
    )
    if name is None:
        _strategies()
    OUT.print("Use --set KEY=VALUE to change any of these.", highlight=False)


def arguments(docstring: str | None) -> dict[str, str]:
    """Read what a docstring in Google's form says of each argument."""
    _, _, section = dedent(f"    {docstring or ''}").partition("Args:\n")
    section = re.split(r"\n\s*\n", section, maxsplit=1)[0]
    lines = dedent(section).splitlines()
    found: dict[str, str] = {}
    key = ""
    for line in lines:
        head = re.match(r"(\w+): (.*)", line)
        if head:
            key, found[head[1]] = head[1], head[2]
        elif key:
            found[key] += f" {line.strip()}"
    return found


def _print(rows: list[tuple[str, str, str, str]], empty: str = "") -> None:
    if not rows:
        OUT.print(styled("  ", (empty, "dim"), "\n"))
        return
    table = Table(box=None, padding=(0, 2, 0, 2), header_style="dim")
    for title in ("param", "type", "default"):
        table.add_column(title, no_wrap=title != "type")
    table.add_column("meaning, range", ratio=1)
    for row in rows:
        table.add_row(*row)
    OUT.print(table)
    OUT.print()


def _strategies() -> None:
    from dit_sparse.strategy import Strategy, shipped_names

    OUT.print(styled(("shipped strategies", "bold")))
    table = Table(box=None, padding=(0, 2, 0, 2), header_style="dim")
    for title in ("name", "methods", "for", "source"):
        table.add_column(title, no_wrap=title == "name")
    for name in shipped_names():
        found = Strategy.load(name)
        receipt = found.receipt
        known = "published settings, not measured here" if receipt.published else receipt.source
        if receipt.measured:
            known = "measured: " + ", ".join(f"{k} {v:g}" for k, v in receipt.measured.items())
        table.add_row(
            name,
            ", ".join(sorted({rule.method for rule in found.rules})) or "dense",
            "any model" if found.model is None else ", ".join(found.model.classes),
            known or "unknown",
        )
    OUT.print(table)
    OUT.print()


def _type(annotation: Any) -> str:
    """Write a field's type for people: ``Literal["a", "b"]`` as ``"a" | "b"``."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    text = re.sub(r"Literal\[(.*?)\]", lambda m: m[1].replace(", ", " | "), text)
    return re.sub(r"tuple\[(\w+), \.\.\.\]", r"list of \1", text)


def _default(field: Any) -> str:
    if field.default is not MISSING:
        return _value(field.default)
    return "required" if field.default_factory is MISSING else _value(field.default_factory())


def _value(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
