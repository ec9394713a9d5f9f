# SPDX-License-Identifier: Apache-2.0
"""Measure what means of dropped blocks are worth, method by method, on recorded calls.

    python samples/fidelity/compensation.py wan-tiny flux-tiny

records a dense generation of each model, sets every method that drops blocks to equal densities,
without means and with them (means counted), and compares each attention output with the dense
one. It writes docs/benchmarks/compensation.json and the page beside it. Ten minutes a model on a
CPU; rows that are in the file already are left alone: delete those that are to be measured again.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from arms import TOLERANCE
from diffusers import DiffusionPipeline
from knobs import record, tuned
from models import MODELS

from dit_sparse.cli.source import SampleDefaults, Settings
from dit_sparse.core.call import AttentionCall
from dit_sparse.core.plan import BlockPlan
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.methods import METHODS
from dit_sparse.methods.params import build_method, param_names
from dit_sparse.profiler.tuning import overall, video_share
from dit_sparse.strategy import Strategy
from dit_sparse.strategy.files import write_text
from dit_sparse.strategy.identity import versions

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "benchmarks" / "compensation.json"
DENSITIES = (0.5, 0.25, 0.125)
STEPS, SEED = 10, 1000
ORDERS = ("raster", "tiles", "hilbert", "morton", "clusters")
HEAD = """\
# What means of dropped blocks are worth

Relative L2 error of attention outputs, root mean square over heads and recorded calls (the first,
a middle and the last of {steps} steps, all layers, one held-out prompt), at equal densities of the
video's pairs: without means, and *with means of what is dropped* (`compensate`), which count in
the density. Small models stand in for the real ones, and the figures are theirs. An error of calls
is not the quality of a clip: for that see [fidelity](fidelity.md). A dash: the method cannot have
that density.

Command: `{command}` ([data](compensation.json))."""
SAMPLE = "samples/fidelity/compensation.py"


def arms() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name what is compared: a method, and params that stay as they are."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for order in ORDERS:
        pieces = {"query_order": order, "key_order": order, "score": "centroid"}
        found[f"{order}, centroids, budget"] = ("composed", pieces)
    for name in sorted(METHODS):
        if "compensate" in param_names(name) and name != "composed":
            found[name] = (name, {})
    return found


def errors(
    strategy: Strategy, calls: list[AttentionCall], dense: list[torch.Tensor]
) -> list[float]:
    """Compare the outputs of sparse calls with dense ones: relative L2 error of each head."""
    rule, ops = strategy.rules[0], Backends()
    method = build_method(rule.method, rule.params)
    states: dict[int, dict[str, Any]] = {}
    found: list[float] = []
    for call, exact in zip(calls, dense, strict=True):
        own = replace(call, state=states.setdefault(call.layer, {}), shared={})
        plan = method.plan(own, ops)
        if plan is None:
            continue
        output, lse = ops.attend(own.query, own.key, own.value, plan, own.scale)
        output = method.finish(own, output, lse, ops)
        if not plan.complete:
            away = (output - exact).float().square().sum((0, 1, 3))
            found += (away / exact.float().square().sum((0, 1, 3))).sqrt().tolist()
    return found


def wanted_rows() -> list[dict[str, Any]]:
    """List what each model's table has."""
    return [
        {"arm": arm, "compensate": compensate, "density": density}
        for density in DENSITIES
        for arm in arms()
        for compensate in ("none", "means")
    ]


def measure(name: str, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Measure rows on one model; the error of one that cannot have its density is None."""
    model = ROOT / "samples" / name
    pipe = DiffusionPipeline.from_pretrained(model, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    settings = Settings(num_inference_steps=STEPS).over(SampleDefaults.read(model))
    calls = record(pipe, {**settings, "prompt": MODELS[name].held_out[0]}, SEED)
    ops, dense = Backends(), []
    for call in calls:
        plan = BlockPlan.full(call.layout(128), call.key_layout(128))
        dense.append(ops.attend(call.query, call.key, call.value, plan, call.scale)[0])
    for row in rows:
        wanted = overall(row["density"], video_share(calls[0]))
        method, given = arms()[row["arm"]]
        given = given | {"compensate": row["compensate"]}
        strategy, told = tuned(method, wanted, calls, given)
        error = None
        if abs(told - wanted) <= TOLERANCE:
            away = errors(strategy, calls, dense)
            error = (sum(x * x for x in away) / len(away)) ** 0.5
        print(name, row, error, flush=True)
        found = {"told": told, "params": dict(strategy.rules[0].params), "error": error}
        yield {"model": name, **row, **found}


def page(found: dict[str, Any]) -> str:
    """Write the table of all models."""
    lines = [HEAD.format(steps=found["steps"], command=found["command"])]
    rows = found["rows"]
    for model in sorted({row["model"] for row in rows}):
        own = [row for row in rows if row["model"] == model]
        known = {(row["arm"], row["density"], row["compensate"]): row["error"] for row in own}
        lines += ["", f"## {model}", ""]
        lines += [
            f"| | {' | '.join(f'{density:g}' for density in DENSITIES)} |",
            "|---|---|---|---|",
        ]
        for arm in arms():
            cells = []
            for density in DENSITIES:
                bare, means = (known.get((arm, density, how)) for how in ("none", "means"))
                told = ["-" if x is None else f"{x:.3f}" for x in (bare, means)]
                cells.append(f"{told[0]}, *{told[1]}*")
            lines.append(f"| {arm if ' ' in arm else f'`{arm}`'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Do it for each model, and write the file after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", choices=sorted(MODELS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"rows": []}
    if RESULTS.exists():
        found = json.loads(RESULTS.read_text())
    for name in args.models:
        keys = ("arm", "compensate", "density")
        there = [{key: row[key] for key in keys} for row in found["rows"] if row["model"] == name]
        left = [row for row in wanted_rows() if row not in there]
        for row in measure(name, left) if left else ():
            found["rows"].append(row)
            models = sorted({row["model"] for row in found["rows"]})
            found |= {
                "kind": "dit_sparse.compensation",
                "command": f"python {SAMPLE} {' '.join(models)}",
                "versions": versions(),
                "steps": STEPS,
                "seed": SEED,
            }
            write_text(RESULTS, json.dumps(found, indent=1, allow_nan=False) + "\n")
            write_text(RESULTS.with_suffix(".md"), page(found))


if __name__ == "__main__":
    main()
