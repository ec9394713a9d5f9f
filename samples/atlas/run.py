# SPDX-License-Identifier: Apache-2.0
"""Look at where the heads of a small model look, beside the same model with random weights.

python samples/atlas/run.py samples/wan-tiny

writes ``docs/benchmarks/atlas/<model>.json`` and a picture of one head per role; ``page.py`` makes
the page.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from diffusers import DiffusionPipeline
from heads import Head, measure, uniform_shares

from dit_sparse import Strategy
from dit_sparse.cli.source import SampleDefaults, Settings
from dit_sparse.inspect.mass import attention_mass
from dit_sparse.inspect.observe import observe_run
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.profiler.capture import call_of

sys.path.insert(0, str(Path(__file__).parents[1] / "fidelity"))
mpl.use("Agg")
from matplotlib import pyplot as plt
from models import MODELS

RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks" / "atlas"
ROLES = ("diagonal", "multi-diagonal", "frame", "stripe", "sharp", "diffuse", "skippable")


class Watch:
    """Measures calls as they come, and keeps the map of one head per role."""

    def __init__(self) -> None:
        self.found: dict[str, list[Any]] = {}
        self.uniform: dict[str, float] = {}
        self.grid: list[int] = []
        self.maps: dict[str, tuple[str, Any]] = {}

    def __call__(self, call: Any, plan: Any, method: str) -> None:  # noqa: ARG002, the seam's form
        """Measure one call."""
        masses = attention_mass(call, Backends())
        heads: list[Head] = measure(call, masses)
        self.uniform = self.uniform or uniform_shares(call)
        grid = call.grid
        self.grid = [grid.frames, grid.height, grid.width, grid.text_length]
        told = [head.to_dict() for head in heads]
        self.found.setdefault(str(call.step), []).append({"layer": call.layer, "heads": told})
        for number, (head, mass) in enumerate(zip(heads, masses, strict=True)):
            name = f"layer {call.layer} head {number}, step {call.step}"
            self.maps.setdefault(head.role, (name, mass.map))


def draw(maps: dict[str, tuple[str, Any]], path: Path) -> None:
    """Draw the block mass of one head per role, square root, so that faint mass shows."""
    shown = [role for role in ROLES if role in maps]
    figure, axes = plt.subplots(1, len(shown), figsize=(2.6 * len(shown), 3), squeeze=False)
    for axis, role in zip(axes[0], shown, strict=True):
        name, mass = maps[role]
        axis.imshow(mass.sqrt(), cmap="magma")
        axis.set_title(f"{role}\n{name}", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Measure one model, trained and random."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prompt = MODELS[args.model.name].held_out[0]
    settings = Settings(num_inference_steps=args.steps)
    call = settings.over(SampleDefaults.read(args.model)) | {"prompt": prompt}
    steps = {0, args.steps // 2, args.steps - 1}
    pipe = DiffusionPipeline.from_pretrained(args.model, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    trained = Watch()
    observe_run(pipe, Strategy.single("dense"), call_of(pipe, call, 0), steps, trained)
    torch.manual_seed(0)
    pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config).eval()
    random = Watch()
    observe_run(pipe, Strategy.single("dense"), call_of(pipe, call, 0), steps, random)
    RESULTS.mkdir(parents=True, exist_ok=True)
    draw(trained.maps, RESULTS / f"{args.model.name}-maps.png")
    data = {
        "kind": "dit_sparse.atlas",
        "model": args.model.name,
        "command": " ".join(["python", *sys.argv]),
        "call": call,
        "grid": trained.grid,
        "uniform": trained.uniform,
        "trained": trained.found,
        "random": random.found,
    }
    (RESULTS / f"{args.model.name}.json").write_text(json.dumps(data, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
