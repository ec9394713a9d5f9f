# SPDX-License-Identifier: Apache-2.0
"""Run the dense and the sparse arm of one request, so that their numbers can be compared.

Both arms go through one attachment, in one process, with one seed and one dense kernel: the dense
arm is the same engine told to use the method "dense", which is the model's own attention, bit for
bit. Each is warmed up before it is timed. Recall is measured in a further sparse run, because
probing costs time.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.cli.console import ERR, UserError, first_line, say
from dit_sparse.core.video import as_uint8
from dit_sparse.errors import DitSparseError
from dit_sparse.strategy import Strategy
from dit_sparse.strategy.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Progress
    from typing_extensions import Self

    from dit_sparse.attach.apply import SparseAttention
    from dit_sparse.attach.report import Report
    from dit_sparse.core.video import Frames

# A run of one step can be dense throughout under a method that searches first.
WARMUP_STEPS = (1, 4)


@dataclass(frozen=True)
class Arm:
    """One timed run.

    Args:
        frames: What it made, ``[frames, height, width, 3]`` uint8; an image is one frame.
        seconds: The whole pipeline call: text encoder, denoising, decoder.
        processor_seconds: Processor time of all threads in that; other programs on the machine
            disturb it less.
        report: What its attention calls did.
        peak_gpu_bytes: The most that torch held on the GPU; None on the CPU.
    """

    frames: Frames
    seconds: float
    processor_seconds: float
    report: Report
    peak_gpu_bytes: int | None


@dataclass(frozen=True)
class Runs:
    """What one request ran: the timed arms, and the probed run where there was one."""

    sparse: Arm
    dense: Arm | None
    probed: Arm | None
    warmed_up: bool
    """The sparse kernel ran before the timed runs (else its first-use check is in their time)."""


class StepBar:
    """Stands in for the pipeline's tqdm bar and feeds ours."""

    def __init__(self, progress: Progress, label: str, iterable: Any, total: int | None) -> None:
        self._iterable = iterable
        steps = len(iterable) if total is None else total
        self._progress, self._left = progress, steps
        self._label = label
        self._task = progress.add_task(f"{label}: denoising", total=steps)

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """What follows the steps is the decoder."""
        self._progress.update(self._task, description=f"{self._label}: decoding")

    def __iter__(self) -> Iterator[Any]:
        """Walk over timesteps."""
        for item in self._iterable:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        """Advance by ``count`` steps."""
        self._progress.advance(self._task, count)

    def finish(self, seconds: float) -> None:
        """Say what it took."""
        self._progress.update(self._task, description=f"{self._label}: {seconds:.1f} s")


class Runner:
    """Runs one pipeline with one set of arguments, again and again.

    Args:
        pipe: The pipeline.
        arguments: Of its call, without generator and output type.
        seed: Of the noise; it is drawn on the CPU, so that devices start from the same.
        progress: Where steps are shown.
    """

    def __init__(
        self, pipe: Any, arguments: dict[str, Any], seed: int, progress: Progress
    ) -> None:
        self.pipe, self.arguments, self.seed, self.progress = pipe, arguments, seed, progress
        self.device = torch.device(pipe.device)

    def once(self, handle: SparseAttention, label: str, **changes: Any) -> Arm:
        """Generate once and time it."""
        bars: list[StepBar] = []
        if not ERR.is_terminal:  # a log file shows no bars while they move
            say(f"{label} ...")

        def bar(iterable: Any = None, total: int | None = None) -> StepBar:
            bars.append(StepBar(self.progress, label, iterable, total))
            return bars[-1]

        arguments = {**self.arguments, **changes}
        arguments["generator"] = torch.Generator("cpu").manual_seed(self.seed)
        torch.manual_seed(self.seed)
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            torch.cuda.synchronize(self.device)
        self.pipe.progress_bar = bar
        start, processor = time.perf_counter(), time.process_time()
        try:
            output = self.pipe(**arguments, output_type="np")
            if cuda:
                torch.cuda.synchronize(self.device)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of GPU memory in the {label}: {first_line(error)}; try a smaller --height, "
                "--width or --frames"
            ) from error
        except DitSparseError:
            raise
        except ValueError as error:  # sizes and the like, by the pipeline's own checks
            raise UserError(f"{type(self.pipe).__name__}: {first_line(error)}") from error
        finally:
            del self.pipe.progress_bar
        seconds, used = time.perf_counter() - start, time.process_time() - processor
        for each in bars:
            each.finish(seconds)
        found = output.frames[0] if hasattr(output, "frames") else output.images[:1]
        try:
            frames = as_uint8(found)
        except ValueError as error:
            raise UserError(f"the {label} produced no valid images: {error}") from error
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else None
        return Arm(frames, seconds, used, handle.report(), peak)

    def all(
        self, handle: SparseAttention, *, compare_dense: bool, probe: int, steps: int | None
    ) -> Runs:
        """Warm up, run the dense arm where it is asked for, the sparse arm, the probed run.

        Args:
            handle: The attachment; its strategy is the sparse arm's.
            compare_dense: Run the dense arm.
            probe: Query rows per call on which recall is measured; 0: no probed run.
            steps: Steps of the request; None: the pipeline's own number.
        """
        sparse, dense_strategy = handle.strategy, Strategy.single("dense")
        warmed_up = all(rule.method == "dense" for rule in sparse.rules)  # no kernel of ours runs
        warmed_up = warmed_up or self.warm_up(handle, sparse, "warm-up, sparse", steps)
        dense = None
        handle.memory.shared.clear()  # plans of the warm-up: making them belongs to the run
        if compare_dense:
            with told(handle, dense_strategy):
                self.once(handle, "warm-up, dense", num_inference_steps=WARMUP_STEPS[0])
                dense = self.once(handle, "dense run")
        with told(handle, sparse):
            timed = self.once(handle, "sparse run")
        probed = None
        if probe:
            with told(handle, sparse, probe):
                probed = self.once(handle, "sparse run, probed")
        return Runs(timed, dense, probed, warmed_up)

    def warm_up(
        self,
        handle: SparseAttention,
        strategy: Strategy,
        label: str,
        steps: int | None,
        counts: tuple[int, ...] = WARMUP_STEPS,
    ) -> bool:
        """Run a few steps without the schedule's dense ones; say whether a kernel was reached.

        Args:
            handle: The attachment.
            strategy: Of the arm.
            label: For progress.
            steps: Steps of the request, which are not exceeded; None: the pipeline's own number.
            counts: Numbers of steps to run, until a kernel is reached.
        """
        plain = strategy.model_copy(update={"schedule": Schedule()})
        for count in counts:
            if steps is not None and count > max(steps, 1):
                break
            with told(handle, plain, remarks=False):
                arm = self.once(handle, label, num_inference_steps=count)
            if any(not name.startswith("model's own") for name in arm.report.kernels):
                return True
        return False


@contextmanager
def told(
    handle: SparseAttention, strategy: Strategy, probe: int = 0, *, remarks: bool = True
) -> Iterator[None]:
    """Let an attachment follow another strategy for a while.

    Args:
        handle: The attachment.
        strategy: What it follows.
        probe: Query rows per call on which recall is measured.
        remarks: Whether it warns where the strategy has no effect: a warm-up is too short to say.
    """
    before = handle.strategy, handle.probe, handle.remarks
    handle.strategy, handle.probe, handle.remarks = strategy, probe, remarks
    try:
        yield
    finally:
        handle.strategy, handle.probe, handle.remarks = before
