# SPDX-License-Identifier: Apache-2.0
"""The training loop, for distillation and fine-tuning: resumed where it stopped, to the bit."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.distill import checkpoint
from dit_sparse.distill.draw import Draw, epoch_order
from dit_sparse.distill.errors import DistillError
from dit_sparse.distill.files import writing
from dit_sparse.distill.finetune import Plain
from dit_sparse.distill.inputs import inputs_of
from dit_sparse.distill.log import Log
from dit_sparse.distill.networks import Networks
from dit_sparse.distill.result import save_result
from dit_sparse.distill.tdm import Group, Matching, Walk
from dit_sparse.distill.update import Update, rate
from dit_sparse.strategy.files import write_text
from dit_sparse.strategy.identity import pipeline_identity

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from dit_sparse.distill.conditions import Conditions
    from dit_sparse.distill.config import Config
    from dit_sparse.distill.networks import Role
    from dit_sparse.distill.shard import Sharding

CHECKPOINTS, RESULT = "checkpoints", "result"
COLUMNS = {
    "distill": ["student_loss", "critic_loss", "student_norm", "critic_norm", "critic_skipped"],
    "finetune": ["student_loss", "student_norm"],
}


class Trainer:
    """One run.

    Args:
        config: What to do.
        pipe: The pipeline; its transformer is the teacher.
        conditions: Its prompts or captions.
        accelerator: Device and other processes.
        latents: For fine-tuning: the encoded clips, one for each caption.
        sharding: How base weights are spread over processes; None: all have all of them.
        inputs: Of ``inputs_of``: what a checkpoint must have been made with; None: these.
    """

    def __init__(
        self,
        config: Config,
        pipe: Any,
        conditions: Conditions,
        accelerator: Any,
        latents: tuple[Path, ...] = (),
        sharding: Sharding | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        if inputs is None:  # encoded data are named by their content
            texts, clips = ([path.name for path in made] for made in (conditions.files, latents))
            inputs = inputs_of(config, pipeline_identity(pipe), texts, clips)
        self.inputs = inputs
        self.config, self.pipe, self.conditions = config, pipe, conditions
        self.accelerator, self.strategy = accelerator, config.make_strategy()
        self.sharding = sharding
        distil = config.task == "distill"
        roles: tuple[Role, ...] = ("student", "critic") if distil else ("student",)
        sparse: tuple[Role, ...] = roles
        if distil and not config.distill.sparse_critic:
            sparse = ("student",)
        self.networks = Networks(
            pipe.transformer,
            self.strategy,
            config.steps,
            roles=roles,
            sparse=sparse,
            lora=config.lora,
            seed=config.seed,
            kernel=config.kernel,
        )
        if config.train.gradient_checkpointing:
            self.networks.checkpoint_gradients()
        if sharding is not None:
            self.networks.shard(sharding, accelerator.device)
        self.updates = {
            role: Update(role, self.networks.parameters(role), config.train, accelerator)
            for role in roles
        }
        self.matching = Matching(self.networks, conditions, config.distill)
        self.plain = Plain(self.networks, conditions, config.finetune, latents)
        self._order = lru_cache(maxsize=4)(epoch_order)

    def run(self, *, show: bool = False) -> Path:
        """Train to the end; returns the folder of the result.

        Raises:
            DistillError: A loss is not finite, or the disk is full; the last good checkpoint
                stays, and the message names it.
        """
        config, main = self.config, self.accelerator.is_main_process
        folder = config.output / CHECKPOINTS
        done = checkpoint.resume(folder, self.inputs, self.updates.values())
        columns = ["iteration", "learning_rate", *COLUMNS[config.task]]
        total = config.train.iterations
        if not main:
            self._loop(done, None)
        else:
            with writing(config.output):
                config.output.mkdir(parents=True, exist_ok=True)
            write_text(config.output / "config.json", config.model_dump_json(indent=2) + "\n")
            with Log(
                config.output,
                columns,
                done,
                total,
                tensorboard=config.train.tensorboard,
                show=show,
            ) as log:
                self._loop(done, log)
        result = config.output / RESULT
        if main:
            save_result(result, config, self.pipe, self.networks, self.conditions, self.strategy)
        self.accelerator.wait_for_everyone()
        return result

    def _loop(self, done: int, log: Log | None) -> None:
        config, folder = self.config, self.config.output / CHECKPOINTS
        for iteration in range(done, config.train.iterations):
            step = self._distill if config.task == "distill" else self._finetune
            try:
                row = step(iteration)
            except DistillError as error:
                there = checkpoint.found(folder)
                kept = (
                    f"the last good checkpoint is {there[-1][1]}"
                    if there
                    else "no checkpoint was saved"
                )
                raise DistillError(
                    f"iteration {iteration + 1}: {error}; {kept}. Reduce the learning rates or "
                    "check the data before you start again"
                ) from error
            last = iteration + 1 == config.train.iterations
            if log is not None:
                log.write({"iteration": iteration + 1, **row})
                if last or (iteration + 1) % config.train.checkpoint_every == 0:
                    updates, keep = self.updates.values(), config.train.keep
                    checkpoint.save(folder, self.inputs, iteration + 1, updates, keep)

    def groups(self, iteration: int) -> Iterator[Group]:
        """List this process's groups of one iteration; together all processes have the batch."""
        train = self.config.train
        size, count = train.micro_batch, len(self.conditions.files)
        index, processes = self.accelerator.process_index, self._processes
        for group in range(index, train.batch // size, processes):
            samples = list(range(group * size, (group + 1) * size))
            prompts = []
            for sample in samples:
                epoch, place = divmod(iteration * train.batch + sample, count)
                prompts.append(self._order(self.config.seed, epoch, count)[place])
            beside: tuple[int, ...] = ()
            if self.sharding is not None:
                beside = tuple((group - index + other) * size for other in range(processes))
            yield Group(samples, prompts, self.accelerator.device, beside)

    @property
    def _processes(self) -> int:
        return int(self.accelerator.num_processes)

    def _distill(self, iteration: int) -> dict[str, Any]:
        """Update the critic, then the student."""
        config, matching = self.config.distill, self.matching
        kept: list[tuple[Group, int, Walk]] = []
        critic: dict[str, Any] = {}
        draw = Draw(self.config.seed, iteration)
        for part in range(config.critic_updates):
            draw = Draw(self.config.seed, iteration, part)
            last, total = part == config.critic_updates - 1, self._zero()
            for group in self.groups(iteration):
                step = matching.draw_step(draw, group.name, "critic")
                later = matching.draw_step(draw, group.name, "student")
                walk = matching.walk(draw, group, ("critic", "student") if last else ("critic",))
                loss = matching.critic(draw, group, walk, step).sum() / self.config.train.batch
                self._backward("critic", step, loss)
                total += loss.detach()
                kept.append((group, later, walk))
            kept = kept if last else []
            critic = self.updates["critic"].apply(
                self.config.train.critic_lr, total, skip_above=config.critic_skip_above
            )
        total = self._zero()
        for group, step, walk in kept:
            loss = matching.student(draw, group, walk, step).sum() / self.config.train.batch
            self._backward("student", step, loss)
            total += loss.detach()
        lr = rate(self.config.train, self.config.train.student_lr, iteration)
        student = self.updates["student"].apply(lr, total)
        return {
            "learning_rate": lr,
            "student_loss": student["loss"],
            "critic_loss": critic["loss"],
            "student_norm": student["norm"],
            "critic_norm": critic["norm"],
            "critic_skipped": int(critic["skipped"]),
        }

    def _finetune(self, iteration: int) -> dict[str, Any]:
        """Update the student by the plain loss."""
        draw, total = Draw(self.config.seed, iteration), self._zero()
        for group in self.groups(iteration):
            losses, step = self.plain.loss(draw, group)
            loss = losses.sum() / self.config.train.batch
            self._backward("student", step, loss)
            total += loss.detach()
        lr = rate(self.config.train, self.config.train.student_lr, iteration)
        student = self.updates["student"].apply(lr, total)
        return {
            "learning_rate": lr,
            "student_loss": student["loss"],
            "student_norm": student["norm"],
        }

    def _backward(self, role: Role, step: int, loss: torch.Tensor) -> None:
        with self.networks.use(role, step):
            loss.backward()

    def _zero(self) -> torch.Tensor:
        return torch.zeros((), device=self.accelerator.device)
