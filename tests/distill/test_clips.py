# SPDX-License-Identifier: Apache-2.0
"""Clips: read, encoded as each pipeline's transformer takes them, and trained on."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from dit_sparse.core.video import write_mp4
from dit_sparse.distill.clips import encode_clip, encode_clips, list_clips, normalized, read_frames
from dit_sparse.distill.conditions import encode
from dit_sparse.distill.config import Size
from dit_sparse.distill.draw import Draw
from dit_sparse.distill.errors import DistillError
from dit_sparse.distill.train import Trainer
from tests import tiny
from tests.distill import setup


def make_clips(folder, count=2, frames=9):
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(count):
        pixels = random.integers(0, 255, (frames, 64, 96, 3), dtype=np.uint8)
        write_mp4(folder / f"clip{i}.mp4", pixels, 8)
        (folder / f"clip{i}.txt").write_text(f"clip {i}\n")
    return folder


def size_of(args):
    return Size(**{k: args[k] for k in ("height", "width", "num_frames") if k in args})


@pytest.mark.parametrize(
    "name", ["wan", "hunyuan_video", "cogvideox", "cogvideox_1.5", "flux", "pixart_sigma"]
)
def test_an_encoded_clip_has_the_form_that_the_transformer_takes(tmp_path, name):
    pipe, args = setup.pipeline(name)
    known = setup.conditions(pipe, args, tmp_path)
    size = size_of(args)
    frames = [Image.new("RGB", (100, 80), (9 * i, 90, 200)) for i in range(size.num_frames or 1)]
    latents = encode_clip(pipe, frames, size)
    assert tuple(latents.shape) == known.first.latents
    assert latents.dtype == torch.float32
    assert bool(latents.isfinite().all())


def test_scaling_is_what_the_pipeline_undoes_before_decoding():
    z = torch.randn(1, 16, 3, 2, 2)
    pipe, _ = tiny.wan()
    mean, std = (torch.tensor(getattr(pipe.vae.config, f"latents_{n}")) for n in ("mean", "std"))
    found = normalized(pipe, z)
    back = torch.stack([found[:, c] * std[c] + mean[c] for c in range(16)], 1)
    torch.testing.assert_close(back, z)
    z = torch.randn(1, 1, 4, 6)
    pipe, _ = tiny.flux()
    back = pipe._unpack_latents(normalized(pipe, z), 4, 6, pipe.vae_scale_factor)
    config = pipe.vae.config
    torch.testing.assert_close(back.reshape(z.shape), (z - config.shift_factor) * 1.5)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DistillError, match="folder not found"):
        list_clips(tmp_path / "nowhere")
    with pytest.raises(DistillError, match="contains no clips"):
        list_clips(tmp_path)
    make_clips(tmp_path, 1, frames=5)
    assert list_clips(tmp_path) == [(tmp_path / "clip0.mp4", "clip 0")]
    assert len(read_frames(tmp_path / "clip0.mp4", 5)) == 5
    with pytest.raises(DistillError, match=r"has 5 frames, but size\.num_frames is 9"):
        read_frames(tmp_path / "clip0.mp4", 9)
    (tmp_path / "clip0.txt").unlink()
    with pytest.raises(DistillError, match=r"has no caption; add clip0\.txt"):
        list_clips(tmp_path)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(DistillError, match="not a readable video"):
        read_frames(tmp_path / "bad.mp4", 1)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DistillError, match="not a readable image"):
        read_frames(tmp_path / "bad.png", 1)


def test_a_frame_of_gigabytes_is_refused_before_it_is_decoded(huge_picture, huge_video):
    with pytest.raises(DistillError, match=r"16000 x 16000 pixels .* 8192 x 8192.*; scale"):
        read_frames(huge_video, 1)
    with pytest.raises(DistillError, match=r"not a readable image: Image size .* exceeds"):
        read_frames(huge_picture, 1)


def finetuner(folder, clips, **changes):
    settings = setup.config(
        folder,
        task="finetune",
        data={"clips": str(clips)},
        strategy={"method": "radial", "block_size": 8, "decay_factor": 0.1, "sink": False},
        finetune={"steps": 4, **changes.pop("finetune", {})},
        **changes,
    )
    pipe, args = setup.pipeline()
    texts, shared = setup.prompts(args, 2)
    known = encode(pipe, texts, shared, settings.cache, steps=4)
    paths = [path for path, _ in list_clips(clips)]
    latents = encode_clips(pipe, paths, settings.size, settings.cache, known.first.latents)
    return Trainer(settings, pipe, known, Accelerator(cpu=True), latents)


def test_fine_tuning_lowers_its_own_loss_and_resumes_to_the_bit(tmp_path):
    clips = make_clips(tmp_path / "clips")
    rates = {"student_lr": 1e-2, "warmup": 0}
    one = finetuner(tmp_path / "one", clips, train={"iterations": 12, **rates})
    draw, group = Draw(0, 999), next(one.groups(0))
    group.samples, group.prompts = [0, 1], [0, 1]
    with torch.no_grad():
        before = float(one.plain.loss(draw, group)[0].mean())
    one.run()
    assert one.networks.report().rows[0]["methods"].keys() == {"radial"}
    with torch.no_grad():
        after = float(one.plain.loss(draw, group)[0].mean())
    assert after < 0.97 * before
    finetuner(tmp_path / "two", clips, train={"iterations": 5, **rates}).run()
    two = finetuner(tmp_path / "two", clips, train={"iterations": 12, **rates})
    two.run()
    again = setup.weights(two)
    for key, value in setup.weights(one).items():
        assert torch.equal(value, again[key]), key
    assert (tmp_path / "one/log.csv").read_text() == (tmp_path / "two/log.csv").read_text()


def test_a_clip_of_another_size_is_refused(tmp_path):
    clips = make_clips(tmp_path / "clips", 1)
    pipe, _ = setup.pipeline()
    with pytest.raises(
        DistillError, match=r"encoded as \(16, 3, 8, 12\), but the transformer expects"
    ):
        encode_clips(
            pipe,
            [clips / "clip0.mp4"],
            Size(height=64, width=96, num_frames=9),
            tmp_path,
            (16, 3, 4, 4),
        )


def test_logit_normal_times_and_shift_stay_in_range(tmp_path):
    clips = make_clips(tmp_path / "clips", 1)
    made = finetuner(tmp_path / "run", clips, finetune={"sigma": "logit_normal", "shift": 5.0})
    times = []
    for i in range(200):
        group = next(made.groups(i))
        times.append(float(made.plain.time(Draw(0, i), group)))
    assert 0 < min(times) < max(times) < 1
    assert sum(times) / 200 == pytest.approx(0.79, abs=0.06)  # of 5 u / (1 + 4 u), u around 1/2
