# SPDX-License-Identifier: Apache-2.0
"""What a generation remembers from call to call, and how many bytes that is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dit_sparse.core.sizes import nbytes

if TYPE_CHECKING:
    from collections.abc import Hashable


@dataclass(slots=True)
class Memory:
    """What one generation remembers from call to call, and the plans that all of them share."""

    states: dict[Hashable, dict[str, Any]] = field(default_factory=dict)
    shared: dict[Hashable, Any] = field(default_factory=dict)
    passes: dict[Hashable, tuple[int, int]] = field(default_factory=dict)
    batches: dict[Hashable, int] = field(default_factory=dict)
    masks_checked: dict[Hashable, bool] = field(default_factory=dict)
    """Whether the padding that a (stage, branch)'s mask hides stands at the end of the text."""
    peak: int = 0
    # The sizes of states as last seen, kept up to date so that a report costs no walk per call.
    sizes: dict[Hashable, int] = field(default_factory=dict)

    def note(self, key: Hashable) -> None:
        """Measure one state after its call."""
        self.sizes[key] = nbytes(self.states[key])
        self.peak = max(self.peak, sum(self.sizes.values()))

    def drop(self, key: Hashable) -> None:
        """Free one state."""
        self.states.pop(key, None)
        self.sizes.pop(key, None)
