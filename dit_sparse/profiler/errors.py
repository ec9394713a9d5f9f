# SPDX-License-Identifier: Apache-2.0
"""What the profiler refuses: candidates, settings, prompts and stores that cannot be used."""

from dit_sparse.errors import DitSparseError

__all__ = ["ProfileError"]


class ProfileError(DitSparseError, ValueError):
    """A search cannot start or go on; says what was wanted, what came, where, what to do."""
