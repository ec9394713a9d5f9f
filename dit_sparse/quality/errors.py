# SPDX-License-Identifier: Apache-2.0
"""What a comparison refuses: clips that cannot be read, do not fit, or hold no picture."""

from dit_sparse.errors import DitSparseError

__all__ = ["QualityInputError"]


class QualityInputError(DitSparseError, ValueError):
    """A clip, a set of weights or a gate cannot be used; says what was wanted and what came."""
