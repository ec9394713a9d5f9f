# SPDX-License-Identifier: Apache-2.0
"""Put averaged weights, tokenizers, text encoders and scheduler into one pipeline folder."""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from families import FAMILIES, make_family
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel


def take(module: nn.Module, path: Path) -> None:
    """Load the averaged weights of a checkpoint into ``module``."""
    if not path.exists():
        message = f"{path} is missing; train it first"
        raise FileNotFoundError(message)
    module.load_state_dict(torch.load(path)["average"])


def restore_names(weights: Path) -> None:
    """Give CLIP's weights the names that checkpoints on the Hub have.

    transformers from 5.6 on saves them without the prefix and reads both; older versions find
    none of them then, and draw random ones.
    """
    prefix = "text_model."
    named = {prefix + name.removeprefix(prefix): w for name, w in load_file(weights).items()}
    save_file(named, weights, metadata={"format": "pt"})


def main() -> None:
    """Build the folder beside its place, then move file by file, so that readers can go on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument(
        "checkpoints", type=Path, help="folder with dit.pt and the halves' decoder.pt, encoder.pt"
    )
    parser.add_argument("pipeline", type=Path, help="folder to write")
    args = parser.parse_args()
    family = make_family(args.family)
    transformer, vae = family.make_transformer(), family.make_autoencoder()
    take(transformer, args.checkpoints / "dit.pt")
    for name in family.halves:
        take(family.half(vae, name), args.checkpoints / f"{name}.pt")
    # text encoders stay float32: they are small
    pipeline = family.make_pipeline(transformer.half(), vae.half())
    args.pipeline.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.pipeline.parent) as staging:
        pipeline.save_pretrained(staging)
        for name, part in pipeline.components.items():
            if isinstance(part, CLIPTextModel):
                restore_names(Path(staging) / name / "model.safetensors")
        defaults = json.dumps(dict(family.sample_defaults), indent=2)
        (Path(staging) / "sample_defaults.json").write_text(defaults + "\n")
        for source in sorted(Path(staging).rglob("*")):
            if source.is_file():
                target = args.pipeline / source.relative_to(staging)
                target.parent.mkdir(exist_ok=True)
                source.chmod(0o644)
                source.replace(target)


if __name__ == "__main__":
    main()
