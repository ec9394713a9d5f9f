# SPDX-License-Identifier: Apache-2.0
"""One role's optimizer: gradients summed over processes, clipped, applied."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.distill.errors import DistillError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dit_sparse.distill.config import Train


def rate(settings: Train, base: float, iteration: int, *, constant: bool = False) -> float:
    """Give the learning rate of a 0-based iteration, a function of it alone."""
    if constant:
        return base
    if iteration < settings.warmup:
        return base * (iteration + 1) / (settings.warmup + 1)
    if settings.schedule == "constant":
        return base
    done = (iteration - settings.warmup) / max(1, settings.iterations - settings.warmup)
    return base * (1 + math.cos(math.pi * min(done, 1.0))) / 2


class Update:
    """AdamW for one role, on fp32 weights.

    A parameter in 16 bits has an fp32 weight of its own: small steps would be lost in it. Its
    gradients are added up there, and it gets the weight's rounded value after each step.

    Args:
        role: Whose.
        parameters: By name.
        settings: Of the loop.
        accelerator: Knows the other processes.
    """

    def __init__(
        self, role: str, parameters: dict[str, nn.Parameter], settings: Train, accelerator: Any
    ) -> None:
        self.role, self.settings = role, settings
        self.accelerator = accelerator
        self.parameters = {name: _weight(parameter) for name, parameter in parameters.items()}
        self.rounded = [
            (parameter, self.parameters[name])
            for name, parameter in parameters.items()
            if parameter is not self.parameters[name]
        ]
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=0.0,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            eps=settings.eps,
        )

    def apply(self, lr: float, loss: Tensor, *, skip_above: float | None = None) -> dict[str, Any]:
        """Take a step with the gradients that were gathered, and forget them.

        The gradients are those of this process's share of the whole batch's mean loss: their sum
        over processes is the batch's gradient, however many processes there are.

        Args:
            lr: Learning rate.
            loss: This process's share of the mean loss, ``[]``.
            skip_above: No step where the mean loss is above.

        Returns:
            ``loss``, ``norm`` of the gradient, and whether it was ``skipped``.

        Raises:
            DistillError: Loss or gradient is not finite; nothing was changed.
        """
        total = float(self.accelerator.reduce(loss.detach().double(), reduction="sum"))
        if not math.isfinite(total):
            self.optimizer.zero_grad()
            raise DistillError(f"the {self.role}'s loss is {total}")
        grads = []
        for parameter in self.parameters.values():
            if parameter.grad is None:  # no path to it on this process, maybe on another
                parameter.grad = torch.zeros_like(parameter)
            if self.accelerator.num_processes > 1:
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="sum")
            grads.append(parameter.grad)
        norm = torch.nn.utils.get_total_norm(grads)
        if not bool(norm.isfinite()):
            self.optimizer.zero_grad()
            raise DistillError(f"the {self.role}'s gradient has a norm of {float(norm)}")
        skipped = skip_above is not None and total > skip_above
        if not skipped:
            torch.nn.utils.clip_grads_with_norm_(
                self.parameters.values(), self.settings.gradient_clip, norm
            )
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self._round()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": total, "norm": float(norm), "skipped": skipped}

    def _round(self) -> None:
        for parameter, weight in self.rounded:
            parameter.data.copy_(weight.data)

    def state(self) -> dict[str, Tensor]:
        """Give weights and moments by name."""
        found: dict[str, Tensor] = {
            f"{self.role}/weight/{name}": p for name, p in self.parameters.items()
        }
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{self.role}/{key}/{name}"] = value
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take weights and moments from ``state``'s tensors.

        Raises:
            DistillError: They are not of these weights; names the first that is missing.
        """
        for name, parameter in self.parameters.items():
            weight = tensors.get(f"{self.role}/weight/{name}")
            if weight is None or weight.shape != parameter.shape:
                raise DistillError(
                    f"the checkpoint does not contain the {self.role} weight {name}"
                )
            parameter.data.copy_(weight)
            state = {
                key: tensors[f"{self.role}/{key}/{name}"].clone()
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{self.role}/{key}/{name}" in tensors
            }
            if state:
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in state.items()
                }
        self._round()


def _weight(parameter: nn.Parameter) -> nn.Parameter:
    """Give a parameter's fp32 weight: itself, or one that takes its gradients over."""
    if parameter.dtype == torch.float32:
        return parameter
    weight = torch.nn.Parameter(parameter.detach().float())

    def take(rounded: Tensor) -> None:
        assert rounded.grad is not None
        grad = rounded.grad.float()
        weight.grad = grad if weight.grad is None else weight.grad.add_(grad)
        rounded.grad = None

    parameter.register_post_accumulate_grad_hook(take)
    return weight
