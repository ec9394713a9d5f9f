# SPDX-License-Identifier: Apache-2.0
"""Which pipeline runs the transformer: found on the stack, from within one of its passes.

Pipelines share transformers, and threads run them at the same time, so nothing that is kept on a
transformer can say whose pass it is. The stack can: every Diffusers pipeline runs its loop within
its own ``__call__``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import MutableMapping
    from types import FrameType

# Base classes of pipelines, by module: a module that nobody imported has no instances. To import
# them here would be a circle, as they get our methods while they are imported.
PIPELINES = {
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
}


@dataclass(slots=True)
class Caller:
    """One execution of a pipeline's ``__call__``.

    Args:
        pipe: The pipeline.
        scope: The locals of that execution. A name added here lives as long as the execution
            does, also where it ends by an exception; the pipeline's own names are only read.
        timestep: ``t`` of the innermost loop, None where none is called so.
    """

    pipe: Any
    scope: MutableMapping[str, Any]
    timestep: Any = None

    @property
    def guided(self) -> bool | None:
        """Whether the pipeline uses classifier-free guidance; None where it does not say."""
        name = "do_classifier_free_guidance"
        said = self.scope.get(name)
        said = getattr(self.pipe, name, None) if said is None else said
        return said if isinstance(said, bool) else None


def find_caller(known: Any = None) -> Caller | None:
    """Find the innermost pipeline on this thread's stack; None where a loop of another kind runs.

    Args:
        known: An object that counts as a pipeline whatever its class.
    """
    bases = tuple(
        getattr(sys.modules[module], name)
        for module, name in PIPELINES.items()
        if module in sys.modules
    )
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    timestep = None
    while frame is not None:
        code = frame.f_code
        # Reading f_locals keeps a frame's objects alive until it is read again (before Python
        # 3.13), so no other frame is looked into.
        if code.co_name == "__call__" and code.co_argcount and code.co_varnames[0] == "self":
            scope = frame.f_locals
            timestep = scope.get("t") if timestep is None else timestep
            owner = scope.get("self")
            if isinstance(owner, bases) or (known is not None and owner is known):
                return Caller(owner, scope, timestep)
        frame = frame.f_back
    return None
