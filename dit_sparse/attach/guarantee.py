# SPDX-License-Identifier: Apache-2.0
"""What a user is promised about every head's error during a generation, and what it may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from dit_sparse.errors import StrategyError
from dit_sparse.strategy import Strategy

MEASURED = "relative_error"  # the figure of a receipt that says how far heads were off
_MOST = 1_000_000


@dataclass(frozen=True, slots=True)
class Guarantee:
    """The envelope of every head, and how it is watched; ``envelope.py`` does so.

    The error is ||O - O_dense|| / ||O_dense|| over the tokens of one sample, of one head's output
    before the output projection, whatever the method added to make up for what it dropped. It is
    estimated on a few rows.

    Args:
        limit: Largest error, in (0, 1]; 1 is what an output of zeros has. "receipt": ``factor``
            times the error that the strategy's receipt has measured. Lower is closer to dense and
            slower, as more heads go back.
        factor: For "receipt", > 0. That error is a root mean square over all heads, dense ones
            included; single heads were up to 3 times as far off (docs/guarantee.md).
        rows: Query rows of a probe, >= 2. More is surer and costs as many dense rows.
        every: A head is probed at its first sparse call under each rule, then once in ``every``
            sparse calls in the mean, in random order, and at least once in twice as many. Lower
            finds out sooner and costs more.
        seed: Of rows and order, in [0, 2 ** 31).
    """

    limit: float | Literal["receipt"] = "receipt"
    factor: float = 3.0
    rows: int = 64
    every: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        if isinstance(self.limit, str):
            if self.limit != "receipt":
                raise StrategyError(
                    'guarantee must be a relative error in (0, 1] or "receipt", got '
                    f"{self.limit!r:.80}; try 0.3"
                )
        elif not _is_number(self.limit) or not 0 < self.limit <= 1:
            raise StrategyError(
                f"guarantee must be a relative error in (0, 1], got {self.limit!r:.80}; 0.3 "
                "allows a head's output to differ from dense by 30 %"
            )
        if not _is_number(self.factor) or not 0 < self.factor < math.inf:
            raise StrategyError(
                f"guarantee: factor must be a number above 0, got {self.factor!r:.80}; try 3"
            )
        for name, least, most, hint in (
            ("rows", 2, _MOST, 64),
            ("every", 1, _MOST, 4),
            ("seed", 0, 2**31 - 1, 0),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise StrategyError(
                    f"guarantee: {name} must be a whole number in [{least}, {most}], got "
                    f"{value!r:.80}; try {hint}"
                )

    @classmethod
    def coerce(cls, wanted: Guarantee | float | str) -> Guarantee:
        """Make a guarantee of a limit, of "receipt", or of what is one already."""
        return wanted if isinstance(wanted, Guarantee) else cls(limit=wanted)  # type: ignore[arg-type]

    def bound(self, strategy: Strategy) -> float:
        """Give the limit as a number, read from the strategy's receipt where that is asked for.

        Raises:
            StrategyError: The receipt has measured no error.
        """
        if not isinstance(self.limit, str):
            return float(self.limit)
        receipt = strategy.receipt
        measured = receipt.measured.get(MEASURED)
        if measured is None:
            known = ", ".join(sorted(receipt.measured)) or "nothing"
            note = f" ({receipt.note})" if receipt.note else ""
            raise StrategyError(
                f'{strategy.name}: guarantee="receipt" requires receipt.measured.{MEASURED}, '
                f"the receipt contains {known}{note:.200}; pass a number, e.g. guarantee=0.3, or "
                "use a strategy measured by 'dit-sparse profile'"
            )
        if measured <= 0:
            raise StrategyError(
                f'{strategy.name}: guarantee="receipt" requires receipt.measured.{MEASURED} '
                f"above 0, got {measured}; pass a number, e.g. guarantee=0.3"
            )
        return min(self.factor * measured, 1.0)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
