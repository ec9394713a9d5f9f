# SPDX-License-Identifier: Apache-2.0
"""Make the clips of an evaluation: warm up each arm, generate, time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from dit_sparse.cli.arms import Runner, told
from dit_sparse.quality.evaluation_setup import DENSE, FLOOR, Made
from dit_sparse.strategy import Schedule

if TYPE_CHECKING:
    from rich.progress import Progress

    from dit_sparse.attach.apply import SparseAttention
    from dit_sparse.strategy import Strategy

BACKENDS = {
    "math": "MATH",
    "efficient": "EFFICIENT_ATTENTION",
    "flash": "FLASH_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
}
# A run of one step can be dense throughout under a method that searches first.
WARMUP_STEPS = (1, 4)


class Maker:
    """Makes clips with one attached pipeline; warms up each arm before its first timed run."""

    def __init__(
        self,
        pipe: Any,
        arguments: dict[str, Any],
        handle: SparseAttention,
        strategies: dict[str, Strategy],
        floor: str | None,
        bars: Progress,
    ) -> None:
        self._pipe, self._arguments, self._handle = pipe, arguments, handle
        self._strategies = {DENSE: handle.strategy, FLOOR: handle.strategy, **strategies}
        self._floor, self._bars = floor, bars
        self._warm: set[str] = set()

    def __call__(self, arm: str, prompt: str, seed: int) -> Made:
        """Generate one clip and time it."""
        runner = Runner(self._pipe, {**self._arguments, "prompt": prompt}, seed, self._bars)
        with sdpa(self._floor if arm == FLOOR else None):
            if arm not in self._warm:
                self._warm_up(arm, runner)
                self._warm.add(arm)
            self._handle.memory.shared.clear()  # making plans belongs to the run
            with told(self._handle, self._strategies[arm]):
                made = runner.once(self._handle, f"{arm}, seed {seed}")
        report = made.report
        return Made(
            made.frames,
            {
                "seconds": made.seconds,
                "processor_seconds": made.processor_seconds,
                "attention_seconds": report.attention_ms / 1e3,
                "density": report.density,
                "sparse_calls": len(report.sparse_rows),
                "calls": len(report.rows),
                "kernels": report.kernels,
                "reasons": report.reasons,
                "gpu_bytes_peak": made.peak_gpu_bytes,
            },
        )

    def _warm_up(self, arm: str, runner: Runner) -> None:
        """Run a few steps without the schedule's dense ones."""
        plain = self._strategies[arm].model_copy(update={"schedule": Schedule()})
        steps = self._arguments.get("num_inference_steps")
        for count in WARMUP_STEPS if arm not in {DENSE, FLOOR} else WARMUP_STEPS[:1]:
            if steps is not None and count > max(steps, 1):
                break
            with told(self._handle, plain):
                made = runner.once(self._handle, f"warm-up, {arm}", num_inference_steps=count)
            if any(not name.startswith("model's own") for name in made.report.kernels):
                break


def sdpa(name: str | None) -> Any:
    """Let PyTorch's attention use one backend only, for a ``with`` block."""
    if name is None:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([getattr(SDPBackend, BACKENDS[name])])
