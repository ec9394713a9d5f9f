# SPDX-License-Identifier: Apache-2.0
"""One of the processes of ``test_two_processes``: trains, and keeps what it then has."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from dit_sparse.distill.shard import Sharding
from tests.distill import setup

# A large eps keeps AdamW linear: otherwise it divides a gradient that is all rounding by its own
# size, and two right runs part.
TRAIN = {"iterations": 2, "batch": 4, "eps": 0.01}
WAYS = {
    "whole": {},
    "sharded": {"sharding": Sharding()},
    "sharded, bf16": {
        "sharding": Sharding(reshard=False),
        "train": {"dtype": "bfloat16", "gradient_checkpointing": True},
    },
}


def start(folder, way, *, alone=False, shaken=False):
    """Make the trainer of a way.

    Args:
        folder: For its output.
        way: A key of ``WAYS``.
        alone: One process that has all weights.
        shaken: Every fp32 base weight is moved by up to one rounding: what comes out then differs
            by what one rounding in each weight is worth.
    """
    options = dict(WAYS[way])
    if alone:
        options.pop("sharding", None)
    made = setup.trainer(folder, train={**TRAIN, **options.pop("train", {})}, **options)
    if shaken:
        generator = torch.Generator().manual_seed(1)
        for name, weight in made.pipe.transformer.named_parameters():
            if weight.dtype == torch.float32 and "lora_" not in name:
                by = torch.rand(weight.shape, generator=generator) * 2 - 1
                weight.data.mul_(1 + torch.finfo(torch.float32).eps * by)
    return made


def held(model):
    """Count the base weights' numbers that this process has."""
    parts = (
        p.to_local() if isinstance(p, DTensor) else p
        for name, p in model.named_parameters()
        if "lora_" not in name
    )
    return sum(part.numel() for part in parts)


def main() -> None:
    torch.set_num_threads(1)
    folder, way = Path(sys.argv[1]), sys.argv[2]
    made = start(folder, way)
    made.run()
    index = made.accelerator.process_index
    found = {**setup.weights(made), "held": torch.tensor(held(made.networks.models["teacher"]))}
    save_file(found, folder / f"process-{index}.safetensors")


if __name__ == "__main__":
    main()
