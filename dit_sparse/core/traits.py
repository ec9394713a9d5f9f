# SPDX-License-Identifier: Apache-2.0
"""What a method states about itself, so that no other file needs to know a method by name.

Every trait has a default; a method overrides those whose default is wrong for it. Params are
given as in a strategy file: by name, plain JSON values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from dit_sparse.core.grid import LatentsGrid

Params = Mapping[str, Any]


class Traits(Protocol):
    """The traits of a method; only ``summary`` must be written, and ``everything`` in most."""

    __slots__ = ()

    summary: ClassVar[str]
    """One line for ``dit-sparse methods``: what it does and its source."""

    static: ClassVar[bool] = False
    """Whether its plan follows from the grid alone, whatever the queries and keys."""

    everything: ClassVar[Params] = {"density": 1.0}
    """Params that keep everything; its output must then equal dense attention."""

    example: ClassVar[Params] = {}
    """Params that drop blocks on a grid of a few hundred tokens, for its picture and its tests."""

    cheap_planning: ClassVar[Params] = {}
    """Params that keep planning below 5 % of dense attention on a CPU; empty where the defaults
    do so, or where no setting does."""

    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": ("",)}
    """The profiler's presets that include it, and its candidates in each: ``KEY=VALUE`` params,
    or "" for the method's bare name."""

    density_params: ClassVar[tuple[str, ...]] = ("density",)
    """Params that decide what share it keeps. Where a candidate gives none of them, the profiler
    tries several densities."""

    at_start: ClassVar[Params] = {}
    """Params that make it search on the first step it sees, with a dense call. The profiler sets
    them, as every step band starts with a search. Empty: it never searches."""

    alone: ClassVar[Params] = {}
    """Params, unless given, with which the profiler makes each head choose by itself."""

    untrainable: ClassVar[str] = ""
    """Why a model cannot be trained through it; empty where it can."""

    stays: ClassVar[str] = "kept as they are; the method does not state how they scale"
    """Why the params that ``rescaled`` leaves alone are right on another grid."""

    @classmethod
    def at_density(cls, density: float, grid: LatentsGrid, block_size: int) -> Params | None:  # noqa: ARG003
        """Give params that keep about this share of all pairs; None: no param decides it.

        Args:
            density: In (0, 1].
            grid: Where the tokens stand.
            block_size: Of a method that has this param; it need not be in the result.
        """
        return {"density": density} if hasattr(cls, "density") else None

    @classmethod
    def knobs(cls, share: float, grid: LatentsGrid, block_size: int) -> tuple[Params, ...]:
        """Give params by a knob in (0, 1] that keeps more when raised; several are tried in turn.

        Unlike ``at_density`` the density may be anything: who turns the knob measures it.
        """
        params = cls.at_density(share, grid, block_size)
        return () if params is None else (params,)

    @classmethod
    def choices(cls, params: Params) -> list[tuple[Params, bool]]:
        """List the candidates that a name with these params stands for in the profiler.

        Returns:
            Their params, and whether each is tried at several densities (``at_density``).
        """
        return [(params, not set(cls.density_params).intersection(params))]

    @property
    def keeps_all(self) -> bool:
        """Whether it is dense attention by its params alone, so that it need not run."""
        return False

    @property
    def block_tokens(self) -> int:
        """Tokens in its blocks, at most."""
        return int(getattr(self, "block_size", 128))

    @property
    def asked_density(self) -> float | None:
        """Share of the video's pairs that its params ask for; None: the content decides."""
        density = getattr(self, "density", None)
        return density if isinstance(density, float) else None

    @property
    def extra_density(self) -> float:
        """Share of all pairs that ``finish`` computes on top of the plan."""
        return 0.0

    @property
    def compensates(self) -> bool:
        """Whether it makes up for what it drops, by means or by pooled keys."""
        return self.extra_density > 0 or getattr(self, "compensate", "none") != "none"

    @property
    def period(self) -> int | None:
        """Steps from one dense refresh to the next; None: it never refreshes."""
        return None

    @property
    def names_heads(self) -> bool:
        """Whether its params treat single heads of the model differently."""
        return False

    @property
    def heads_tied(self) -> str:
        """Why what a head keeps depends on the call's other heads; empty where it does not."""
        return ""

    def drifts(self, old: LatentsGrid, new: LatentsGrid) -> tuple[str, ...]:  # noqa: ARG002
        """Warn, a line each, of what the same params do differently on another grid."""
        return ()
