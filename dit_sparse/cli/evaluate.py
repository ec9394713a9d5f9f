# SPDX-License-Identifier: Apache-2.0
"""``dit-sparse evaluate``: what strategies gain and cost on a model, over prompts and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dit_sparse.cli.console import Debug
from dit_sparse.cli.lora import read_loras
from dit_sparse.cli.options import (
    WHAT,
    Call,
    Device,
    Dtype,
    Fps,
    Frames,
    GuidanceScale,
    Height,
    Kernel,
    Loras,
    NegativePrompt,
    Steps,
    Threads,
    Width,
    key_values,
)

EXAMPLES = (
    (
        "dit-sparse evaluate samples/wan-tiny --strategy wan-tiny.adaspa --strategy "
        'wan-tiny.radial --prompt "a red circle moving right" --seeds 0,1 -o out'
    ),
    (
        "accelerate launch --num_processes 4 -m dit_sparse evaluate MODEL --strategy my.json "
        "--prompts prompts.txt --seeds 0,1 -o out --gate psnr>=22,lpips_alex<=0.2"
    ),
)
MEASURE = {"rich_help_panel": "What to measure"}


def run(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a Diffusers pipeline, or its Hub id (owner/name).", show_default=False
        ),
    ],
    strategies: Annotated[
        list[str],
        typer.Option(
            "--strategy",
            help="A shipped strategy, strategy file, Hub repository or method; can be repeated.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for clips and reports. An interrupted run resumes there; clips made "
            "with other inputs (model, settings, versions) are an error.",
            show_default=False,
        ),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file with one prompt per line. Empty lines and lines that begin with # "
            "are skipped; write \\# for a prompt that begins with #.",
            show_default="none",
            **WHAT,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt; can be repeated.", show_default="none", **WHAT),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.", **WHAT)] = "0",
    steps: Steps = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    guidance_scale: GuidanceScale = None,
    negative_prompt: NegativePrompt = None,
    call: Call = None,
    lora: Loras = None,
    fps: Fps = None,
    floor: Annotated[
        Literal["math", "efficient", "flash", "cudnn", "off"],
        typer.Option(
            help="SDPA backend for a second dense run; its difference from the first is the "
            "noise floor.",
            **MEASURE,
        ),
    ] = "math",
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            help="Comma-separated metrics to compute, or 'all'.",
            show_default="all except lpips_vgg, dists",
            **MEASURE,
        ),
    ] = None,
    gates: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            metavar="METRIC>=NUMBER",
            help="Threshold on the median over pairs, e.g. psnr>=25; .worst applies to the "
            "worst pair. Exit code 1 if a gate fails.",
            show_default="none",
            **MEASURE,
        ),
    ] = None,
    every: Annotated[
        int,
        typer.Option(min=1, help="Compute expensive metrics only on every N-th frame.", **MEASURE),
    ] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kernel: Kernel = None,
    threads: Threads = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            "--overwrite",
            help="Delete the clips and reports of an earlier evaluation in the folder.",
        ),
    ] = False,
    debug: Debug = False,  # noqa: ARG001  (read by ``guarded``)
) -> None:
    """Generate dense and sparse pairs, measure every pair, and say what strategies gain and cost.

    Dense and sparse runs share seed and dense kernel. A second dense run with another attention
    backend gives the noise floor. Stopped runs go on: finished clips are kept. Several processes
    (accelerate launch) share the prompts. Exit code 1 where a gate failed.
    """
    from dit_sparse.cli.compare import words
    from dit_sparse.cli.evaluating import Wish, perform
    from dit_sparse.cli.source import Settings

    passed = perform(
        Wish(
            model=model,
            strategies=tuple(strategies),
            output=output,
            prompts=prompts,
            prompt=tuple(prompt or ()),
            seeds=seeds,
            settings=Settings(
                height,
                width,
                frames,
                steps,
                guidance_scale,
                negative_prompt,
                key_values("--call", call),
            ),
            loras=read_loras(lora),
            fps=fps,
            floor=None if floor == "off" else floor,
            metrics=words(metrics),
            gates=tuple(gates or ()),
            every=every,
            device=device,
            dtype=dtype,
            kernel=kernel,
            threads=threads,
            fresh=fresh,
        )
    )
    if not passed:
        raise typer.Exit(1)
