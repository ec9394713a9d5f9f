# SPDX-License-Identifier: Apache-2.0
"""The options that several commands share: one meaning, one range, one help text."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import typer

from dit_sparse.cli.console import UserError

WHAT = {"rich_help_panel": "What to generate"}
HOW = {"rich_help_panel": "How to run"}
EXAMPLES = {"--set": "decay_factor=0.5", "--call": "true_cfg_scale=4"}


def _repeated(flag: str, metavar: str, text: str, show_default: str) -> Any:
    """Describe an option of what is generated that may be given several times."""
    text += " Can be repeated."
    panel = WHAT["rich_help_panel"]
    return typer.Option(
        flag, metavar=metavar, help=text, show_default=show_default, rich_help_panel=panel
    )


Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=10_000,
        help="Denoising steps.",
        show_default="the model's",
        **WHAT,
    ),
]
Height = Annotated[
    int | None,
    typer.Option(min=1, max=16384, help="Pixels.", show_default="the model's", **WHAT),
]
Width = Height
Frames = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=10_000,
        help="Number of video frames.",
        show_default="the model's",
        **WHAT,
    ),
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Classifier-free guidance scale; above 1, most models run twice per step.",
        show_default="the model's",
        **WHAT,
    ),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(help="The negative prompt.", show_default="the model's", **WHAT),
]
Call = Annotated[
    list[str] | None,
    _repeated(
        "--call",
        "KEY=VALUE",
        "Additional argument of the pipeline call, e.g. true_cfg_scale=4; VALUE is JSON or "
        "plain text.",
        show_default="the model's",
    ),
]
Loras = Annotated[
    list[str] | None,
    _repeated(
        "--lora",
        "SOURCE[=SCALE]",
        "LoRA adapter to merge into the model: folder, safetensors file or Hub id.",
        show_default="none",
    ),
]
Fps = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        max=240.0,
        help="Frames per second of the written videos.",
        show_default="the model's, or 16",
        **WHAT,
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(help="auto: the GPU if available, else the CPU.", **HOW),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        help="Precision of the model; auto: float32 on the CPU, bfloat16 on a GPU.",
        **HOW,
    ),
]
Kernel = Annotated[
    str | None,
    typer.Option(
        help="Attention kernel; if it cannot run on this machine, the command fails instead of "
        "using another one. 'dit-sparse doctor' lists them.",
        show_default="chosen automatically",
        **HOW,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=4096,
        help="Number of CPU threads for torch.",
        show_default="torch's",
        **HOW,
    ),
]


def read_seeds(text: str) -> tuple[int, ...]:
    """Read what ``--seeds`` names: ``0,1,5``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) < 2**32 for part in parts):
        raise UserError(f"--seeds {text!r:.100}: must be comma-separated integers, e.g. 0,1,2")
    return tuple(map(int, parts))


def key_values(flag: str, pairs: list[str] | None) -> dict[str, Any]:
    """Read ``key=value`` pairs of a flag: values are JSON where they are valid JSON, else text."""
    found: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not (equals and key.isidentifier()):
            raise UserError(f"{flag} {pair!r:.200}: must be KEY=VALUE, e.g. {EXAMPLES[flag]}")
        if key in found:
            raise UserError(f"{flag} {key}: given twice; remove one")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found
