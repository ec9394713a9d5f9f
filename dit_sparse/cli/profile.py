# SPDX-License-Identifier: Apache-2.0
"""``dit-sparse profile``: search a strategy for a model by measuring.

Past 300 lines, as the options and their help alone are 170.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dit_sparse.cli.console import ERR, Debug, UserError, say
from dit_sparse.cli.lora import read_loras
from dit_sparse.cli.options import (
    Call,
    Device,
    Dtype,
    Frames,
    GuidanceScale,
    Height,
    Loras,
    NegativePrompt,
    Steps,
    Threads,
    Width,
    key_values,
    read_seeds,
)
from dit_sparse.cli.profile_shown import Shown, bars, show
from dit_sparse.cli.prompts import PROMPTS, read_prompts

if TYPE_CHECKING:
    from dit_sparse.profiler import Wish

EXAMPLES = (
    "dit-sparse profile samples/wan-tiny --prompts prompts.txt --target 0.15 -o wan.json",
    (
        "accelerate launch -m dit_sparse profile Wan-AI/Wan2.1-T2V-14B-Diffusers "
        "--prompts prompts.txt --budget 0.5 -o wan14b.json"
    ),
    (
        "dit-sparse profile samples/wan-tiny --prompts 2 --candidates sparse-vdit "
        "--rule sparse-vdit --sequential layers -o vdit.json"
    ),
    "dit-sparse profile wan2.1-14b --prompts 4 --dry-run",
)

HOW = {"rich_help_panel": "How to measure"}


def run(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a Diffusers pipeline, or its Hub id (owner/name); with --dry-run "
            "also a model name known to forecast.",
            show_default=False,
        ),
    ],
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts",
            metavar="FILE|N",
            help="A text file with one prompt per line (lines that begin with # are comments), "
            f"or a number of built-in prompts (1 to {len(PROMPTS)}).",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Strategy file to write (.json). Measurements are stored next to it in a "
            "folder <name>.measured, so an interrupted search resumes and a search with another "
            "target takes seconds. Required unless --dry-run is given.",
            show_default=False,
        ),
    ] = None,
    candidates: Annotated[
        str,
        typer.Option(
            help="Comma-separated methods, e.g. radial,svg2:compensate=means,adaspa@0.3; a name "
            "without @ stands for three densities. Presets: default, quick, sparse-vdit."
        ),
    ] = "default",
    target: Annotated[
        float | None,
        typer.Option(
            help="Maximum relative error of the heads' outputs (root mean square), in [0, 1].",
            show_default="0.1, unless --budget or --density is given",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Maximum predicted self-attention time as a fraction of dense, in (0, 1]; "
            "minimises the error."
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            help="Maximum mean density, in (0, 1]; minimises the error independently of the "
            "device."
        ),
    ] = None,
    rule: Annotated[
        Literal["time", "sparse-vdit"],
        typer.Option(
            help="How to choose candidates. time: by --target or --budget; sparse-vdit: the "
            "rule of the Sparse-vDiT paper."
        ),
    ] = "time",
    loss: Annotated[
        Literal["relative", "mse"], typer.Option(help="Sparse-vDiT rule: error metric.")
    ] = "relative",
    weight: Annotated[
        float, typer.Option("--lambda", help="Sparse-vDiT rule: weight of density.")
    ] = 0.5,
    epsilon: Annotated[
        float, typer.Option(help="Sparse-vDiT rule: heads with a larger loss stay dense.")
    ] = 1.0,
    seeds: Annotated[
        str, typer.Option(help="Comma-separated seeds; every prompt runs with every seed.")
    ] = "0",
    bands: Annotated[
        str,
        typer.Option(
            help="Step bands: a number of equal bands, or their edges as fractions 0,...,1.", **HOW
        ),
    ] = "3",
    captures: Annotated[
        int, typer.Option(min=2, max=100, help="Measured calls per layer and band.", **HOW)
    ] = 2,
    sample: Annotated[
        str,
        typer.Option(
            metavar="auto|all|N",
            help="Rows of blocks on which outputs are compared; auto: 16 below 8,192 tokens, "
            "otherwise 64.",
            **HOW,
        ),
    ] = "auto",
    shortlist: Annotated[
        int,
        typer.Option(
            min=0,
            max=1000,
            help="Maximum number of candidates to measure on all calls. One extra generation "
            "selects them and tunes their densities. 0: measure all, without tuning.",
            **HOW,
        ),
    ] = 18,
    sequential: Annotated[
        Literal["none", "bands", "layers"],
        typer.Option(
            help="bands: decide step bands in order, measuring later bands with the earlier "
            "ones sparse; layers: each layer passes on the output of the candidates it would "
            "choose, like Sparse-vDiT's search.",
            **HOW,
        ),
    ] = "none",
    costs: Annotated[
        Literal["measured", "assumed"],
        typer.Option(
            help="Measure costs with a micro-benchmark on this device, or assume them.", **HOW
        ),
    ] = "measured",
    check: Annotated[
        bool, typer.Option(help="Finally, run the first prompt dense and sparse.", **HOW)
    ] = True,
    state_limit: Annotated[
        float, typer.Option(min=0.001, help="Maximum state of candidates, in GiB.", **HOW)
    ] = 8.0,
    steps: Steps = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    guidance_scale: GuidanceScale = None,
    negative_prompt: NegativePrompt = None,
    call: Call = None,
    lora: Loras = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output file.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete earlier measurements for this output.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Forecast the search time from config files only."),
    ] = False,
    debug: Debug = False,  # noqa: ARG001  (read by ``guarded``)
) -> None:
    """Measure methods on a model's own calls and write the best mix as a strategy file.

    Runs the model dense over the prompts, tries every candidate on captured calls of every layer,
    predicts what each costs on this device, and gives each head in each band of steps the one
    that serves the target or budget. Errors are measured on these prompts only.
    """
    texts = read_prompts(prompts)
    numbers = read_seeds(seeds)
    rows, loras = _rows(sample), read_loras(lora)
    if dry_run:
        from dit_sparse.cli.profile_ahead import tell

        tell(
            model, (height, width, frames), steps, guidance_scale, len(texts) * len(numbers),
            candidates, _edges(bands), captures, rows, shortlist, sequential,
            check=check, timing=costs == "measured", state_limit=state_limit,
        )  # fmt: skip
        return
    if output is None:
        raise UserError("-o is missing; give the strategy file to write, e.g. -o mine.json")
    folder = check_output(output, overwrite=overwrite)
    with ERR.status("starting"):
        import torch
        from accelerate import PartialState

        from dit_sparse.cli.source import (
            SampleDefaults,
            Settings,
            call_arguments,
            load,
            local_folder,
            machine,
        )
        from dit_sparse.profiler import Bands, Store, Wish, parse_candidates, profile

        wish = Wish(rule, target, budget, density, loss, weight, epsilon)
        edges = Bands(_edges(bands), captures)
        parse_candidates(candidates)
        place = local_folder(model)
    defaults = SampleDefaults() if place is None else SampleDefaults.read(place)
    if threads is not None:
        torch.set_num_threads(threads)
    state = PartialState(cpu=device == "cpu")
    where, kind = machine(device, dtype, state.local_process_index)
    pipe = load(model, where, kind, loras)
    pipe.set_progress_bar_config(disable=True)
    asked = Settings(
        height, width, frames, steps, guidance_scale, negative_prompt, key_values("--call", call)
    )
    settings = asked.over(defaults)
    arguments = call_arguments(pipe, texts[0], settings)
    arguments.pop("prompt")
    how = f"--sample {sample} --shortlist {shortlist} --sequential {sequential}"
    how += "".join(f" --lora {replace(each, source=Path(each.source).name)}" for each in loras)
    command = _command(model, prompts, candidates, wish, seeds, edges.edges, how, settings)
    try:
        with bars() as shown:
            found = profile(
                pipe,
                texts,
                arguments=arguments,
                seeds=numbers,
                candidates=candidates,
                wish=wish,
                bands=edges,
                costs=costs,
                check=check,
                name=output.stem,
                command=command,
                store=Store(folder),
                fresh=fresh,
                state=state,
                state_limit=int(state_limit * 2**30),
                sample=rows,
                shortlist=shortlist,
                sequential=sequential,
                progress=Shown(shown),
            )
    except KeyboardInterrupt:
        say(f"Interrupted. Measurements are kept in {folder}; run the same command to resume.")
        raise typer.Exit(130) from None
    if found is not None:
        found.strategy.save(output)
        show(found, output)


def check_output(output: Path, *, overwrite: bool) -> Path:
    """Refuse an output that cannot be written before any work; give the folder beside it."""
    if output.suffix.lower() != ".json":
        raise UserError(f"-o {output}: must be a .json file")
    if output.is_dir():
        raise UserError(f"-o {output}: is a folder; give a file name")
    if not output.absolute().parent.is_dir():
        raise UserError(f"-o {output}: the folder does not exist; create it first")
    if output.exists() and not overwrite:
        raise UserError(f"-o {output}: already exists; add --overwrite to replace it")
    return output.with_name(output.stem + ".measured")


def _rows(text: str) -> int | None:
    if text in {"auto", "all"}:
        return None if text == "auto" else 0
    if not (text.isascii() and text.isdigit() and 2 <= int(text) < 2**31):
        raise UserError(f"--sample {text!r:.100}: must be auto, all, or a number of rows >= 2")
    return int(text)


def _edges(text: str) -> tuple[float, ...]:
    if text.isascii() and text.isdigit() and 1 <= int(text) <= 100:
        count = int(text)
        return tuple(i / count for i in range(count + 1))
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(
            f"--bands {text!r:.100}: must be a number from 1 to 100, or fractions such as 0,0.2,1"
        ) from error


def _command(
    model: str,
    prompts: str,
    candidates: str,
    wish: Wish,
    seeds: str,
    edges: tuple[float, ...],
    how: str,
    settings: dict[str, Any],
) -> str:
    """Write the command as it can be given again; files by name, not by folder."""
    from dit_sparse.cli.source import FLAGS

    limits = {"target": wish.target, "budget": wish.budget, "density": wish.density}
    limit = " ".join(f"--{key} {value:g}" for key, value in limits.items() if value is not None)
    if wish.rule != "time":
        limit = f"--rule {wish.rule} --loss {wish.loss} --lambda {wish.weight:g}"
        limit += f" --epsilon {wish.epsilon:g}"
    told = shlex.join(
        part
        for key, value in settings.items()
        for part in ((FLAGS[key], f"{value}") if key in FLAGS else ("--call", f"{key}={value}"))
    )
    bands = ",".join(f"{edge:g}" for edge in edges)
    return (
        f"dit-sparse profile {Path(model).name if Path(model).is_dir() else model} "
        f"--prompts {Path(prompts).name} --candidates '{candidates}' {limit} --seeds {seeds} "
        f"--bands {bands} {how} {told}"
    ).strip()
