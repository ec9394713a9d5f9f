# SPDX-License-Identifier: Apache-2.0
"""Make the clips of an evaluation: warm up each arm, generate, time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from dit_sparse.cli.arms import WARMUP_STEPS, Runner, told
from dit_sparse.quality.evaluation_setup import DENSE, FLOOR, Made

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
                counts = WARMUP_STEPS[:1] if arm in {DENSE, FLOOR} else WARMUP_STEPS
                steps = self._arguments.get("num_inference_steps")
                strategy, label = self._strategies[arm], f"warm-up, {arm}"
                runner.warm_up(self._handle, strategy, label, steps, counts)
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


def sdpa(name: str | None) -> Any:
    """Let PyTorch's attention use one backend only, for a ``with`` block."""
    if name is None:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([getattr(SDPBackend, BACKENDS[name])])
