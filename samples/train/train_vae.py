# SPDX-License-Identifier: Apache-2.0
"""Train the decoder of a family's autoencoder, or its encoder, on the fixed latent space.

The decoder maps slightly noisy latents to pixels; the encoder maps pixels to latents. Neither
needs the other, nor the transformer.
"""

import argparse
import csv
import time
from pathlib import Path

import torch
from families import FAMILIES, make_family
from families.base import HALVES
from optim import Average, Optimizer
from torch import Tensor, nn

NOISE = 0.1  # largest noise on the latents: what the transformer makes is never exact
LOG_EVERY, SAVE_EVERY = 25, 100


def decoder_loss(model: nn.Module, video: Tensor, latents: Tensor, step: int) -> Tensor:
    """Compare decoded pixels: mean absolute plus mean squared error."""
    torch.manual_seed(step)
    level = NOISE * torch.rand(len(latents), *[1] * (latents.ndim - 1))
    with torch.autocast("cpu", torch.bfloat16):
        decoded = model.decode(latents + level * torch.randn_like(latents)).sample
    error = decoded.float() - video
    return error.abs().mean() + error.square().mean()


def encoder_loss(model: nn.Module, video: Tensor, latents: Tensor, _step: int) -> Tensor:
    """Compare the posterior's mean with the latents, and hold its log variance near -8."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = model.encode(video).latent_dist
    error = (posterior.mean.float() - latents).square().mean()
    return error + 0.0125 * (posterior.logvar.float() + 8).square().mean()


def main() -> None:
    """Train one half for a number of steps, on from its checkpoint where there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("half", choices=HALVES)
    parser.add_argument("folder", type=Path, help="holds latents.pt, checkpoints and logs")
    parser.add_argument("--until", type=int, required=True, help="step at which to end")
    parser.add_argument("--decay", type=int, required=True, help="last steps, of falling rate")
    parser.add_argument("--lr", type=float, default=6e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    family = make_family(args.family)
    space = family.space(args.folder / "latents.pt")
    model = family.make_autoencoder()
    part = family.half(model, args.half)
    loss_of = {"decoder": decoder_loss, "encoder": encoder_loss}[args.half]
    optimizer, average = Optimizer(part, args.lr, 0.5, ("time_conv",)), Average(part, 0.97)
    path, step, cpu_seconds = args.folder / f"{args.half}.pt", 0, 0.0
    if path.exists():
        state = torch.load(path)
        part.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.weights, average.updates = state["average"], state["updates"]
        step, cpu_seconds = state["step"], state["cpu_seconds"]
    cpu_before, losses = cpu_seconds - time.process_time(), []
    with (args.folder / f"{args.half}.csv").open("a", newline="") as file:
        log = csv.writer(file)
        if file.tell() == 0:
            log.writerow(["step", "loss", "cpu_seconds"])
        while step < args.until:
            video = family.pieces(step)
            latents = torch.stack([space.encode(one) for one in video])
            loss = loss_of(model, video, latents, step)
            factor = max(0.02, min(1.0, (args.until - step) / args.decay))
            optimizer.step(loss, factor * min(1.0, (step + 1) / 20))
            average.update(part)
            step += 1
            losses.append(loss.item())
            cpu_seconds = cpu_before + time.process_time()
            log.writerow([step, f"{losses[-1]:.5f}", f"{cpu_seconds:.1f}"])
            if step % LOG_EVERY == 0:
                file.flush()
                recent = sum(losses[-LOG_EVERY:]) / LOG_EVERY
                print(f"{step} loss {recent:.4f} cpu {cpu_seconds:.0f} s", flush=True)
            if step % SAVE_EVERY == 0 or step == args.until:
                state = {
                    "model": part.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average.weights,
                    "updates": average.updates,
                    "step": step,
                    "cpu_seconds": cpu_seconds,
                }
                torch.save(state, path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)


if __name__ == "__main__":
    main()
