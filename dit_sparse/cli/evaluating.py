# SPDX-License-Identifier: Apache-2.0
"""What ``evaluate`` does: check everything cheap, make the missing clips, measure, report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import typer
from rich.table import Table

from dit_sparse.attach.apply import enable
from dit_sparse.cli.console import OUT, UserError, progress, say, styled
from dit_sparse.cli.making import Maker
from dit_sparse.cli.options import read_seeds
from dit_sparse.cli.prompts import of_file
from dit_sparse.cli.source import (
    DEFAULT_FPS,
    SampleDefaults,
    Settings,
    call_arguments,
    effective,
    load,
    local_folder,
    machine,
)
from dit_sparse.core.machine import environment
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.quality.catalogue import chosen
from dit_sparse.quality.evaluation import Store, generate, measure, open_store
from dit_sparse.quality.evaluation_setup import DENSE, FLOOR, Setup
from dit_sparse.quality.gates import parse_gates
from dit_sparse.quality.report import write_evaluation
from dit_sparse.quality.summary import Pair, Summary, summarise
from dit_sparse.strategy import Strategy
from dit_sparse.strategy.identity import pipeline_identity, versions

if TYPE_CHECKING:
    from pathlib import Path

    from dit_sparse.cli.lora import Lora


@dataclass(frozen=True)
class Wish:
    """One call of ``dit-sparse evaluate``; its help says what each means."""

    model: str
    strategies: tuple[str, ...]
    output: Path
    prompts: Path | None
    prompt: tuple[str, ...]
    seeds: str
    settings: Settings
    loras: tuple[Lora, ...]
    fps: float | None
    floor: str | None
    metrics: list[str] | None
    gates: tuple[str, ...]
    every: int
    device: str
    dtype: str
    kernel: str | None
    threads: int | None
    fresh: bool


def perform(wish: Wish) -> bool:
    """Do it; False where a gate failed. Every process of a launch runs this."""
    from accelerate import PartialState

    metrics = chosen(wish.metrics)
    parse_gates(wish.gates, metrics)
    strategies = read_strategies(wish.strategies)
    Backends(wish.kernel)  # a name that does not exist is said before anything is loaded
    prompts, seeds = read_prompts(wish), read_seeds(wish.seeds)
    folder = local_folder(wish.model)
    defaults = SampleDefaults() if folder is None else SampleDefaults.read(folder)
    if wish.threads is not None:
        torch.set_num_threads(wish.threads)
    state = PartialState(cpu=wish.device == "cpu")
    device, dtype = machine(wish.device, wish.dtype, state.local_process_index)
    pipe = load(wish.model, device, dtype, wish.loras)
    arguments = call_arguments(pipe, prompts[0], wish.settings.over(defaults))
    facts = environment()
    setup = Setup(
        model=wish.model,
        prompts=prompts,
        seeds=seeds,
        strategies={label: each.to_dict() for label, each in strategies.items()},
        call={
            **effective(pipe, arguments),
            "pipeline": type(pipe).__name__,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.partition(":")[0],
            "kernel": wish.kernel or "the best that can run",
        },
        identity={
            "pipeline": pipeline_identity(pipe),
            "machine": timed_on(device, facts),
            "versions": versions(),
        },
        fps=wish.fps or defaults.fps or DEFAULT_FPS,
        floor=f"SDPA {wish.floor}" if wish.floor else None,
        metrics=metrics,
        every=wish.every,
        about={
            **({"lora": ", ".join(map(str, wish.loras))} if wish.loras else {}),
            "versions": facts["packages"],
            "device": device,
            "processor": facts["processor"],
            "gpus": facts["gpus"],
            "torch_threads": facts["torch_threads"],
            "processes": state.num_processes,
            "platform": facts["platform"],
        },
    )
    for each in strategies.values():  # does it fit this model? Said before the first clip
        enable(pipe, each, kernel=wish.kernel).remove()
    if state.is_main_process:
        open_store(wish.output, setup, fresh=wish.fresh)
    state.wait_for_everyone()
    jobs = setup.jobs()[state.process_index :: state.num_processes]
    place = Store(wish.output)
    try:
        with progress() as bars, enable(pipe, Strategy.single("dense"), kernel=wish.kernel) as at:
            task = bars.add_task("clips", total=len(jobs) * len(setup.arms))
            maker = Maker(pipe, arguments, at, strategies, wish.floor, bars)
            for _ in generate(setup, place, maker, jobs):
                bars.advance(task)
            labels = [arm for arm in setup.arms if arm != DENSE]
            task = bars.add_task("measuring", total=len(jobs) * len(labels))
            for job in jobs:
                for label in labels:
                    measure(setup, place, job, label)
                    bars.advance(task)
    except KeyboardInterrupt:
        say(
            f"Interrupted. Finished clips are kept in {wish.output}; run the same command to "
            "resume."
        )
        raise typer.Exit(130) from None
    state.wait_for_everyone()
    if not state.is_main_process:
        return True
    found = summed_up(setup, place, wish.gates)
    files = write_evaluation(found, wish.output)
    show(found)
    OUT.print(styled((f"{wish.output}/", "dim"), f" {', '.join(files)}, pairs/"), soft_wrap=True)
    return found.passed is not False


def timed_on(device: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Name what the times of clips depend on: two of different machines are no speed-up."""
    if device.startswith("cuda"):
        return {"gpu": torch.cuda.get_device_name(device)}
    return {key: facts[key] for key in ("processor", "torch_threads")}


def read_strategies(names: tuple[str, ...]) -> dict[str, Strategy]:
    """Read the strategies, by name."""
    found: dict[str, Strategy] = {}
    for name in names:
        each = Strategy.coerce(name)
        if each.name in found:
            raise UserError(
                f"--strategy {name}: another strategy is also named {each.name!r}; names must be "
                "unique"
            )
        found[each.name] = each
    return found


def read_prompts(wish: Wish) -> tuple[str, ...]:
    """Put the prompts of the file and of the command line together."""
    lines = () if wish.prompts is None else of_file(wish.prompts)
    found = (*lines, *(text for each in wish.prompt if (text := each.strip())))
    if not found:
        raise UserError("no prompts; give --prompts FILE (one prompt per line) or --prompt TEXT")
    return found


def summed_up(setup: Setup, place: Store, gates: tuple[str, ...]) -> Summary:
    """Read every pair back and sum up."""
    found: dict[str, list[Pair]] = {}
    for job in setup.jobs():
        for arm in setup.arms:
            if arm != DENSE:
                page = f"pairs/{job.key}/vs-{arm}/report.html"
                pair = Pair(job, page, measure(setup, place, job, arm))
                found.setdefault(arm, []).append(pair)
    return summarise(setup, found, gates)


def show(found: Summary) -> None:
    """Print the table and the verdicts."""
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for heading in ("strategy", "speed-up", "density", "PSNR", "worst", "SSIM", "LPIPS"):
        table.add_column(heading, justify="left" if heading == "strategy" else "right")
    for arm in (*found.arms, *([found.floor] if found.floor is not None else [])):
        rows = [arm.rows.get(name) for name in ("psnr", "psnr", "ssim", "lpips_alex")]
        values = [None if row is None else row.value for row in rows]
        values[1] = None if rows[1] is None else rows[1].worst
        cells = ["-" if value is None else f"{value:.4g}" for value in values]
        label = f"noise floor: {found.setup.floor}" if arm.label == FLOOR else arm.label
        speed = "-" if arm.speedup is None or arm.label == FLOOR else f"{arm.speedup[0]:.2f}x"
        density = "-" if arm.density is None else f"{arm.density:.3f}"
        table.add_row(label, speed, density, *cells)
    OUT.print()
    OUT.print(table)
    OUT.print()
    for note in found.notes:
        OUT.print(styled(("note:", "yellow"), f" {note}"))
    for arm in found.arms:
        for verdict in arm.verdicts:
            style = "green" if verdict.passed else "bold red"
            OUT.print(styled((f"{arm.label}: {verdict}", style)))
