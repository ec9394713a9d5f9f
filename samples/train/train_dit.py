# SPDX-License-Identifier: Apache-2.0
"""Train the transformer by flow matching on latents of clips rendered on the fly.

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

import torch
from data import caption, clip
from latents import LatentSpace
from optim import Average, Optimizer
from text import PIPELINE_TOKENS, Prompts
from torch import Tensor, nn
from transformer import BiasedCrossAttention, collapse_padding, make_transformer

ADAM_NAMES = ("patch_embedding", "proj_out", "time_proj", "scale_shift", "time_embedder")
LOG_EVERY, SAVE_EVERY = 25, 100
PADDED_LENGTHS = (64, PIPELINE_TOKENS)
SIGMA_DEVIATION = 1.2


@dataclass(frozen=True, slots=True)
class Bucket:
    """Clips of one size that train together; every batch holds one bucket's clips."""

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
    parser.add_argument("folder", type=Path, help="holds latents.pt, the checkpoint and the log")
    parser.add_argument("--until", type=int, required=True, help="step at which the stage ends")
    parser.add_argument("--buckets", nargs="+", type=Bucket.parse, required=True)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=20, help="steps of rising learning rate")
    parser.add_argument("--decay", type=int, default=0, help="last steps, of falling rate")
    parser.add_argument("--sigma-mean", type=float, default=0.5, help="before the sigmoid")
    parser.add_argument("--start", type=Path, help="checkpoint; default is the folder's own")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    return parser.parse_args()


def rate(step: int, first: int, args: argparse.Namespace) -> float:
    """Give the learning rate's factor: up over ``warmup``, flat, linearly to 3 % in ``decay``."""
    rising = min(1.0, (step - first + 1) / args.warmup) if args.warmup else 1.0
    falling = min(1.0, (args.until - step) / args.decay) if args.decay else 1.0
    return rising * max(0.03, falling)


def draw(step: int, args: argparse.Namespace, space: LatentSpace) -> tuple[Tensor, list[str]]:
    """Render the clips of a step: latents ``[batch, channels, t, h, w]`` and their captions."""
    rng = random.Random(f"bucket {step}")
    bucket = rng.choices(args.buckets, [bucket.share for bucket in args.buckets])[0]
    latents, captions = [], []
    for number in range(bucket.batch):
        index = step * 64 + number
        video, scene = clip(index, bucket.frames, bucket.pixels)
        latents.append(space.encode(video))
        captions.append(caption(index, scene))
    return torch.stack(latents), captions


def stratified_sigmas(batch: int, rng: random.Random, mean: float, deviation: float) -> Tensor:
    """Draw noise levels, sigmoid(normal), one per equal-mass stratum, in random order."""
    shift = rng.random()
    quantiles = [(i + shift) / batch for i in range(batch)]
    rng.shuffle(quantiles)
    normal = torch.special.ndtri(torch.tensor(quantiles).clamp(1e-3, 1 - 1e-3))
    return torch.sigmoid(mean + deviation * normal)


def flow_loss(
    model: nn.Module, latents: Tensor, captions: list[str], prompts: Prompts, args: tuple
) -> Tensor:
    """Return each clip's squared error of the velocity, noise - latents, ``[batch]``."""
    step, sigma_mean = args
    rng = random.Random(f"noise {step}")
    torch.manual_seed(rng.getrandbits(62))
    text, BiasedCrossAttention.bias = prompts(captions, rng.choice(PADDED_LENGTHS))
    sigma = stratified_sigmas(len(latents), rng, sigma_mean, SIGMA_DEVIATION)
    noise = torch.randn_like(latents)
    level = sigma.view(-1, 1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model((1 - level) * latents + level * noise, sigma * 1000, text).sample
    return (velocity.float() - (noise - latents)).square().mean(dim=(1, 2, 3, 4))


class Run:
    """A model in training, with all that its checkpoint holds."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Start from ``args.start`` or the folder's checkpoint, or afresh where there is none."""
        self.path = args.folder / "dit.pt"
        self.model = make_transformer()
        collapse_padding(self.model)
        self.optimizer = Optimizer(self.model, args.lr, 0.6, ADAM_NAMES)
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
            self.model.compile_repeated_blocks(dynamic=False)

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
    space, prompts, run = LatentSpace.load(args.folder / "latents.pt"), Prompts(), Run(args)
    first, losses = run.step, []
    with (args.folder / "dit.csv").open("a", newline="") as file:
        log = csv.writer(file)
        if file.tell() == 0:
            log.writerow(["step", "tokens", "loss", "cpu_seconds"])
        while run.step < args.until:
            latents, captions = draw(run.step, args, space)
            errors = flow_loss(run.model, latents, captions, prompts, (run.step, args.sigma_mean))
            run.optimizer.step(errors.mean(), rate(run.step, first, args))
            run.average.update(run.model)
            run.step += 1
            cpu_seconds = run.cpu_before + time.process_time()
            tokens = latents[0, 0].numel()
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
