# SPDX-License-Identifier: Apache-2.0
"""What is measured beside the units: a device's costs, and what the strategy really does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.attach.apply import enable
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.kernels.dispatch import describe_device
from dit_sparse.profiler.capture import call_of
from dit_sparse.profiler.cost import CostModel
from dit_sparse.profiler.micro import Size, measure_costs
from dit_sparse.strategy import Strategy
from dit_sparse.strategy.identity import text_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dit_sparse.profiler.candidates import Candidate
    from dit_sparse.profiler.store import Store

    Progress = Callable[[str, int, int], None]


def costs_of(
    store: Store,
    candidates: tuple[Candidate, ...],
    about: Mapping[str, Any],
    models: Mapping[str, Any],
    source: str,
    progress: Progress | None,
) -> dict[str, Any]:
    """Measure costs once on a device, or assume them.

    Returns:
        "model" (of ``CostModel``), "agreement" (figures) and, of measured ones, "timed_on".
    """
    if source == "assumed":
        return {"model": CostModel.assumed(candidates, about["heads"]).to_dict(), "agreement": {}}
    model = next(iter(models.values()))
    known, place = store.read("costs.json"), timed_on(model.device)
    if known is not None and known.get("timed_on") == place:
        return known
    size = Size(
        LatentsGrid(*about["grid"]),
        about["batch"],
        about["heads"],
        about["head_dim"],
        about["layers"],
        about["num_steps"],
        model.device,
        model.dtype,
    )
    timed = measure_costs(
        candidates, size, None if progress is None else lambda a, b: progress("timing", a, b)
    )
    agreement = {}
    if timed.rank_correlation is not None and timed.median_error is not None:
        agreement = {
            "cost_rank_correlation": float(f"{timed.rank_correlation:.4g}"),
            "cost_median_relative_error": float(f"{timed.median_error:.4g}"),
        }
    found = {"model": timed.model.to_dict(), "agreement": agreement, "timed_on": place}
    store.write("costs.json", found)
    return found


def timed_on(device: torch.device) -> str:
    """Name what measured times depend on."""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{describe_device(device)}{threads}"


def check(
    store: Store,
    pipe: Any,
    strategy: Strategy,
    call: dict[str, Any],
    seed: int,
    progress: Progress | None,
) -> dict[str, float]:
    """Run one unit dense and sparse; measured once for the same rules and device."""
    key = text_digest([strategy.to_dict()["rules"], timed_on(pipe.device)])
    if (known := store.read(f"check-{key}.json")) is not None:
        return known
    times, latents = [], []
    for done, each in enumerate((Strategy.single("dense"), strategy)):
        if progress is not None:
            progress("checking", done, 2)
        with enable(pipe, each) as handle, torch.no_grad():
            output = pipe(**call_of(pipe, call, seed))
            times.append(handle.report().attention_ms)
        made = output.frames if hasattr(output, "frames") else output.images
        latents.append(torch.as_tensor(made).double())
    if progress is not None:
        progress("checking", 2, 2)
    moved = float((latents[1] - latents[0]).norm() / latents[0].norm())
    found = {"measured_attention_speedup": times[0] / times[1], "latents_relative_error": moved}
    found = {name: float(f"{value:.4g}") for name, value in found.items()}
    store.write(f"check-{key}.json", found)
    return found
