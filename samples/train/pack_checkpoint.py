# SPDX-License-Identifier: Apache-2.0
"""Write the averaged weights of a checkpoint as float16, small enough to ship and to go on from.

``train_dit.py --weights FILE`` goes on at the same step; the optimizer starts afresh.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file


def main(arguments: list[str] | None = None) -> None:
    """Read ``dit.pt``, write one file of weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, help="folder with dit.pt")
    parser.add_argument("weights", type=Path, help="safetensors file to write")
    args = parser.parse_args(arguments)
    state = torch.load(args.checkpoints / "dit.pt")
    weights = {name: value.half().contiguous() for name, value in state["average"].items()}
    metadata = {"step": str(state["step"]), "cpu_seconds": f"{state['cpu_seconds']:.1f}"}
    args.weights.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, args.weights, metadata)
    args.weights.chmod(0o644)


if __name__ == "__main__":
    main()
