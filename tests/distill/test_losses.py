# SPDX-License-Identifier: Apache-2.0
"""Losses and their gradients against loops over single numbers in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.distill.losses import critic_loss, matching_loss, student_loss
from dit_sparse.distill.objective import Level

SEEDS = st.integers(0, 10_000)


def tensors(seed, count, shape=(2, 3, 4)):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=random, dtype=torch.float64)


def numbers(x):
    return [row.flatten().tolist() for row in x]


@given(seed=SEEDS, huber=st.sampled_from([0.0, 1e-3, 0.3]), weighted=st.booleans())
def test_student_loss_and_gradient(seed, huber, weighted):
    student, teacher, critic = tensors(seed, 3)
    leaf = student.clone().requires_grad_()
    weight = "teacher_distance" if weighted else "none"
    found = student_loss(leaf, teacher, critic, huber=huber, weight=weight)
    (grad,) = torch.autograd.grad(found.sum(), leaf)
    for b, (x, r, f) in enumerate(
        zip(numbers(student), numbers(teacher), numbers(critic), strict=True)
    ):
        n = len(x)
        c = huber * math.sqrt(n)
        w = min(sum(abs(p - q) for p, q in zip(x, r, strict=True)) / n, 5.0) if weighted else 1.0
        loss, slopes = 0.0, []
        for p, q in zip(r, f, strict=True):
            gap = q - p  # x0 - (x0 + R - F)
            root = math.sqrt(gap * gap + c * c)
            loss += (root - c) / n / w
            slopes.append(gap / root / n / w)
        assert float(found[b].detach()) == pytest.approx(loss, rel=1e-6)
        assert grad[b].flatten().tolist() == pytest.approx(slopes, rel=1e-6, abs=1e-12)


@given(seed=SEEDS, pull=st.sampled_from([0.0, 0.5]), plain=st.booleans())
def test_critic_loss_and_gradient(seed, pull, plain):
    found, student, teacher = tensors(seed, 3)
    sigma = torch.tensor([0.2, 0.9], dtype=torch.float64)
    leaf = found.clone().requires_grad_()
    loss = critic_loss(
        leaf,
        student,
        Level(1 - sigma, sigma),
        weight="none" if plain else "inverse_variance",
        teacher=teacher,
        regularization=pull,
    )
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    for b, (f, x, r) in enumerate(
        zip(numbers(found), numbers(student), numbers(teacher), strict=True)
    ):
        scale = 1.0 if plain else 1 / float(sigma[b]) ** 2
        each = [
            scale * ((p - q) ** 2 + pull * (p - t) ** 2) for p, q, t in zip(f, x, r, strict=True)
        ]
        slope = [
            2 * scale * ((p - q) + pull * (p - t)) / len(f)
            for p, q, t in zip(f, x, r, strict=True)
        ]
        assert float(loss[b].detach()) == pytest.approx(sum(each) / len(f), rel=1e-9)
        assert grad[b].flatten().tolist() == pytest.approx(slope, rel=1e-9)


def test_the_critics_loss_is_the_plain_error_of_a_velocity():
    clean, noise, wrong = tensors(3, 3)
    sigma = torch.tensor([0.3, 0.7], dtype=torch.float64)
    s = sigma.reshape(2, 1, 1)
    x = (1 - s) * clean + s * noise
    velocity = noise - clean + 0.1 * wrong
    loss = critic_loss(x - s * velocity, clean, Level(1 - sigma, sigma))
    wanted = ((velocity - (x - clean) / s) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss, wanted)


def test_nothing_flows_into_teacher_or_critic():
    student, teacher, critic = (x.requires_grad_() for x in tensors(1, 3).unbind())
    loss = student_loss(student, teacher, critic, huber=1e-3, weight="teacher_distance").sum()
    grads = torch.autograd.grad(loss, (student, teacher, critic), allow_unused=True)
    assert grads[0] is not None
    assert grads[1:] == (None, None)


def test_matching_loss_is_a_mean_for_each_sample():
    one, other = tensors(5, 2)
    wanted = [
        sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / len(a)
        for a, b in zip(numbers(one), numbers(other), strict=True)
    ]
    assert matching_loss(one, other).tolist() == pytest.approx(wanted)
