# SPDX-License-Identifier: Apache-2.0
"""Compare few-step students with what they were taught by, and with no training at all.

    python samples/distillation/run.py samples/wan-tiny

Every arm goes through the ordinary Diffusers pipeline: weights by ``load_lora_weights``, sparsity
by ``enable_sparse_attention``. The checker reads each clip; the quality checks say how far it is
from the teacher's clip of the same prompt and noise. Writes
``docs/benchmarks/distillation/<model>.json``, of which ``page.py`` makes the page. A stopped run
goes on; clips stay in the output folder.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import DiffusionPipeline

import dit_sparse
from dit_sparse.cli.source import SampleDefaults, Settings
from dit_sparse.quality import compare
from dit_sparse.strategy.identity import pipeline_identity, remember, versions

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from checker import check
from evaluate import question

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "docs" / "benchmarks" / "distillation"
METRICS = ("psnr", "ssim", "lpips_alex", "sharpness_ratio", "motion_ratio")


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to make a clip.

    Args:
        steps: Of sampling.
        guided: Classifier-free guidance: twice the passes.
        sparse: With the strategy of ``sparse.yaml``.
        weights: Folder below the output folder with a student's result.
    """

    steps: int
    guided: bool
    sparse: bool
    weights: str | None = None


def arms(steps: int, teacher_steps: int) -> dict[str, Arm]:
    """List the arms; students take no guidance, it is in their weights."""
    return {
        "teacher": Arm(teacher_steps, guided=True, sparse=False),
        f"dense, {steps} steps": Arm(steps, guided=True, sparse=False),
        f"sparse, {steps} steps": Arm(steps, guided=True, sparse=True),
        f"sparse, {steps} steps, no guidance": Arm(steps, guided=False, sparse=True),
        "dense student": Arm(steps, guided=False, sparse=False, weights="dense"),
        "sparse student": Arm(steps, guided=False, sparse=True, weights="sparse"),
        "dense student made sparse": Arm(steps, guided=False, sparse=True, weights="dense"),
    }


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/distillation"))
    parser.add_argument("--clips", type=int, default=50)
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="drop the clips of earlier runs")
    return parser.parse_args()


def make_pipeline(model: Path, arm: Arm, output: Path, strategy: dict[str, Any]) -> Any:
    """Load the model as a user would."""
    pipe = DiffusionPipeline.from_pretrained(model, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    if arm.weights is not None:
        pipe.load_lora_weights(str(output / arm.weights / "result"))
    if arm.weights == "sparse":
        pipe.enable_sparse_attention(str(output / arm.weights / "result"))
    elif arm.sparse:
        options = dict(strategy)
        pipe.enable_sparse_attention(dit_sparse.Strategy.single(options.pop("method"), **options))
    return pipe


def make_clip(pipe: Any, number: int, settings: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Generate clip ``number``: uint8 ``[frames, height, width, 3]``, and processor seconds."""
    start = time.process_time()
    generator = torch.Generator().manual_seed(number)
    prompt = question(number)[1]
    frames = pipe(prompt, generator=generator, output_type="np", **settings).frames[0]
    return np.round(frames * 255).astype(np.uint8), time.process_time() - start


def row_of(number: int, clip: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Read a clip and compare it with the teacher's."""
    scene, prompt = question(number)
    reading = check(torch.from_numpy(clip).float() / 255)
    found = compare(reference, clip, metrics=METRICS, fps=12.0).to_dict()["metrics"]
    return {
        "number": number,
        "prompt": prompt,
        "held_out": scene.held_out,
        "colour": reading.colour == scene.colour,
        "shape": reading.shape == scene.shape,
        "motion": reading.motion == scene.motion,
        "overlap": round(reading.overlap, 4),
        "right": reading.matches(scene.colour, scene.shape, scene.motion),
        **{name: found[name]["value"] for name in METRICS},
    }


def folder_of(arm: str) -> str:
    """Name an arm's folder of clips."""
    return arm.replace(", ", "-").replace(" ", "-")


def run_arm(
    args: argparse.Namespace, name: str, arm: Arm, strategy: dict[str, Any]
) -> list[dict[str, Any]]:
    """Make and read all clips of an arm that are not there yet."""
    folder = args.output / "clips" / folder_of(name)
    if args.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    teacher = args.output / "clips" / "teacher"
    defaults = SampleDefaults.read(args.model)
    asked = Settings(num_inference_steps=arm.steps, guidance_scale=None if arm.guided else 1.0)
    settings, rows = asked.over(defaults), []
    pipe = make_pipeline(args.model, arm, args.output, strategy)
    active = pipe.sparse_attention
    inputs = {"settings": settings, "versions": versions(), "pipeline": pipeline_identity(pipe)}
    inputs["strategy"] = active.strategy.to_dict() if active else None
    if (why := remember(folder / "inputs.json", inputs, "clips")) is not None:
        raise SystemExit(why)
    for number in range(args.clips):
        stored = folder / f"{number:03}.json"
        if not stored.exists():
            clip, seconds = make_clip(pipe, number, settings)
            np.save(folder / f"{number:03}.npy", clip)
            row = row_of(number, clip, np.load(teacher / f"{number:03}.npy"))
            row["processor_seconds"] = round(seconds, 3)
            row["density"] = round(active.report().density, 4) if active else 1.0
            stored.write_text(json.dumps(row) + "\n")
            print(name, row, flush=True)
        rows.append(json.loads(stored.read_text()))
    return rows


def main() -> None:
    """Run the arms and put their rows together."""
    args = read_arguments()
    torch.set_num_threads(args.threads)
    config = yaml.safe_load((HERE / "sparse.yaml").read_text())
    defaults = SampleDefaults.read(args.model)
    table = arms(config["distill"]["steps"], defaults.num_inference_steps or 50)
    unknown = set(args.arms or ()) - set(table)
    if unknown:
        raise SystemExit(f"--arms: {', '.join(unknown)}: wanted some of: {', '.join(table)}")
    found = {
        name: run_arm(args, name, arm, config["strategy"])
        for name, arm in table.items()
        if not args.arms or name in args.arms
    }
    if args.arms:
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    data = {
        "kind": "dit_sparse.distillation",
        "model": args.model.name,
        "strategy": config["strategy"],
        "clips": args.clips,
        "arms": {
            name: {
                "steps": arm.steps,
                "guided": arm.guided,
                "folder": folder_of(name),
                "rows": found[name],
            }
            for name, arm in table.items()
        },
    }
    text = json.dumps(data, indent=1, allow_nan=False)
    (RESULTS / f"{args.model.name}.json").write_text(text + "\n")
    for student in ("dense", "sparse"):
        log = (args.output / student / "log.csv").read_text()
        (RESULTS / f"{args.model.name}-{student}.csv").write_text(log)


if __name__ == "__main__":
    main()
