# SPDX-License-Identifier: Apache-2.0
"""The numbers of heads where this process has a share of them: its own, and the model's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dit_sparse.pipelines.site import HERE
from dit_sparse.strategy import Choice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dit_sparse.attach.report import CallRecord
    from dit_sparse.core.call import AttentionCall


def within(groups: Sequence[Choice], first: int, count: int) -> list[Choice]:
    """Narrow groups to the heads from ``first`` on, numbered from 0; leave out empty ones."""
    own = [
        Choice(rule, method, tuple(head - first for head in heads if 0 <= head - first < count))
        for rule, method, heads in groups
    ]
    return [each for each in own if each.heads]


def numbered(call: AttentionCall) -> AttentionCall:
    """Give a call's heads the model's numbers; tensors and state are the same objects."""
    if HERE.share is None:
        return call
    return replace(call, heads=tuple(HERE.share.first + head for head in call.heads))


def renumber(record: CallRecord, first: int) -> None:
    """Give a record's heads the model's numbers."""
    for part in record.parts:
        part.heads = tuple(first + head for head in part.heads)
    record.returned = tuple(first + head for head in record.returned)
