# SPDX-License-Identifier: Apache-2.0
"""Tell models apart without reading all of their weights."""

from __future__ import annotations

import hashlib
from typing import Any

from dit_sparse.strategy import config_hash

_SAMPLE = 64  # numbers of each tensor


def weights_hash(*models: Any) -> str:
    """Name models by config, dtype and the sum of a sample of every tensor: 16 hex digits.

    Models that were trained apart differ; a change of a few numbers may go unseen.

    Args:
        *models: Diffusers models, in an order of their own.
    """
    digest = hashlib.sha256()
    for model in models:
        digest.update(f"{config_hash(model.config)} {model.dtype}".encode())
        for key, value in sorted(model.state_dict().items()):
            some = value.flatten()[:: max(1, value.numel() // _SAMPLE)][:_SAMPLE]
            digest.update(f"{key} {some.double().sum().item():.9e}".encode())
    return digest.hexdigest()[:16]
