# SPDX-License-Identifier: Apache-2.0
"""Whole runs on tiny pipelines: resuming, what stops a run, and what is left behind."""

import errno
import json

import pytest
import torch

import dit_sparse
from dit_sparse.distill import checkpoint, files
from dit_sparse.distill.checkpoint import found
from dit_sparse.distill.errors import DistillError
from tests import tiny
from tests.distill import setup

WEIGHTS = "pytorch_lora_weights.safetensors"  # named: diffusers before 0.40 demands it offline


def run(folder, name="wan", **changes):
    made = setup.trainer(folder, name, **changes)
    made.run()
    made.networks.detach()
    return made


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path):
    unbroken = setup.weights(run(tmp_path / "one", train={"iterations": 4}))
    broken = setup.trainer(tmp_path / "two", train={"iterations": 4, "checkpoint_every": 2})
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 8:  # within the critic's update of the fourth iteration
            raise KeyboardInterrupt

    walk = broken.matching.walk
    broken.matching.walk = lambda *args: (stop(), walk(*args))[1]
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    resumed = run(tmp_path / "two", train={"iterations": 4, "checkpoint_every": 2})
    again = setup.weights(resumed)
    assert again.keys() == unbroken.keys()
    assert len(again) > 60
    for key, value in unbroken.items():
        assert torch.equal(value, again[key]), key
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("one", "two")]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 5


def test_training_moves_the_student_and_leaves_the_teacher_alone(tmp_path):
    made = setup.trainer(tmp_path)
    model = made.pipe.transformer
    before = {k: v.clone() for k, v in model.state_dict().items() if "lora" not in k}
    start = setup.weights(made)
    made.run()
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), key
    after = setup.weights(made)
    for role in ("student", "critic"):
        keys = [key for key in start if key.startswith(f"{role}/weight")]
        assert any(not torch.equal(start[key], after[key]) for key in keys), role


@pytest.mark.parametrize("name", ["hunyuan_video", "cogvideox", "flux", "pixart_sigma"])
def test_every_family_trains(tmp_path, name):
    made = run(tmp_path, name, train={"iterations": 1})
    (row,) = (tmp_path / "log.csv").read_text().splitlines()[1:]
    assert all(torch.isfinite(torch.tensor(float(x))) for x in row.split(","))
    assert all(bool(value.isfinite().all()) for value in setup.weights(made).values())


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": None},
        {"distill": {"sparse_critic": False}},
        {"distill": {"critic_updates": 2, "renoise": "disjoint"}},
        {"distill": {"critic_regularization": 0.5, "student_weight": "teacher_distance"}},
        {"strategy": None},
        {"train": {"micro_batch": 2}},
    ],
    ids=["full", "dense critic", "two critic updates", "regularised", "dense", "micro-batch"],
)
def test_options_run_and_change_the_numbers(tmp_path, changes):
    one = {"train": {"iterations": 1, **changes.pop("train", {})}}
    run(tmp_path / "plain", train={"iterations": 1})
    run(tmp_path / "other", **one, **changes)
    plain, other = ((tmp_path / n / "log.csv").read_text() for n in ("plain", "other"))
    assert plain != other


def test_a_loss_above_the_limit_skips_the_critic(tmp_path):
    made = setup.trainer(tmp_path, distill={"critic_skip_above": 1e-9}, train={"iterations": 1})
    start = setup.weights(made)
    made.run()
    after = setup.weights(made)
    assert all(torch.equal(start[k], after[k]) for k in start if k.startswith("critic/"))
    assert (tmp_path / "log.csv").read_text().splitlines()[1].endswith(",1")


def test_bf16_with_checkpointing_trains(tmp_path):
    settings = {"iterations": 1, "gradient_checkpointing": True}
    made = setup.trainer(tmp_path, train=settings)
    made.pipe.transformer.to(torch.bfloat16)
    for role in ("student", "critic"):
        for weight in made.networks.parameters(role).values():
            weight.data = weight.data.float()
    row = made._distill(0)
    assert torch.isfinite(torch.tensor(row["student_loss"]))
    assert row["student_norm"] > 0


@pytest.mark.parametrize("role", ["student", "critic"])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(tmp_path, role):
    made = setup.trainer(tmp_path, train={"iterations": 3})
    loss = getattr(made.matching, role)
    calls = []

    def poisoned(*args):
        calls.append(1)
        return loss(*args) * (float("nan") if len(calls) > 2 else 1)

    setattr(made.matching, role, poisoned)
    with pytest.raises(DistillError, match=f"iteration 2: the {role}'s loss is nan") as error:
        made.run()
    (kept,) = found(tmp_path / "checkpoints")
    assert kept[0] == 1
    assert str(kept[1]) in str(error.value)
    tensors, _ = files.read_tensors(kept[1])
    assert all(bool(value.isfinite().all()) for value in tensors.values())
    assert not (tmp_path / "result").exists()


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    made = setup.trainer(tmp_path, train={"iterations": 2})
    save = files.save_file

    def full(tensors, path, notes):
        if "00000002" in str(path):
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, notes)

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(DistillError, match="No space left on device; the previous content"):
        made.run()
    folder = tmp_path / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["iteration-00000001.safetensors"]
    assert files.read_tensors(found(folder)[0][1])[1]["iteration"] == 1


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path, train={"iterations": 3, "keep": 1})
    assert [number for number, _ in found(tmp_path / "checkpoints")] == [3]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    run(tmp_path, train={"iterations": 1})
    with pytest.raises(
        DistillError, match=r"distill\.eta: 0\.9, now 0\.5; restore these inputs.*--fresh"
    ):
        setup.trainer(tmp_path, train={"iterations": 2}, distill={"eta": 0.5}).run()
    made = setup.trainer(tmp_path, train={"iterations": 2})
    assert checkpoint.resume(tmp_path / "checkpoints", made.inputs, made.updates.values()) == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_whole_weights_in_16_bits_train_in_fp32(tmp_path, checkpointing):
    """Steps that a rounded weight would lose add up, and the model runs the rounded sum."""
    slow = {"student_lr": 1e-5, "critic_lr": 1e-5, "warmup": 0, "iterations": 3}
    train = {"dtype": "bfloat16", "gradient_checkpointing": checkpointing, **slow}
    made = setup.trainer(tmp_path, lora=None, train=train)
    models = made.networks.models
    teacher = {name: p.clone() for name, p in models["teacher"].named_parameters()}
    made.run()
    for role, update in made.updates.items():
        own = dict(models[role].named_parameters())
        assert {p.dtype for p in own.values()} == {torch.bfloat16, torch.float32}
        moved = 0
        for name, weight in update.parameters.items():
            assert weight.dtype == torch.float32
            assert own[name].grad is None
            assert torch.equal(own[name], weight.detach().to(own[name].dtype)), name
            moved += bool((weight.detach() != teacher[name].float()).any())
        assert moved > len(own) / 2, role
    resumed = setup.trainer(tmp_path, lora=None, train={**train, "iterations": 4})
    folder = tmp_path / "checkpoints"
    assert checkpoint.resume(folder, resumed.inputs, resumed.updates.values()) == 3
    for role in made.networks.roles:
        pairs = zip(*(m.networks.parameters(role).values() for m in (made, resumed)), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_the_result_is_loaded_by_the_pipeline_and_samples_on_the_trained_grid(tmp_path, name):
    """A LoRA whose alpha is not its rank, so that a lost setting shows."""
    made = setup.trainer(tmp_path, name, lora={"rank": 4, "alpha": 8}, train={"iterations": 1})
    for weight in made.networks.parameters("student").values():
        weight.data.add_(0.1 * torch.randn(weight.shape))
    result = tmp_path / "result"
    made.run()
    told, seen = [], []

    pipe, args = setup.pipeline(name)
    if name == "wan":
        args["guidance_scale"] = 1.0
    dense = tiny.run(pipe, args, num_inference_steps=3)
    pipe.load_lora_weights(result, weight_name=WEIGHTS)
    handle = dit_sparse.enable(pipe, result)

    def note(_, __, named, output):
        told.append(named)
        seen.append(output[0])

    hook = pipe.transformer.register_forward_hook(note, with_kwargs=True)
    sampled = tiny.run(pipe, args, num_inference_steps=3)
    hook.remove()
    assert not torch.equal(sampled, dense)
    assert [float(kw["timestep"][0]) for kw in told] == made.conditions.grid.told.tolist()
    rows = handle.report().rows
    assert len(rows) == 3 * len(handle._sites)
    assert {name for row in rows for name in row["methods"]} == {"blade"}
    first = made.conditions.first
    for step, (kw, wanted) in enumerate(zip(told, seen, strict=True)):
        with torch.no_grad():
            answer = made.networks.predict(
                "student", kw["hidden_states"], kw["timestep"], step, made.conditions.load([0]),
                first,
            )  # fmt: skip
        torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [{"rank": 2, "alpha": 6}, None], ids=["merged", "full"])
def test_a_result_of_whole_weights_is_the_student(tmp_path, lora):
    name = "pixart_sigma" if lora else "wan"
    made = setup.trainer(tmp_path, name, lora=lora, train={"iterations": 1})
    for key, weight in made.networks.parameters("student").items():
        weight.data.add_(0.1 * torch.randn(weight.shape) if "lora" in key else 0)
    made.run()
    folder = tmp_path / "result" / "transformer"
    model = type(made.pipe.transformer).from_pretrained(str(folder)).eval()
    made.networks.detach()
    made.networks.sparse = ()
    first, condition = made.conditions.first, made.conditions.load([0])
    x, told = torch.randn(1, *first.latents), made.conditions.grid.told[:1]
    with torch.no_grad():
        wanted = made.networks.predict("student", x, told, 0, condition, first)
        made.networks.models["student"] = model
        made.networks._layers = []
        got = made.networks.predict("student", x, told, 0, condition, first)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_card_says_how_to_sample_and_how_it_was_made(tmp_path):
    made = run(tmp_path, train={"iterations": 1})
    text = (tmp_path / "result" / "README.md").read_text()
    assert 'pipe.load_lora_weights("THIS FOLDER")' in text
    assert 'pipe.enable_sparse_attention("THIS FOLDER")' in text
    assert "num_inference_steps=3, guidance_scale=1.0" in text
    kept = json.loads(text.split("```json\n")[1].split("```")[0])
    assert kept == made.config.model_dump(mode="json")


def test_tensorboard_is_written_where_asked_for(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path, train={"iterations": 1, "tensorboard": True})
    assert list((tmp_path / "tensorboard").iterdir())
