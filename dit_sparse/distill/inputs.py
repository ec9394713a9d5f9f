# SPDX-License-Identifier: Apache-2.0
"""Everything that a training depends on, by content: stored in each checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_sparse.strategy.identity import text_digest, versions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dit_sparse.distill.config import Config


def inputs_of(
    config: Config,
    pipeline: Mapping[str, Any],
    texts: Sequence[Any],
    clips: Sequence[str] = (),
) -> dict[str, Any]:
    """Put the identity of a training together.

    Args:
        config: Its settings; files that it names count by their content.
        pipeline: Of ``identity.pipeline_identity``, before anything is trained.
        texts: Prompts or captions, in their order.
        clips: Hashes of the clips, in the captions' order.
    """
    strategy = config.make_strategy()
    return {
        "settings": config.fixed(),
        "strategy": None if strategy is None else strategy.to_dict(),
        "data": {
            "prompts": {"count": len(texts), "hash": text_digest(list(texts))},
            "clips": {"count": len(clips), "hash": text_digest(list(clips))},
        },
        "pipeline": dict(pipeline),
        "versions": versions(),
    }


def encoding_inputs(pipeline: Mapping[str, Any]) -> str:
    """Hash what encoded prompts and clips depend on: all but the transformer's numbers and steps.

    Args:
        pipeline: Of ``identity.pipeline_identity``.
    """
    parts = {name: part for name, part in pipeline.items() if name != "scheduler"}
    for name, part in parts.items():
        if name.startswith("transformer") and part is not None:
            parts[name] = {key: part[key] for key in ("class", "config")}
    return text_digest([parts, versions()])
