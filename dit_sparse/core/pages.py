# SPDX-License-Identifier: Apache-2.0
"""Write HTML pages from templates: ``templates/`` here is the common look, others add their own.

Pages load nothing from a network: style and script stand in them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_sparse._version import __version__
from dit_sparse.core.reading import visible

if TYPE_CHECKING:
    from jinja2 import Environment

COMMON = Path(__file__).with_name("templates")


def render(template: Path, **values: Any) -> str:
    """Fill in a template; ``version`` is always there.

    Args:
        template: Its file; it may include others of its folder and of the common one.
        **values: What it shows. Text is escaped, control characters become visible; a name that
            the template wants and does not get is an error.
    """
    page = _environment(template.parent).get_template(template.name)
    return page.render(version=__version__, **values)


@cache
def _environment(folder: Path) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader([folder, COMMON]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
