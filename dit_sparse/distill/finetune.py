# SPDX-License-Identifier: Apache-2.0
"""The model's own training loss with sparse attention in place, on videos or pictures.

For Radial's length extension (Li et al. 2025, arXiv:2506.19852): train at two to four times the
frames with the radial mask, so that the model learns both the length and the mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_sparse.distill.files import read_tensors
from dit_sparse.distill.losses import matching_loss
from dit_sparse.distill.objective import diffuse

if TYPE_CHECKING:
    from pathlib import Path

    from dit_sparse.distill.conditions import Conditions
    from dit_sparse.distill.config import Finetune
    from dit_sparse.distill.draw import Draw
    from dit_sparse.distill.networks import Networks
    from dit_sparse.distill.tdm import Group


class Plain:
    """The plain loss of one run's groups.

    Args:
        networks: Who computes; only the student.
        conditions: Captions and the sampling grid, one caption a latents file.
        settings: Of the method.
        latents: One file a clip, ``"latents"`` in it without a batch.
    """

    def __init__(
        self,
        networks: Networks,
        conditions: Conditions,
        settings: Finetune,
        latents: tuple[Path, ...],
    ) -> None:
        self.networks, self.conditions, self.settings = networks, conditions, settings
        self.latents, self.grid = latents, conditions.grid
        self.objective = self.grid.objective

    def time(self, draw: Draw, group: Group) -> Tensor:
        """Draw the group's time, float64 ``[]``: all its samples are at one step of a run."""
        u = draw.uniform("time", [group.name])[0]
        if self.settings.sigma == "logit_normal":
            normal = draw.normal("time", [group.name], ()).double()[0]
            u = torch.sigmoid(self.settings.logit_mean + self.settings.logit_std * normal)
        table = self.objective.alphas_cumprod
        if table is not None:
            return (u * len(table)).floor()
        # A schedule of shift s moves sigma to s u / (1 + (s - 1) u).
        shift = self.settings.shift
        return (shift * u / (1 + (shift - 1) * u)).clamp(min=1e-4)

    def loss(self, draw: Draw, group: Group) -> tuple[Tensor, int]:
        """Compute the losses ``[batch]``, and say at which step of a run they are."""
        rows = [read_tensors(self.latents[i])[0]["latents"].float() for i in group.prompts]
        clean = torch.stack(rows).to(group.device)
        times = self.time(draw, group).expand(len(clean))
        level = self.objective.level(times)
        noise = draw.normal("noise", group.samples, tuple(clean.shape[1:])).to(group.device)
        step = self.grid.step_of(float(times[0]))
        condition = self._condition(draw, group)
        x = diffuse(clean, noise, level)
        output = self.networks.predict(
            "student", x, self.objective.model_time(times), step, condition, self.conditions.first
        )
        return matching_loss(output, self.objective.output(clean, noise, level)), step

    def _condition(self, draw: Draw, group: Group) -> dict[str, Tensor]:
        """Read the captions; some are dropped, where the model has an unconditional branch."""
        condition = self.conditions.load(group.prompts)
        uncond = self.conditions.uncond(len(group.samples))
        if uncond is None or self.settings.caption_dropout == 0:
            return condition
        dropped = draw.uniform("caption", group.samples) < self.settings.caption_dropout
        return {
            key: torch.where(dropped.reshape(-1, *(1,) * (value.ndim - 1)), uncond[key], value)
            for key, value in condition.items()
        }
