# SPDX-License-Identifier: Apache-2.0
"""``dit-sparse forecast``: what could be gained, from config files alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dit_sparse.cli.console import ERR, OUT, Debug, UserError, first_line, styled
from dit_sparse.core.reading import load_json

if TYPE_CHECKING:
    from dit_sparse.forecast.generation import Forecast, MethodForecast
    from dit_sparse.pipelines.known import KnownModel
    from dit_sparse.pipelines.size import ModelSize
    from dit_sparse.strategy import Strategy

MOST = 4096  # layers, heads: the largest models have about a hundred of either
EXAMPLES = (
    "dit-sparse forecast hunyuan-video --strategy radial",
    "dit-sparse forecast wan2.1-14b --height 480 --width 832 --density 0.25",
    "dit-sparse forecast wan2.1-14b --all-methods",
    "dit-sparse forecast samples/wan-tiny --strategy wan-tiny.adaspa",
)


def run(
    model: Annotated[
        str,
        typer.Argument(
            help="A known model name (hunyuan-video, wan2.1-14b, ...), folder or Hub id."
        ),
    ],
    height: Annotated[int | None, typer.Option(min=16, max=16384, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=16, max=16384, help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, max=10_000, help="Frames.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Denoising steps.")] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="A shipped strategy, strategy file, Hub repository or method.",
            show_default="none: a generic method with a tenth of the steps dense",
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            min=0.0001,
            max=1.0,
            help="Density of sparse calls.",
            show_default="the strategy's if known, else 0.25",
        ),
    ] = None,
    efficiency: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=2.0,
            help="Kernel efficiency, as defined by bench.",
            show_default="0.9, assumed",
        ),
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option(help="Use the median efficiency from a file written by bench."),
    ] = None,
    all_methods: Annotated[
        bool,
        typer.Option(
            "--all-methods", help="Print a table of all methods with their default params instead."
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="JSON file for the results; an existing file is replaced."
        ),
    ] = None,
    debug: Debug = False,  # noqa: ARG001  (read by ``guarded``)
) -> None:
    """Forecast gain and memory without weights or a GPU.

    Counts what the transformer computes at this size (text encoders and VAE left out), and says
    when sparse attention is not worth it.
    """
    if efficiency is not None and bench is not None:
        raise UserError("--efficiency and --bench cannot be combined; use one of them")
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise UserError(f"-o {output}: must be a file name in an existing folder")
    if all_methods and strategy is not None:
        raise UserError("--all-methods and --strategy cannot be combined; use one of them")
    measured = None if bench is None else _efficiency(bench)
    with ERR.status(f"counting {model}"):
        from dit_sparse.forecast.generation import (
            EFFICIENCY,
            better_size,
            forecast,
            forecast_method,
        )
        from dit_sparse.methods import METHODS
        from dit_sparse.methods.params import build_method
        from dit_sparse.pipelines.size import model_size
        from dit_sparse.strategy import Strategy, config_hash

        found, vae = read_model(model)
        rows, columns = height or found.height, width or found.width
        count = frames or found.num_frames
        size = model_size(found.config, rows, columns, count, vae=vae)
        batch = 2 if size.family.batched_cfg else 1
        length = f", {count} frames" if count > 1 else ""
        title = f"{model}, {rows} x {columns} pixels{length}, {steps or found.num_steps} steps"
        if all_methods:
            listed = [
                forecast_method(
                    name, build_method(name, {}), size, steps or found.num_steps, batch
                )
                for name in METHODS
                if name != "dense"
            ]
        else:
            remarks: tuple[str, ...] = ()
            asked = None if strategy is None else Strategy.coerce(strategy)
            if asked is not None:
                remarks = _check(asked, size, config_hash(found.config))
            told = forecast(
                size,
                asked,
                num_steps=steps or found.num_steps,
                density=density,
                efficiency=efficiency or measured or EFFICIENCY,
                batch=batch,
            )
            better = better_size(size, rows, columns)
    if all_methods:
        OUT.print(_method_table(listed, size.layers, title))
        if output is not None:
            _write(output, {"title": title, "methods": [asdict(m) for m in listed]})
        return
    source = "given" if efficiency else f"median of {bench}" if bench else "assumed"
    OUT.print(_table(told, title, source, better))
    for warning in (*remarks, *told.warnings):
        OUT.print(styled((warning, "bold yellow")))
    if output is not None:
        _save(output, told, title, source)


def read_model(name: str) -> tuple[KnownModel, dict[str, Any] | None]:
    """Find a model's transformer config, its usual size, and its VAE's config."""
    from dit_sparse.cli.source import SampleDefaults, local_folder
    from dit_sparse.pipelines import family_by_name
    from dit_sparse.pipelines.known import KNOWN_MODELS, KnownModel, known_model

    if name in KNOWN_MODELS:
        return known_model(name), None
    folder = local_folder(name) if Path(name).exists() or "/" in name else None
    if folder is None and "/" not in name:
        known_model(name)  # says which names there are
    config = _config(name, folder, "transformer")
    if config is None:
        raise UserError(
            f"{name}: has no transformer/config.json; give a Diffusers pipeline folder, a Hub id "
            "or a known model name"
        )
    defaults = SampleDefaults() if folder is None else SampleDefaults.read(folder)
    if "_class_name" not in config:
        raise UserError(
            f"{name}: transformer/config.json: missing key '_class_name'; use a config saved by "
            "Diffusers"
        )
    for key, value in config.items():
        if isinstance(value, int) and value > MOST and ("layers" in key or "heads" in key):
            raise UserError(
                f"{name}: transformer/config.json: {key}: must be at most {MOST}, got {value}"
            )
    usual = family_by_name(config["_class_name"]).usual
    return KnownModel(
        config,
        defaults.height or usual.height,
        defaults.width or usual.width,
        defaults.num_frames or usual.num_frames,
        defaults.num_inference_steps or usual.num_steps,
    ), _config(name, folder, "vae")


def _config(name: str, folder: Path | None, part: str) -> dict[str, Any] | None:
    """Read ``part/config.json`` of a folder, or download just that file."""
    path = None if folder is None else folder / part / "config.json"
    try:
        if path is None:
            from dit_sparse.strategy.hub import fetch

            path = fetch(name, f"{part}/config.json")
        if not path.is_file():
            return None
        found: dict[str, Any] = load_json(path)
    except Exception as error:  # the network, the Hub, the file: what was named is wrong
        raise UserError(f"{name}: {part}/config.json: {first_line(error)}") from error
    return found


def _efficiency(path: Path) -> float:
    """Take the median efficiency of a benchmark's file."""
    import statistics

    try:
        rows = load_json(path)["measurements"]
        return float(statistics.median(r["efficiency"] for r in rows if r["efficiency"]))
    except (OSError, ValueError, KeyError, TypeError, statistics.StatisticsError) as error:
        raise UserError(
            f"--bench {path}: not a file written by dit-sparse bench: {first_line(error)}"
        ) from error


def _check(asked: Strategy, size: ModelSize, config: str) -> tuple[str, ...]:
    """Refuse a strategy that cannot be meant for this model; what is odd, but runs."""
    wan = size.class_name.startswith("Wan")
    stages = ("transformer", "transformer_2") if wan else ("transformer",)
    return asked.validate_for(
        size.class_name, size.layers, size.heads, stages=stages, config_hash=config
    )


def _method_table(listed: list[MethodForecast], layers: int, title: str) -> Table:
    table = Table(title=f"{title}: all methods with default params, per forward pass")
    for name in ("method", "density", "counted", "state per layer", "all layers", "shared"):
        table.add_column(name, justify="left" if name in {"method", "counted"} else "right")
    for m in listed:
        table.add_row(
            m.method,
            "by content" if m.density is None else f"{m.density:.1%}",
            "from plans" if m.exact else "by params" if m.density is not None else "",
            f"{_si(m.state_bytes)}B",
            f"{_si(m.state_bytes * layers)}B",
            f"{_si(m.shared_bytes)}B",
        )
    return table


def _table(told: Forecast, title: str, source: str, better: tuple[int, int] | None) -> Table:
    size = told.size
    table = Table(title=title, show_header=False, box=None, padding=(0, 2, 0, 2))
    whole = size.attention_flops + size.other_flops
    alone = "frames are multiples of 128 tokens"
    rows = [
        ("transformer", f"{size.class_name}, {_si(size.parameters)} weights"),
        ("tokens", f"{size.grid.tokens:,} ({size.grid})"),
        ("layers x heads x head_dim", f"{size.layers} x {size.heads} x {size.head_dim}"),
        ("self-attention", f"{_si(size.attention_flops)} of {_si(whole)} FLOP per pass"),
        ("", f"{told.share:.0%} of the time of a pass"),
        ("maximum speed-up", f"{told.cap:.2f} x, if attention were free"),
        ("sparse calls", f"{told.sparse_share:.0%} of all calls"),
        ("their density", f"{told.density:.1%} ({told.density_from})"),
        ("kernel efficiency", f"{told.efficiency:.2f} ({source})"),
        ("planning", f"{told.planning:.1%} of dense attention (assumed)"),
        ("expected speed-up", f"{told.gain:.2f} x (excluding text encoders and VAE)"),
        ("state, per pass", f"{_si(told.state_bytes)}B"),
        *((f"  {m.method}", f"{_si(m.state_bytes)}B per layer") for m in told.methods),
        *((f"  {m.method}", f"{_si(m.shared_bytes)}B shared by all layers") for m in told.methods),
        ("kernel on this machine", _kernel()),
        (
            "nearest better size",
            f"this size: {alone}" if better is None else f"{better[0]} x {better[1]}: {alone}",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _si(number: float) -> str:
    """Write a number with a unit's prefix: 12.3 G."""
    for prefix, unit in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= unit:
            return f"{number / unit:.1f} {prefix}"
    return f"{number:.0f} "


def _kernel() -> str:
    """Name the kernel that would run on this machine."""
    import torch

    from dit_sparse.forecast.doctor import accelerators
    from dit_sparse.kernels.dispatch import BY_NAME_ONLY, Backends

    device = next(iter(accelerators()), "cpu")
    names = [
        name
        for name, reasons in Backends().explain(
            device, torch.float32 if device == "cpu" else torch.bfloat16
        )
        if not reasons and name not in BY_NAME_ONLY
    ]
    if not names:
        return f"none available on {device}; run 'dit-sparse doctor'"
    doubt = ", which may be slower than dense attention" if names[0] == "portable" else ""
    return f"{names[0]} ({device}){doubt}"


def _save(path: Path, told: Forecast, title: str, source: str) -> None:
    plain = asdict(told)
    size = plain.pop("size")
    size.pop("family")
    known = {"title": title, "efficiency_from": source, "worth_it": told.worth_it}
    _write(path, {**known, **plain, "size": size})


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"-o {path}: cannot be written: {error.strerror}") from error
