# SPDX-License-Identifier: Apache-2.0
"""Dense attention: the model's own, for rules that exempt some heads, layers or steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dit_sparse.core.call import Method

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dit_sparse.core.call import AttentionCall, Ops
    from dit_sparse.core.plan import BlockPlan
    from dit_sparse.core.traits import Params


@dataclass(frozen=True, slots=True)
class Dense(Method):
    """Keep everything: the model's own attention runs, bit for bit."""

    summary: ClassVar[str] = "full attention, computed by the model's own code"
    everything: ClassVar[Params] = {}
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    stays: ClassVar[str] = "the method has no params"
    keeps_all: ClassVar[bool] = True

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:  # noqa: ARG002
        """Decline every call."""
        return None
