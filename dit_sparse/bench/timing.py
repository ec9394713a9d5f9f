# SPDX-License-Identifier: Apache-2.0
"""Clocks and dense competitors.

On one CPU thread time is that thread's own processor time, which other programs on the machine
disturb little; on more threads and on GPUs it is the wall clock's.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Clock:
    """Tells milliseconds; on a GPU it waits for the device first.

    Args:
        device: Where the work runs.
        kind: "thread" (processor time of the one thread) or "wall".
    """

    device: torch.device
    kind: str

    @classmethod
    def of(cls, device: torch.device) -> Clock:
        """Choose for a device and the present number of threads."""
        one = device.type == "cpu" and torch.get_num_threads() == 1
        return cls(device, "thread" if one else "wall")

    def now(self) -> float:
        """Milliseconds since some moment."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1e3 * (time.thread_time() if self.kind == "thread" else time.perf_counter())


def alternate(
    calls: dict[str, Callable[[], object]], repeats: int, clock: Clock
) -> dict[str, float]:
    """Run all calls in turn, one round for warming up; median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = clock.now()
            call()
            times[name].append(clock.now() - start)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def dense_calls(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, flex: bool = True
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Give torch's own dense attention: every backend that takes this call.

    ``flex``: FlexAttention too, which is compiled first, for half a minute or more.

    Returns:
        The calls by name, and for each backend that cannot run, why.
    """
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def sdpa() -> object:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

    if query.device.type == "cpu":
        return {"sdpa": sdpa}, {}
    tried: dict[str, Callable[[], object]] = {}
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ):

        def only(backend: SDPBackend = backend) -> object:
            with sdpa_kernel(backend):
                return sdpa()

        tried[backend.name.lower()] = only

    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        tried["flex_attention"] = lambda: compiled(q, k, v, scale=scale)
    calls, against = {}, {}
    for name, call in tried.items():
        try:
            call()
        except Exception as error:  # noqa: BLE001, PERF203  (compilers raise anything)
            against[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
        else:
            calls[name] = call
    return calls or {"sdpa": sdpa}, against
