# SPDX-License-Identifier: Apache-2.0
"""The floors of the package, and every import in it: ``python -m tests.floors`` prints them."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = "dit_sparse"

# A folder may import any folder of a lower floor.
FLOORS = (
    ("core",),
    ("methods", "kernels", "pipelines"),
    ("strategy", "attach"),
    ("bench", "forecast", "profiler", "inspect", "quality", "distill"),
    ("cli",),
)
# And these of its own floor: docs/decisions/0005-floors.md has the reasons.
ASIDE = {
    "attach": {"strategy"},
    "profiler": {"bench", "forecast"},
    "inspect": {"forecast", "profiler"},
    "distill": {"forecast"},
}
# Beside the folders: what everything may import, and what may import everything.
GROUND = {"errors", "_version"}
FACE = {"", "__main__"}


class Arrow(NamedTuple):
    """One import: of ``target`` (a module of the package, dotted; "" is the package itself)."""

    module: str
    line: int
    target: str


class Import(NamedTuple):
    """One imported name; ``name`` is "" where a whole module is."""

    line: int
    base: str
    name: str


@cache  # the package is read once
def modules(package: Path) -> dict[str, Path]:
    """Name every module of the package, dotted, without the package's own name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.Module, module: str, *, is_package: bool) -> list[Import]:
    """List every import, those inside functions and under TYPE_CHECKING included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = [PACKAGE, *filter(None, module.split("."))]
                up = parts[: len(parts) - node.level + is_package]
                base = ".".join([*up, *filter(None, [base])])
            found += [Import(node.lineno, base, alias.name) for alias in node.names]
    return found


@cache
def arrows(package: Path) -> list[Arrow]:
    """List the imports of the package's own modules."""
    files = modules(package)
    folders = {".".join(module.split(".")[:-1]) for module in files}
    found = []
    for module, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for each in imports(tree, module, is_package=path.name == "__init__.py"):
            top, _, rest = each.base.partition(".")
            if top == PACKAGE:
                inner = f"{rest}.{each.name}".strip(".")  # from dit_sparse.methods import radial
                is_module = inner in files or inner in folders
                found.append(Arrow(module, each.line, inner if is_module else rest))
    return found


def folder(module: str) -> str:
    """Give the folder that a module is in, or its own name beside them."""
    return module.partition(".")[0]


def floor(name: str) -> int | None:
    """Give the floor of a folder, from 0; None: it is on none."""
    return next((i for i, names in enumerate(FLOORS) if name in names), None)


def allowed(name: str) -> set[str]:
    """Give what a folder may import, itself included."""
    if name in GROUND:
        return GROUND
    if name in FACE:
        return GROUND | {each for names in FLOORS for each in names}
    number = floor(name)
    below = {each for names in FLOORS[:number] for each in names}
    return GROUND | below | {name} | ASIDE.get(name, set())


def table() -> str:
    """Write floors, folders and what each folder imports, as Markdown."""
    used: dict[str, set[str]] = defaultdict(set)
    sizes: dict[str, int] = defaultdict(int)
    files = modules(ROOT / PACKAGE)
    for module, path in files.items():
        sizes[folder(module)] += len(path.read_text(encoding="utf-8").splitlines())
    for arrow in arrows(ROOT / PACKAGE):
        used[folder(arrow.module)].add(folder(arrow.target))
    lines = ["| floor | folder | files | lines | imports |", "|---|---|---|---|---|"]
    for number in reversed(range(len(FLOORS))):
        for name in FLOORS[number]:
            count = sum(folder(module) == name for module in files)
            seen = sorted(used[name] - {name} - GROUND)
            seen.sort(key=lambda each: -(floor(each) or 0))
            lines.append(f"| {number} | {name} | {count} | {sizes[name]:,} | {', '.join(seen)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
