# SPDX-License-Identifier: Apache-2.0
"""What a model's output means: noise levels, and the ways between output, clean data and noise.

At a level (alpha, sigma) the noisy sample is x = alpha x0 + sigma noise. The output is one of
    flow:          noise - x0, with alpha = 1 - sigma   (Wan, HunyuanVideo, FLUX)
    epsilon:       noise                                (PixArt)
    v_prediction:  alpha noise - sigma x0               (CogVideoX)
the last two with alpha^2 + sigma^2 = 1. A level is named by its *time*: sigma for flow, the whole
timestep otherwise. For flow nothing is looked up in a table of timesteps, where a shifted schedule
leaves holes; the numbers are the scheduler's own (``grid.py`` reads them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from dit_sparse.distill.errors import DistillError

Kind = Literal["flow", "epsilon", "v_prediction"]
TABLED = ("epsilon", "v_prediction")


class Level(NamedTuple):
    """A noise level for each sample, ``[batch]``."""

    alpha: Tensor
    sigma: Tensor

    def like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give alpha and sigma in the form that multiplies ``x``."""
        shape = (-1,) + (1,) * (x.ndim - 1)
        return tuple(part.to(x.device, x.dtype).reshape(shape) for part in self)  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Objective:
    """One model's parametrisation.

    Args:
        kind: What the output is.
        time_scale: Flow: what the model is told, divided by sigma (1000; FLUX 1).
        whole: Flow: the model is told whole numbers, rounded down, as its scheduler does.
        alphas_cumprod: Otherwise: alpha^2 of every timestep, float64.
    """

    kind: Kind
    time_scale: float = 1000.0
    whole: bool = False
    alphas_cumprod: Tensor | None = None

    def level(self, time: Tensor) -> Level:
        """Look up the level of each sample's time, float64 ``[batch]``."""
        if self.alphas_cumprod is None:
            sigma = time.double()
            return Level(1 - sigma, sigma)
        square = self.alphas_cumprod[time.long()]
        return Level(square.sqrt(), (1 - square).sqrt())

    def model_time(self, time: Tensor) -> Tensor:
        """Say what the model is told for a time between the grid's: float64 ``[batch]``."""
        if self.alphas_cumprod is not None:
            return time.double()
        told = time.double() * self.time_scale
        return told.floor() if self.whole else told

    def clean(self, x: Tensor, output: Tensor, level: Level) -> Tensor:
        """Read the clean sample out of the model's output."""
        alpha, sigma = level.like(x)
        if self.kind == "flow":
            return x - sigma * output
        if self.kind == "epsilon":
            return (x - sigma * output) / alpha
        return alpha * x - sigma * output

    def noise(self, x: Tensor, output: Tensor, level: Level) -> Tensor:
        """Read the noise out of the model's output."""
        alpha, sigma = level.like(x)
        if self.kind == "flow":
            return x + alpha * output
        if self.kind == "epsilon":
            return output
        return alpha * output + sigma * x

    def output(self, clean: Tensor, noise: Tensor, level: Level) -> Tensor:
        """Say what the model should give for a pair."""
        alpha, sigma = level.like(clean)
        if self.kind == "flow":
            return noise - clean
        return noise if self.kind == "epsilon" else alpha * noise - sigma * clean


def diffuse(clean: Tensor, noise: Tensor, level: Level) -> Tensor:
    """Add noise to a clean sample: alpha x0 + sigma noise."""
    alpha, sigma = level.like(clean)
    return alpha * clean + sigma * noise


def diffuse_on(x: Tensor, noise: Tensor, at: Level, to: Level) -> Tensor:
    """Add noise to a noisy sample so that it is distributed as at the higher level ``to``.

    With r = alpha_to / alpha_at: r x + sqrt(sigma_to^2 - r^2 sigma_at^2) noise, exact for either
    parametrisation. ``at`` must have an alpha above 0 and be no noisier than ``to``.
    """
    ratio = to.alpha / at.alpha
    # Rounding may leave a hair below 0 where both levels are one.
    added = (to.sigma**2 - ratio**2 * at.sigma**2).clamp(min=0).sqrt()
    scale, spread = Level(ratio, added).like(x)
    return scale * x + spread * noise


def mixed_noise(predicted: Tensor, fresh: Tensor, eta: float) -> Tensor:
    """Mix the noise that the model sees with fresh noise; its variance stays 1."""
    return eta * predicted + math.sqrt(1 - eta**2) * fresh


def objective_of(scheduler: Any, told: list[float]) -> Objective:
    """Find a pipeline's parametrisation from its scheduler and what its transformer was told.

    Args:
        scheduler: After ``set_timesteps``.
        told: The ``timestep`` of each step of a run.

    Raises:
        DistillError: A kind of prediction that cannot be trained here.
    """
    config, name = scheduler.config, type(scheduler).__name__
    kind = config.get("prediction_type")
    flow = kind == "flow_prediction" or name.startswith("FlowMatch")
    if flow or config.get("use_flow_sigmas"):
        if not flow:
            raise DistillError(
                f"{name}: use_flow_sigmas with prediction_type {kind!r}; must be flow_prediction"
            )
        steps = float(config.get("num_train_timesteps", 1000))
        whole = not scheduler.timesteps.is_floating_point()
        return Objective("flow", 1.0 if max(told) <= 1.5 else steps, whole)
    table = getattr(scheduler, "alphas_cumprod", None)
    if kind not in TABLED or table is None:
        raise DistillError(
            f"{name}: prediction_type {kind!r} is not supported for training; use "
            f"flow_prediction, {' or '.join(TABLED)}"
        )
    table = table.double().cpu()
    if kind == "epsilon" and bool((table <= 0).any()):
        raise DistillError(
            f"{name}: a model with prediction_type epsilon cannot learn at a level without "
            "signal (alphas_cumprod 0, rescale_betas_zero_snr); use v_prediction, or disable "
            "the rescaling"
        )
    return Objective(kind, 1.0, whole=False, alphas_cumprod=table)
