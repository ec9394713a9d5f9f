# SPDX-License-Identifier: Apache-2.0
"""Imports go downwards only: reads every import of the package and fails on an upward arrow."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from dit_sparse.methods import METHODS

ROOT = Path(__file__).parents[1]
PACKAGE = "dit_sparse"
TABLE = "tests/test_layers.py"


class Layer(NamedTuple):
    """Modules of one layer (a folder counts with all that is in it) and the layers right below."""

    modules: tuple[str, ...]
    below: tuple[str, ...]


# A module may import its own layer and all that its arrows lead to. A new module goes into the row
# it belongs to; a new row needs a reason in docs/decisions/.
LAYERS = {
    "cli": Layer(("cli", "__main__"), ("package", "profiler", "distill", "bench", "inspect")),
    "package": Layer(("",), ("apply", "profiler")),  # dit_sparse/__init__.py
    "profiler": Layer(("profiler",), ("apply", "quality", "bench")),
    "distill": Layer(("distill",), ("apply", "video")),
    "quality": Layer(("quality",), ("apply", "video")),
    "bench": Layer(("bench",), ("apply", "doctor")),
    "inspect": Layer(("inspect",), ("profiler",)),  # shows what a search measured
    "doctor": Layer(("doctor",), ("strategy", "backends", "pipelines")),
    "video": Layer(("video",), ("base",)),
    "apply": Layer(("apply", "runtime"), ("engine", "strategy", "pipelines", "forecast")),
    "engine": Layer(
        (
            "engine",
            "compute",
            "describe",
            "run",
            "idle",
            "envelope",
            "guarantee",
            "head_groups",
            "head_share",
            "memory",
        ),
        ("strategy", "pipelines", "report"),
    ),
    "forecast": Layer(("forecast",), ("strategy", "backends", "pipelines")),
    "report": Layer(("report", "probe"), ("ops", "reference")),
    "strategy": Layer(
        ("strategy", "strategy_form", "strategy_io", "hub", "schedule", "profiles", "identity"),
        ("methods",),
    ),
    "pipelines": Layer(("pipelines",), ("grid",)),  # an adapter never sees a method
    "methods": Layer(("methods",), ("call",)),  # a method never sees a kernel
    "ops": Layer(("ops",), ("backends", "call")),
    "backends": Layer(("backends", "canary"), ("kernels", "reference")),
    "kernels": Layer(("kernels",), ("plan",)),  # a kernel never sees a model
    "reference": Layer(("kernels.reference",), ("plan",)),  # shares no arithmetic with a kernel
    "call": Layer(("call", "traits"), ("plan",)),
    "plan": Layer(("plan", "plan_io", "tiles", "nbytes"), ("grid",)),
    "grid": Layer(("grid", "synthetic"), ("base",)),
    "base": Layer(("errors", "prompts", "reading", "machine", "core", "_version"), ()),
}

# Who may import what is not ours; anyone, where a name is not here.
OUTSIDE = {
    "diffusers": {"pipelines", "cli", "distill"},  # distill loads the pipeline it trains
    "triton": {"kernels"},
    "typer": {"cli"},
    # The links at the repository's top: a file imported through one is there twice.
    "kernels": set(),
    "pipelines": set(),
    "profiles": set(),
}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
READS_ENVIRONMENT = {"cli"}


def layer_of(module: str) -> str | None:
    """Name the layer of ``module`` (dotted, below the package), the longest row that fits."""
    fits = {
        len(prefix): name
        for name, layer in LAYERS.items()
        for prefix in layer.modules
        if module == prefix or (prefix and module.startswith(f"{prefix}."))
    }
    return fits[max(fits)] if fits else None


def reach(name: str) -> set[str]:
    """All layers that ``name`` may import, itself included."""
    return {name}.union(*(reach(below) for below in LAYERS[name].below))


def imports(tree: ast.Module, module: str, *, is_package: bool) -> list[tuple[int, str, str]]:
    """List (line, module, name or '') of every import, those inside functions included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = [PACKAGE, *filter(None, module.split("."))]
                up = parts[: len(parts) - node.level + is_package]
                base = ".".join([*up, *filter(None, [base])])
            found += [(node.lineno, base, alias.name) for alias in node.names]
    return found


def reads_environment(tree: ast.Module) -> list[int]:
    """Lines that read the environment by way of ``os``."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if (
            isinstance(node, ast.Attribute)
            and node.attr in ENVIRONMENT
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
        )
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and any(alias.name in ENVIRONMENT for alias in node.names)
        )
    ]


def violations(package: Path) -> list[str]:
    """Say, a line each, which file of the package imports what it may not."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    folders = {".".join(m.split(".")[:-1]) for m in files}
    found = []
    for module, path in files.items():
        where = path.relative_to(package.parent).as_posix()
        own = layer_of(module)
        if own is None:
            found.append(f"{where} is in no layer: add '{module}' to a row of LAYERS ({TABLE})")
            continue
        allowed = reach(own)
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        is_package = path.name == "__init__.py"
        for line, base, name in imports(tree, module, is_package=is_package):
            top, _, rest = base.partition(".")
            if top != PACKAGE:
                if own not in OUTSIDE.get(top, {own}):
                    only = ", ".join(sorted(OUTSIDE[top])) or "nobody"
                    found.append(f"{where}:{line} imports {top}, which only these may: {only}")
                continue
            inner = f"{rest}.{name}".strip(".")  # `from dit_sparse.methods import radial`
            target = inner if inner in files or inner in folders else rest
            layer = layer_of(target)
            if layer is None and target not in files:
                found.append(f"{where}:{line} imports {base}, in no layer of LAYERS ({TABLE})")
            elif layer is not None and layer not in allowed:
                found.append(
                    f"{where}:{line} imports {f'{PACKAGE}.{target}'.strip('.')} ({layer}): "
                    f"{own} may import {', '.join(sorted(allowed))}"
                )
        if own not in READS_ENVIRONMENT:
            found += [
                f"{where}:{line} reads the environment: only cli.py does, pass the value down"
                for line in reads_environment(tree)
            ]
    return list(dict.fromkeys(found))  # `from x import a, b` is one arrow


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root / PACKAGE


def test_imports_go_downwards():
    found = violations(ROOT / PACKAGE)
    assert not found, "\n".join(found)


def test_only_their_own_folder_knows_methods_by_name():
    names = set(METHODS) - {"dense"}  # what every program compares with
    found = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        if path.is_relative_to(ROOT / PACKAGE / "methods"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Constant) and node.value in names
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if named or module in {f"{PACKAGE}.methods.{name}" for name in names}:
                found.append(f"{path.relative_to(ROOT).as_posix()}:{node.lineno}")
    # The metrics of another repository, which is called as its method.
    assert {line.partition(":")[0] for line in found} <= {"dit_sparse/quality/catalogue.py"}, found


def test_the_table_has_no_circle():
    TopologicalSorter({name: layer.below for name, layer in LAYERS.items()}).prepare()


@pytest.mark.parametrize(
    ("module", "text", "words"),
    [
        ("methods/radial.py", "from dit_sparse.kernels.cpu import attend", "methods may import"),
        ("methods/radial.py", "from dit_sparse import apply", "dit_sparse.apply (apply)"),
        ("methods/radial.py", "import dit_sparse", "imports dit_sparse (package)"),
        ("methods/radial.py", "from ..kernels import cpu", "dit_sparse.kernels.cpu (kernels)"),
        ("methods/radial.py", "def f():\n    import dit_sparse.backends", "radial.py:2"),
        ("methods/__init__.py", "from ..backends import pick", "(backends)"),
        ("pipelines/wan.py", "from dit_sparse.methods import radial", "(methods)"),
        ("kernels/cpu.py", "from dit_sparse.kernels import reference", "(reference)"),
        ("kernels/cpu.py", "from dit_sparse.pipelines import wan", "(pipelines)"),
        ("plan.py", "from dit_sparse.call import AttentionCall", "plan may import"),
        ("strategy.py", "import dit_sparse.profiler.search", "(profiler)"),
        ("apply.py", "from dit_sparse.nowhere import x", "in no layer"),
        ("apply.py", "from diffusers import WanPipeline", "imports diffusers"),
        ("backends.py", "import triton.language as tl", "imports triton"),
        ("apply.py", "from kernels import cpu", "imports kernels, which only these may: nobody"),
        ("apply.py", "import os\nos.environ['X']", "apply.py:2 reads the environment"),
        ("apply.py", "from os import getenv", "reads the environment"),
        ("helpers.py", "", "add 'helpers' to a row of LAYERS"),
    ],
)
def test_an_upward_arrow_is_found(tmp_path, module, text, words):
    below = {"apply.py": "", "backends.py": "", "kernels/cpu.py": "", "kernels/reference.py": ""}
    below |= {"methods/radial.py": "", "pipelines/wan.py": ""}
    (found,) = violations(write(tmp_path, {**below, module: text}))
    assert words in found


def test_downward_arrows_pass(tmp_path):
    files = {
        "__init__.py": "from dit_sparse.apply import enable\nfrom dit_sparse._version import v",
        "cli.py": "import os\nfrom dit_sparse import plan\nos.environ['X']\nimport diffusers",
        "apply.py": "from dit_sparse.methods.radial import Radial\nimport dit_sparse.pipelines",
        "plan.py": "import os\nfrom .grid import LatentsGrid\nos.fspath('x')",
        "grid.py": "from .errors import GeometryError",
        "errors.py": "",
        "methods/radial.py": "from dit_sparse import plan\nfrom .shared import bands",
        "methods/shared.py": "from ..plan import BlockPlan",
        "kernels/triton_fwd.py": "import triton\nfrom dit_sparse.kernels import cpu",
        "kernels/cpu.py": "from dit_sparse.plan import BlockPlan",
        "pipelines/__init__.py": "from diffusers import WanPipeline\nfrom . import wan",
        "pipelines/wan.py": "from dit_sparse.grid import LatentsGrid",
    }
    assert violations(write(tmp_path, files)) == []
