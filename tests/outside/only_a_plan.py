# SPDX-License-Identifier: Apache-2.0
"""The least that a method can be: a summary and a plan, and no trait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_sparse.core.call import Method
from dit_sparse.core.plan import BlockPlan


@dataclass(frozen=True, slots=True)
class OnlyAPlan(Method):
    """Keep everything."""

    summary: ClassVar[str] = "keeps everything"

    def plan(self, call, ops):
        return BlockPlan.full(call.layout(64), call.key_layout(64))
