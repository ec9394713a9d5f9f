# SPDX-License-Identifier: Apache-2.0
"""Noise levels and conversions against naive float64 formulas; the grid against real sampling."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.distill.errors import DistillError
from dit_sparse.distill.grid import StepGrid, read_grid
from dit_sparse.distill.objective import Level, Objective, diffuse, diffuse_on, mixed_noise
from dit_sparse.distill.record import record
from tests import tiny
from tests.distill import setup

TABLE = torch.linspace(0.999, 0.0005, 1000, dtype=torch.float64)
KINDS = {
    "flow": Objective("flow"),
    "epsilon": Objective("epsilon", alphas_cumprod=TABLE),
    "v_prediction": Objective("v_prediction", alphas_cumprod=TABLE),
}
FAMILIES = [
    "wan", "hunyuan_video", "hunyuan_video_guided", "cogvideox", "cogvideox_1.5", "flux",
    "pixart_sigma", "pixart_ddim",
]  # fmt: skip


def naive_level(kind, time):
    if kind == "flow":
        return 1 - time, time
    square = float(TABLE[int(time)])
    return math.sqrt(square), math.sqrt(1 - square)


def naive_output(kind, clean, noise, alpha, sigma):
    return {
        "flow": noise - clean, "epsilon": noise, "v_prediction": alpha * noise - sigma * clean
    }[kind]  # fmt: skip


@given(kind=st.sampled_from(sorted(KINDS)), u=st.floats(0.001, 0.999), seed=st.integers(0, 99))
def test_output_clean_and_noise_are_three_ways_to_say_one_thing(kind, u, seed):
    objective = KINDS[kind]
    time = u if kind == "flow" else float(int(u * 1000))
    alpha, sigma = naive_level(kind, time)
    random = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, 2, 3, 5, generator=random, dtype=torch.float64)
    level = objective.level(torch.tensor([time, time], dtype=torch.float64))
    assert float(level.alpha[0]) == pytest.approx(alpha, abs=1e-12)
    assert float(level.sigma[0]) == pytest.approx(sigma, abs=1e-12)
    x = alpha * clean + sigma * noise
    output = naive_output(kind, clean, noise, alpha, sigma)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(diffuse(clean, noise, level), x, **close)
    torch.testing.assert_close(objective.output(clean, noise, level), output, **close)
    torch.testing.assert_close(objective.clean(x, output, level), clean, **close)
    torch.testing.assert_close(objective.noise(x, output, level), noise, **close)


@given(
    kind=st.sampled_from(sorted(KINDS)),
    times=st.tuples(st.floats(0, 0.98), st.floats(0, 1)),
)
def test_noising_on_is_noising_at_once(kind, times):
    """x0 and the two noises enter with the weights of one step from x0 to the higher level."""
    low, gap = times
    high = low + (0.999 - low) * gap
    if kind != "flow":
        low, high = float(int(low * 1000)), float(int(high * 1000))
    at, to = (KINDS[kind].level(torch.tensor([t], dtype=torch.float64)) for t in (low, high))
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    signal = diffuse_on(diffuse(one, zero, at), zero, at, to)
    own = diffuse_on(diffuse(zero, one, at), zero, at, to)
    fresh = diffuse_on(zero, one, at, to)
    alpha, sigma = naive_level(kind, high)
    assert float(signal) == pytest.approx(alpha, abs=1e-12)
    assert float(own**2 + fresh**2) == pytest.approx(sigma**2, abs=1e-9)


def test_mixed_noise_keeps_its_variance():
    one, zero = torch.ones(1), torch.zeros(1)
    for eta in (0.0, 0.3, 0.9, 1.0):
        parts = mixed_noise(one, zero, eta), mixed_noise(zero, one, eta)
        assert float(sum(p**2 for p in parts)) == pytest.approx(1.0)
        assert float(parts[0]) == pytest.approx(eta)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("steps", [2, 4])
def test_the_training_grid_is_what_the_transformer_is_told_when_sampling(name, steps):
    pipe, args = tiny.PIPELINES[name]()
    grid = record(pipe, args, steps=steps).grid
    told, seen = [], []

    def note(_, positional, named):
        told.append(float(named["timestep"].flatten()[0]))
        x = named["hidden_states"] if "hidden_states" in named else positional[0]
        seen.append(x[:1].clone())

    hook = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    tiny.run(pipe, args, num_inference_steps=steps)
    hook.remove()
    passes = len(told) // steps
    assert told[::passes] == grid.told.tolist()
    assert grid.steps == steps
    # What the sampler says its levels are, read from its own tables.
    scheduler = pipe.scheduler
    for i in range(steps):
        level = grid.level(i, 1)
        if grid.objective.kind == "flow":
            assert float(level.sigma) == float(scheduler.sigmas[i].double())
        else:
            square = float(scheduler.alphas_cumprod[int(scheduler.timesteps[i])])
            assert float(level.alpha) ** 2 == pytest.approx(square, rel=1e-6)
    clean = grid.level(steps, 3)
    assert clean.alpha.tolist() == [1.0] * 3
    assert clean.sigma.tolist() == [0.0] * 3


def test_a_recording_leaves_the_pipeline_as_it_was():
    pipe, args = tiny.wan()
    before = tiny.run(pipe, args)
    keys = set(vars(pipe.transformer))
    record(pipe, args, steps=2)
    assert set(vars(pipe.transformer)) == keys
    assert torch.equal(before, tiny.run(pipe, args))


def test_the_unconditional_branch_is_the_pipelines_own():
    for name in ("wan", "cogvideox", "pixart_sigma", "hunyuan_video_guided"):
        pipe, args = setup.pipeline(name)
        found = record(pipe, args, steps=2)
        assert torch.equal(found.prompt["encoder_hidden_states"], args["prompt_embeds"])
        assert torch.equal(found.uncond["encoder_hidden_states"], args["negative_prompt_embeds"])


GRID = StepGrid(
    Objective("flow"),
    torch.tensor([1.0, 0.9, 0.5], dtype=torch.float64),
    torch.tensor([1000.0, 900.0, 500.0], dtype=torch.float64),
)


@given(u=st.floats(0, 1, exclude_max=True), step=st.integers(0, 2))
def test_disjoint_spans_end_where_the_step_starts(u, step):
    low, high = [(0.9, 1.0), (0.5, 0.9), (0.0, 0.5)][step]
    u = torch.tensor([u], dtype=torch.float64)
    time = float(GRID.draw(u, step, top=0.98, disjoint=True))
    assert max(low, 1e-4) <= time <= high
    time = float(GRID.draw(u, step, top=0.98, disjoint=False))
    assert max(low, 1e-4) <= time <= (1.0 if step == 0 else 0.98)


def test_a_time_falls_into_the_step_that_starts_above_it():
    assert [GRID.step_of(t) for t in (1.0, 0.95, 0.9, 0.7, 0.5, 0.1)] == [0, 0, 1, 1, 2, 2]


class Scheduler:
    def __init__(self, timesteps=(900, 500), **config):
        self.config = config
        self.timesteps = torch.tensor(timesteps)
        self.alphas_cumprod = TABLE.float()


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (
            Scheduler(prediction_type="sample"),
            "prediction_type 'sample' is not supported for training",
        ),
        (Scheduler(prediction_type="epsilon", use_flow_sigmas=True), "must be flow_prediction"),
        (Scheduler((500, 900), prediction_type="epsilon"), "must decrease from step to step"),
        (Scheduler((900, 500, 1), prediction_type="epsilon"), "one call per step"),
        (Scheduler((900.5, 500), prediction_type="epsilon"), "not in its table"),
    ],
)
def test_a_scheduler_that_cannot_be_trained_is_named(scheduler, words):
    with pytest.raises(DistillError, match=words):
        read_grid(scheduler, [900.0, 500.0])


def test_epsilon_without_any_signal_is_refused():
    scheduler = Scheduler(prediction_type="epsilon")
    scheduler.alphas_cumprod[-1] = 0
    with pytest.raises(DistillError, match="without signal"):
        read_grid(scheduler, [900.0, 500.0])


def test_levels_of_another_spacing_than_the_timesteps_are_refused():
    scheduler = Scheduler(prediction_type="epsilon")
    scheduler.sigmas = torch.tensor([3.0, 1.0, 0.0])
    with pytest.raises(DistillError, match="Karras"):
        read_grid(scheduler, [900.0, 500.0])


def test_pipelines_that_start_from_a_picture_or_have_two_transformers_are_refused():
    for name, words in (("wan_i2v", "starts from an image"), ("wan_2.2", "2 transformers")):
        pipe, args = tiny.PIPELINES[name]()
        with pytest.raises(DistillError, match=words):
            record(pipe, args, steps=2)


def test_a_size_that_the_pipeline_refuses_is_said_in_its_words():
    pipe, args = tiny.wan()
    with pytest.raises(DistillError, match=r"WanPipeline rejected this run: .*divisible by 16"):
        record(pipe, {**args, "height": 65}, steps=2)
    assert "forward" not in vars(pipe.transformer)


def test_a_level_takes_the_form_and_dtype_of_what_it_multiplies():
    alpha, _ = Level(torch.tensor([0.5]), torch.tensor([0.5])).like(torch.zeros(1, 2, 3))
    assert alpha.shape == (1, 1, 1)
    assert alpha.dtype == torch.float32
