# SPDX-License-Identifier: Apache-2.0
"""What training refuses: configs, models, data, and numbers that are none."""

from dit_sparse.errors import DitSparseError

__all__ = ["DistillError"]


class DistillError(DitSparseError, ValueError):
    """Training cannot start or go on; says what was wanted, what came, where, what to do."""
