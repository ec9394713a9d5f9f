# SPDX-License-Identifier: Apache-2.0
"""Print what a run gained and cost: dense beside sparse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dit_sparse.cli.console import OUT, styled

if TYPE_CHECKING:
    from pathlib import Path

DISTURBED = 0.05  # wall clock and processor time disagree by this much: the machine was busy
EVEN = 0.02  # a ratio this near to 1 is no difference on a machine that does other things too


def show(result: dict[str, Any], folder: Path, files: list[str]) -> None:
    """Print the table, the speed-up in words, and where the files are."""
    dense, sparse = result["arms"]["dense"], result["arms"]["sparse"]
    table = Table(title=None, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("")
    if dense is not None:
        table.add_column("dense", justify="right")
    table.add_column(f"sparse: {result['strategy']['name']}", justify="right")
    for label, left, right in _rows(result, dense, sparse):
        table.add_row(label, *([left] if dense is not None else []), right)
    OUT.print()
    OUT.print(table)
    OUT.print()
    for line in _verdict(result):
        OUT.print(line)
    OUT.print(styled((f"{folder}/", "dim"), f" {', '.join(files)}"), soft_wrap=True)


def _rows(
    result: dict[str, Any], dense: dict[str, Any] | None, sparse: dict[str, Any]
) -> list[tuple[str, str, str]]:
    def both(key: str) -> tuple[str, str]:
        return ("" if dense is None else f"{dense[key]:.2f} s"), f"{sparse[key]:.2f} s"

    density, recall = result["density"], result["recall"]
    on_cpu = result["environment"]["device"] == "cpu"
    rows = [
        ("time, whole pipeline call", *both("total_seconds")),
        ("time, self-attention", *both("attention_seconds")),
        *([("CPU time, all threads", *both("processor_seconds"))] if on_cpu else []),
        ("density, all calls", "1", f"{density['overall']:.3f}"),
        (
            f"density, {density['sparse_call_count']} of {density['call_count']} calls",
            "1",
            _number(density["sparse_calls"], ".3f"),
        ),
    ]
    if recall is not None:
        mean, worst = _number(recall["mean"], ".3f"), _number(recall["worst"], ".3f")
        rows.append(("recall (worst call)", "1", f"{mean} ({worst})"))
    for name, score in (result["quality"] or {}).items():
        if name == "psnr_pooled":
            continue
        digits = ".2f" if name == "psnr" else ".4f"
        unit = f" {score['unit']}" if score["unit"] else ""
        told = f"{_number(score['value'], digits)}{unit} ({_number(score['worst'], digits)})"
        rows.append((f"{name.upper()} against dense (worst frame)", "", told))
    kernels = "" if dense is None else ", ".join(dense["kernels"])
    rows.append(("kernels", kernels, ", ".join(sparse["kernels"])))
    rows.append(("memory for plans and state", "", _size(sparse["state_bytes_peak"])))
    return rows


def _verdict(result: dict[str, Any]) -> list[Text]:
    """Say the speed-up plainly, and what a reader must know before he believes it."""
    lines = []
    speedup, density = result["speedup"], result["density"]
    if speedup is not None:
        total, attention = speedup["total"], speedup["attention"]
        of = f"; self-attention only: {attention:.2f}x" if attention is not None else ""
        if abs(total - 1) <= EVEN:
            lines.append(
                styled(("Same speed as dense at this size", "bold"), f" ({total:.2f}x{of}).")
            )
        elif total > 1:
            lines.append(styled((f"{total:.2f}x as fast as dense", "bold green"), f"{of}."))
        else:
            slower = ("Slower than dense at this size", "bold yellow")
            lines.append(styled(slower, f": {total:.2f}x{of}."))
        if (
            result["environment"]["device"] == "cpu"
            and abs(speedup["processor"] / total - 1) > DISTURBED
        ):
            lines.append(
                Text(
                    f"By CPU time it is {speedup['processor']:.2f}x. The machine was busy with "
                    "other jobs, so this figure is more reliable."
                )
            )
    if density["sparse_call_count"] == 0:
        lines.append(
            styled(("No sparse calls:", "yellow"), " every attention call was computed densely.")
        )
    psnr = (result["quality"] or {}).get("psnr")
    if psnr is not None and density["sparse_call_count"] and psnr["value"] == 100:
        lines.append(
            styled(
                ("All frames are identical to the dense run", "yellow"),
                ", although some calls were sparse.",
            )
        )
    lines += [
        styled(("stayed dense", "yellow"), f" x {count}: {why}")
        for why, count in result["arms"]["sparse"]["dense_against_the_strategy"].items()
    ]
    lines += _guarantee(result["arms"]["sparse"]["guarantee"])
    repeat = result["repeat"]
    if repeat is not None and not repeat["identical"]:
        lines.append(
            Text(
                f"Two runs with the same settings differ by up to {repeat['largest_difference']} "
                "of 255 levels; consider this when you read PSNR and SSIM."
            )
        )
    return lines


def _guarantee(found: dict[str, Any] | None) -> list[Text]:
    """Say whether every head kept to what was asked for."""
    if found is None:
        return []
    limit, count = f"{found['limit']:.3g}", len(found["returned"])
    if count:
        told = (
            f" {count} of {found['heads']} heads went back to dense (counted per layer and "
            "guidance branch); result.json lists them."
        )
        return [styled((f"Guarantee {limit}:", "yellow"), told)]
    if not found["probes"]:
        return [Text(f"Guarantee {limit}: no sparse calls, no probes.")]
    worst = f"{found['worst_kept']:.3g}"
    return [Text(f"Guarantee {limit} held: largest error {worst} in {found['probes']} probes.")]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
