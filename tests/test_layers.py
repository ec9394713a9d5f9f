# SPDX-License-Identifier: Apache-2.0
"""Imports go downwards only: every import of the package is held against ``tests/floors.py``."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from dit_sparse.methods import METHODS
from tests.floors import (
    ASIDE,
    FACE,
    FLOORS,
    GROUND,
    PACKAGE,
    ROOT,
    allowed,
    arrows,
    floor,
    folder,
    imports,
    modules,
)

TABLE = "tests/floors.py"
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
# The reference shares no arithmetic with a kernel, and a kernel does not know that others exist.
CHOOSERS = {"kernels.dispatch", "kernels.canary"}


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
    files = modules(package)
    found = []
    for module, path in files.items():
        where = path.relative_to(package.parent).as_posix()
        own = folder(module)
        if own not in GROUND | FACE and floor(own) is None:
            found.append(f"{where} is on no floor: move it into a folder of FLOORS ({TABLE})")
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for line, base, _ in imports(tree, module, is_package=path.name == "__init__.py"):
            top = base.partition(".")[0]
            if own not in OUTSIDE.get(top, {own}):
                only = ", ".join(sorted(OUTSIDE[top])) or "nobody"
                found.append(f"{where}:{line} imports {top}, which only these may: {only}")
        if own not in READS_ENVIRONMENT:
            found += [
                f"{where}:{line} reads the environment: only cli/ does, pass the value down"
                for line in reads_environment(tree)
            ]
    for module, line, target in arrows(package):
        own, other = folder(module), folder(target)
        where = f"{files[module].relative_to(package.parent).as_posix()}:{line}"
        named = f"{PACKAGE}.{target}".strip(".")
        if other not in GROUND | FACE and floor(other) is None:
            found.append(f"{where} imports {named}, which is on no floor ({TABLE})")
        elif own not in FACE and other not in allowed(own):
            found.append(f"{where} imports {named}: {own} may import {_names(own)}")
        elif own == "kernels" and module not in CHOOSERS and target in CHOOSERS:
            found.append(f"{where} imports {named}: a kernel knows no other")
        elif own == "kernels" and module not in CHOOSERS and target == "kernels.reference":
            found.append(f"{where} imports {named}: a kernel shares nothing with its reference")
    return list(dict.fromkeys(found))  # `from x import a, b` is one arrow


def _names(own: str) -> str:
    return ", ".join(sorted(allowed(own)))


def circle(package: Path) -> list[str]:
    """Give modules that import each other in a circle, if there are any."""
    below = defaultdict(set)
    for module, _, target in arrows(package):
        if module != target:
            below[module].add(target)
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root / PACKAGE


def test_a_newcomer_finds_every_folder():
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for number, names in enumerate(FLOORS):
        for name in names:
            assert f"| {number} | `{name}/` |" in text


def test_imports_go_downwards():
    found = violations(ROOT / PACKAGE)
    assert not found, "\n".join(found)


def test_no_circle():
    assert not circle(ROOT / PACKAGE)


@pytest.mark.parametrize("where", ["", "def f():\n    ", "if TYPE_CHECKING:\n    "])
def test_a_circle_is_found_wherever_it_stands(tmp_path, where):
    files = {
        "core/a.py": "from dit_sparse.core.b import x",
        "core/b.py": f"{where}from dit_sparse.core.c import x",
        "core/c.py": f"{where}from dit_sparse.core import a",
    }
    found = circle(write(tmp_path, files))
    assert set(found) == {"core.a", "core.b", "core.c"}


def test_only_folders_and_five_files_stand_in_the_package():
    names = {path.name for path in (ROOT / PACKAGE).iterdir()} - {"__pycache__"}
    folders = {name for names in FLOORS for name in names}
    beside = {"__init__.py", "__main__.py", "_version.py", "errors.py", "py.typed"}
    assert names == folders | beside | {"profiles"}


def test_arrows_on_one_floor_go_one_way():
    found = [(folder(module), folder(target)) for module, _, target in arrows(ROOT / PACKAGE)]
    for name, others in ASIDE.items():
        assert {floor(other) for other in others} == {floor(name)}
        unused = others - {target for own, target in found if own == name}
        assert not unused, f"{name} does not import {unused}: take them out of ASIDE"
    TopologicalSorter(ASIDE).prepare()


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


@pytest.mark.parametrize(
    ("module", "text", "words"),
    [
        ("methods/radial.py", "from dit_sparse.kernels.cpu import attend", "methods may import"),
        ("methods/radial.py", "from dit_sparse.attach import apply", "dit_sparse.attach.apply:"),
        ("methods/radial.py", "import dit_sparse", "imports dit_sparse:"),
        ("methods/radial.py", "from ..kernels import cpu", "imports dit_sparse.kernels.cpu"),
        ("methods/radial.py", "def f():\n    import dit_sparse.kernels.dispatch", "radial.py:2"),
        ("methods/__init__.py", "from ..kernels.dispatch import pick", "kernels.dispatch"),
        ("pipelines/wan.py", "from dit_sparse.methods import radial", "methods.radial"),
        ("kernels/cpu.py", "from dit_sparse.kernels import reference", "its reference"),
        ("kernels/cpu.py", "from dit_sparse.kernels import dispatch", "knows no other"),
        ("kernels/cpu.py", "from dit_sparse.pipelines import wan", "pipelines.wan"),
        ("core/plan.py", "from dit_sparse.methods.radial import Radial", "core may import"),
        ("strategy/form.py", "from dit_sparse.attach import apply", "strategy may import"),
        ("quality/ssim.py", "import dit_sparse.profiler.search", "quality may import"),
        ("quality/ssim.py", "import dit_sparse.bench.run", "quality may import"),
        ("errors.py", "from dit_sparse.core.plan import BlockPlan", "errors may import"),
        ("attach/apply.py", "from dit_sparse.nowhere import x", "on no floor"),
        ("attach/apply.py", "from diffusers import WanPipeline", "imports diffusers"),
        ("attach/apply.py", "import triton.language as tl", "imports triton"),
        ("attach/apply.py", "from kernels import cpu", "only these may: nobody"),
        ("attach/apply.py", "import os\nos.environ['X']", "apply.py:2 reads the environment"),
        ("attach/apply.py", "from os import getenv", "reads the environment"),
        ("helpers.py", "", "helpers.py is on no floor"),
    ],
)
def test_an_upward_arrow_is_found(tmp_path, module, text, words):
    below = {"attach/apply.py": "", "kernels/dispatch.py": "", "kernels/cpu.py": ""}
    below |= {"kernels/reference.py": "", "methods/radial.py": "", "pipelines/wan.py": ""}
    below |= {"core/plan.py": "", "bench/run.py": ""}
    (found,) = violations(write(tmp_path, {**below, module: text}))
    assert words in found


def test_downward_arrows_pass(tmp_path):
    files = {
        "__init__.py": "from dit_sparse.attach.apply import enable",
        "cli/run.py": "import os\nfrom dit_sparse.core import plan\nos.environ['X']",
        "attach/apply.py": "from dit_sparse.methods import radial\nimport dit_sparse.pipelines",
        "attach/engine.py": "from dit_sparse.strategy.form import Rule",
        "strategy/form.py": "",
        "core/plan.py": "import os\nfrom .grid import LatentsGrid\nos.fspath('x')",
        "core/grid.py": "from dit_sparse.errors import GeometryError",
        "errors.py": "",
        "_version.py": "",
        "methods/radial.py": "from dit_sparse.core import plan\nfrom .shared import bands",
        "methods/shared.py": "from ..core.plan import BlockPlan",
        "kernels/triton_fwd.py": "import triton\nfrom dit_sparse.kernels import cpu",
        "kernels/dispatch.py": "from dit_sparse.kernels import reference",
        "kernels/reference.py": "",
        "kernels/cpu.py": "from dit_sparse.core.plan import BlockPlan",
        "pipelines/__init__.py": "from diffusers import WanPipeline\nfrom . import wan",
        "pipelines/wan.py": "from dit_sparse.core.grid import LatentsGrid",
    }
    assert violations(write(tmp_path, files)) == []
