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


def start(folder, way, *, alone=False):
    """Make the trainer of a way; ``alone``: of one process that has all weights."""
    options = dict(WAYS[way])
    if alone:
        options.pop("sharding", None)
    return setup.trainer(folder, train={**TRAIN, **options.pop("train", {})}, **options)


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
