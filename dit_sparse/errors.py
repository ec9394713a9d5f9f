# SPDX-License-Identifier: Apache-2.0
"""Every exception that dit_sparse raises on purpose, in one tree.

All derive from ``DitSparseError`` and from the builtin a caller would expect, so both
``except dit_sparse.DitSparseError`` and ``except ValueError`` work.
"""

__all__ = [
    "AttachError",
    "DitSparseError",
    "GeometryError",
    "KernelError",
    "NativeUnavailable",
    "PlanError",
    "PromptsError",
    "StrategyError",
    "UnsupportedError",
]


class DitSparseError(Exception):
    """Base of all errors raised by dit_sparse."""


class PlanError(DitSparseError, ValueError):
    """A plan is malformed, or does not fit the call it was given to."""


class StrategyError(DitSparseError, ValueError):
    """A strategy file, its name or its content cannot be used."""


class PromptsError(DitSparseError, ValueError):
    """A file of prompts cannot be read."""


class AttachError(DitSparseError, RuntimeError):
    """Attaching or detaching was asked for in a state that does not allow it."""


class UnsupportedError(DitSparseError, TypeError):
    """The pipeline, model or processor is not one that dit_sparse knows."""


class GeometryError(DitSparseError, ValueError):
    """Token counts, masks or grids do not add up where exactness was demanded (strict)."""


class KernelError(DitSparseError, RuntimeError):
    """A kernel cannot run this call, or failed its check against the reference."""


class NativeUnavailable(KernelError):  # noqa: N818  (a state of the machine, not a mistake)
    """The compiled CPU kernel is missing, damaged, of another version or for another machine."""
