# SPDX-License-Identifier: Apache-2.0
"""``dit-sparse vbench``: export clips for VBench, run it in its own environment, read results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from dit_sparse.cli.console import (
    ERR,
    OUT,
    Debug,
    UserError,
    first_line,
    guarded,
    progress,
    styled,
)
from dit_sparse.core.reading import load_json

if TYPE_CHECKING:
    from dit_sparse.quality.vbench import Results

EXAMPLES = (
    "dit-sparse vbench export out wan-tiny.adaspa -o clips/sparse",
    "dit-sparse vbench run clips/sparse --python ~/vbench/bin/python -o sparse.json",
    "dit-sparse vbench import results.zip -o sparse.json",
)
Output = Annotated[
    Path, typer.Option("--output", "-o", help="JSON file for the scores.", show_default=False)
]


def export(
    evaluation: Annotated[
        Path, typer.Argument(help="Output folder of 'dit-sparse evaluate'.", show_default=False)
    ],
    arm: Annotated[
        str, typer.Argument(help="dense, floor, or a strategy's name.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="New or empty folder.", show_default=False)
    ],
    debug: Debug = False,  # noqa: ARG001  (read by ``guarded``)
) -> None:
    """Write an arm's clips in the layout of VBench and VBench-2.0, with a manifest."""
    from dit_sparse.quality.vbench import Item
    from dit_sparse.quality.vbench import export as write

    items, arms = [], set()
    for path in sorted((evaluation / "pairs").glob("*/*.json")):
        told = _read(path, "arm", "file", "prompt", "seed")
        arms.add(told["arm"])
        if told["arm"] == arm:
            # Only the name: a file of others must not lead out of the folder.
            exact = path.parent / Path(str(told["file"].get("exact"))).name
            items.append(Item(exact, told["prompt"], told["seed"]))
    if not items:
        known = f"available: {', '.join(sorted(arms))}" if arms else "it has no finished clips"
        raise UserError(f"{evaluation}: no clips of {arm!r:.100}; {known}")
    setup = _read(evaluation / "evaluation.json", "model", "call")
    settings = {"model": setup["model"], "arm": arm, "call": setup["call"]}
    with progress() as bars:
        task = bars.add_task("exporting", total=len(items))
        made = write(
            items, output, settings=settings, watch=lambda n: bars.update(task, completed=n)
        )
    OUT.print(f"{len(made['files'])} clips for {made['suite']} in {output}")
    if not made["named_by_prompt"]:
        OUT.print(
            "Some prompts cannot be used as file names. 'dit-sparse vbench run' passes them as "
            "custom input."
        )


def _read(path: Path, *keys: str) -> dict[str, Any]:
    """Read a file of an evaluation, which must have these keys."""
    try:
        found = load_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
    lacks = [key for key in keys if not isinstance(found, dict) or key not in found]
    if lacks or not isinstance(found.get("file", {}), dict):
        raise UserError(
            f"{path}: not a file written by dit-sparse evaluate: missing "
            f"{', '.join(lacks) or 'file'}"
        )
    return dict(found)


def run(
    clips: Annotated[Path, typer.Argument(help="An exported folder.", show_default=False)],
    python: Annotated[
        Path,
        typer.Option(
            help="Python interpreter of an environment with VBench (pip install vbench).",
            show_default=False,
        ),
    ],
    output: Output,
    dimensions: Annotated[
        list[str] | None,
        typer.Option(
            "--dimension",
            help="Dimension to score; repeat the option or separate names with commas.",
            show_default="all that this mode supports",
        ),
    ] = None,
    standard: Annotated[
        bool,
        typer.Option("--standard", help="The clips were generated from VBench's own prompts."),
    ] = False,
    cache: Annotated[Path, typer.Option(help="Folder with VBench's weights.")] = Path(
        "~/.cache/vbench"
    ),
    torch_hub: Annotated[Path, typer.Option(help="Folder with torch.hub weights.")] = Path(
        "~/.cache/torch/hub"
    ),
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Device for VBench.")] = "cpu",
    allow_download: Annotated[
        bool, typer.Option("--allow-download", help="Allow VBench to download missing weights.")
    ] = False,
    torchvision_stub: Annotated[
        bool,
        typer.Option(
            "--torchvision-stub",
            help="Declare missing operators for a torchvision that was not built for the "
            "installed torch.",
        ),
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=1, help="Total timeout for all dimensions, in seconds.")
    ] = 86400,
    debug: Debug = False,  # noqa: ARG001  (read by ``guarded``)
) -> None:
    """Score an exported folder with the official evaluator, in its own interpreter."""
    from dit_sparse.cli.compare import words
    from dit_sparse.quality.vbench import run_vbench

    with ERR.status("VBench is running"):
        found = run_vbench(
            clips,
            python.expanduser(),
            dimensions=words(dimensions),
            cache=cache,
            torch_hub=torch_hub,
            device=device,
            standard=standard,
            allow_download=allow_download,
            torchvision_stub=torchvision_stub,
            timeout=timeout,
        )
    finish(found, output)


def read(
    results: Annotated[
        Path,
        typer.Argument(
            help="A *_eval_results.json file, or a folder or zip archive of such files.",
            show_default=False,
        ),
    ],
    output: Output,
    debug: Debug = False,  # noqa: ARG001  (read by ``guarded``)
) -> None:
    """Read results that VBench made elsewhere; totals only where all 16 dimensions are there."""
    from dit_sparse.quality.vbench import read_results

    finish(read_results(results), output)


def finish(found: Results, output: Path) -> None:
    """Write and print scores; exit code 1 where a dimension failed."""
    from dit_sparse.quality.files import plain, replace_text, writing

    told: dict[str, Any] = found.to_dict()
    with writing(output):
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
    replace_text(output, json.dumps(plain(told), indent=2, allow_nan=False) + "\n")
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("dimension")
    table.add_column("score", justify="right")
    table.add_column("clips", justify="right")
    for name, score in found.scores.items():
        value = score.status if score.value is None else f"{score.value:.4f}"
        table.add_row(f"vbench.{name}", value, str(len(score.videos)) if score.videos else "")
    OUT.print(table)
    for name, score in found.scores.items():
        if score.reason is not None:
            OUT.print(styled((f"{name} {score.status}: {score.reason}", "dim")))
    if told["totals"] is None:
        OUT.print(
            "No totals: all 16 dimensions are required, and a missing one does not count as 0."
        )
    else:
        parts = (f"{name} {value:.4f}" for name, value in told["totals"].items())
        OUT.print(", ".join(parts))
    if any(score.status == "error" for score in found.scores.values()):
        raise typer.Exit(1)


app = typer.Typer(
    no_args_is_help=True,
    help="Export clips for VBench, run it in a separate environment, and import its results.",
    epilog="\n\n".join(("Examples:", *EXAMPLES)),
)
for _name, _command in (("export", export), ("run", run), ("import", read)):
    app.command(_name)(guarded(_command))
