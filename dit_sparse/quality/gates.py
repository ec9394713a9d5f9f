# SPDX-License-Identifier: Apache-2.0
"""Gates: what a comparison must reach to pass, as ``psnr>=25`` or ``lpips_alex.worst<=0.2``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dit_sparse.quality.errors import QualityInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dit_sparse.quality.scores import Scores

FIELDS = ("value", "median", "worst", "spread", "dense", "sparse")


@dataclass(frozen=True, slots=True)
class Gate:
    """One bound.

    Args:
        metric: A row's name.
        part: Which of its numbers, one of ``FIELDS``.
        at_least: The bound is a lower one; else an upper one.
        bound: The number itself passes.
        text: As it was written.
    """

    metric: str
    part: str
    at_least: bool
    bound: float
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one gate: ``found`` is None where there was no number, which fails."""

    gate: Gate
    found: float | None
    passed: bool
    reason: str | None = None

    def __str__(self) -> str:
        """Say it in words."""
        told = self.reason if self.found is None else f"{self.found:.4g}"
        return f"{self.gate.text}: {'passed' if self.passed else 'FAILED'} ({told})"


def parse_gates(texts: Iterable[str], metrics: Iterable[str]) -> tuple[Gate, ...]:
    """Read gates; several may stand in one text, with spaces or commas between them.

    Args:
        texts: Each like ``psnr>=25 psnr.worst>=18``.
        metrics: Names of the rows that there will be.

    Raises:
        QualityInputError: Not of that form, or a row that will not be measured.
    """
    known = tuple(metrics)
    words = [word for text in texts for word in re.split(r"[,\s]+", text) if word]
    return tuple(_parse(word, known) for word in words)


def _parse(text: str, known: tuple[str, ...]) -> Gate:
    form = re.fullmatch(r"([\w.]+)(>=|<=)([-+.\deE]+)", text)
    try:
        bound = float(form[3]) if form else math.nan
    except ValueError:
        bound = math.nan
    if form is None or not math.isfinite(bound):
        raise QualityInputError(
            f"gate {text!r:.100}: must be METRIC>=NUMBER or METRIC<=NUMBER, e.g. psnr>=25 or "
            "psnr.worst>=18"
        )
    metric, part = form[1], "value"
    if metric not in known and metric.rpartition(".")[2] in FIELDS:
        metric, _, part = metric.rpartition(".")
    if metric not in known:
        raise QualityInputError(
            f"gate {text!r:.100}: {metric!r:.80} is not measured in this run; measured metrics: "
            f"{', '.join(known)}; each can be followed by .worst, .median or .spread"
        )
    return Gate(metric, part, form[2] == ">=", bound, text)


def check(gates: Iterable[Gate], rows: Mapping[str, Scores]) -> tuple[Verdict, ...]:
    """Hold rows against gates. A row without a number fails: what was not seen did not pass."""
    verdicts = []
    for gate in gates:
        row = rows[gate.metric]
        found = getattr(row, gate.part)
        if found is None:
            reason = row.reason or f"{gate.metric} has no {gate.part}"
            verdicts.append(Verdict(gate, None, passed=False, reason=reason))
            continue
        passed = found >= gate.bound if gate.at_least else found <= gate.bound
        verdicts.append(Verdict(gate, found, passed))
    return tuple(verdicts)
