# SPDX-License-Identifier: Apache-2.0
"""Muon for weight matrices beside AdamW for the rest, one learning rate, and averaged weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, "Muon", the quintic's


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push all singular values of ``[rows, columns]`` towards 1 by Newton-Schulz iterations."""
    first, second, third = COEFFICIENTS
    work = matrix / (matrix.norm() + 1e-7)
    transposed = work.shape[0] > work.shape[1]
    if transposed:
        work = work.T
    for _ in range(steps):
        gram = work @ work.T
        work = first * work + (second * gram + third * gram @ gram) @ work
    return work.T if transposed else work


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalized steps whose size matches AdamW's (0.2 sqrt(larger side)).

    Convolutions are flattened to ``[out, in * kernel]``.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        """Take ``params`` of two or more dimensions."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(param)
                average = state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                update = orthogonalize(param.grad.lerp(average, group["momentum"]).flatten(1))
                size = 0.2 * max(update.shape) ** 0.5
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update.view_as(param), alpha=-group["lr"] * size)


class Optimizer:
    """Muon and AdamW behind one learning rate."""

    def __init__(
        self, model: nn.Module, lr: float, adam_ratio: float, adam_names: tuple[str, ...]
    ) -> None:
        """Split the parameters: vectors, thin matrices and ``adam_names`` go to AdamW.

        Args:
            model: Its parameters are trained.
            lr: Muon's learning rate.
            adam_ratio: AdamW's learning rate as a multiple of ``lr``.
            adam_names: Substrings of names of parameters that AdamW takes whatever their shape.
        """
        matrices, rest = [], []
        for name, param in model.named_parameters():
            wide = param.ndim > 1 and min(param.flatten(1).shape) >= 8 and param.numel() > 512
            named = any(part in name for part in adam_names)
            (matrices if wide and not named else rest).append(param)
        self.params = matrices + rest
        self.lr, self.adam_ratio = lr, adam_ratio
        self.muon = Muon(matrices, lr)
        self.adam = torch.optim.AdamW(rest, lr * adam_ratio, betas=(0.9, 0.97), weight_decay=1e-3)

    def step(self, loss: Tensor, factor: float) -> None:
        """Take the gradient of ``loss``, clip its norm to 1, move by ``factor * lr``.

        Raises:
            FloatingPointError: The loss is no number: the checkpoint before it is still good.
        """
        if not loss.isfinite():
            message = f"loss must be finite, got {loss.item()}; go on from the last checkpoint"
            raise FloatingPointError(message)
        self.muon.zero_grad()
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for optimizer, ratio in ((self.muon, 1.0), (self.adam, self.adam_ratio)):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * ratio * factor
            optimizer.step()

    def state_dict(self) -> dict:
        """Return both states, for a checkpoint."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Take both states from a checkpoint."""
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


class Average:
    """Exponential moving average of a model's weights; short at first, `decay` later."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start at the model's weights."""
        self.decay, self.updates = decay, 0
        self.weights = {name: value.clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's weights."""
        decay = min(self.decay, self.updates / (self.updates + 10))
        self.updates += 1
        for name, value in model.state_dict().items():
            self.weights[name].lerp_(value, 1 - decay)
