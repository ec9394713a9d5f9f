# SPDX-License-Identifier: Apache-2.0
"""The two losses of trajectory distribution matching, on tensors alone.

Source: Luo et al. 2025, "Learning Few-Step Diffusion Models by Trajectory Distribution Matching",
arXiv:2503.06674, with the settings of Gu et al. 2025, "Video-BLADE", arXiv:2508.10774.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dit_sparse.distill.objective import Level

CriticWeight = Literal["inverse_variance", "none"]
StudentWeight = Literal["none", "teacher_distance"]
MOST = 5.0  # the largest divisor of "teacher_distance", as published


def critic_loss(
    found: Tensor,
    student: Tensor,
    level: Level,
    *,
    weight: CriticWeight = "inverse_variance",
    teacher: Tensor | None = None,
    regularization: float = 0.0,
) -> Tensor:
    """Let the critic recover what the student made.

    Mean over elements of w (F - x0)^2 + lambda w (F - R)^2, each sample on its own. With w =
    1 / sigma^2 this is, for flow matching, the plain error of the velocity, and otherwise the
    published error over 1 - alphas_cumprod.

    Args:
        found: The critic's clean sample F ``[batch, ...]``.
        student: The student's x0, without gradient.
        level: Of the noised sample that the critic saw.
        weight: "none" takes w = 1.
        teacher: The teacher's clean sample R without guidance; only where lambda > 0.
        regularization: lambda, >= 0; published 0.5 for CogVideoX, 0 for Wan.

    Returns:
        ``[batch]``.
    """
    _, sigma = level.like(found)
    scale = sigma**-2 if weight == "inverse_variance" else torch.ones_like(sigma)
    error = scale * (found - student) ** 2
    if teacher is not None and regularization > 0:
        error = error + regularization * scale * (found - teacher) ** 2
    return error.flatten(1).mean(1)


def student_loss(
    student: Tensor,
    teacher: Tensor,
    critic: Tensor,
    *,
    huber: float,
    weight: StudentWeight = "none",
) -> Tensor:
    """Pull the student from the critic's clean sample towards the teacher's.

    With the target x0 + R - F held fixed: mean of sqrt((x0 - target)^2 + c^2) - c, so that the
    gradient by x0 is (F - R) / sqrt((F - R)^2 + c^2): the difference of the two scores, bounded.

    Args:
        student: x0 ``[batch, ...]``, with gradient.
        teacher: R, the guided teacher's clean sample of the noised x0.
        critic: F, the critic's of the same.
        huber: c / sqrt(elements of a sample), >= 0; BLADE (Wan) has 1e-3 / 128, TDM 0.00054.
            0 is the plain absolute value.
        weight: "teacher_distance" divides each sample by its mean |x0 - R|, 5 at most (published
            for CogVideoX); "none" does not (Wan).

    Returns:
        ``[batch]``.
    """
    target = (student + teacher - critic).detach()
    c = huber * student[0].numel() ** 0.5
    gap = student - target
    loss = ((gap**2 + c**2).sqrt() - c if c > 0 else gap.abs()).flatten(1).mean(1)
    if weight == "teacher_distance":
        far = (student - teacher).detach().abs().flatten(1).mean(1)
        loss = loss / far.clamp(min=torch.finfo(far.dtype).tiny, max=MOST)
    return loss


def matching_loss(output: Tensor, wanted: Tensor) -> Tensor:
    """Take the squared error of the model's own output, a mean for each sample ``[batch]``."""
    return ((output - wanted) ** 2).flatten(1).mean(1)
