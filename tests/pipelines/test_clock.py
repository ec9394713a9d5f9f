# SPDX-License-Identifier: Apache-2.0
"""The clock on real schedulers and on pipelines that start late or tell nothing."""

from __future__ import annotations

import types

import diffusers
import pytest
import torch

import dit_sparse
from dit_sparse.pipelines.clock import Clock
from tests import tiny

RADIAL = {"form": "paper", "decay_factor": 0.3, "block_size": 8}

SCHEDULERS = {
    "unipc": diffusers.UniPCMultistepScheduler,
    "flow": diffusers.FlowMatchEulerDiscreteScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "cogvideox": diffusers.CogVideoXDDIMScheduler,
}


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
@pytest.mark.parametrize("first", [0, 3])
def test_the_step_of_every_kind_of_scheduler(name, first):
    scheduler = SCHEDULERS[name]()
    clock = Clock(types.SimpleNamespace(scheduler=scheduler))
    clock.start()
    for _ in range(2):
        scheduler.set_timesteps(6)
        sample = tiny.normal(1, 4, 8, 8)
        for step, timestep in enumerate(scheduler.timesteps[first:], start=first):
            clock.timestep = timestep[None]
            for branch in range(2):  # two passes within the step
                moment = clock.read()
                assert (moment.step, moment.num_steps) == (step, 6)
                assert moment.new == (step == first and branch == 0)
            sample = scheduler.step(tiny.normal(1, 4, 8, 8), timestep, sample).prev_sample


def test_a_pipeline_that_starts_late():
    pipe, args = tiny.wan()
    late = diffusers.WanVideoToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=pipe.transformer,
        vae=pipe.vae,
        scheduler=pipe.scheduler,
    )
    late.set_progress_bar_config(disable=True)
    args = {k: args[k] for k in ("prompt_embeds", "negative_prompt_embeds", "height", "width")}
    frames = [torch.zeros(3, 64, 96)] * 9
    with dit_sparse.sparse_attention(late, "radial", **RADIAL) as handle:
        tiny.run(late, args, video=frames, strength=0.5)
        report = handle.report()
    assert {row["step"] for row in report.rows} == {2, 3}
    assert {row["branch"] for row in report.rows} == {"cond", "uncond"}  # counted, not told
    assert report.attached_at is None


def test_a_loop_of_the_users_own():
    pipe, args = tiny.wan()
    scheduler, model = pipe.scheduler, pipe.transformer
    with dit_sparse.sparse_attention(model, "radial", scheduler=scheduler, **RADIAL) as handle:
        for _ in range(2):
            scheduler.set_timesteps(3)
            latents = tiny.normal(1, 16, 3, 8, 12)
            with torch.no_grad():
                for timestep in scheduler.timesteps:
                    velocity = model(
                        hidden_states=latents,
                        timestep=timestep[None],
                        encoder_hidden_states=args["prompt_embeds"],
                    ).sample
                    latents = scheduler.step(velocity, timestep, latents).prev_sample
            assert [row["step"] for row in handle.report().rows] == [0, 0, 1, 1, 2, 2]
