# SPDX-License-Identifier: Apache-2.0
"""Recognise checkpoints that were trained with sparse attention of their own.

Where the model still computes that attention, ours on top would replace what it was trained for:
it is left alone, with an error that says so. Where Diffusers has dropped it already (it ignores
weights that its class does not have), the model runs dense attention, for which it was not
trained; whether ours does it good or harm is not known, so this is allowed and warned of.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dit_sparse.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import nn

# VSA (Zhang et al. 2025, arXiv:2505.13389) adds a projection of this name to each attention.
VSA_GATE = "to_gate_compress"
# Names under which FastVideo publishes what it trained with VSA ("FullAttn" is what it did not).
VSA_NAME = re.compile(r"(?<![a-z0-9])(fastwan2\.1|vsa)(?![a-z0-9])", re.IGNORECASE)


def refuse_gates(model: nn.Module) -> None:
    """Raise ``UnsupportedError`` where a model has the gates of a sparse attention of its own."""
    for path, _ in model.named_parameters():
        if VSA_GATE in path:
            raise UnsupportedError(
                f"{type(model).__name__} was trained with Video Sparse Attention and already "
                f"computes it ({path}); use it without dit_sparse"
            )


def trained_sparse(model: nn.Module) -> str | None:
    """Say so where a checkpoint's name tells that it was trained with sparse attention."""
    config = getattr(model, "config", None)
    name = str(getattr(config, "_name_or_path", None) or "")
    found = VSA_NAME.search(name)
    if found is None:
        return None
    return (
        f"{found[0]!r} in this checkpoint's name ({name}) indicates that it was trained with "
        "Video Sparse Attention. Diffusers drops the gates of this method, so the model runs "
        "dense attention, for which it was not trained, and no strategy was measured on it; "
        "compare with dense, or use FastVideo"
    )
