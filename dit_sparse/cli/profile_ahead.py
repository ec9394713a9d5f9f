# SPDX-License-Identifier: Apache-2.0
"""``dit-sparse profile --dry-run``: how long a search will take, from config files alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dit_sparse.cli.console import ERR, OUT, styled
from dit_sparse.cli.forecast import read_model

if TYPE_CHECKING:
    from rich.table import Table

    from dit_sparse.profiler.expected import Expected

GUIDED = ("Wan",)  # families that run a pass for each guidance branch


def tell(
    model: str,
    size: tuple[int | None, int | None, int | None],
    steps: int | None,
    guidance: float | None,
    units: int,
    candidates: str,
    edges: tuple[float, ...],
    captures: int,
    sample: int | None,
    shortlist: int,
    sequential: str,
    *,
    check: bool,
    timing: bool,
    state_limit: float,
) -> None:
    """Print the forecast.

    Args:
        model: A known name, folder or Hub id.
        size: Height, width and frames; None: the model's.
        steps: Likewise.
        guidance: Guidance scale; without any a step is one pass.
        units: Prompts times seeds.
        candidates: As ``profile`` takes them.
        edges: Of the step bands.
        captures: Captured calls of a layer and band.
        sample: Rows that are compared.
        shortlist: Candidates that are measured on all calls, at most; 0: all.
        sequential: As ``profile`` takes it.
        check: The strategy is run once at the end.
        timing: Costs are measured.
        state_limit: GiB that candidates may remember.
    """
    with ERR.status(f"counting {model}"):
        from dit_sparse.pipelines.size import model_size
        from dit_sparse.profiler.candidates import parse_candidates
        from dit_sparse.profiler.capture import Bands, Measuring
        from dit_sparse.profiler.expected import expected

        how = Measuring(
            parse_candidates(candidates), Bands(edges, captures), sample,
            int(state_limit * 2**30), shortlist,
        )  # fmt: skip
        known, vae = read_model(model)
        height, width = size[0] or known.height, size[1] or known.width
        frames, count = size[2] or known.num_frames, steps or known.num_steps
        found = model_size(known.config, height, width, frames, vae=vae)
        two = found.family.batched_cfg or found.class_name.startswith(GUIDED)
        passes = 2 if two and (guidance is None or guidance > 1) else 1
        told = expected(
            found, how, num_steps=count, units=units, passes=passes, sequential=sequential,
            check=check, timing=timing,
        )  # fmt: skip
    length = f", {frames} frames" if frames > 1 else ""
    title = f"{model}, {height} x {width} pixels{length}, {count} steps of {passes} passes"
    OUT.print(_table(told, title, how.measured))
    if told.state_bytes > state_limit * 2**30:
        most = max(told.state, key=lambda name: told.state[name])
        warning = (
            f"Candidates need more state than --state-limit {state_limit:g} GiB, and the search "
            "would stop:"
        )
        advice = f" raise the limit, or exclude a method, e.g. --candidates {candidates},-{most}."
        OUT.print(styled((warning, "bold yellow"), advice))


def _table(told: Expected, title: str, candidates: int) -> Table:
    from rich.table import Table

    from dit_sparse.forecast.generation import ATTENTION_RATE, EFFICIENCY, OTHER_RATE
    from dit_sparse.profiler.cost import SEARCH
    from dit_sparse.profiler.expected import OWN

    table = Table(title=title, show_header=False, box=None, padding=(0, 2, 0, 2))
    for row in (
        ("one dense generation", f"{_time(told.generation)}, excluding text encoders and VAE"),
        (
            "per prompt and seed",
            (
                f"{told.per_unit:.2f} generations: {told.own:g} for the run itself, "
                f"{told.measuring:.2f} to measure {candidates} candidates on {told.captured} "
                "calls"
            ),
        ),
        *([("screening", f"{told.screening:.2f} generations, once")] if told.screening else []),
        ("micro-benchmark", f"{told.timing:.2f} generations, once"),
        ("final check", f"{told.check:g} generations, once"),
        ("total", f"{_time(told.seconds)} for {told.units} prompts x seeds"),
        ("state", f"at most {told.state_bytes / 2**30:.1f} GiB, for {_heavy(told)}"),
        (
            "assumptions",
            (
                f"one GPU with {ATTENTION_RATE:g} TFLOP/s in attention and {OTHER_RATE:g} "
                f"TFLOP/s elsewhere (H100 or H200, bf16), kernel efficiency {EFFICIENCY:g}, "
                f"{OWN:.0%} of a dense call for each candidate's planning and comparing, "
                f"{SEARCH:g} dense call for the searches"
            ),
        ),
    ):
        table.add_row(*row)
    return table


def _heavy(told: Expected) -> str:
    """Name what remembers most."""
    named = sorted(told.state.items(), key=lambda item: -item[1])[:3]
    found = [f"{name} {size / 2**30:.1f}" for name, size in named if size >= 2**20]
    return ", ".join(found) or "no candidate"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
