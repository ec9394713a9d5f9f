# SPDX-License-Identifier: Apache-2.0
"""The command line ``dit-sparse``: one file per command; this one puts them together.

Only what ``--help`` needs is imported here; a command imports the rest when it runs.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from dit_sparse._version import __version__
from dit_sparse.cli.console import guarded

__all__ = ["app", "main"]

# In the order of ``--help``: a file of that name here, with ``run`` and ``EXAMPLES``, or with an
# ``app`` of commands.
COMMANDS = (
    "generate",
    "evaluate",
    "compare",
    "methods",
    "forecast",
    "inspect",
    "profile",
    "diff",
    "retile",
    "doctor",
    "bench",
    "vbench",
)
app = typer.Typer(
    name="dit-sparse",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 99},
)
for _name in COMMANDS:
    _command = import_module(f"{__name__}.{_name}")
    if hasattr(_command, "app"):
        app.add_typer(_command.app, name=_name)
        continue
    # Rich joins the lines of an epilog, except where an empty one stands between them.
    _epilog = "\n\n".join(("Examples:", *_command.EXAMPLES))
    app.command(_name, epilog=_epilog)(guarded(_command.run))


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"dit-sparse {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Generate videos and images faster with sparse attention, and see what it costs in quality.

    Exit codes: 0 done, 1 doctor found a problem, a gate failed or diff found a difference, 2 the
    request cannot be met, 130 interrupted.
    """


def main() -> None:
    """Run the command line."""
    app()
