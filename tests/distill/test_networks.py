# SPDX-License-Identifier: Apache-2.0
"""Three roles on one set of weights: each runs its own adapter and attention."""

from pathlib import Path

import pytest
import torch

from dit_sparse.distill.config import Lora
from dit_sparse.distill.errors import DistillError
from dit_sparse.distill.log import Log
from dit_sparse.distill.networks import Networks
from tests.distill import setup


def answers(made):
    first, condition = made.conditions.first, made.conditions.load([0])
    random = torch.Generator().manual_seed(3)
    x, told = torch.randn(1, *first.latents, generator=random), made.conditions.grid.told[:1]
    return {
        role: made.networks.predict(role, x, told, 0, condition, first).detach()
        for role in ("student", "teacher", "critic", "teacher")
    }, (x, told, condition)


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 4}, None], ids=["adapters", "copies"])
def test_the_teacher_is_the_plain_model_and_the_others_are_themselves(tmp_path, lora):
    pipe, _ = setup.pipeline()
    made = setup.trainer(tmp_path, lora=lora)
    random = torch.Generator().manual_seed(1)
    for role in ("student", "critic"):
        for weight in made.networks.parameters(role).values():
            noise = torch.randn(weight.shape, generator=random)
            weight.data.add_(noise, alpha=0.1)
    found, (x, told, condition) = answers(made)
    with torch.no_grad():  # a model that has never seen an adapter or a hook
        plain = pipe.transformer(
            hidden_states=x, timestep=told.long(), **condition, return_dict=False
        )[0]
    torch.testing.assert_close(found["teacher"], plain, rtol=1e-6, atol=1e-6)
    for one, other in (("student", "teacher"), ("critic", "teacher"), ("student", "critic")):
        assert float((found[one] - found[other]).abs().max()) > 1e-3
    for role in ("student", "critic"):
        assert all(weight.requires_grad for weight in made.networks.parameters(role).values())
    own = [set(map(id, made.networks.parameters(r).values())) for r in ("student", "critic")]
    assert own[0]
    assert not own[0] & own[1]


def test_only_the_sparse_roles_are_sparse(tmp_path):
    made = setup.trainer(tmp_path, distill={"sparse_critic": False})
    found, _ = answers(made)  # adapters are still zero: only attention tells roles apart
    assert torch.equal(found["critic"], found["teacher"])
    assert float((found["student"] - found["critic"]).abs().max()) > 1e-4


def test_modules_that_are_not_there_are_named():
    pipe, _ = setup.pipeline()
    with pytest.raises(DistillError, match=r"lora\.targets: WanTransformer3DModel has no module"):
        Networks(pipe.transformer, None, 2, lora=Lora(targets=("to_x",)))


def test_half_a_row_of_a_killed_run_is_dropped(tmp_path):
    columns = ["iteration", "student_loss"]
    path = tmp_path / "log.csv"
    path.write_text("iteration,student_loss\n1,0.5\n2,0.4\n1")  # of row 12, say
    with Log(tmp_path, columns, 2, 3) as log:
        log.write({"iteration": 3, "student_loss": 0.3})
    assert path.read_text() == "iteration,student_loss\n1,0.5\n2,0.4\n3,0.3\n"


def test_a_log_without_room_or_of_something_else_is_one_line(tmp_path):
    columns = ["iteration", "student_loss"]
    if Path("/dev/full").exists():
        (tmp_path / ".log.csv").symlink_to("/dev/full")
        with pytest.raises(DistillError, match=r"log\.csv: cannot be written: No space left"):
            Log(tmp_path, columns, 0, 3)
        (tmp_path / ".log.csv").unlink()
        with Log(tmp_path, columns, 0, 3) as log:
            log.path.unlink()
            log.path.symlink_to("/dev/full")
            with pytest.raises(DistillError, match=r"log\.csv: cannot be written: No space left"):
                log.write({"iteration": 1, "student_loss": 0.3})
        log.path.unlink()
    (tmp_path / "log.csv").write_text("step,loss\nx,0.5\n")
    with pytest.raises(DistillError, match=r"log\.csv: not a log of this training.*delete it"):
        Log(tmp_path, columns, 2, 3)
