# SPDX-License-Identifier: Apache-2.0
"""Sum up an evaluation: each strategy's numbers over all pairs, beside the noise floor's.

Over pairs the middle counts, and the worst is always named: one setting has been seen to span 13
to 26 dB over 15 prompts, where a mean says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from dit_sparse.quality.catalogue import chosen, kinds
from dit_sparse.quality.evaluation_setup import FLOOR
from dit_sparse.quality.gates import Verdict, check, parse_gates
from dit_sparse.quality.scores import Scores, Status

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dit_sparse.quality.evaluation_setup import Job, Setup

ABSENT: tuple[Status, ...] = ("skipped", "error")
FEW = 10  # pairs (5 prompts x 2 seeds) below which a median says little
NEAR_FLOOR = 1.0  # dB
DISTURBED = 0.05  # wall clock and processor time disagree by this much: the machine was busy


@dataclass(frozen=True)
class Pair:
    """One prompt and seed of one arm.

    Args:
        job: Which.
        page: The pair's page, from the summary's folder.
        found: Its ``report.json``.
    """

    job: Job
    page: str
    found: dict[str, Any]

    def value(self, metric: str, part: str = "value") -> float | None:
        """Give one number of a row; None where there is none."""
        row = self.found["metrics"].get(metric)
        return None if row is None else row[part]


@dataclass(frozen=True)
class Arm:
    """A strategy, or the noise floor, over all pairs.

    Args:
        label: Its name.
        rows: Each metric: the value is the median over pairs, ``per_frame`` has one per pair.
        pairs: All of them, the worst PSNR first.
        verdicts: What became of each gate.
        speedup: Median of dense seconds / its seconds, the lowest, the highest.
        processor: The same by processor time; None where it was not taken.
        attention: The same for self-attention alone.
        density: Median.
    """

    label: str
    rows: dict[str, Scores]
    pairs: tuple[Pair, ...]
    verdicts: tuple[Verdict, ...] = ()
    speedup: tuple[float, float, float] | None = None
    processor: tuple[float, float, float] | None = None
    attention: tuple[float, float, float] | None = None
    density: float | None = None

    @property
    def passed(self) -> bool | None:
        """All gates passed; None where there are none."""
        return all(v.passed for v in self.verdicts) if self.verdicts else None


@dataclass(frozen=True)
class Summary:
    """An evaluation summed up."""

    setup: Setup
    arms: tuple[Arm, ...]
    floor: Arm | None
    notes: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool | None:
        """Every strategy passed every gate; None where there are none."""
        results = [arm.passed for arm in self.arms]
        return None if all(result is None for result in results) else all(results)

    def to_dict(self) -> dict[str, Any]:
        """Give everything, ready for strict JSON."""
        return {
            **self.setup.as_dict(),
            "passed": self.passed,
            "notes": list(self.notes),
            "results": {arm.label: _arm_dict(arm) for arm in self.arms},
            "noise_floor": None if self.floor is None else _arm_dict(self.floor),
        }


def summarise(setup: Setup, found: dict[str, list[Pair]], gates: Iterable[str] = ()) -> Summary:
    """Sum up.

    Args:
        setup: What was evaluated.
        found: All pairs by arm.
        gates: Held against medians over pairs; ``.worst`` is the worst pair.
    """
    names = chosen(setup.metrics)
    bounds = parse_gates(gates, names)
    arms = []
    for label in (*setup.strategies, *([FLOOR] if setup.floor else [])):
        pairs = sorted(found[label], key=lambda pair: pair.value("psnr") or 0.0)
        rows = {name: _over_pairs(name, pairs) for name in names}
        densities = [p.found["context"].get("density") for p in pairs]
        arm = Arm(
            label,
            rows,
            tuple(pairs),
            speedup=_three(pairs, "speedup"),
            processor=_three(pairs, "speedup_processor"),
            attention=_three(pairs, "speedup_attention"),
            density=_median([d for d in densities if d is not None]),
        )
        verdicts = check(bounds, rows) if label != FLOOR else ()
        arms.append(replace(arm, verdicts=verdicts))
    strategies = tuple(arm for arm in arms if arm.label != FLOOR)
    floor = next((arm for arm in arms if arm.label == FLOOR), None)
    return Summary(setup, strategies, floor, tuple(_remarks(setup, strategies, floor)))


def _over_pairs(name: str, pairs: list[Pair]) -> Scores:
    kind = kinds()[name]
    values = [pair.value(name) for pair in pairs]
    there = tuple(value for value in values if value is not None)
    text = f"{kind.definition}; median over prompts and seeds, worst: the worst pair"
    if len(there) < len(values) or not there:
        statuses = [pair.found["metrics"][name]["status"] for pair in pairs]
        why = next((s for s in statuses if s != "ok"), "n/a: no pairs")
        status, _, reason = why.partition(": ")
        known: Status = next((s for s in ABSENT if s == status), "n/a")
        return Scores(name, text, kind.unit, None, reason=reason, better=kind.better, status=known)
    return Scores(name, text, kind.unit, float(median(there)), there, better=kind.better)


def _remarks(setup: Setup, arms: tuple[Arm, ...], floor: Arm | None) -> list[str]:
    notes = []
    count = len(setup.prompts) * len(setup.seeds)
    if count < FEW:
        notes.append(
            f"{count} pair{'s' * (count > 1)} only. Results can vary by 10 dB over prompts and "
            "seeds, so use at least 5 prompts and 2 seeds before you rely on these numbers."
        )
    ground = None if floor is None else floor.rows.get("psnr")
    for arm in arms:
        same = sum(pair.value("psnr") == 100 for pair in arm.pairs)
        if same:
            known = "" if arm.density is None else f" (its density was {arm.density:.3f})"
            notes.append(
                f"{arm.label}: {same} of {len(arm.pairs)} clips are identical to the dense "
                f"clips. Check that sparse attention was active.{known}"
            )
        row = arm.rows.get("psnr")
        near = (
            ground is not None
            and ground.value is not None
            and row is not None
            and row.value is not None
            and row.value >= ground.value - NEAR_FLOOR
        )
        if near and not same:
            notes.append(
                f"{arm.label} is as close to the dense clips as a second dense run with another "
                "attention backend, so PSNR cannot distinguish it from dense."
            )
        on_cpu = setup.call.get("device") == "cpu"
        if on_cpu and arm.speedup is not None and arm.processor is not None:
            wall, processor = arm.speedup[0], arm.processor[0]
            if abs(processor / wall - 1) > DISTURBED:
                notes.append(
                    f"{arm.label}: by CPU time the speed-up is {processor:.2f}x, not "
                    f"{wall:.2f}x. The machine was busy with other jobs, so the CPU time is more "
                    "reliable."
                )
        stayed = [
            p.found["context"]["stayed_dense"]
            for p in arm.pairs
            if p.found["context"].get("stayed_dense")
        ]
        if stayed:
            why = next(iter(stayed[0]))
            notes.append(f"{arm.label}: in {len(stayed)} clips calls stayed dense: {why}")
    if ground is not None and ground.value == 100:
        notes.append(
            f"The noise floor ({setup.floor}) is identical to the dense clips, because both "
            "backends compute the same result on this device. It therefore gives no bound."
        )
    return notes


def _three(pairs: list[Pair], key: str) -> tuple[float, float, float] | None:
    values = [pair.found["context"].get(key) for pair in pairs]
    there = [float(value) for value in values if value is not None]
    return (float(median(there)), min(there), max(there)) if there else None


def _median(values: list[float]) -> float | None:
    return float(median(values)) if values else None


def _arm_dict(arm: Arm) -> dict[str, Any]:
    return {
        "passed": arm.passed,
        "gates": [
            {"gate": v.gate.text, "found": v.found, "passed": v.passed, "reason": v.reason}
            for v in arm.verdicts
        ],
        "density": arm.density,
        "speedup": _told(arm.speedup),
        "speedup_processor": _told(arm.processor),
        "speedup_attention": _told(arm.attention),
        "metrics": {name: _row(row) for name, row in arm.rows.items()},
        "pairs": [
            {
                "prompt": pair.job.prompt,
                "seed": pair.job.seed,
                "page": pair.page,
                "speedup": pair.found["context"].get("speedup"),
                "density": pair.found["context"].get("density"),
                "metrics": {name: pair.value(name) for name in arm.rows},
                "worst_frame": {name: pair.value(name, "worst") for name in arm.rows},
            }
            for pair in arm.pairs
        ],
    }


def _told(three: tuple[float, float, float] | None) -> dict[str, float] | None:
    return None if three is None else dict(zip(("median", "low", "high"), three, strict=True))


def _row(row: Scores) -> dict[str, Any]:
    """Drop what only frames have."""
    frames = {"per_frame", "first_frame", "frame_step", "worst_frame", "identical_frames"}
    told = {key: value for key, value in row.as_dict().items() if key not in frames}
    return {**told, "per_pair": list(row.per_frame)}
