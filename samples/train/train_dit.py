# SPDX-License-Identifier: Apache-2.0
"""Train a family's transformer on latents of clips or pictures rendered on the fly.

One call is one stage: a number of steps, a mix of clip sizes, a learning rate. ``README.md`` lists
the calls that made the shipped weights. Each step draws from a generator seeded with the step's
number, so the same call resumes a stage that was stopped and ends with the same weights.
"""

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from families import FAMILIES, make_family
from families.base import Family, Space
from objectives import Noised, stratified_sigmas
from optim import Average, Optimizer
from safetensors import safe_open
from torch import Tensor, nn

LOG_EVERY, SAVE_EVERY = 25, 100  # steps
SAVE_SECONDS = 600  # of wall time, for slow steps
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Bucket:
    """Examples of one size that train together; pictures have one frame."""

    frames: int
    pixels: int
    batch: int
    share: float
    sigma_mean: float | None = None  # instead of the stage's

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """Read ``FRAMESxPIXELSxBATCH:SHARE[@SIGMA_MEAN]``, such as ``17x64x10:0.5``."""
        size, share = text.split(":")
        share, _, sigma_mean = share.partition("@")
        frames, pixels, batch = map(int, size.split("x"))
        return cls(frames, pixels, batch, float(share), float(sigma_mean) if sigma_mean else None)


def read_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path, help="holds latents.pt, the checkpoint and the log")
    parser.add_argument("--until", type=int, required=True, help="step at which the stage ends")
    parser.add_argument("--buckets", nargs="+", type=Bucket.parse, required=True)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=20, help="steps of rising learning rate")
    parser.add_argument("--decay", type=int, default=0, help="last steps, of falling rate")
    parser.add_argument("--sigma-mean", type=float, default=0.5, help="before the sigmoid")
    parser.add_argument("--start", type=Path, help="checkpoint; default is the folder's own")
    parser.add_argument(
        "--weights",
        type=Path,
        help="to start from: a checkpoint, from_wan.py's or pack_checkpoint.py's",
    )
    parser.add_argument("--teacher", type=Path, help="as --weights; its guidance is learnt")
    parser.add_argument("--guidance", type=float, default=4.0, help="of the teacher")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the autocast")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    return parser.parse_args(arguments)


def rate(step: int, first: int, args: argparse.Namespace) -> float:
    """Give the learning rate's factor: up over ``warmup``, flat, linearly to 3 % in ``decay``."""
    rising = min(1.0, (step - first + 1) / args.warmup) if args.warmup else 1.0
    falling = min(1.0, (args.until - step) / args.decay) if args.decay else 1.0
    return rising * max(0.03, falling)


def choose(step: int, buckets: list[Bucket]) -> Bucket:
    """Choose the bucket of a step."""
    rng = random.Random(f"bucket {step}")
    return rng.choices(buckets, [bucket.share for bucket in buckets])[0]


def draw(step: int, bucket: Bucket, family: Family, space: Space) -> tuple[Tensor, list[str]]:
    """Render the examples of a step: latents ``[batch, channels, ...]`` and their captions."""
    latents, captions = [], []
    for number in range(bucket.batch):
        pixels, caption = family.example(step * 64 + number, bucket.frames, bucket.pixels)
        latents.append(space.encode(pixels))
        captions.append(caption)
    return torch.stack(latents), captions


class Teacher:
    """A trained copy whose guided prediction becomes the target: guidance in one forward.

    Meng et al. 2023, "On Distillation of Guided Diffusion Models", arXiv:2210.03142, first stage,
    at one fixed guidance: uncond + scale (cond - uncond).
    """

    def __init__(self, family: Family, path: Path, scale: float) -> None:
        """Take the averaged weights of the checkpoint ``path``."""
        self.family, self.scale = family, scale
        self.model = family.make_transformer().requires_grad_(requires_grad=False).eval()
        self.model.load_state_dict(read_weights(path)[0])
        family.prepare(self.model)

    @torch.no_grad()
    def __call__(self, noised: Noised, conditioning: dict[str, Any], rng: random.Random) -> Tensor:
        """Predict with guidance for noised latents."""
        nothing = self.family.conditioning([""] * len(noised.noisy), rng)
        with_text, without = (
            self.family.forward(self.model, noised.noisy, noised.timestep, told).float()
            for told in (conditioning, nothing)
        )
        return without + self.scale * (with_text - without)


def errors_of(
    family: Family,
    model: nn.Module,
    batch: tuple[Tensor, list[str]],
    step: int,
    sigma_mean: float,
    teacher: Teacher | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return each example's squared error of the prediction, ``[batch]``."""
    latents, captions = batch
    rng = random.Random(f"noise {step}")
    torch.manual_seed(rng.getrandbits(62))
    conditioning = family.conditioning(captions, rng)
    sigma = stratified_sigmas(len(latents), rng, sigma_mean)
    noised = family.objective(latents, torch.randn_like(latents), sigma)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        predicted = family.forward(model, noised.noisy, noised.timestep, conditioning)
        target = noised.target if teacher is None else teacher(noised, conditioning, rng)
    return (predicted.float() - target).square().flatten(1).mean(dim=1)


class Run:
    """A model in training, with all that its checkpoint holds."""

    def __init__(self, family: Family, args: argparse.Namespace) -> None:
        """Start from ``args.start`` or the folder's checkpoint, or afresh where there is none."""
        self.path = args.folder / "dit.pt"
        self.model = family.make_transformer()
        self.step, self.cpu_seconds = 0, 0.0
        start = args.start or self.path
        if args.weights and not start.exists():
            weights, self.step, self.cpu_seconds = read_weights(args.weights)
            self.model.load_state_dict(weights)
        family.prepare(self.model)
        self.optimizer = Optimizer(self.model, args.lr, 0.6, family.adam_names)
        self.average = Average(self.model, 0.985)
        self.until, self.first = args.until, self.step
        if start.exists():
            state = torch.load(start)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.weights, self.average.updates = state["average"], state["updates"]
            self.step, self.cpu_seconds = state["step"], state["cpu_seconds"]
            same_stage = state.get("until") == args.until
            self.first = state["first"] if same_stage else self.step
        self.cpu_before = self.cpu_seconds - time.process_time()
        self.saved = time.monotonic()
        if not args.eager:
            family.compile_layers(self.model)

    def save(self) -> None:
        """Write the checkpoint; a reader never sees half of one."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.weights,
            "updates": self.average.updates,
            "step": self.step,
            "until": self.until,
            "first": self.first,
            "cpu_seconds": self.cpu_before + time.process_time(),
        }
        torch.save(state, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").replace(self.path)
        self.saved = time.monotonic()

    def save_if_due(self) -> None:
        """Write the checkpoint every so many steps or seconds, and at the end of the stage."""
        late = time.monotonic() - self.saved > SAVE_SECONDS
        if late or self.step % SAVE_EVERY == 0 or self.step == self.until:
            self.save()


def read_weights(path: Path) -> tuple[dict[str, Tensor], int, float]:
    """Read weights, averaged ones of a checkpoint; the steps and CPU seconds they trained for."""
    if path.suffix != ".safetensors":
        state = torch.load(path)
        return state.get("average", state), state.get("step", 0), state.get("cpu_seconds", 0.0)
    with safe_open(path, "pt") as file:
        told = file.metadata() or {}
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    return weights, int(told.get("step", 0)), float(told.get("cpu_seconds", 0.0))


def open_log(path: Path, step: int) -> TextIO:
    """Open the table of losses for appending; rows past ``step`` were not kept and go."""
    rows = path.read_text().splitlines() if path.exists() else []
    kept = [row for row in rows[1:] if int(row.split(",")[0]) <= step]
    path.write_text("\n".join(["step,tokens,loss,cpu_seconds", *kept]) + "\n")
    return path.open("a")


def main(arguments: list[str] | None = None) -> None:
    """Run one stage."""
    args = read_arguments(arguments)
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    family = make_family(args.family)
    space, run = family.space(args.folder / "latents.pt"), Run(family, args)
    teacher = Teacher(family, args.teacher, args.guidance) if args.teacher else None
    losses = []
    with open_log(args.folder / "dit.csv", run.step) as log:
        while run.step < args.until:
            bucket = choose(run.step, args.buckets)
            batch = draw(run.step, bucket, family, space)
            mean = args.sigma_mean if bucket.sigma_mean is None else bucket.sigma_mean
            dtype = DTYPES[args.dtype]
            errors = errors_of(family, run.model, batch, run.step, mean, teacher, dtype)
            run.optimizer.step(errors.mean(), rate(run.step, run.first, args))
            run.average.update(run.model)
            run.step += 1
            cpu_seconds = run.cpu_before + time.process_time()
            tokens = batch[0][0, 0].numel()
            losses.append(errors.mean().item())
            row = f"{run.step},{tokens},{losses[-1]:.4f},{cpu_seconds:.1f}"
            print(row, file=log, flush=True)
            if run.step % LOG_EVERY == 0:
                recent = sum(losses[-LOG_EVERY:]) / len(losses[-LOG_EVERY:])
                print(f"{run.step} loss {recent:.4f} cpu {cpu_seconds:.0f} s", flush=True)
            run.save_if_due()


if __name__ == "__main__":
    main()
