# SPDX-License-Identifier: Apache-2.0
"""Old names of modules that moved into folders: they work for one release, with a warning."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGE = "dit_sparse"
MOVED = {
    "apply": "attach.apply",
    "backends": "kernels.dispatch",
    "call": "core.call",
    "doctor": "forecast.doctor",
    "envelope": "attach.envelope",
    "grid": "core.grid",
    "guarantee": "attach.guarantee",
    "hub": "strategy.hub",
    "identity": "strategy.identity",
    "plan": "core.plan",
    "probe": "attach.probe",
    "prompts": "core.prompts",
    "runtime": "attach.runtime",
    "schedule": "strategy.schedule",
    "strategy_form": "strategy.form",
    "strategy_io": "strategy.files",
    "traits": "core.traits",
    "video": "core.video",
}


class MovedModules(MetaPathFinder, Loader):
    """Finds the old names; asked last, so a module of such a name would come first."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """Answer for the old names alone."""
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == PACKAGE and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make a module that has whatever the new one has."""
        new = f"{PACKAGE}.{MOVED[spec.name.rpartition('.')[2]]}"
        warnings.warn(
            f"{spec.name} has moved to {new}; the old name will be removed in the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        made = ModuleType(spec.name, f"Now {new}.")
        there = import_module(new)

        def look_up(name: str) -> Any:
            return getattr(there, name)

        made.__dict__["__getattr__"] = look_up
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to run."""
