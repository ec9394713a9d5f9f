# SPDX-License-Identifier: Apache-2.0
"""The search from end to end: generate, measure, predict, choose, check, write down."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from dit_sparse.apply import enable, transformers_of
from dit_sparse.backends import describe_device
from dit_sparse.grid import LatentsGrid
from dit_sparse.profiler.build import figures, rules_of, strategy_of, versions
from dit_sparse.profiler.candidates import parse_candidates
from dit_sparse.profiler.capture import Bands, call_of, candidates_of, capture
from dit_sparse.profiler.cost import CostModel
from dit_sparse.profiler.errors import ProfileError
from dit_sparse.profiler.measure import STATE_LIMIT
from dit_sparse.profiler.micro import Size, measure_costs
from dit_sparse.profiler.search import minimise, sparse_vdit_rule
from dit_sparse.profiler.store import Memory, Store
from dit_sparse.profiler.table import cells_of, sum_up
from dit_sparse.profiler.wish import Wish
from dit_sparse.strategy import Receipt, Strategy, config_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dit_sparse.profiler.candidates import Candidate
    from dit_sparse.profiler.search import Cell
    from dit_sparse.profiler.table import Key, Row

    Progress = Callable[[str, int, int], None]

EDGES = (0.0, 1 / 3, 2 / 3, 1.0)


@dataclass(frozen=True)
class Profile:
    """What a search found.

    Args:
        strategy: With its receipt.
        candidates: Column c of a table is candidate c - 1; column 0 is dense.
        rows: What was measured, by (stage, layer, band).
        choices: Column of each head, by the same.
        costs: How time was predicted.
    """

    strategy: Strategy
    candidates: tuple[Candidate, ...]
    rows: dict[Key, Row]
    choices: dict[Key, tuple[int, ...]]
    costs: CostModel


def profile(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    arguments: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    candidates: str = "default",
    wish: Wish | None = None,
    bands: Bands | None = None,
    costs: Literal["measured", "assumed"] = "measured",
    check: bool = True,
    name: str = "profiled",
    command: str | None = None,
    store: Store | None = None,
    fresh: bool = False,
    state: Any = None,
    state_limit: int = STATE_LIMIT,
    progress: Progress | None = None,
) -> Profile | None:
    """Search a strategy for a pipeline.

    Args:
        pipe: A Diffusers pipeline with nothing attached; it is left as it was.
        prompts: Texts, or arguments of a call that stand for one (embeddings).
        arguments: Of every call (height, num_inference_steps, ...).
        seeds: Each prompt is generated once with each.
        candidates: See ``candidates.py``.
        wish: What to search for.
        bands: How the run is cut; thirds by default.
        costs: "measured" runs a micro-benchmark on this device; "assumed" is free and repeatable.
        check: Generate the first prompt dense and sparse at the end, and write down how much
            faster self-attention was and how far the latents moved.
        name: Of the strategy.
        command: For the receipt.
        store: Where measurements are kept, so that a killed search goes on; None: nowhere.
        fresh: Drop what the store holds.
        state: accelerate's ``PartialState``: its processes share the units, the first one
            searches; the others return None.
        state_limit: Bytes that candidates may remember.
        progress: Called with (what, done, total).

    Raises:
        ProfileError: A setting, candidate, prompt or store that cannot be used.
        UnsupportedError: A pipeline that dit_sparse does not know.
    """
    wish, bands = wish or Wish(), bands or Bands(EDGES)
    wanted = parse_candidates(candidates)
    if not prompts or not seeds:
        raise ProfileError("at least one prompt and one seed are needed")
    models = transformers_of(pipe)
    shared = dict(arguments or {})
    jobs = [({**shared, **_as_call(prompt)}, seed) for prompt in prompts for seed in seeds]
    store = Memory() if store is None else store
    index, count = (0, 1) if state is None else (state.process_index, state.num_processes)
    if index == 0:
        store.open(
            {
                "candidates": [want.text for want in wanted],
                "bands": list(bands.edges),
                "captures": bands.captures,
                "calls": [_digest(call) for call, _ in jobs],
                "seeds": list(seeds),
                "model": {stage: _weights(model) for stage, model in models.items()},
                "versions": versions(),
            },
            fresh=fresh,
        )
    _wait(state)
    own = range(index, len(jobs), count)
    for done, number in enumerate(own):
        if store.unit(number) is None:

            def tick(part: int, whole: int, done: int = done) -> None:
                if progress is not None:
                    progress("measuring", done * whole + part, len(own) * whole)

            call, seed = jobs[number]
            unit = capture(pipe, call, seed, wanted, bands, state_limit=state_limit, tick=tick)
            store.write_unit(number, unit)
        if progress is not None:
            progress("units", done + 1, len(own))
    _wait(state)
    if index != 0:
        return None
    units = [store.unit(number) for number in range(len(jobs))]
    found = [unit for unit in units if unit is not None]
    if len(found) < len(jobs):
        raise ProfileError(f"{len(jobs) - len(found)} of {len(jobs)} units are missing")
    options = candidates_of(wanted, found[0]["about"])
    rows = sum_up(found, options, bands)
    timed = _costs(store, options, found[0]["about"], models, costs, progress)
    model = CostModel.from_dict(timed["model"])
    cells = cells_of(rows, options, model)
    choices = dict(zip(rows, choose(cells, rows, wish), strict=True))
    measured = figures(choices, rows) | _predicted(cells, choices) | timed["agreement"]
    rules = rules_of(choices, options, bands, stages=len(models))
    receipt = Receipt(
        source="searched by dit_sparse.profiler",
        command=command,
        prompts=tuple(str(call.get("prompt", "(embeddings)")) for call, _ in jobs[:: len(seeds)]),
        seeds=tuple(seeds),
        device=describe_device(next(iter(models.values())).device),
        kernel=found[0]["kernel"],
        versions=versions(),
        measured=measured,
        note=f"Searched for {wish}; {len(options)} candidates, {bands.captures} calls measured a "
        f"layer and step band. Time model: {model.source}. Errors are of heads' outputs before "
        "the projection, on dense inputs: later layers see more.",
    )
    strategy = strategy_of(name, models, found[0]["about"], rules, receipt)
    if check:
        extra = _check(store, pipe, strategy, *jobs[0], progress)
        receipt = receipt.model_copy(update={"measured": measured | extra})
        strategy = strategy.model_copy(update={"receipt": receipt})
    return Profile(strategy, options, rows, choices, model)


def choose(cells: list[Cell], rows: Mapping[Key, Row], wish: Wish) -> list[tuple[int, ...]]:
    """Apply the wish's rule to the tables; cells and rows are in one order."""
    if wish.rule == "time":
        return list(minimise(cells, target=wish.target, budget=wish.budget).choices)
    found = []
    for row in rows.values():
        loss = np.sqrt(row.error[:, 1:])
        if wish.loss == "mse":
            loss = row.error[:, 1:] * row.power[:, None]
        found.append(
            sparse_vdit_rule(loss, row.density[:, 1:], weight=wish.weight, epsilon=wish.epsilon)
        )
    return found


def _predicted(cells: list[Cell], choices: Mapping[Key, tuple[int, ...]]) -> dict[str, float]:
    """Predict how much faster self-attention is, over all captured branches."""
    dense = sum(float(cell.time[:, 0].sum()) for cell in cells)
    time = 0.0
    for cell in cells:
        chosen = choices[cell.key]
        time += float(cell.time[np.arange(len(chosen)), chosen].sum())
        time += float(cell.launch[sorted(set(chosen))].sum())
    return {"predicted_attention_speedup": float(f"{dense / time:.6g}")}


def _costs(
    store: Store,
    candidates: tuple[Candidate, ...],
    about: Mapping[str, Any],
    models: Mapping[str, Any],
    source: str,
    progress: Progress | None,
) -> dict[str, Any]:
    """Measure costs once, or assume them."""
    if source == "assumed":
        return {"model": CostModel.assumed(candidates, about["heads"]).to_dict(), "agreement": {}}
    if (known := store.read("costs.json")) is not None:
        return known
    model = next(iter(models.values()))
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
    found = {"model": timed.model.to_dict(), "agreement": agreement}
    store.write("costs.json", found)
    return found


def _check(
    store: Store,
    pipe: Any,
    strategy: Strategy,
    call: dict[str, Any],
    seed: int,
    progress: Progress | None,
) -> dict[str, float]:
    """Run the first unit dense and sparse; measured once for the same rules."""
    key = hashlib.sha256(json.dumps(strategy.to_dict()["rules"]).encode()).hexdigest()[:16]
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


def _as_call(prompt: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)


def _digest(call: Mapping[str, Any]) -> dict[str, str]:
    """Name a call's arguments: tensors by shape and sum, the rest as text."""
    return {
        key: f"{tuple(value.shape)} {value.double().sum().item():.9e}"
        if isinstance(value, torch.Tensor)
        else str(value)
        for key, value in sorted(call.items())
    }


def _weights(model: Any) -> str:
    """Name a model by its config, dtype and a sample of its numbers."""
    digest = hashlib.sha256(f"{config_hash(model.config)} {model.dtype}".encode())
    for key, value in sorted(model.state_dict().items()):
        some = value.flatten()[:: max(1, value.numel() // 64)][:64]
        digest.update(f"{key} {some.double().sum().item():.9e}".encode())
    return digest.hexdigest()[:16]


def _wait(state: Any) -> None:
    if state is not None:
        state.wait_for_everyone()
