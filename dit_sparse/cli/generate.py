# SPDX-License-Identifier: Apache-2.0
"""``dit-sparse generate``: one prompt, sparse and (on demand) dense, with the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit_sparse.cli.console import Debug
from dit_sparse.cli.lora import read_loras
from dit_sparse.cli.options import (
    HOW,
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
        'dit-sparse generate samples/wan-tiny "a red circle moving right" '
        "--strategy wan-tiny.radial -o out --compare-dense"
    ),
    (
        'dit-sparse generate Wan-AI/Wan2.1-T2V-1.3B-Diffusers "a cat" --strategy radial '
        "--set decay_factor=0.5 --set dense_warmup_steps=0.2 --frames 81 -o out"
    ),
)


def run(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a Diffusers pipeline, or its Hub id (owner/name).", show_default=False
        ),
    ],
    prompt: Annotated[str, typer.Argument(help="The prompt.", show_default=False)],
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            help="A shipped strategy, strategy file, Hub repository or method; 'dit-sparse "
            "methods' lists them.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the results: sparse.mp4 (.png for images), strip.png, result.json; "
            "dense.mp4 with --compare-dense. Other files in the folder are not changed.",
            show_default=False,
        ),
    ],
    compare_dense: Annotated[
        bool,
        typer.Option(
            "--compare-dense",
            help="Also run the model dense with the same seed, and compare time and quality.",
        ),
    ] = False,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set a param of the strategy's method or schedule; VALUE is JSON or plain "
            "text. Can be repeated.",
        ),
    ] = None,
    steps: Steps = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    guidance_scale: GuidanceScale = None,
    negative_prompt: NegativePrompt = None,
    call: Call = None,
    lora: Loras = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Random seed of the initial noise.", **WHAT)
    ] = 0,
    fps: Fps = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kernel: Kernel = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Raise an error instead of computing a call densely if its geometry or mask is "
            "not supported.",
            **HOW,
        ),
    ] = False,
    probe: Annotated[
        int,
        typer.Option(
            min=0,
            max=100_000,
            help="Query rows per attention call for measuring recall, in an additional sparse "
            "run; 0 skips that run.",
            **HOW,
        ),
    ] = 32,
    guarantee: Annotated[
        str | None,
        typer.Option(
            metavar="ERROR|receipt",
            help="Maximum relative error of a head's output, in (0, 1], checked on probed rows; "
            "a head that exceeds it goes back to dense. 'receipt': three times the error in the "
            "strategy's receipt.",
            show_default="no guarantee",
            **HOW,
        ),
    ] = None,
    threads: Threads = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing result in the output folder.")
    ] = False,
    debug: Debug = False,  # noqa: ARG001  (read by ``guarded``)
) -> None:
    """Generate with sparse attention and say what it gained and cost.

    The sparse run writes its clip, a strip of frames and result.json. With --compare-dense the
    same seed runs dense too, and the receipt has the speed-up, PSNR and SSIM between the two.
    """
    from dit_sparse.cli.perform import Request, perform
    from dit_sparse.cli.source import Settings

    perform(
        Request(
            model=model,
            prompt=prompt,
            strategy=strategy,
            output=output,
            options=key_values("--set", options),
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
            compare_dense=compare_dense,
            seed=seed,
            fps=fps,
            device=device,
            dtype=dtype,
            kernel=kernel,
            strict=strict,
            probe=probe,
            guarantee=number_or_word(guarantee),
            threads=threads,
            overwrite=overwrite,
        )
    )


def number_or_word(text: str | None) -> float | str | None:
    """Read a number where the text is one."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text
