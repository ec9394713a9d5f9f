# SPDX-License-Identifier: Apache-2.0
"""Training resumes exactly, teaches guidance, and sees small clips on the native grid."""

import csv

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.samples.built import SAMPLES

FAMILY = "flagship"
STAGE = ["--buckets", "5x16x2:0.5", "9x16x1:0.5@1.5", "--warmup", "4", "--eager"]
STAGE += ["--dtype", "float32"]


def train(folder, until, *more):
    import train_dit

    train_dit.main(["flagship", str(folder), "--until", str(until), *STAGE, *more])
    return torch.load(folder / "dit.pt")


def column(folder, name):
    return [row[name] for row in csv.DictReader((folder / "dit.csv").read_text().splitlines())]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scripts_on_path):
    """Four steps from nothing."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder, 4)
    return folder


def test_a_killed_stage_resumes_as_if_it_had_not_been_killed(trained, tmp_path, monkeypatch):
    import train_dit

    def draw_or_die(step, *others):
        if step == 3:
            raise KeyboardInterrupt
        return draw(step, *others)

    draw = train_dit.draw
    with monkeypatch.context() as patch:
        patch.setattr(train_dit, "SAVE_EVERY", 2)  # inside the warm-up
        patch.setattr(train_dit, "draw", draw_or_die)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, 4)
    assert torch.load(tmp_path / "dit.pt")["step"] == 2
    resumed, whole = train(tmp_path, 4), torch.load(trained / "dit.pt")
    for part in ("model", "average"):
        for name, value in whole[part].items():
            assert torch.equal(resumed[part][name], value), name
    assert column(trained, "step") == ["1", "2", "3", "4"]
    assert column(tmp_path, "loss") == column(trained, "loss")


def test_a_slow_stage_saves_by_the_clock(tmp_path, monkeypatch):
    import train_dit

    saved = []
    save = train_dit.Run.save
    monkeypatch.setattr(train_dit, "SAVE_SECONDS", -1)
    monkeypatch.setattr(train_dit.Run, "save", lambda run: (saved.append(run.step), save(run)))
    train(tmp_path, 2)
    assert saved == [1, 2]


def test_a_packed_checkpoint_goes_on_at_its_step(trained, tmp_path):
    import pack_checkpoint

    packed = tmp_path / "packed.safetensors"
    pack_checkpoint.main([str(trained), str(packed)])
    assert packed.stat().st_size < 8_000_000
    (tmp_path / "next").mkdir()
    state = train(tmp_path / "next", 5, "--weights", str(packed))
    assert state["step"] == 5
    assert state["first"] == 4  # of the warm-up
    before = torch.load(trained / "dit.pt")["average"]
    after = state["average"]
    assert all(torch.allclose(after[name], before[name], atol=0.01) for name in before)
    assert column(tmp_path / "next", "step") == ["5"]


def test_a_teacher_gives_the_guided_prediction(trained, family):
    import random

    from objectives import Noised
    from train_dit import Teacher

    torch.manual_seed(0)
    teacher = Teacher(family, trained / "dit.pt", scale=4.0)
    torch.nn.init.normal_(teacher.model.proj_out.weight)
    noised = Noised(torch.randn(2, 16, 2, 2, 2), torch.tensor([300.0, 800.0]), torch.empty(0))
    captions = ["a red circle moving right", "a blue square growing"]
    guided = teacher(noised, family.conditioning(captions, random.Random(1)), random.Random(1))
    plain = ask(family, teacher.model, noised, captions)
    nothing = ask(family, teacher.model, noised, ["", ""])
    torch.testing.assert_close(guided, nothing + 4 * (plain - nothing))
    assert not torch.allclose(guided, plain)


@torch.no_grad()
def ask(family, model, noised, captions):
    import random

    conditioning = family.conditioning(captions, random.Random(1))
    return family.forward(model, noised.noisy, noised.timestep, conditioning)


def test_a_student_learns_from_packed_weights_of_its_teacher(trained, tmp_path):
    import pack_checkpoint

    packed = tmp_path / "packed.safetensors"
    pack_checkpoint.main([str(trained), str(packed)])
    taught = train(tmp_path / "a", 5, "--weights", str(packed), "--teacher", str(packed))
    plain = train(tmp_path / "b", 5, "--weights", str(packed))
    assert taught["step"] == plain["step"] == 5
    name = "blocks.0.ffn.net.2.weight"
    assert not torch.equal(taught["model"][name], plain["model"][name])


def test_the_flagship_starts_as_wan_tiny_and_is_small(family):
    import from_wan

    model = family.make_transformer()
    wan = WanTransformer3DModel.from_pretrained(SAMPLES / "wan-tiny", subfolder="transformer")
    from_wan.flagship(model, wan)
    assert 3.8e6 < sum(param.numel() for param in model.parameters()) < 4.0e6
    inputs = (torch.randn(1, 16, 3, 4, 4), torch.tensor([500.0]), torch.randn(1, 64, 64))
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs).sample, wan(*inputs).sample)


def test_positions_at_the_native_size_are_the_stock_ones(family):
    model = family.make_transformer()
    stock, latents = model.rope, torch.empty(1, 16, 9, 24, 24)
    wanted = stock(latents)
    family.spread(model)
    for result, table in zip(model.rope(latents), wanted, strict=True):
        torch.testing.assert_close(result, table)


def test_positions_of_a_small_clip_cover_the_native_grid(scripts_on_path):
    from positions import positions

    assert positions(8, 24).tolist() == [1, 4, 7, 10, 13, 16, 19, 22]
    assert positions(16, 24)[:3].tolist() == [0.25, 1.75, 3.25]
    assert positions(5, 9, causal=True).tolist() == [0, 1.5, 3.5, 5.5, 7.5]


def test_the_shipped_latents_are_those_of_the_shipped_autoencoder(family, tmp_path):
    from data import clip
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(SAMPLES / "wan-tiny", subfolder="vae")
    video, _ = clip(7, 5, 64, seed=200)
    space = family.space(tmp_path / "latents.pt")
    with torch.no_grad():
        decoded = vae.decode(space.encode(video)[None]).sample[0]
    psnr = -10 * ((decoded - video) / 2).square().mean().log10()
    assert psnr > 28


def test_the_shipped_checkpoint_fits_the_flagship(family):
    from train_dit import read_weights

    folder = SAMPLES / "train" / "checkpoints"
    weights, step, cpu_seconds = read_weights(folder / "flagship.safetensors")
    family.make_transformer().load_state_dict(weights)
    assert step > 0
    assert cpu_seconds > 0
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20_000_000


def test_a_preview_counts_the_questions_it_answers(trained, tmp_path, capsys):
    import preview

    picture = tmp_path / "preview.png"
    call = [
        "flagship",
        str(trained / "dit.pt"),
        str(picture),
        "--size",
        "5x16",
        "--questions",
        "2",
    ]
    preview.main([*call, "--dtype", "float32", "--set", "num_inference_steps=1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 4, ")
    assert [line.split(":")[0] for line in lines[1:3]] == [
        "a small red square moving down over a navy plain background",
        "a small red square moving left over a black plain background",
    ]
    assert lines[3].endswith(" of 2 have all words right")
    assert picture.stat().st_size > 100
