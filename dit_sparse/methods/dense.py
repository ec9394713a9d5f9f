# SPDX-License-Identifier: Apache-2.0
"""Dense attention: the model's own, for rules that exempt some heads, layers or steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dit_sparse.call import Method

if TYPE_CHECKING:
    from dit_sparse.call import AttentionCall, Ops
    from dit_sparse.plan import BlockPlan


@dataclass(frozen=True, slots=True)
class Dense(Method):
    """Keep everything: the model's own attention runs, bit for bit."""

    summary: ClassVar[str] = "everything, by the model's own attention"

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:  # noqa: ARG002
        """Decline every call."""
        return None
