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
    prompt: Annotated[str, typer.Argument(help="What to show.", show_default=False)],
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            help="A shipped strategy, the path or Hub id of one, or a method's name; "
            "'dit-sparse methods' lists them.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the results: sparse.mp4 (.png for images), strip.png, result.json; "
            "dense.mp4 with --compare-dense. Other files in it are left alone.",
            show_default=False,
        ),
    ],
    compare_dense: Annotated[
        bool,
        typer.Option(
            "--compare-dense",
            help="Run the model dense too, from the same seed, and compare time and quality.",
        ),
    ] = False,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change one param of the strategy's method, or of its schedule; VALUE is JSON "
            "or plain text. May be given several times.",
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
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the noise.", **WHAT)
    ] = 0,
    fps: Fps = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kernel: Kernel = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Stop where a call would stay dense because its geometry or mask is not "
            "understood.",
            **HOW,
        ),
    ] = False,
    probe: Annotated[
        int,
        typer.Option(
            min=0,
            max=100_000,
            help="Query rows per attention call on which recall is measured, in one more sparse "
            "run; 0: no such run.",
            **HOW,
        ),
    ] = 32,
    guarantee: Annotated[
        str | None,
        typer.Option(
            metavar="ERROR|receipt",
            help="Largest relative error of a head's output, in (0, 1], watched on probed rows: a "
            "head that is farther off goes back to dense. 'receipt': three times what the "
            "strategy's receipt has measured.",
            show_default="not watched",
            **HOW,
        ),
    ] = None,
    threads: Threads = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier result in the output folder.")
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
