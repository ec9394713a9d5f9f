# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: INP001  (scripts of the documentation, no package)
"""What mkdocs calls while it builds the site: pages made from code and data are added here."""

from __future__ import annotations

import re
import sys
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

HERE = Path(__file__).parent
DOCS = HERE.parent
sys.path.insert(0, str(HERE))  # mkdocs takes it away again once this file is loaded

import benchmark_pages  # noqa: E402
import method_pages  # noqa: E402

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Put every method's page below "Methods"."""
    for section in config["nav"]:
        if "Methods" in section:
            section["Methods"] += [{name: f"methods/{name}.md"} for name in method_pages.names()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and pictures that are made from code and data."""
    from mkdocs.structure.files import File

    for name, text in benchmark_pages.pages(DOCS / "benchmarks").items():
        files.append(File.generated(config, f"benchmarks/{name}.md", content=text))
    for name in method_pages.names():
        page = f"methods/{name}.md"
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, content=f"# {name}\n"))
        drawn = method_pages.picture(name)
        if drawn is not None:
            place = f"methods/pictures/{name}.png"
            files.append(File.generated(config, place, content=drawn))
    return files


def on_page_markdown(text: str, page: Any, config: Any, files: Any) -> str:  # noqa: ARG001
    """Complete a method's page; name, rather than link, files that are not part of the site."""
    source = PurePosixPath(page.file.src_uri)
    if source.parent == PurePosixPath("methods") and source.stem in method_pages.names():
        text = f"{text.rstrip()}\n\n{method_pages.generated(source.stem, DOCS / 'benchmarks')}"
    return inside(text, source.parent)


def inside(text: str, folder: PurePosixPath) -> str:
    """Turn links that lead out of the documentation into their text and path."""

    def rewrite(found: re.Match[str]) -> str:
        picture, label, target, _ = found.groups()
        path = normpath(str(PurePosixPath("docs") / folder / target))
        is_page = path.startswith("docs/") and (picture or path.endswith(".md"))
        if is_page or "/_site" in path:
            return found[0]
        return f"{label} (`{path}`)" if label.strip("`") != path else f"`{path}`"

    return LINK.sub(rewrite, text)
