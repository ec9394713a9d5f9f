# SPDX-License-Identifier: Apache-2.0
"""Fractions of a run as step indices: one rounding rule for schedules and search steps."""

from __future__ import annotations

from math import floor

_SLACK = 1e-9  # 0.29 * 50 is 14.499999999999998 in binary, and 14.5 where it was written


def step_at(fraction: float, num_steps: int) -> int:
    """Round ``fraction * num_steps`` half up: the 0-based step that stands at this fraction."""
    return floor(fraction * num_steps + 0.5 + _SLACK)
