# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: INP001  (scripts of the documentation, no package)
"""Benchmark pages from the committed data: every figure in them is read from a file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tables import environment, size, table

from dit_sparse.methods import METHODS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def pages(data: Path) -> dict[str, str]:
    """Write a page for each kind of data: name of the page -> Markdown."""
    makers: dict[str, Callable[[Path], str]] = {
        "kernels": _kernels,
        "methods": _methods,
        "memory": _memory,
        "demo": _demo,
        "compiled": _compiled,
    }
    return {name: make(data) for name, make in makers.items()}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _made(found: dict[str, Any], path: Path) -> str:
    where = environment(found.get("environment", {}))
    return f"Made by `{found['command']}` on {where}. Data: `docs/benchmarks/{path.name}`.\n"


def _kernels(data: Path) -> str:
    text = [
        "# Kernels against dense attention\n",
        (
            "Efficiency is (dense time x density) / sparse time: 1 where every dropped block "
            "saves its whole share. *local*: kept blocks stand beside each other; *random*: they "
            "stand alone.\n"
        ),
    ]
    for path in sorted(data.glob("*.json")):
        found = _read(path)
        if not isinstance(found, dict) or not found.get("measurements"):
            continue
        text += [f"## {found['environment'].get('processor') or path.stem}\n", _made(found, path)]
        rows = [
            (
                each["shape"]["name"],
                each["dtype"],
                each["block_size"],
                each["pattern"],
                f"{each['density']:g}",
                each["threads"],
                f"{each['kernel']} / {each['dense_kernel']}",
                f"{each['dense_ms']:.1f}",
                f"{each['sparse_ms']:.1f}",
                f"{each['speedup']:.2f}",
                f"{each['efficiency']:.2f}",
            )
            for each in found["measurements"]
        ]
        head = ("shape", "dtype", "block", "pattern", "density", "threads", "kernel / dense",
                "dense ms", "sparse ms", "speed-up", "efficiency")  # fmt: skip
        text.append(table(head, rows))
        if peak := found.get("peak_memory"):
            text.append(
                f"A sparse call at {peak['tokens']:,} tokens ({peak['heads']} heads of "
                f"{peak['head_dim']}, density {peak['density']:g}, {peak['threads']} threads) "
                f"takes {peak['extra_mib']:.1f} MiB beyond its inputs and its output.\n"
            )
    return "\n".join(text)


def _methods(data: Path) -> str:
    text = [
        "# What methods cost\n",
        (
            "Whole methods with default params (or those named), planning and ordering "
            "included, over one generation of one layer, on synthetic queries and keys. Planning "
            "is a share of one dense attention; efficiency is (dense time x density) / sparse "
            "time. Densities are the methods' own on this content, so rows are not at equal "
            "quality.\n"
        ),
    ]
    for path in sorted(data.glob("methods-*.json")):
        found = _read(path)
        text += [f"## {path.stem}\n", _made(found, path)]
        rows = [
            (
                f"[`{row['method']}`](../methods/{row['method']}.md){_differing(row['params'])}",
                row["shape"]["name"],
                row["threads"],
                f"{row['density']:.1%}",
                f"{row['planning_share']:.1%}",
                f"{row['efficiency']:.2f}",
                f"{row['speedup']:.2f}",
                f"{row['state_mib']:.2f}",
            )
            for row in found["methods"]
        ]
        head = ("method", "shape", "threads", "density", "planning", "efficiency", "speed-up",
                "state MiB")  # fmt: skip
        text.append(table(head, rows))
    return "\n".join(text + _missing(text))


def _missing(text: list[str]) -> list[str]:
    """Name the methods that have no row on a page."""
    links = [f"[`{name}`](../methods/{name}.md)" for name in sorted(set(METHODS) - {"dense"})]
    missing = [link for link in links if link not in "\n".join(text)]
    return [f"Not measured yet: {', '.join(missing)}.\n"] * bool(missing)


def _differing(params: dict[str, Any]) -> str:
    return "".join(f" `{name}={value}`" for name, value in params.items())


def _memory(data: Path) -> str:
    text = [
        "# What methods remember\n",
        (
            "Counted on tensors without data, bfloat16, one sample, one pass. *Exact*: the "
            "density follows from the geometry alone; else it is that of synthetic content.\n"
        ),
    ]
    for path in sorted(data.glob("memory-*.json")):
        found = _read(path)
        rows = [
            (
                f"[`{row['method']}`](../methods/{row['method']}.md)",
                "" if row["density"] is None else f"{row['density']:.1%}",
                "yes" if row["exact"] else "",
                size(row["state_bytes"]),
                size(row["shared_bytes"]),
            )
            for row in found["methods"]
        ]
        head = ("method", "density", "exact", "a layer", "shared by all layers")
        text += [f"## {found['title']}\n", f"Data: `docs/benchmarks/{path.name}`.\n"]
        text.append(table(head, rows))
    return "\n".join(text + _missing(text))


def _demo(data: Path) -> str:
    path = data / "demo-cpu.json"
    found = _read(path)
    dense, sparse = found["arms"]["dense"], found["arms"]["sparse"]
    asked = found["request"]
    rows = [
        ("whole generation, s", f"{dense['total_seconds']:.1f}", f"{sparse['total_seconds']:.1f}"),
        (
            "self-attention, s",
            f"{dense['attention_seconds']:.1f}",
            f"{sparse['attention_seconds']:.1f}",
        ),
        ("density, all calls", "1", f"{found['density']['overall']:.3f}"),
        ("density, sparse calls", "1", f"{found['density']['sparse_calls']:.3f}"),
        ("recall, mean", "1", f"{found['recall']['mean']:.3f}"),
        ("recall, worst call", "1", f"{found['recall']['worst']:.3f}"),
    ]
    rows += [
        (
            f"{name}, {value.get('unit') or 'no unit'} ({value['better']} is better)",
            "",
            f"{value['value']:.3f}",
        )
        for name, value in found["quality"].items()
        if isinstance(value, dict) and isinstance(value.get("value"), float)
    ]
    return "\n".join(
        [
            "# One generation, dense and sparse\n",
            (
                f"`make demo`: `{asked['model']}`, “{asked['prompt']}”, seed {asked['seed']}, "
                f"strategy `{asked['strategy']}`, on {environment(found['environment'])}. "
                f"Data: `docs/benchmarks/{path.name}`.\n"
            ),
            "![dense, sparse, their difference](../images/demo-strip.png)\n",
            table(("measured", "dense", "sparse"), rows),
            f"Density: {found['density']['definition']}.\n",
            f"Recall: {found['recall']['definition']}.\n",
        ]
    )


def _compiled(data: Path) -> str:
    path = data / "aot.json"
    found = _read(path)
    keys = ("tile", "stages", "warps", "registers", "spills", "shared")
    rows = [
        (f"`{name}`", *(row.get(key, "") for key in keys)) for name, row in found["rows"].items()
    ]
    return "\n".join(
        [
            "# Triton kernels, compiled ahead of time\n",
            (
                f"Triton {found['triton']}; made by `{found['command']}`. No GPU is needed for "
                "it, and none was at hand: this is what the compiler says, not a speed. Data: "
                f"`docs/benchmarks/{path.name}`.\n"
            ),
            table(("kernel/blocks/dtype/head_dim/block/device", *keys), rows),
        ]
    )
