# SPDX-License-Identifier: Apache-2.0
"""``dit-sparse bench``: how fast the kernels of this machine are, sparse against dense."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from dit_sparse.cli.console import ERR, OUT, Debug, Terminal, UserError, say

EXAMPLES = (
    "dit-sparse bench --device cpu -o bench.json",
    "dit-sparse bench --block-size 128 --density 0.25 --threads 1 --repeats 3",
    "dit-sparse bench --shape 'HunyuanVideo' --kernel triton --kernel flex",
    "dit-sparse bench --shape 21x30x52x2x128 --method radial --method svg2",
)


def run(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="JSON file for all results; an existing file is replaced.",
            show_default="none, print only the table",
        ),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(help="auto: the GPU if available, else the CPU."),
    ] = "auto",
    block_sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--block-size",
            min=1,
            max=1024,
            help="Block size in tokens; can be repeated.",
            show_default="64 and 128",
        ),
    ] = None,
    densities: Annotated[
        list[float] | None,
        typer.Option(
            "--density",
            min=0.001,
            max=1.0,
            help="Fraction of key blocks to compute; can be repeated.",
            show_default="0.5, 0.25, and 0.125 on the CPU, 0.1 on a GPU",
        ),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=4096,
            help="Number of CPU threads; can be repeated.",
            show_default="1 and all",
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            help="Part of a known shape's name, or FRAMESxHEIGHTxWIDTHxHEADSxHEAD_DIM in "
            "tokens; can be repeated.",
            show_default="8k tokens on the CPU, the models' full sizes on a GPU",
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="Measure whole methods over a generation, including planning and ordering, "
            "instead of kernels alone: a method name, or all; can be repeated.",
            show_default="none: measure kernels on fixed plans",
        ),
    ] = None,
    num_steps: Annotated[
        int, typer.Option("--steps", min=2, max=1000, help="Number of steps in that generation.")
    ] = 50,
    repeats: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of timed rounds; the median is reported.")
    ] = 5,
    kernels: Annotated[
        list[str] | None,
        typer.Option(
            "--kernel",
            help="Kernel to measure; can be repeated.",
            show_default="the fastest on the CPU, all available on a GPU",
        ),
    ] = None,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory/--no-memory", help="Also measure peak memory at 32k tokens (CPU only)."
        ),
    ] = True,
    debug: Debug = False,  # noqa: ARG001  (read by ``guarded``)
) -> None:
    """Time sparse against dense attention in one process.

    efficiency = dense time x density / sparse time: 1 where every block that is left out saves
    its whole share of the dense time. A method's times include its planning and its ordering.
    """
    import torch

    from dit_sparse.bench import find_shapes, run_bench, run_method_bench
    from dit_sparse.kernels.dispatch import Backends
    from dit_sparse.methods import METHODS, method_class

    for kernel in kernels or ():  # a name that does not exist is said at once
        Backends(kernel)
    for name in methods or ():
        if name != "all":
            method_class(name)
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise UserError(
            f"--device cuda: torch {torch.__version__} finds no GPU; use --device cpu, or run "
            "'dit-sparse doctor' for details"
        )
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise UserError(f"-o {output}: must be a file name in an existing folder")
    given: dict[str, Any] = {"threads": threads, "shapes": find_shapes(shapes or ())}
    with ERR.status("measuring") as status:

        def tell(line: str) -> None:
            status.update(Text(f"measuring {line}"))
            if not ERR.is_terminal:
                say(f"measuring {line} ...")

        given |= {
            "device": "cuda" if device == "cuda" or (device == "auto" and there) else "cpu",
            "repeats": repeats,
            "command": " ".join(["dit-sparse", *sys.argv[1:]]),
            "progress": tell,
        }
        if methods:
            names = [n for n in METHODS if n != "dense"] if "all" in methods else methods
            given |= {"methods": names, "num_steps": num_steps}
            found = run_method_bench(**{name: value for name, value in given.items() if value})
        else:
            given |= {"block_sizes": block_sizes, "densities": densities, "kernels": kernels}
            given = {name: value for name, value in given.items() if value}
            found = run_bench(memory=memory, **given)
    # Many columns: in a file or a pipe lines may be long, a terminal is as wide as it is.
    wide = OUT if OUT.is_terminal else Terminal(width=max(OUT.width, 140))
    wide.print(found.table())
    if output is not None:
        try:
            found.save(output)
        except OSError as error:
            raise UserError(f"-o {output}: cannot be written: {error.strerror}") from error
