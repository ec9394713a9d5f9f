# SPDX-License-Identifier: Apache-2.0
"""One of the processes of ``test_two_processes``: trains, and keeps what the first one has."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.distill import setup

# A large eps keeps AdamW linear: otherwise it divides a gradient that is all rounding by its own
# size, and two right runs part.
TRAIN = {"iterations": 2, "batch": 4, "eps": 0.01}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    made = setup.trainer(folder, train=TRAIN)
    made.run()
    index = made.accelerator.process_index
    save_file(setup.weights(made), folder / f"process-{index}.safetensors")


if __name__ == "__main__":
    main()
