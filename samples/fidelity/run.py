# SPDX-License-Identifier: Apache-2.0
"""Measure what every method costs in quality on a small model, at equal densities.

    python samples/fidelity/run.py samples/wan-tiny -o outputs/fidelity

makes the strategies, lets ``dit-sparse evaluate`` generate and compare, lets the checker read the
clips, and writes ``docs/benchmarks/fidelity/<model>.json``, of which ``page.py`` makes the tables
and plots. Stopped, the same command goes on; it takes hours on a CPU.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from arms import TOLERANCE, Maker
from composition import compositions
from models import MODELS
from strip import draw_strip

from dit_sparse.cli.source import SampleDefaults, Settings
from dit_sparse.methods import METHODS
from dit_sparse.profiler.tuning import overall
from dit_sparse.strategy.files import write_text
from dit_sparse.strategy.identity import pipeline_identity, remember, versions

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "docs" / "benchmarks" / "fidelity"
METRICS = "psnr,ssim,lpips_alex,motion_ratio,sharpness_ratio"


@dataclass(frozen=True)
class Made:
    """What is told of the strategies beside their files.

    Args:
        video_share: The share of all pairs that are of the video's tokens alone.
        missing: Why there is no strategy, by name, where a method cannot have the density.
    """

    video_share: float
    missing: dict[str, str]


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder, such as samples/wan-tiny")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for clips")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    every = [*sorted(set(METHODS) - {"dense"}), "mixed"]
    parser.add_argument("--methods", nargs="+", default=every)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000, 1001])
    parser.add_argument("--calibration", type=int, default=2, help="prompts to tune and search on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--add", action="store_true", help="keep the other methods' arms that are in the file"
    )
    parser.add_argument("--fresh", action="store_true", help="drop what an earlier run made")
    parser.add_argument("--tune-only", action="store_true", help="write the strategies and stop")
    return parser.parse_args()


def settings_of(model: Path, steps: int) -> dict[str, Any]:
    """Give the settings of every call: the model's own, with another number of steps."""
    return Settings(num_inference_steps=steps).over(SampleDefaults.read(model))


def make_strategies(args: argparse.Namespace, prompts: tuple[str, ...], folder: Path) -> Made:
    """Write one file per method and density; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings_of(args.model, args.steps)
    store = folder.parent / "measured"
    maker = Maker(args.model, settings, prompts[: args.calibration], store)
    inputs = {"pipeline": pipeline_identity(maker.pipe), "settings": settings}
    inputs |= {"prompts": maker.prompts, "versions": versions()}
    if (why := remember(folder / "inputs.json", inputs, "strategies")) is not None:
        raise SystemExit(why)
    path = folder / "made.json"
    if path.exists():
        made = Made(**json.loads(path.read_text()))
    else:
        made = Made(maker.video_share, {})
        write_text(path, json.dumps(asdict(made), indent=2) + "\n")
    for density in args.densities:
        wanted = overall(density, made.video_share)
        for method in args.methods:
            name = f"{method}-{100 * density:g}"
            if name in made.missing or (folder / f"{name}.json").exists():
                continue
            strategy, told = maker.strategy(method, wanted)
            print(f"{name}: predicted density {told:.3f}, wanted {wanted:.3f}", flush=True)
            if abs(told - wanted) <= TOLERANCE:
                strategy.model_copy(update={"name": name}).save(folder / f"{name}.json")
            else:
                made.missing[name] = f"comes to {told:.3f} at the nearest, wanted {wanted:.3f}"
                write_text(path, json.dumps(asdict(made), indent=2) + "\n")
    return made


def evaluate(args: argparse.Namespace, prompts: tuple[str, ...], strategies: list[Path]) -> Path:
    """Let the quality checks generate and compare; returns their folder."""
    place = args.output / args.model.name / "evaluation"
    place.parent.mkdir(parents=True, exist_ok=True)
    listed = place.parent / "prompts.txt"
    listed.write_text("\n".join(prompts) + "\n")
    command = [sys.executable, "-m", "dit_sparse", "evaluate", str(args.model)]
    command += [part for each in strategies for part in ("--strategy", str(each))]
    command += ["--prompts", str(listed), "--seeds", ",".join(map(str, args.seeds))]
    command += ["--steps", str(args.steps), "--threads", str(args.threads), "-o", str(place)]
    command += ["--floor", "off"] if args.add else []  # the file that is there has it
    subprocess.run([*command, "--metrics", METRICS], check=True)  # noqa: S603, our own command
    return place


def collect(args: argparse.Namespace, place: Path, made: Made) -> dict[str, Any]:
    """Put every pair's numbers and the checker's readings together."""
    told = json.loads((place / "report.json").read_text())
    read = MODELS[args.model.name].read
    arms: dict[str, list[dict[str, Any]]] = {}
    for folder in sorted((place / "pairs").iterdir()):
        for path in sorted(folder.glob("*.json")):
            arm = path.stem
            pair = json.loads(path.read_text())
            row = {"prompt": pair["prompt"], "seed": pair["seed"]}
            row["density"] = pair["facts"].get("density")
            row["right"] = read(pair["prompt"], folder / pair["file"]["exact"])
            page = folder / f"vs-{arm}" / "report.json"
            if arm != "dense":
                metrics = json.loads(page.read_text())["metrics"]
                row |= {name: metrics[name]["value"] for name in METRICS.split(",")}
                row["psnr_worst_frame"] = metrics["psnr"]["worst"]
            arms.setdefault(arm, []).append(row)
    return {
        "kind": "dit_sparse.fidelity",
        "model": args.model.name,
        "command": f"python samples/fidelity/run.py samples/{args.model.name} -o outputs/fidelity "
        f"--densities {' '.join(f'{density:g}' for density in args.densities)} "
        f"--steps {args.steps}"
        + (f" --methods {' '.join(args.methods)} --add" if args.add else ""),
        "call": told["call"],
        "versions": versions(),
        "prompts": told["prompts"],
        "seeds": told["seeds"],
        "densities": args.densities,
        "video_share": made.video_share,
        "missing": {
            name: why
            for name, why in made.missing.items()
            if float(name.rpartition("-")[2]) / 100 in args.densities
        },
        "made_of": compositions(place.parent / "strategies", place.parent / "measured"),
        "arms": arms,
    }


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Add a run's arms to those of an earlier run on the same prompts, seeds and settings."""
    same = ("model", "prompts", "seeds", "video_share")
    # Without LPIPS's weights these arms get a dash.
    ignored = {"versions"} | (set() if new["call"].get("weights") else {"weights"})
    calls = [
        {key: v for key, v in each["call"].items() if v is not None and key not in ignored}
        for each in (old, new)
    ]
    if any(old[name] != new[name] for name in same) or calls[0] != calls[1]:
        raise SystemExit("--add: the file that is there has other prompts, seeds or settings")
    own = set(new["arms"]) - {"dense", "floor"}
    told = {name: {"command": new["command"], "versions": new["versions"]} for name in own}
    missing = {name: why for name, why in old["missing"].items() if name not in own}
    return old | {
        "densities": sorted({*old["densities"], *new["densities"]}, reverse=True),
        "missing": missing | new["missing"],
        "made_of": old.get("made_of", {}) | new.get("made_of", {}),
        "arms": dict(sorted((old["arms"] | {name: new["arms"][name] for name in own}).items())),
        "added": dict(sorted((old.get("added", {}) | told).items())),
    }


def main() -> None:
    """Do it all for one model."""
    args = read_arguments()
    torch.set_num_threads(args.threads)
    prompts = MODELS[args.model.name]
    folder = args.output / args.model.name / "strategies"
    if args.fresh:
        shutil.rmtree(folder.parent, ignore_errors=True)
    made = make_strategies(args, prompts.calibration, folder)
    if args.tune_only:
        return
    names = [f"{m}-{100 * d:g}" for d in args.densities for m in args.methods]
    files = [folder / f"{name}.json" for name in names if (folder / f"{name}.json").exists()]
    place = evaluate(args, prompts.held_out, files)
    found = collect(args, place, made)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{args.model.name}.json"
    if args.add:
        found = joined(json.loads(path.read_text()), found)
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    if args.add:
        return
    pair = min((place / "pairs").iterdir())
    draw_strip(pair, args.methods, args.densities, RESULTS / f"{args.model.name}-strip.png")


if __name__ == "__main__":
    main()
