# SPDX-License-Identifier: Apache-2.0
"""Turn wan-tiny's transformer into starting weights for another video family's.

The flagship starts as the same function: its additional feed-forward units output zero.

HunyuanVideo's layers take over self-attention, feed-forward and, by least squares over all
timesteps, their modulation. What has no counterpart starts as the family starts it: all that reads
text. Query and key norms differ (over all heads in Wan, per head elsewhere): a start, not the same
function.
"""

import argparse
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from families import FAMILIES, make_family
from torch import Tensor, nn

WAN = Path(__file__).parents[1] / "wan-tiny"
RIDGE = 1e-4  # of the mean squared input, against weights that nothing determines


@torch.no_grad()
def fit(linear: nn.Linear, inputs: Tensor, wanted: Tensor) -> None:
    """Set ``linear`` so that it maps ``inputs [n, in]`` to ``wanted [n, out]``, least squares."""
    inputs, wanted = inputs.double(), wanted.double()
    centre, target = inputs.mean(dim=0), wanted.mean(dim=0)
    gram = (inputs - centre).T @ (inputs - centre)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, (inputs - centre).T @ (wanted - target)).T
    linear.weight.copy_(weight)
    linear.bias.copy_(target - weight @ centre)


@torch.no_grad()
def modulation(wan: WanTransformer3DModel, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Give Wan's shifts, scales, gates ``[n, layers, 6, dim]``, its output's ``[n, 2, dim]``."""
    embedder = wan.condition_embedder
    time = embedder.time_embedder(embedder.timesteps_proj(timestep))  # [n, dim]
    shared = embedder.time_proj(nn.functional.silu(time)).unflatten(1, (6, -1))
    layers = [block.scale_shift_table + shared for block in wan.blocks]
    return torch.stack(layers, dim=1), wan.scale_shift_table + time[:, None]


@torch.no_grad()
def copy_attention(target: nn.Module, source: nn.Module) -> None:
    """Take over queries, keys, values and, folded into weights and one number, their norms."""
    for name, norm in (("to_q", "norm_q"), ("to_k", "norm_k")):
        old, new, scale = (
            getattr(source, name),
            getattr(target, name),
            getattr(source, norm).weight,
        )
        new.weight.copy_(scale[:, None] * old.weight)
        new.bias.copy_(scale * old.bias)
        getattr(target, norm).weight.fill_(scale.square().mean().sqrt())
    target.to_v.load_state_dict(source.to_v.state_dict())


@torch.no_grad()
def hunyuan_video(model: nn.Module, wan: WanTransformer3DModel) -> None:
    """Start a HunyuanVideo transformer; its one-stream layers get both parts side by side."""
    timestep = torch.arange(0.0, 1000.0, 4)
    layers, last = modulation(wan, timestep)
    embedder = model.time_text_embed
    for part in (embedder.guidance_embedder.linear_2, embedder.text_embedder.linear_2):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    time = embedder.timestep_embedder(embedder.time_proj(timestep))
    inputs = nn.functional.silu(time)
    model.x_embedder.proj.load_state_dict(wan.patch_embedding.state_dict())
    fit(model.norm_out.linear, inputs, last.flip(1).flatten(1))  # scale stands first here
    model.proj_out.load_state_dict(wan.proj_out.state_dict())
    dual = len(model.transformer_blocks)
    for number, layer in enumerate(model.transformer_blocks):
        block = wan.blocks[number]
        copy_attention(layer.attn, block.attn1)
        layer.attn.to_out[0].load_state_dict(block.attn1.to_out[0].state_dict())
        layer.ff.load_state_dict(block.ffn.state_dict())
        fit(layer.norm1.linear, inputs, layers[:, number].flatten(1))
    for number, layer in enumerate(model.single_transformer_blocks, start=dual):
        block, told = wan.blocks[number], layers[:, number]
        copy_attention(layer.attn, block.attn1)
        told = torch.stack([told[:, 0], told[:, 1], torch.ones_like(told[:, 2])], dim=1)
        fit(layer.norm.linear, inputs, told.flatten(1))
        shift, scale, gate, ff_shift, ff_scale, ff_gate = layers[:, number].mean(dim=0)
        ratio = (1 + ff_scale) / (1 + scale).clamp(min=0.2)
        first, second = block.ffn.net[0].proj, block.ffn.net[2]
        layer.proj_mlp.weight.copy_(first.weight * ratio)
        layer.proj_mlp.bias.copy_(first.bias + first.weight @ (ff_shift - shift * ratio))
        out = block.attn1.to_out[0]
        layer.proj_out.weight.copy_(
            torch.cat([gate[:, None] * out.weight, ff_gate[:, None] * second.weight], dim=1)
        )
        layer.proj_out.bias.copy_(gate * out.bias + ff_gate * second.bias)


@torch.no_grad()
def flagship(model: nn.Module, wan: WanTransformer3DModel) -> None:
    """Start a Wan transformer with wider feed-forward layers; it computes what ``wan`` does."""
    weights = model.state_dict()  # the output of a feed-forward layer starts at zero
    for name, value in wan.state_dict().items():
        weights[name][tuple(slice(length) for length in value.shape)] = value


STARTS = {"flagship": flagship, "hunyuan-video": hunyuan_video}


def main() -> None:
    """Write the starting weights, for ``train_dit.py --weights``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=set(FAMILIES) & set(STARTS))
    parser.add_argument("weights", type=Path, help="file to write")
    args = parser.parse_args()
    model = make_family(args.family).make_transformer()
    wan = WanTransformer3DModel.from_pretrained(WAN, subfolder="transformer")
    STARTS[args.family](model, wan)
    args.weights.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), args.weights)


if __name__ == "__main__":
    main()
