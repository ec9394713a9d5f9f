# SPDX-License-Identifier: Apache-2.0
"""How commands speak: results on stdout, progress and errors on stderr, one line per error."""

from __future__ import annotations

import errno
import functools
import os
import traceback
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from dit_sparse.core.reading import visible
from dit_sparse.errors import DitSparseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rich.console import ConsoleOptions, RenderableType
    from rich.progress import Progress
    from rich.segment import Segment
    from rich.status import Status

styled = Text.assemble  # styled("plain, ", ("bold", "bold")): no markup, so nothing to escape


class Terminal(Console):
    """A console that shows text as it is: no markup, no emoji codes, no escape sequences.

    Names, notes and prompts come from files of others; only ``styled`` parts have a style.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make control characters visible before the text is laid out."""
        return super().render_str(visible(text), **options)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """Show a spinner beside a text."""
        return super().status(Text(status) if isinstance(status, str) else status, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Do the same with text that comes as an object of its own."""
        for part in super().render(renderable, options):
            yield part if part.control else part._replace(text=visible(part.text))


OUT = Terminal()
ERR = Terminal(stderr=True)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


# What the disk answers: never our mistake, wherever it is met.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


class UserError(Exception):
    """The request cannot be met; the message is for the person who made it."""


def first_line(error: BaseException) -> str:
    """Give the first line of an error's message, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def say(text: str) -> None:
    """Say one line on stderr, as it is."""
    ERR.print(text, highlight=False, soft_wrap=True)


def progress() -> Progress:
    """Make the progress display of everything that takes longer than a second."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=ERR,
    )


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn an expected error into one line and exit code 2, Ctrl-C into exit code 130.

    A full or broken disk counts as expected. Other exceptions are our mistakes and keep their
    traceback. A command that takes ``debug`` shows the traceback of expected errors too.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            say(
                "Interrupted. Sparse attention was removed from the pipeline; no files were "
                "written."
            )
            raise typer.Exit(130) from None
        except (DitSparseError, UserError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in DISK:
                raise
            if kwargs.get("debug"):
                traceback.print_exc()
            text = _disk(error) if isinstance(error, OSError) else str(error)
            line = "; ".join(part.strip() for part in text.splitlines() if part.strip())
            ERR.print("error:", style="bold red", end=" ")
            say(line)
            raise typer.Exit(2) from None

    return run


def _disk(error: OSError) -> str:
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{where}{error.strerror}; free space on this disk, or write to another disk"
