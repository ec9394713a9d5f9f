# SPDX-License-Identifier: Apache-2.0
"""Find what is attached to a transformer, and clear what was left on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_sparse.pipelines import taps
from dit_sparse.pipelines.processors import SITE, release

if TYPE_CHECKING:
    from torch import nn

    from dit_sparse.pipelines.site import Site


def sites_of(model: nn.Module) -> list[tuple[str, Site]]:
    """List the attention modules that have sparse attention, and their sites."""
    found = ((path, getattr(module, SITE, None)) for path, module in model.named_modules())
    return [(path, site) for path, site in found if site is not None]


def clear(model: Any) -> bool:
    """Take off what a pipeline that is gone left on a transformer; False where it is plain."""
    left = sites_of(model)
    for _, site in left:
        release(site.module.processor)
        site.module.__dict__.pop(SITE, None)
    if left:
        taps.detach(model)
    return bool(left)
