# SPDX-License-Identifier: Apache-2.0
"""Judge a plan by some of its rows: a stratified sample of query blocks.

The query blocks are cut into strata of neighbours, and two of each are drawn without replacement.
With M blocks in a stratum and a, b the sums of squares in the two drawn, (a + b) M / 2 has the
stratum's sum as its expectation, and M (M - 2) (a - b)^2 / 4 the variance of that as its own
(Cochran 1977, "Sampling Techniques", sections 5.3 and 5.4: stratified random sampling).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

import torch

from dit_sparse.kernels.chunks import block_of_slot

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.plan import BlockPlan


@dataclass(frozen=True)
class Rows:
    """The drawn query blocks of one plan.

    Args:
        pairs: The two blocks drawn of each stratum, int64 ``[strata, 2]``.
        sizes: Blocks in each stratum, fp64 ``[strata]``.
        blocks: Query blocks in all.
    """

    pairs: Tensor
    sizes: Tensor
    blocks: int

    @property
    def weights(self) -> Tensor:
        """How many blocks each block stands for, 0 where it was not drawn: fp64 ``[blocks]``."""
        found = torch.zeros(self.blocks, dtype=torch.float64)
        found[self.pairs] = (self.sizes / 2)[:, None].expand(-1, 2)
        return found

    def thinned(self, plan: BlockPlan) -> BlockPlan:
        """Let the plan keep nothing for the blocks that were not drawn."""
        drawn = (self.weights > 0).to(plan.device)
        return replace(plan, kv_num_blocks=plan.kv_num_blocks * drawn, complete=False)

    def total(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate the sum over all blocks, and the variance of this estimate.

        Args:
            sums: Of each block, right for the drawn ones: fp64 ``[heads, blocks]``.

        Returns:
            Two fp64 ``[heads]``, on the CPU.
        """
        one, other = sums.cpu()[:, self.pairs].unbind(-1)  # [heads, strata]
        total = ((one + other) * self.sizes / 2).sum(-1)
        spread = self.sizes * (self.sizes - 2) * (one - other).square() / 4
        return total, spread.sum(-1)


def draw(blocks: int, share: float, seed: int) -> Rows | None:
    """Draw about ``share`` of the query blocks, at least two; None: that is all of them.

    Args:
        blocks: Query blocks, >= 1.
        share: In (0, 1].
        seed: The same one draws the same.
    """
    strata = max(1, ceil(blocks * share) // 2)
    if 2 * strata >= blocks:
        return None
    random = torch.Generator().manual_seed(seed)
    pairs, sizes = [], []
    for i in range(strata):
        first, last = blocks * i // strata, blocks * (i + 1) // strata
        pairs.append(first + torch.randperm(last - first, generator=random)[:2])
        sizes.append(last - first)
    return Rows(torch.stack(pairs), torch.tensor(sizes, dtype=torch.float64), blocks)


def block_of_token(plan: BlockPlan) -> Tensor:
    """Give every query token the number of its block: int64 ``[batch|1, heads|1, tokens]``."""
    block = block_of_slot(plan.q)
    order = plan.q_permutation
    if order is None:
        return block
    shape = tuple(max(a, b) for a, b in zip(block.shape[:2], order.shape[:2], strict=True))
    place = order.expand(*shape, -1)
    tokens = plan.query_length
    found = block.new_zeros(*shape, tokens + 1)
    found.scatter_(-1, torch.where(place < 0, tokens, place), block.expand(*shape, -1))
    return found[..., :tokens]


def block_sums(values: Tensor, block: Tensor, blocks: int) -> Tensor:
    """Sum a number of each token over its query block and over samples.

    Args:
        values: ``[batch, heads, tokens]``.
        block: From ``block_of_token``.
        blocks: How many there are.

    Returns:
        fp64 ``[heads, blocks]``.
    """
    found = values.new_zeros((*values.shape[:2], blocks), dtype=torch.float64)
    found.scatter_add_(-1, block.expand(values.shape), values.double())
    return found.sum(0)
