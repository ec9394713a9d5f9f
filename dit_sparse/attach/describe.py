# SPDX-License-Identifier: Apache-2.0
"""Describe one attention call to a method: when it is, where its tokens stand, what is padding.

What is not understood is declined: the call stays dense, and its record says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dit_sparse.core.call import AttentionCall
from dit_sparse.pipelines import masks
from dit_sparse.pipelines.site import HERE

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.attach.report import CallRecord
    from dit_sparse.attach.run import Pass, Run, Text
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.pipelines.clock import Moment
    from dit_sparse.pipelines.family import Family, Shape
    from dit_sparse.pipelines.site import Site


class Decline(Exception):  # noqa: N818  (not an error: this call stays dense)
    """Why one call cannot be sparse."""


@dataclass(slots=True)
class Stage:
    """One transformer of the pipeline."""

    name: str
    family: Family
    num_layers: int


def describe(
    now: Pass,
    run: Run,
    stage: Stage,
    site: Site,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    shape: Shape | None,
    scale: float | None,
    record: CallRecord,
) -> tuple[AttentionCall, Tensor | None]:
    """Gather what a method may know, or raise ``Decline``.

    Returns:
        The call, and the order that puts its valid text first (None: as it is).
    """
    moment = now.moment
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        raise Decline("gradients are required; run under torch.no_grad()")
    if moment is None:
        raise Decline(now.reason or "the step of this pass is unknown")
    batch, tokens, heads, head_dim = query.shape
    record.step, record.branch = moment.step, _branch(run, site, stage, moment, batch)
    if HERE.declined is not None:
        raise Decline(HERE.declined)
    if shape is None:
        raise Decline(HERE.unplaced)
    if not (batch and tokens and heads and head_dim and min(shape[:3]) > 0):
        raise Decline(f"no tokens to attend to: query {tuple(query.shape)}, grid {shape}")
    grid = stage.family.grid(shape, tokens)
    if grid.tokens != tokens:
        raise Decline(
            f"the grid {grid} has {grid.tokens} tokens, but attention was called with {tokens} "
            "(due to reference images, history frames or a cache that drops tokens)"
        )
    run.enter(site.stage, grid)
    valid, order = _text_valid(run, mask, grid, stage, record, batch)
    call = AttentionCall(
        query,
        key,
        value,
        grid,
        head_dim**-0.5 if scale is None else scale,
        text_valid=valid,
        layer=site.layer,
        num_layers=stage.num_layers,
        heads=tuple(range(heads)),
        step=moment.step,
        num_steps=moment.num_steps,
        stage=site.stage,
        branch=record.branch,
        shared=run.memory.shared,
    )
    return call, order


def _branch(run: Run, site: Site, stage: Stage, moment: Moment, batch: int) -> str:
    """Name the guidance branch: as told, else by counting this layer's passes in the step."""
    told = "both" if moment.branch is None and stage.family.batched_cfg else moment.branch
    if told == "both" and moment.guided is False:
        told = "cond"  # CogVideoX's pipeline says "both" with guidance off, too
    if told is not None and not stage.family.per_sample:
        full = run.memory.batches.setdefault((site.stage, told), batch)
        # FasterCache leaves the unconditional half of the batch out in some steps.
        return "cond" if told == "both" and 2 * batch == full else told
    place = (site.stage, site.layer, told)
    step, count = run.memory.passes.get(place, (-1, 0))
    count = count + 1 if step == moment.step else 0
    run.memory.passes[place] = (moment.step, count)
    if told is not None:
        return f"{told}, sample {count}"
    names = ("cond", "uncond")  # two-pass pipelines run the conditional pass first
    return names[count] if count < len(names) else f"pass{count}"


def _text_valid(
    run: Run,
    mask: Tensor | None,
    grid: LatentsGrid,
    stage: Stage,
    record: CallRecord,
    batch: int,
) -> Text:
    """Read from a text-padding mask how many text tokens are valid, and how to order them."""
    if mask is None:
        return None, None
    if run.text[0] is mask:  # the same object in every layer of a pass
        return run.text[1]
    row = masks.video_row(mask, grid, batch)
    if not stage.family.text_padding or row is None:
        raise Decline(
            f"the attention mask {mask.dtype} {tuple(mask.shape)} is not the text padding mask "
            f"of {stage.family.name}"
        )
    valid = row[:, grid.text_start : grid.text_start + grid.text_length].sum(-1)
    seen = (record.stage, record.branch)
    checked = run.memory.masks_checked
    if seen not in checked:  # one device read per generation and branch
        if not masks.only_padding(mask, row, grid):
            raise Decline("the attention mask hides more than the text padding")
        checked[seen] = masks.at_the_end(row, grid)
    order = None if checked[seen] else masks.valid_first(row, grid)
    result = (valid, order) if grid.text_length else (None, None)
    if mask.shape[2] == 1:  # one of [tokens, tokens] is big, and made anew in every layer
        run.text = (mask, result)
    return result
