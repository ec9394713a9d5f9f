# SPDX-License-Identifier: Apache-2.0
"""The step of a pass: on real schedulers, and in pipelines that start late or tell nothing."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import dit_sparse
from dit_sparse.pipelines.clock import Clock, look_up
from tests import tiny
from tests.models.builders import CASES
from tests.models.case import make

RADIAL = {"form": "paper", "decay_factor": 0.3, "block_size": 8}
GNA = {"window": (2, 3, 3), "tile": (2, 2, 2)}

SCHEDULERS = {
    "unipc": diffusers.UniPCMultistepScheduler,
    "flow": diffusers.FlowMatchEulerDiscreteScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "cogvideox": diffusers.CogVideoXDDIMScheduler,
    "pndm": diffusers.PNDMScheduler,  # two or three evaluations at one timestep
    "heun": diffusers.HeunDiscreteScheduler,  # likewise
}


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_step_of_every_kind_of_scheduler(name, first, scaled):
    if scaled and (name == "pndm" or (name, first) == ("heun", 3)):
        pytest.skip("by value alone its repeated timesteps cannot be told apart")
    scheduler = SCHEDULERS[name]()
    clock = Clock(scheduler=scheduler)
    schedules = []
    for _ in range(2):
        scheduler.set_timesteps(6)
        sample = tiny.normal(1, 4, 8, 8)
        steps = len(scheduler.timesteps)
        for step, timestep in enumerate(scheduler.timesteps[first:], start=first):
            seen = (timestep / 1000)[None] if scaled else timestep.expand(2)
            if not (scaled and (name, step) == ("flow", 0)):  # 1000 / 1000 is its last, too
                moment = clock.read(None, seen, {})
                assert (moment.step, moment.num_steps) == (step, steps)
                assert moment.schedule is scheduler.timesteps
            sample = scheduler.step(tiny.normal(1, 4, 8, 8), timestep, sample).prev_sample
        schedules.append(scheduler.timesteps)
    assert schedules[0] is not schedules[1]


times = st.lists(st.floats(2, 999, width=32), min_size=1, max_size=20, unique=True)


@given(times, st.data())
def test_a_time_is_found_by_its_value(values, data):
    schedule = torch.tensor(sorted(values, reverse=True))
    step = data.draw(st.integers(0, len(values) - 1))
    now = schedule[step].clone()
    assert look_up(now, schedule) == step
    assert look_up(torch.stack([now, now.new_zeros(()), now]), schedule) == step  # 0: finished
    assert look_up(float(now), schedule) == step
    assert look_up(now.new_tensor([-5.0, 5e6]), schedule) is None
    if len(values) > 1:
        other = data.draw(st.integers(0, len(values) - 1).filter(lambda i: i != step))
        with pytest.raises(LookupError, match=f"steps {min(step, other)} to {max(step, other)} "):
            look_up(schedule[[step, other]], schedule)
        repeated = torch.cat([schedule, schedule[step:]])
        with pytest.raises(LookupError, match="matches several steps"):
            look_up(now, repeated)


def test_a_rounded_time_may_stand_for_two_steps():
    schedule = torch.tensor([1000.0, 998.0, 500.0])
    assert look_up((schedule[2] / 1000).bfloat16(), schedule) == 2
    assert look_up(torch.tensor(998.0), schedule) == 1
    with pytest.raises(LookupError, match="of the schedule, 0 to 1"):
        look_up(torch.tensor(999.0).bfloat16(), schedule)


@pytest.mark.parametrize("skip_prk_steps", [True, False])
def test_repeated_timesteps_are_steps_of_their_own(skip_prk_steps):
    pipe, args = tiny.pixart()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.PNDMScheduler(skip_prk_steps=skip_prk_steps)
    with dit_sparse.sparse_attention(pipe, "radial", strict=True, **RADIAL) as handle:
        tiny.run(pipe, args, num_inference_steps=5)
        report = handle.report()
    count = len(pipe.scheduler.timesteps)
    assert [row["step"] for row in report.rows if row["layer"] == 0] == list(range(count))
    assert report.num_steps == count


def skyreels(kind):
    """A diffusion-forcing pipeline, which steps a copy of its scheduler for each frame."""
    case = CASES["SkyReelsV2Transformer3DModel"]
    case = replace(case, config={**case.config, "in_channels": 16, "out_channels": 16})
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    pipe = getattr(diffusers, f"SkyReelsV2DiffusionForcing{kind}Pipeline")(
        transformer=make("SkyReelsV2Transformer3DModel", case),
        vae=vae.eval(),
        tokenizer=None,
        text_encoder=None,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (96, 64), (200, 40, 90))
    given_frames = {
        "": {"num_frames": 9},
        "ImageToVideo": {"num_frames": 9, "image": picture},
        "VideoToVideo": {
            "num_frames": 21,
            "video": [picture] * 5,
            "overlap_history": 5,
            "base_num_frames": 13,
        },
    }
    return pipe, {
        "prompt": None,
        "prompt_embeds": tiny.normal(1, 512, 16),
        "negative_prompt_embeds": tiny.normal(1, 512, 16, seed=2),
        "height": 64,
        "width": 96,
        **given_frames[kind],
    }


@pytest.mark.parametrize("kind", ["", "ImageToVideo", "VideoToVideo"])
def test_a_pipeline_that_steps_copies_of_its_scheduler(kind):
    pipe, args = skyreels(kind)
    options = {"dense_warmup_steps": 2, **GNA}
    with dit_sparse.sparse_attention(pipe, "gna", strict=True, **options) as handle:
        tiny.run(pipe, args)
        report = handle.report()
    passes = [(row["step"], row["branch"]) for row in report.rows if row["layer"] == 0]
    assert passes == [(step, branch) for step in range(4) for branch in ("cond", "uncond")]
    assert {row["step"] for row in report.sparse_rows} == {2, 3}


def test_frames_at_several_steps_are_declined():
    pipe, args = skyreels("")
    # As the pipeline does for blocks of frames, but without the mask of causal attention.
    pipe.transformer._set_ar_attention = lambda *_: None
    forced = {**args, "num_frames": 33, "ar_step": 2, "causal_block_size": 3}
    stock = tiny.run(pipe, forced, base_num_frames=33)
    with dit_sparse.sparse_attention(pipe, "gna", **GNA) as handle:
        mixed = tiny.run(pipe, forced, base_num_frames=33)
        report = handle.report()
    assert not torch.equal(mixed, stock)  # its first and last passes are of one step
    assert {row["step"] for row in report.sparse_rows} == {0, 2, 3}
    assert all("one pass contains steps" in reason for reason in report.reasons)
    assert {row["step"] for row in report.rows if row["reason"]} == {-1}
    with (
        dit_sparse.sparse_attention(pipe, "gna", strict=True, **GNA),
        pytest.raises(dit_sparse.GeometryError, match=r"one pass contains steps 0 to 1 \(frames"),
    ):
        tiny.run(pipe, forced, base_num_frames=33)


def test_samples_with_a_time_each_are_declined():
    pipe, args = tiny.wan()
    scheduler, model = pipe.scheduler, pipe.transformer
    scheduler.set_timesteps(4)
    batch = (tiny.normal(2, 16, 3, 8, 12), args["prompt_embeds"].expand(2, -1, -1))
    with dit_sparse.sparse_attention(model, "gna", scheduler=scheduler, **GNA) as handle:
        for first, second in ((0, 1), (2, 2)):
            times = scheduler.timesteps[[first, second]]
            with torch.no_grad():
                model(batch[0], times, batch[1])
        rows = handle.report().rows
    assert [row["step"] for row in rows] == [-1, -1, 2, 2]
    assert "one pass contains steps 0 to 1" in rows[0]["reason"]


def test_what_is_in_no_schedule_is_not_step_0():
    pipe, args = tiny.wan()
    scheduler, model = pipe.scheduler, pipe.transformer
    scheduler.set_timesteps(4)
    inputs = (tiny.normal(1, 16, 3, 8, 12), torch.tensor([7777.0]), args["prompt_embeds"])
    with dit_sparse.sparse_attention(model, "gna", scheduler=scheduler, **GNA) as handle:
        with torch.no_grad():
            model(*inputs)
            scheduler.set_begin_index(1)
            model(*inputs)
        rows = handle.report().rows
    assert [row["step"] for row in rows] == [-1, -1, 1, 1]
    assert "cannot be determined from the scheduler or the timestep" in rows[0]["reason"]
    with (
        torch.no_grad(),
        dit_sparse.sparse_attention(model, "gna", scheduler=type(scheduler)(), strict=True, **GNA),
        pytest.raises(dit_sparse.GeometryError, match="cannot be determined from the scheduler"),
    ):
        model(*inputs)


@pytest.mark.parametrize("warmup", [0, 2, 3, 0.75])
def test_a_pipeline_that_starts_late(warmup):
    """Steps count from the start of the whole schedule, not from where ``strength`` enters it."""
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
    options = {"dense_warmup_steps": warmup, **RADIAL}
    with dit_sparse.sparse_attention(late, "radial", strict=True, **options) as handle:
        tiny.run(late, args, video=frames, strength=0.5)
        report = handle.report()
    assert {row["step"] for row in report.rows} == {2, 3}
    assert {row["branch"] for row in report.rows} == {"cond", "uncond"}  # counted, not told
    assert {row["step"] for row in report.sparse_rows} == ({2, 3} if warmup in {0, 2} else {3})
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
