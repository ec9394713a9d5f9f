# SPDX-License-Identifier: Apache-2.0
"""Put the averaged weights, the tokenizer and the scheduler into one `WanPipeline` folder."""

import argparse
import tempfile
from pathlib import Path

import torch
from autoencoder import make_autoencoder
from diffusers import UniPCMultistepScheduler, WanPipeline
from text import make_text_encoder, make_tokenizer
from torch import nn
from transformer import make_transformer

HALVES = {
    "decoder": ("decoder", "post_quant_conv"),
    "encoder": ("encoder", "quant_conv"),
}


def take(module: nn.Module, path: Path, *, allow_untrained: bool) -> None:
    """Load the averaged weights of a checkpoint into ``module``."""
    if path.exists():
        module.load_state_dict(torch.load(path)["average"])
    elif not allow_untrained:
        message = f"{path.name} is missing; train it first or pass --allow-untrained"
        raise FileNotFoundError(message)


def main() -> None:
    """Build the folder beside its place, then move file by file, so that readers can go on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoints", type=Path, help="folder with dit.pt, decoder.pt, encoder.pt"
    )
    parser.add_argument("pipeline", type=Path, help="folder to write")
    parser.add_argument("--allow-untrained", action="store_true")
    args = parser.parse_args()
    transformer, vae, tokenizer = make_transformer(), make_autoencoder(), make_tokenizer()
    take(transformer, args.checkpoints / "dit.pt", allow_untrained=args.allow_untrained)
    for name, parts in HALVES.items():
        half = nn.ModuleList([getattr(vae, part) for part in parts])
        take(half, args.checkpoints / f"{name}.pt", allow_untrained=args.allow_untrained)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=3.0,
    )
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=make_text_encoder(tokenizer),  # float32: it is small
        vae=vae.half(),
        scheduler=scheduler,
        transformer=transformer.half(),
    )
    args.pipeline.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.pipeline.parent) as staging:
        pipeline.save_pretrained(staging)
        for source in sorted(Path(staging).rglob("*")):
            if source.is_file():
                target = args.pipeline / source.relative_to(staging)
                target.parent.mkdir(exist_ok=True)
                source.chmod(0o644)
                source.replace(target)


if __name__ == "__main__":
    main()
