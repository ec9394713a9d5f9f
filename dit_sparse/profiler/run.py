# SPDX-License-Identifier: Apache-2.0
"""The search from end to end: generate, measure, predict, choose, check, write down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from dit_sparse.attach.apply import transformers_of
from dit_sparse.kernels.dispatch import describe_device
from dit_sparse.profiler.build import figures, rules_of, strategy_of, versions
from dit_sparse.profiler.candidates import parse_candidates
from dit_sparse.profiler.capture import SHORTLIST, Bands, Measuring
from dit_sparse.profiler.choose import choose, predicted
from dit_sparse.profiler.cost import CostModel
from dit_sparse.profiler.errors import ProfileError
from dit_sparse.profiler.measure import STATE_LIMIT
from dit_sparse.profiler.outcome import check as check_strategy
from dit_sparse.profiler.outcome import costs_of
from dit_sparse.profiler.store import Memory, Store
from dit_sparse.profiler.table import cells_of, sum_up
from dit_sparse.profiler.units import Work
from dit_sparse.profiler.wish import Wish
from dit_sparse.strategy import Receipt, Strategy
from dit_sparse.strategy.identity import pipeline_identity, plain
from dit_sparse.strategy.identity import versions as all_versions

if TYPE_CHECKING:
    from dit_sparse.profiler.candidates import Candidate
    from dit_sparse.profiler.table import Key, Row
    from dit_sparse.profiler.units import Choices, Units

Progress = Callable[[str, int, int], None]

EDGES = (0.0, 1 / 3, 2 / 3, 1.0)
Sequential = Literal["none", "bands", "layers"]
ON_INPUTS = {
    "none": "on dense inputs: later layers see more",
    "bands": "on inputs that the strategy produced up to the band's beginning",
    "layers": "on inputs that each generation's own choices produced, layer by layer",
}


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
    sample: int | None = None,
    shortlist: int = SHORTLIST,
    sequential: Sequential = "none",
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
        sample: Rows of blocks on which outputs are compared in each call; 0: all; None: 16 below
            8,192 tokens, 64 from there on.
        shortlist: Candidates that are measured on all calls, at most. Where more are wanted, or
            where only calls tell what density a method has, one more generation screens them
            first. 0: all are measured, as they are named.
        sequential: "bands" measures and decides step bands in order, each with the ones before it
            sparse; "layers" lets every measured layer pass on what it would choose, as
            Sparse-vDiT's search does. Both hold for one wish: another one measures anew.
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
    how = Measuring(parse_candidates(candidates), bands, sample, state_limit, shortlist)
    if not prompts or not seeds:
        raise ProfileError("at least one prompt and one seed are needed")
    _check_sequential(sequential, wish)
    models = transformers_of(pipe)
    shared = dict(arguments or {})
    jobs = [({**shared, **_as_call(prompt)}, seed) for prompt in prompts for seed in seeds]
    store = Memory() if store is None else store
    work = Work(pipe, jobs, how, store, state, progress)
    if work.index == 0:
        setup = {
            "candidates": [want.text for want in how.wanted],
            "bands": list(bands.edges),
            "captures": bands.captures,
            "sample": sample,
            "shortlist": shortlist,
            "sequential": sequential,
            "calls": [plain(call) for call, _ in jobs],
            "seeds": list(seeds),
            "pipeline": pipeline_identity(pipe),
            "device": next(iter(models.values())).device.type,
            "versions": all_versions(),
        }
        if sequential != "none":  # what is measured depends on what is chosen on the way
            setup |= {"wish": asdict(wish), "costs": costs}
        store.open(setup, fresh=fresh)
    work.wait()
    if how.screens:
        work.screen()

    def tables(units: Units) -> tuple[tuple[Candidate, ...], dict[Key, Row], dict[str, Any]]:
        options = work.candidates(units[0]["about"])
        timed = costs_of(store, options, units[0]["about"], models, costs, progress)
        return options, sum_up(units, options, bands), timed

    def decide(units: Units) -> Choices:
        options, rows, timed = tables(units)
        cells = cells_of(rows, options, CostModel.from_dict(timed["model"]))
        return dict(zip(rows, choose(cells, rows, wish), strict=True)) if rows else {}

    def so_far(choices: Choices) -> Strategy:
        options = work.candidates(work.units(0)[0]["about"])
        rules = rules_of(choices, options, bands, stages=len(models))
        return Strategy(name="decided so far", rules=rules)

    if sequential == "bands":
        work.measure_in_bands(decide, so_far)
    else:
        work.measure(greedy=wish if sequential == "layers" else None)
    if work.index != 0:
        return None
    found = work.units()
    options, rows, timed = tables(found)
    model = CostModel.from_dict(timed["model"])
    cells = cells_of(rows, options, model)
    if sequential == "bands":
        choices = {key: column for part in work.chosen() for key, column in part.items()}
    else:
        choices = dict(zip(rows, choose(cells, rows, wish), strict=True))
    measured = figures(choices, rows) | predicted(cells, choices) | timed["agreement"]
    rules = rules_of(choices, options, bands, stages=len(models))
    shortlisted = f" of {len(how.wanted)}" if how.screens else ""
    receipt = Receipt(
        source="searched by dit_sparse.profiler",
        command=command,
        prompts=tuple(str(call.get("prompt", "(embeddings)")) for call, _ in jobs[:: len(seeds)]),
        seeds=tuple(seeds),
        device=describe_device(next(iter(models.values())).device),
        kernel=found[0]["kernel"],
        versions=versions(),
        measured=measured,
        note=f"Searched for {wish}; {len(options)} candidates{shortlisted}, {bands.captures} "
        f"calls measured per layer and step band. Time model: {model.source}. Errors are of "
        f"heads' outputs before the projection, {ON_INPUTS[sequential]}.",
    )
    strategy = strategy_of(name, models, found[0]["about"], rules, receipt)
    if check:
        extra = check_strategy(store, pipe, strategy, *jobs[0], progress)
        receipt = receipt.model_copy(update={"measured": measured | extra})
        strategy = strategy.model_copy(update={"receipt": receipt})
    return Profile(strategy, options, rows, choices, model)


def _check_sequential(sequential: str, wish: Wish) -> None:
    """Refuse what cannot be decided on the way."""
    if sequential not in ON_INPUTS:
        raise ProfileError(
            f"sequential must be one of {', '.join(ON_INPUTS)}, got {sequential!r:.80}"
        )
    if sequential == "layers" and wish.rule == "time" and wish.target is None:
        raise ProfileError(
            "sequential layers: each layer chooses separately, which requires a target or "
            f"Sparse-vDiT's rule, got: {wish}; give a target, or use sequential bands"
        )


def _as_call(prompt: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
