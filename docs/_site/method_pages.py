# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: INP001  (scripts of the documentation, no package)
"""The page of a method: its docstring, a picture of a real plan, its params, what was measured.

A page in ``docs/methods`` says when to use the method; the rest is appended to it here, so that it
cannot grow old. A method without such a page gets one all the same.
"""

from __future__ import annotations

import inspect
import json
import re
import statistics
from dataclasses import fields
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

from tables import code, markdown, prose, size, table

from dit_sparse.cli.methods import _default, _type, arguments
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.inspect import draw_views, observe_synthetic
from dit_sparse.inspect.observe import observe_static
from dit_sparse.methods import METHODS, method_class
from dit_sparse.strategy import Strategy, shipped_names

if TYPE_CHECKING:
    from pathlib import Path

GRID = LatentsGrid(6, 8, 12)  # small, as every build draws all methods anew
LAYER, STEP, STEPS = 1, 4, 8  # behind every method's search


def generated(name: str, data: Path) -> str:
    """Write all of a method's page that code and data know.

    Args:
        name: From the table of methods.
        data: Folder of the committed benchmark data.
    """
    cls: Any = method_class(name)
    parts = [
        f"## What it does\n\n{prose(cls.__doc__)}\n\n{_source(cls)}",
        _picture_text(name),
        (
            f"## Parameters\n\n{params_table(name)}\n"
            "The [schedule](../how-to/strategies.md#the-schedule) (dense first and last steps, "
            "dense layers) comes on top, for every method alike."
        ),
        _shipped(name),
        _measured(name, data),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def params_table(name: str) -> str:
    """List the fields of the method's dataclass: name, type, default, what its docstring says."""
    cls: Any = method_class(name)
    about = arguments(cls.__doc__)
    rows = [
        (
            f"`{field.name}`",
            code(_type(field.type)),
            f"`{_default(field)}`",
            markdown(about.get(field.name, "")),
        )
        for field in fields(cls)
    ]
    if not rows:
        return "It has none.\n"
    return table(("param", "type", "default", "meaning, range"), rows)


def picture(name: str, grid: LatentsGrid = GRID) -> bytes | None:
    """Draw what heads keep, from a real plan; None where it is everything.

    Methods that read the content get made-up queries and keys, whose scores fall with distance.
    """
    strategy = Strategy.single(name, **method_class(name).example)
    views = observe_static(name, strategy.rules[0].params, grid, 2)
    note = "by geometry alone"
    if views is None:
        note = "synthetic queries and keys: dynamic choices do not represent a model"
        views = observe_synthetic(
            strategy, grid, heads=2, head_dim=64, num_layers=4, layer=LAYER, step=STEP,
            num_steps=STEPS,
        )  # fmt: skip
    views = [view for view in views if view.method != "dense"]
    if not views:
        return None
    params = ", ".join(f"{key}={value}" for key, value in method_class(name).example.items())
    file = BytesIO()
    title = f"{name}({params}) on {grid} tokens"
    draw_views(views, grid, title, note).save(file, "PNG", optimize=True)
    return file.getvalue()


def _picture_text(name: str) -> str:
    if name == "dense":
        return ""
    return (
        f"![what two heads keep by {name}](pictures/{name}.png)\n\n"
        "Left the whole map, queries down and keys across; right what one token (red) reads. Blue "
        "is computed. Drawn when this page was built, from the plan that the method makes for a "
        "small grid; params in the title, defaults for the rest."
    )


def _source(cls: Any) -> str:
    module = inspect.getmodule(cls)
    text = prose(module.__doc__ if module is not None else "")
    found = re.search(r"Source: .*?(?=\n\n|\Z)", text, re.DOTALL)
    source = found[0] if found else markdown(cls.summary)
    return f"{source}\n\nCode: `{str(cls.__module__).replace('.', '/')}.py`."


def _shipped(name: str) -> str:
    rows = []
    for shipped in shipped_names():
        strategy = Strategy.load(shipped)
        if name in {rule.method for rule in strategy.rules}:
            receipt = strategy.receipt
            known = "published, not measured here" if receipt.published else receipt.source
            rows.append((f"`{shipped}`", known or "", markdown(receipt.note or "")))
    if not rows:
        return ""
    return "## Shipped strategies\n\n" + table(("name", "known by", "note"), rows)


@cache
def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _measured(name: str, data: Path) -> str:
    lines = []
    for path in sorted(data.glob("fidelity/*.json")):
        found = _json(path)
        for density in found["densities"]:
            pairs = found["arms"].get(f"{name}-{density * 100:.0f}", [])
            if pairs:
                psnr = [pair["psnr"] for pair in pairs]
                lines.append(
                    f"- **Fidelity** on `{found['model']}` at density {density:g}: PSNR to the "
                    f"dense clip {statistics.median(psnr):.1f} dB (median of {len(psnr)} pairs, "
                    f"worst {min(psnr):.1f}), density as measured "
                    f"{statistics.mean(pair['density'] for pair in pairs):.3f}. "
                    "[All methods](../benchmarks/fidelity.md)"
                )
    for path in sorted(data.glob("methods-*.json")):
        for row in _json(path)["methods"]:
            if row["method"] == name:
                params = "".join(f", `{key}={value}`" for key, value in row["params"].items())
                lines.append(
                    f"- **Planning** on a CPU, {row['shape']['name']}{params}, density "
                    f"{row['density']:.0%}: {row['planning_share']:.1%} of one dense attention; "
                    f"efficiency with planning {row['efficiency']:.2f}. "
                    "[All methods](../benchmarks/methods.md)"
                )
    for path in sorted(data.glob("memory-*.json")):
        found = _json(path)
        for row in found["methods"]:
            if row["method"] == name:
                state = size(row["state_bytes"]) or "nothing"
                shared = size(row["shared_bytes"]) or "nothing"
                lines.append(
                    f"- **Memory**, {found['title']}: {state} a layer, {shared} shared by all. "
                    "[All methods](../benchmarks/memory.md)"
                )
    return "## What was measured\n\n" + "\n".join(lines) if lines else ""


def names() -> list[str]:
    """List the methods, dense last."""
    return [*sorted(set(METHODS) - {"dense"}), "dense"]
