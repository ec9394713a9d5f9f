# SPDX-License-Identifier: Apache-2.0
"""Train a family's transformer on latents of clips or pictures rendered on the fly.

One call is one stage: a number of steps, a mix of clip sizes, a learning rate. ``README.md`` lists
the calls that made the shipped weights. Each step draws from a generator seeded with the step's
number, so a stage that was stopped goes on from its checkpoint with the clips it would have seen;
only the learning rate's warm-up is repeated.
"""

import argparse
import csv
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, make_family
from families.base import Family, Space
from objectives import Noised, stratified_sigmas
from optim import Average, Optimizer
from torch import Tensor, nn

LOG_EVERY, SAVE_EVERY = 25, 100


@dataclass(frozen=True, slots=True)
class Bucket:
    """Examples of one size that train together; pictures have one frame."""

    frames: int
    pixels: int
    batch: int
    share: float

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """Read ``FRAMESxPIXELSxBATCH:SHARE``, such as ``17x64x10:0.5``."""
        size, share = text.split(":")
        frames, pixels, batch = map(int, size.split("x"))
        return cls(frames, pixels, batch, float(share))


def read_arguments() -> argparse.Namespace:
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
    parser.add_argument("--weights", type=Path, help="starting weights (see from_wan.py)")
    parser.add_argument("--teacher", type=Path, help="checkpoint whose guidance to learn")
    parser.add_argument("--guidance", type=float, default=4.0, help="of the teacher")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    return parser.parse_args()


def rate(step: int, first: int, args: argparse.Namespace) -> float:
    """Give the learning rate's factor: up over ``warmup``, flat, linearly to 3 % in ``decay``."""
    rising = min(1.0, (step - first + 1) / args.warmup) if args.warmup else 1.0
    falling = min(1.0, (args.until - step) / args.decay) if args.decay else 1.0
    return rising * max(0.03, falling)


def draw(
    step: int, buckets: list[Bucket], family: Family, space: Space
) -> tuple[Tensor, list[str]]:
    """Render the examples of a step: latents ``[batch, channels, ...]`` and their captions."""
    rng = random.Random(f"bucket {step}")
    bucket = rng.choices(buckets, [bucket.share for bucket in buckets])[0]
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
        self.model.load_state_dict(torch.load(path)["average"])
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
) -> Tensor:
    """Return each example's squared error of the prediction, ``[batch]``."""
    latents, captions = batch
    rng = random.Random(f"noise {step}")
    torch.manual_seed(rng.getrandbits(62))
    conditioning = family.conditioning(captions, rng)
    sigma = stratified_sigmas(len(latents), rng, sigma_mean)
    noised = family.objective(latents, torch.randn_like(latents), sigma)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = family.forward(model, noised.noisy, noised.timestep, conditioning)
        target = noised.target if teacher is None else teacher(noised, conditioning, rng)
    return (predicted.float() - target).square().flatten(1).mean(dim=1)


class Run:
    """A model in training, with all that its checkpoint holds."""

    def __init__(self, family: Family, args: argparse.Namespace) -> None:
        """Start from ``args.start`` or the folder's checkpoint, or afresh where there is none."""
        self.path = args.folder / "dit.pt"
        self.model = family.make_transformer()
        if args.weights:
            self.model.load_state_dict(torch.load(args.weights))
        family.prepare(self.model)
        self.optimizer = Optimizer(self.model, args.lr, 0.6, family.adam_names)
        self.average = Average(self.model, 0.985)
        self.step, self.cpu_seconds = 0, 0.0
        start = args.start or self.path
        if start.exists():
            state = torch.load(start)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.weights, self.average.updates = state["average"], state["updates"]
            self.step, self.cpu_seconds = state["step"], state["cpu_seconds"]
        self.cpu_before = self.cpu_seconds - time.process_time()
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
            "cpu_seconds": self.cpu_before + time.process_time(),
        }
        torch.save(state, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").replace(self.path)


def main() -> None:
    """Run one stage."""
    args = read_arguments()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    family = make_family(args.family)
    space, run = family.space(args.folder / "latents.pt"), Run(family, args)
    teacher = Teacher(family, args.teacher, args.guidance) if args.teacher else None
    first, losses = run.step, []
    with (args.folder / "dit.csv").open("a", newline="") as file:
        log = csv.writer(file)
        if file.tell() == 0:
            log.writerow(["step", "tokens", "loss", "cpu_seconds"])
        while run.step < args.until:
            batch = draw(run.step, args.buckets, family, space)
            errors = errors_of(family, run.model, batch, run.step, args.sigma_mean, teacher)
            run.optimizer.step(errors.mean(), rate(run.step, first, args))
            run.average.update(run.model)
            run.step += 1
            cpu_seconds = run.cpu_before + time.process_time()
            tokens = batch[0][0, 0].numel()
            losses.append(errors.mean().item())
            log.writerow([run.step, tokens, f"{losses[-1]:.4f}", f"{cpu_seconds:.1f}"])
            if run.step % LOG_EVERY == 0:
                file.flush()
                recent = sum(losses[-LOG_EVERY:]) / len(losses[-LOG_EVERY:])
                print(f"{run.step} loss {recent:.4f} cpu {cpu_seconds:.0f} s", flush=True)
            if run.step % SAVE_EVERY == 0 or run.step == args.until:
                run.save()


if __name__ == "__main__":
    main()
