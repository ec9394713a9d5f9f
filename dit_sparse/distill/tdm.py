# SPDX-License-Identifier: Apache-2.0
"""One step of sparsity-aware trajectory distribution matching, for one group of samples.

Source: Luo et al. 2025 (TDM), arXiv:2503.06674, and Gu et al. 2025 (BLADE), arXiv:2508.10774. The
student, sparse and of K steps, runs along its own trajectory; at one of its steps its clean sample
is noised again to a random level, and there the guided dense teacher and a critic that knows the
student's samples say in which direction to move. No data but prompts.

A group's samples share the drawn step of the student (the strategy may differ from step to step);
everything else is drawn for each sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_sparse.distill.losses import critic_loss, student_loss
from dit_sparse.distill.objective import Level, diffuse, diffuse_on, mixed_noise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dit_sparse.distill.conditions import Conditions
    from dit_sparse.distill.config import Distill
    from dit_sparse.distill.draw import Draw
    from dit_sparse.distill.networks import Networks, Role


@dataclass(eq=False)
class Group:
    """Samples that go through one pass together.

    Args:
        samples: Their indices within the whole batch; names of their random numbers.
        prompts: Their prompts' indices.
        device: Where to compute.
        beside: Names of the groups that other processes run in the same passes, where all
            must keep step; this one's may be among them.
    """

    samples: list[int]
    prompts: list[int]
    device: torch.device
    beside: tuple[int, ...] = ()

    @property
    def name(self) -> int:
        """The first sample's index names what the group shares."""
        return self.samples[0]


@dataclass(eq=False)
class Walk:
    """What is kept of a rollout: noisy samples by the step that starts from them."""

    states: dict[int, Tensor]


class Matching:
    """The losses of one run's groups.

    Args:
        networks: Who computes.
        conditions: Prompts and grid.
        settings: Of the method.
    """

    def __init__(self, networks: Networks, conditions: Conditions, settings: Distill) -> None:
        self.networks, self.conditions, self.settings = networks, conditions, settings
        self.grid = conditions.grid
        self.objective = self.grid.objective

    def draw_step(self, draw: Draw, name: int, purpose: str) -> int:
        """Draw the step of the student of the group of that name."""
        return draw.integer(f"{purpose} step", name, self.grid.steps)

    @torch.no_grad()
    def walk(self, draw: Draw, group: Group, purposes: Sequence[str]) -> Walk:
        """Run the student from noise, and keep the states that ``purposes`` start from.

        It goes as far as the groups beside this one need, though nothing of that is kept: sharded
        processes run the same passes.
        """
        wanted = {self.draw_step(draw, group.name, purpose) for purpose in purposes}
        beside = {self.draw_step(draw, name, p) for name in group.beside for p in purposes}
        shape = self.conditions.first.latents
        x = draw.normal("start", group.samples, shape).to(group.device)
        walk = Walk({0: x})
        condition = self.conditions.load(group.prompts)
        for step in range(max(wanted | beside)):
            clean, noise = self._step(x, step, condition)
            fresh = draw.normal(f"walk {step}", group.samples, shape).to(group.device)
            level = self.grid.level(step + 1, len(x))
            x = diffuse(clean, mixed_noise(noise, fresh, self.settings.eta), level)
            walk.states[step + 1] = x
        walk.states = {step: walk.states[step] for step in wanted}
        return walk

    def critic(self, draw: Draw, group: Group, walk: Walk, step: int) -> Tensor:
        """Compute the critic's losses ``[batch]`` for the student's step ``step``."""
        condition = self.conditions.load(group.prompts)
        with torch.no_grad():
            clean, noise = self._step(walk.states[step], step, condition)
            noisy, level, told = self._noised(draw, group, clean, noise, step, "critic")
            teacher = None
            if self.settings.critic_regularization > 0:
                teacher = self._clean("teacher", noisy, level, told, step, condition)
        found = self._clean("critic", noisy, level, told, step, condition)
        return critic_loss(
            found,
            clean,
            level,
            weight=self.settings.critic_weight,
            teacher=teacher,
            regularization=self.settings.critic_regularization,
        )

    def student(self, draw: Draw, group: Group, walk: Walk, step: int) -> Tensor:
        """Compute the student's losses ``[batch]``; only its step ``step`` has a gradient."""
        condition = self.conditions.load(group.prompts)
        clean, noise = self._step(walk.states[step], step, condition)
        with torch.no_grad():
            noisy, level, told = self._noised(
                draw, group, clean.detach(), noise.detach(), step, "student"
            )
            critic = self._clean("critic", noisy, level, told, step, condition)
            teacher = self._guided(noisy, level, told, step, condition)
        return student_loss(
            clean,
            teacher,
            critic,
            huber=self.settings.huber,
            weight=self.settings.student_weight,
        )

    def _step(self, x: Tensor, step: int, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Let the student take a step from its grid: clean sample and predicted noise."""
        level = self.grid.level(step, len(x))
        told = self.grid.told[step].expand(len(x))
        output = self.networks.predict("student", x, told, step, condition, self.conditions.first)
        return self.objective.clean(x, output, level), self.objective.noise(x, output, level)

    def _noised(
        self, draw: Draw, group: Group, clean: Tensor, noise: Tensor, step: int, purpose: str
    ) -> tuple[Tensor, Level, Tensor]:
        """Noise a step's result again: to the step's end by the student's own noise, then up."""
        shape = tuple(clean.shape[1:])
        batch = len(clean)

        def fresh(name: str) -> Tensor:
            return draw.normal(f"{purpose} {name}", group.samples, shape).to(clean.device)

        end = self.grid.level(step + 1, batch)
        middle = diffuse(clean, mixed_noise(noise, fresh("end"), self.settings.eta), end)
        time = self.grid.draw(
            draw.uniform(f"{purpose} time", group.samples),
            step,
            top=self.settings.renoise_top,
            disjoint=self.settings.renoise == "disjoint",
        )
        level = self.objective.level(time)
        noisy = diffuse_on(middle, fresh("noise"), end, level)
        return noisy, level, self.objective.model_time(time)

    def _clean(
        self,
        role: Role,
        x: Tensor,
        level: Level,
        told: Tensor,
        step: int,
        condition: dict[str, Tensor],
    ) -> Tensor:
        output = self.networks.predict(role, x, told, step, condition, self.conditions.first)
        return self.objective.clean(x, output, level)

    def _guided(
        self, x: Tensor, level: Level, told: Tensor, step: int, condition: dict[str, Tensor]
    ) -> Tensor:
        """Ask the teacher, with classifier-free guidance where it has two branches."""
        clean = self._clean("teacher", x, level, told, step, condition)
        uncond = self.conditions.uncond(len(x))
        if uncond is None:
            return clean
        other = self._clean("teacher", x, level, told, step, uncond)
        return other + self.settings.teacher_scale * (clean - other)
