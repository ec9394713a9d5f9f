# SPDX-License-Identifier: Apache-2.0
"""Student, critic and teacher: one model with two adapters, or three whole models.

With LoRA the base weights are in memory once: the teacher is the model with its adapters off and
dense attention, student and critic are one adapter each.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch

from dit_sparse.distill.attention import TrainableAttention
from dit_sparse.distill.errors import DistillError
from dit_sparse.distill.record import prediction
from dit_sparse.distill.shard import shard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from dit_sparse.distill.config import Lora
    from dit_sparse.distill.record import Recording
    from dit_sparse.distill.shard import Sharding
    from dit_sparse.strategy import Strategy

Role = Literal["student", "critic", "teacher"]


class Networks:
    """The roles of one training run.

    Args:
        model: The pretrained transformer, on its device; its weights are frozen or copied.
        strategy: What the sparse roles run; None: nothing is sparse.
        num_steps: Steps of the sampling run, for the strategy's schedule.
        roles: Which are trained: ("student",) or ("student", "critic").
        sparse: Which are sparse.
        lora: Settings of the adapters; None: whole copies are trained.
        seed: For the adapters' first weights.
        kernel: Which kernel; None: the best that has gradients.
    """

    def __init__(
        self,
        model: Any,
        strategy: Strategy | None,
        num_steps: int,
        *,
        roles: tuple[Role, ...] = ("student", "critic"),
        sparse: tuple[Role, ...] = ("student", "critic"),
        lora: Lora | None = None,
        seed: int = 0,
        kernel: str | None = None,
    ) -> None:
        """Prepare the models; raises before anything is changed."""
        self.num_steps, self.lora, self.sparse = num_steps, lora, sparse
        model.requires_grad_(requires_grad=False)
        model.eval()
        self.models: dict[Role, Any] = {"teacher": model}
        self._layers: list[Any] = []
        if lora is not None:
            _add_adapters(model, lora, roles, seed)
            self._layers = [m for m in model.modules() if _is_adapted(m)]
            self.models |= dict.fromkeys(roles, model)
        else:
            for role in roles:
                self.models[role] = copy.deepcopy(model).requires_grad_()
        self._handles: dict[int, TrainableAttention] = {}
        if strategy is not None:
            for role in roles:
                own = self.models[role]
                if role in sparse and id(own) not in self._handles:
                    self._handles[id(own)] = TrainableAttention(own, strategy, kernel)
        self.roles = roles

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """Name a role's trained weights, in a fixed order."""
        named = self.models[role].named_parameters()
        if self.lora is None:
            return dict(named)
        return {name: p for name, p in named if f".{role}." in name}

    @contextmanager
    def use(self, role: Role, step: int) -> Iterator[Any]:
        """Let a role's model run at a step of the sampling run; also around its backward pass.

        With gradient checkpointing the backward pass runs the model again, and must find the same
        adapter, attention and step.
        """
        model = self.models[role]
        if self._layers:
            self._switch(role)
        handle = self._handles.get(id(model))
        if handle is not None:
            handle.paused = role not in self.sparse
            handle.begin(step, self.num_steps)
        yield model

    def predict(
        self,
        role: Role,
        x: Tensor,
        told: Tensor,
        step: int,
        condition: dict[str, Tensor],
        recording: Recording,
    ) -> Tensor:
        """Run a role's model: its output in ``x``'s dtype.

        Args:
            role: Who.
            x: Noisy samples ``[batch, ...]``.
            told: What the model is told of the time, ``[batch]``.
            step: Of the sampling run, for the strategy.
            condition: What depends on the prompts.
            recording: What does not.
        """
        with self.use(role, step) as model:
            device = self.device
            inputs = x.to(device, self.dtype)
            arguments = {
                key: value.to(device, self.dtype if value.is_floating_point() else None)
                for key, value in condition.items()
            }
            shared = {k: _to_batch(k, v, len(x)) for k, v in recording.shared.items()}
            answer: Tensor = model(
                hidden_states=inputs,
                timestep=told.to(device, recording.time_dtype),
                **arguments,
                **shared,
                return_dict=False,
            )[0]
        return prediction(answer, inputs).to(x.device, x.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The base model's dtype."""
        found: torch.dtype = self.models["teacher"].dtype
        return found

    @property
    def device(self) -> torch.device:
        """Where passes run: with FSDP's offload, the base weights wait elsewhere."""
        return self.parameters_of(self.roles[0])[0].device

    def shard(self, how: Sharding, device: torch.device) -> None:
        """Spread the base weights over all processes; with LoRA only."""
        trained = [weight for role in self.roles for weight in self.parameters_of(role)]
        shard(self.models["teacher"], trained, how, device)

    def checkpoint_gradients(self) -> None:
        """Keep no activations of the trained models: they are computed again."""
        for model in {id(self.models[r]): self.models[r] for r in self.roles}.values():
            model.enable_gradient_checkpointing()

    def report(self, role: Role = "student") -> Any:
        """Report on the attention of a role's newest pass; None where nothing is sparse."""
        handle = self._handles.get(id(self.models[role]))
        return None if handle is None else handle.report()

    def detach(self) -> None:
        """Take sparse attention off all models."""
        for handle in self._handles.values():
            handle.remove()

    def _switch(self, role: Role) -> None:
        """Set one adapter active, or none; peft freezes those that are not, which we undo."""
        for layer in self._layers:
            layer.enable_adapters(role != "teacher")
            if role != "teacher":
                layer.set_adapter(role)
        for trained in self.roles:
            for parameter in self.parameters_of(trained):
                parameter.requires_grad_()

    def parameters_of(self, role: Role) -> list[nn.Parameter]:
        """List a role's trained weights."""
        if not hasattr(self, "_own"):
            self._own = {r: list(self.parameters(r).values()) for r in self.roles}
        return self._own[role]


def _to_batch(name: str, value: Any, batch: int) -> Any:
    """Repeat what is one sample's for a batch (guidance, sizes); tables stay as they are."""
    if name == "guidance":
        return value.expand(batch)
    if name == "added_cond_kwargs":
        return {
            key: part.expand(batch, *part.shape[1:]) if isinstance(part, torch.Tensor) else part
            for key, part in value.items()
        }
    return value


def _is_adapted(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _add_adapters(model: Any, lora: Lora, roles: tuple[Role, ...], seed: int) -> None:
    """Put one LoRA adapter a role on the model, its weights fp32, the same on every process."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise DistillError(
            "LoRA requires the package peft; install dit-sparse[distill], or set lora: null to "
            "train all weights"
        ) from error
    config = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "init_lora_weights": True,
    }
    paths = [f".{name}" for name, _ in model.named_modules()]
    if not any(path.endswith(f".{target}") for path in paths for target in lora.targets):
        raise DistillError(
            f"lora.targets: {type(model).__name__} has no module named {', '.join(lora.targets)}"
        )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Two adapters on one model are meant.
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        torch.manual_seed(seed)
        for role in roles:
            inject_adapter_in_model(LoraConfig(**config), model, adapter_name=role)
    for name, parameter in model.named_parameters():
        if any(f".{role}." in name for role in roles):
            parameter.data = parameter.data.float()
            parameter.requires_grad_()
