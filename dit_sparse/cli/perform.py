# SPDX-License-Identifier: Apache-2.0
"""What ``generate`` does: check everything cheap first, run the arms, write, print."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.attach.apply import enable
from dit_sparse.attach.guarantee import Guarantee
from dit_sparse.cli import receipt
from dit_sparse.cli.arms import Runner
from dit_sparse.cli.console import progress, say
from dit_sparse.cli.folder import RESULT, staged, write_json
from dit_sparse.cli.result import SCHEMA_VERSION, measure, summarise
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
from dit_sparse.core.video import frame_strip, write_mp4, write_png
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rich.progress import Progress

    from dit_sparse.attach.apply import SparseAttention
    from dit_sparse.cli.arms import Runs
    from dit_sparse.cli.lora import Lora
    from dit_sparse.core.video import Frames
    from dit_sparse.quality import Scores


@dataclass(frozen=True)
class Request:
    """One call of ``dit-sparse generate``; its help says what each means."""

    model: str
    prompt: str
    strategy: str
    output: Path
    options: dict[str, Any]
    settings: Settings
    loras: tuple[Lora, ...]
    compare_dense: bool
    seed: int
    fps: float | None
    device: str
    dtype: str
    kernel: str | None
    strict: bool
    probe: int
    guarantee: float | str | None
    threads: int | None
    overwrite: bool


def perform(request: Request) -> None:
    """Generate, compare, write the folder and print the receipt."""
    strategy = Strategy.coerce(request.strategy, **request.options)
    if request.guarantee is not None:
        Guarantee.coerce(request.guarantee).bound(strategy)  # says what is wrong with it
    Backends(request.kernel)  # a name that does not exist is said before anything is loaded
    folder = local_folder(request.model)
    device, dtype = machine(request.device, request.dtype)
    defaults = SampleDefaults() if folder is None else SampleDefaults.read(folder)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    with staged(request.output, overwrite=request.overwrite) as scratch:
        pipe = load(request.model, device, dtype, request.loras)
        arguments = call_arguments(pipe, request.prompt, request.settings.over(defaults))
        with progress() as bars:
            handle = attach(pipe, strategy, request)
            with handle:
                runs = Runner(pipe, arguments, request.seed, bars).all(
                    handle,
                    compare_dense=request.compare_dense,
                    probe=request.probe,
                    steps=arguments.get("num_inference_steps"),
                )
            scores = measure(runs, lambda frames, label: watched(bars, frames, label))
            fps = request.fps or defaults.fps or DEFAULT_FPS
            written = write_pictures(scratch, runs, caption(request, scores), fps, bars)
        result = {
            "schema_version": SCHEMA_VERSION,
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request": described(request, pipe, arguments, fps),
            "strategy": handle.strategy.to_dict(),
            "environment": {**environment(), "device": device, "dtype": str(dtype)[6:]},
            **summarise(runs, scores, request.probe),
            "files": [*written, RESULT],
        }
        write_json(scratch / RESULT, result)
    receipt.show(result, request.output, [*written, RESULT])


def attach(pipe: Any, strategy: Strategy, request: Request) -> SparseAttention:
    """Enable, and say what is odd about it but runs."""
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        handle = enable(
            pipe,
            strategy,
            kernel=request.kernel,
            strict=request.strict,
            guarantee=request.guarantee,
        )
    for remark in remarks:
        say(f"note: {remark.message}")
    return handle


def watched(bars: Progress, frames: Frames, label: str) -> Iterable[Any]:
    """Walk over frames under a progress bar."""
    return bars.track(frames, total=len(frames), description=label)


def write_pictures(folder: Path, runs: Runs, title: str, fps: float, bars: Progress) -> list[str]:
    """Write the clips (or images) and the strip; give their names."""
    clips = {"dense": runs.dense, "sparse": runs.sparse}
    made = {label: arm.frames for label, arm in clips.items() if arm is not None}
    names = []
    for label, frames in bars.track(made.items(), description="writing"):
        if len(frames) > 1:
            names.append(f"{label}.mp4")
            write_mp4(folder / names[-1], frames, fps)
        else:
            names.append(f"{label}.png")
            write_png(folder / names[-1], frames[0])
    write_png(folder / "strip.png", frame_strip(made, title))
    return [*names, "strip.png"]


def caption(request: Request, scores: dict[str, Scores]) -> str:
    """Say in one line what the strip shows."""
    told = [
        f"{name.upper()} {scores[name].value:.{digits}f} {scores[name].unit}".strip()
        for name, digits in (("psnr", 2), ("ssim", 4))
        if name in scores and scores[name].value is not None
    ]
    return ", ".join([f'"{request.prompt}"', f"seed {request.seed}", *told])


def described(
    request: Request, pipe: Any, arguments: dict[str, Any], fps: float
) -> dict[str, Any]:
    """Give what was asked and what it came to."""
    transformer = getattr(pipe, "transformer", None)
    return {
        "model": request.model,
        "lora": [str(one) for one in request.loras],
        "pipeline": type(pipe).__name__,
        "transformer": type(transformer).__name__,
        "prompt": request.prompt,
        "seed": request.seed,
        "strategy": request.strategy,
        "options": request.options,
        "settings": {**effective(pipe, arguments), "fps": fps},
        "kernel": request.kernel,
        "strict": request.strict,
        "compare_dense": request.compare_dense,
        "probe": request.probe,
        "guarantee": request.guarantee,
    }
