# SPDX-License-Identifier: Apache-2.0
"""Dense attention: the model's own, for rules that exempt some heads, layers or steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.call import AttentionCall, Ops
    from dit_sparse.plan import BlockPlan


@dataclass(frozen=True, slots=True)
class Dense:
    """Keep everything: the model's own attention runs, bit for bit."""

    summary: ClassVar[str] = "everything, by the model's own attention"

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:  # noqa: ARG002
        """Decline every call."""
        return None

    def finish(
        self,
        call: AttentionCall,  # noqa: ARG002
        output: Tensor,
        lse: Tensor,  # noqa: ARG002
        ops: Ops,  # noqa: ARG002
    ) -> Tensor:
        """Return the output as it is."""
        return output
