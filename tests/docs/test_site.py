# SPDX-License-Identifier: Apache-2.0
"""The documentation site: links, the pages made from code and data, and the build itself."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image

from dit_sparse import LatentsGrid
from dit_sparse.inspect.draw import DROPPED, KEPT, MAP
from dit_sparse.methods import METHODS, method_class

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OURS = ("hooks", "method_pages", "benchmark_pages", "tables")
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s#]*)(?:#([^)\s]*))?\)")


@pytest.fixture
def site(monkeypatch):
    """Modules of docs/_site, by name."""
    monkeypatch.syspath_prepend(str(DOCS / "_site"))
    found = {name: importlib.import_module(name) for name in OURS}
    yield found
    for name in OURS:
        del sys.modules[name]


def pages(site):
    """All pages of the site, made ones included: path below docs -> Markdown."""
    found = {
        path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8")
        for path in DOCS.rglob("*.md")
    }
    made = site["benchmark_pages"].pages(DOCS / "benchmarks")
    found |= {f"benchmarks/{name}.md": text for name, text in made.items()}
    for name in METHODS:
        page = f"methods/{name}.md"
        found[page] = found.get(page, "") + site["method_pages"].generated(
            name, DOCS / "benchmarks"
        )
    return found


def anchors(text):
    """Anchors of a page's headings, as mkdocs makes them."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", head.replace("`", "")).strip().lower() for head in heads]
    return {re.sub(r"[-\s]+", "-", head) for head in plain}


def test_every_link_leads_somewhere(site):
    found = pages(site)
    found["../README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
    wrong = []
    for page, text in found.items():
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for target, anchor in LINK.findall(prose):
            path = PurePosixPath("docs") / PurePosixPath(page).parent / target
            parts = []
            for part in path.parts:
                parts = parts[:-1] if part == ".." else [*parts, part]
            where = "/".join(parts) if target else f"docs/{page}"
            inner = where.removeprefix("docs/")
            if "methods/pictures/" in where:
                continue  # drawn when the site is built: test_pictures_show_the_plan
            if inner not in found and not (ROOT / where).exists():
                wrong.append(f"{page}: {target}")
            elif anchor and inner in found and anchor not in anchors(found[inner]):
                wrong.append(f"{page}: {target}#{anchor}")
    assert not wrong


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_methods_page_has_all_its_params(site, name):
    text = site["method_pages"].generated(name, DOCS / "benchmarks")
    cls = method_class(name)
    for param in dataclasses.fields(cls):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{param.name}` |")]
        made = param.default is dataclasses.MISSING
        default = param.default_factory() if made else param.default
        default = list(default) if isinstance(default, tuple) else default
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        assert cells[2].strip("`") == str(default)
        assert len(cells) == 4
        assert len(cells[3]) > 10, f"{name}.{param.name} has no words in its docstring"
    assert "arxiv.org/abs/" in text or name == "dense"
    assert f"dit_sparse/methods/{cls.__module__.rpartition('.')[2]}.py" in text
    assert (DOCS / "methods" / f"{name}.md").is_file(), "say when to use it: docs/methods/"


@pytest.mark.parametrize("name", ["gna", "radial"])
def test_pictures_show_the_plan(site, name):
    """The share of kept pixels in the map is the plan's density; other colours are mixtures."""
    grid = LatentsGrid(4, 6, 8)  # 192 tokens: one pixel for each pair
    data = site["method_pages"].picture(name, grid)
    pixels = np.asarray(Image.open(BytesIO(data)).convert("RGB")).astype(float)
    # The map is the square right below the last line of text, within a gray border.
    border = (pixels == 128).all(-1)
    top = int(np.argmax(border.sum(1) > MAP)) + 1
    left = int(np.argmax(border[top])) + 1
    square = pixels[top : top + MAP, left : left + MAP]
    share = (square - DROPPED)[..., 0] / (KEPT[0] - DROPPED[0])
    strategy = {"name": name, "params": dict(method_class(name).example)}
    assert abs(share.mean() - density(strategy, grid)) < 0.01
    assert site["method_pages"].picture("dense", grid) is None


def density(strategy, grid):
    """Count kept pairs of a method's plan, by a kernel: which keys each query really read."""
    import torch

    from dit_sparse.core.call import AttentionCall
    from dit_sparse.kernels import reference
    from dit_sparse.kernels.dispatch import Backends
    from dit_sparse.methods.params import build_method

    method = build_method(strategy["name"], strategy["params"])
    zeros = torch.zeros(1, grid.tokens, 1, 8)
    call = AttentionCall(zeros, zeros, zeros, grid, 1.0, heads=(0,))
    plan = method.plan(call, Backends())
    _, lse = reference.attend(zeros, zeros, zeros, plan, 1.0)  # scores 0: exp(lse) counts keys
    return float(lse.exp().mean() / grid.tokens)


def test_benchmark_pages_are_their_data(site):
    made = site["benchmark_pages"].pages(DOCS / "benchmarks")
    data = [json.loads(path.read_text()) for path in sorted((DOCS / "benchmarks").glob("*.json"))]
    kernels = [each for each in data if isinstance(each, dict) and each.get("measurements")]
    rows = [line for line in made["kernels"].splitlines() if re.match(r"\| \d", line)]
    wanted = [each for found in kernels for each in found["measurements"]]
    assert len(rows) == len(wanted) > 72
    for row, each in zip(rows, wanted, strict=True):
        speed = each["dense_ms"] / each["sparse_ms"]
        assert row.endswith(f"| {speed:.2f} | {speed * each['density']:.2f} |")
    assert all(found["command"] in made["kernels"] for found in kernels)
    demo = json.loads((DOCS / "benchmarks/demo-cpu.json").read_text(encoding="utf-8"))
    assert f"| {demo['arms']['sparse']['total_seconds']:.1f} |" in made["demo"]
    compiled = json.loads((DOCS / "benchmarks/aot.json").read_text(encoding="utf-8"))
    assert made["compiled"].count("\n| `") == len(compiled["rows"])
    for kind in ("methods", "memory"):
        for name in set(METHODS) - {"dense"}:
            assert f"../methods/{name}.md" in made[kind]


@pytest.mark.parametrize(
    ("text", "folder", "wanted"),
    [
        ("[a](b.md)", "", "[a](b.md)"),
        ("[a](../b.md#c)", "how-to", "[a](../b.md#c)"),
        ("![a](images/b.png)", "", "![a](images/b.png)"),
        ("[`x/`](../dit_sparse/x)", "", "x/ (`dit_sparse/x`)"),
        ("[`dit_sparse/x`](../dit_sparse/x)", "", "`dit_sparse/x`"),
        ("[data](benchmarks/a.json)", "", "data (`docs/benchmarks/a.json`)"),
        ("[a](https://b.c)", "", "[a](https://b.c)"),
        ("[a](#b)", "", "[a](#b)"),
    ],
)
def test_links_out_of_the_site_become_words(site, text, folder, wanted):
    assert site["hooks"].inside(text, PurePosixPath(folder)).replace("`x/` (", "x/ (") == wanted


@pytest.mark.slow
def test_it_builds_and_fetches_nothing(tmp_path):
    """Strict, and no page loads anything from elsewhere."""
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason="make docs installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    loads = re.compile(r"<(?:script|img|iframe|link)[^>]*?(?:src|href)=\"(?:https?:)?//[^\"]*\"")
    for page in tmp_path.rglob("*.html"):
        found = [
            x for x in loads.findall(page.read_text(encoding="utf-8")) if "canonical" not in x
        ]
        assert not found, page
    for name in METHODS:
        assert (tmp_path / "methods" / f"{name}.html").is_file()
        assert (tmp_path / "methods" / "pictures" / f"{name}.png").is_file() == (name != "dense")
