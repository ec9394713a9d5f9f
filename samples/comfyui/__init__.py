# SPDX-License-Identifier: Apache-2.0
"""A ComfyUI node that runs a strategy of dit_sparse in a model's self-attention.

It sets ComfyUI's own seam, ``optimized_attention_override`` in ``transformer_options``, on a clone
of the model, and marks each layer's self-attention by an object patch, so that cross-attention is
never mistaken for it. What ComfyUI tells at each call (``grid_sizes``, ``sigmas``,
``sample_sigmas``, ``cond_or_uncond``) says where the call stands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dit_sparse import LatentsGrid, Runtime, Strategy

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = "optimized_attention_override"
LAYER = "dit_sparse_layer"


class Known(NamedTuple):
    """One model of ComfyUI: its class in Diffusers, and where its self-attention is."""

    model_class: str
    layers: str
    attention: str


MODELS = {"WanModel": Known("WanTransformer3DModel", "blocks", "self_attn")}


class Override:
    """What ComfyUI calls in place of its attention function."""

    def __init__(
        self, runtime: Runtime, previous: Callable[..., Any] | None, first: int, total: int
    ) -> None:
        """Remember what was set before: the dense calls still go through it."""
        self.runtime, self.previous = runtime, previous
        self.first, self.total = first, total
        self._schedule: Any = None
        self._sigma: tuple[Any, int | None] = (None, None)

    @torch.compiler.disable  # where a call stands is looked up, not traced
    def __call__(
        self,
        func: Callable[..., Any],
        query: Any,
        key: Any,
        value: Any,
        heads: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Compute one attention call of the model, as ``func`` would; ``args`` start with mask."""
        options = kwargs.get("transformer_options") or {}
        names = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")
        named = dict(zip(names, args, strict=False))
        mine = {name: kwargs.get(name, named.get(name)) for name in names}

        def own(q: Any, k: Any, v: Any, count: int, **other: Any) -> Any:
            rest = {**named, **kwargs, **other}
            if self.previous is not None:
                return self.previous(func, q, k, v, count, **rest)
            return func(q, k, v, count, **rest)

        layer = options.get(LAYER)
        if layer is None or mine["mask"] is not None:
            return own(query, key, value, heads)
        head_first = bool(mine["skip_reshape"])

        def split(x: Any) -> Any:
            """Give ``[batch, seq_len, heads, head_dim]``."""
            return x.transpose(1, 2) if head_first else x.unflatten(-1, (heads, -1))

        def dense(q: Any, k: Any, v: Any) -> Any:
            flat = (each.flatten(2) for each in (q, k, v))
            made = own(*flat, q.shape[2], skip_reshape=False, skip_output_reshape=False)
            return made.unflatten(-1, (q.shape[2], -1))

        step, total = self._clock(options)
        sizes = options.get("grid_sizes")
        output = self.runtime.attend(
            *map(split, (query, key, value)),
            grid=None if sizes is None else LatentsGrid(*map(int, sizes)),
            layer=layer,
            step=step,
            num_steps=total,
            branch=branch(options.get("cond_or_uncond")),
            dense=dense,
        )
        return output.transpose(1, 2) if mine["skip_output_reshape"] else output.flatten(2)

    def _clock(self, options: dict[str, Any]) -> tuple[int | None, int]:
        """Find the step by its sigma in the sampler's schedule, once for each pass."""
        schedule, sigma = options.get("sample_sigmas"), options.get("sigmas")
        if schedule is None or sigma is None:
            return None, 0
        if schedule is not self._schedule:  # another sampling
            self.runtime.restart()
            self._schedule, self._sigma = schedule, (None, None)
        steps = len(schedule) - 1
        if self._sigma[0] is not sigma:
            # A sampler of higher order asks between two entries: that is the earlier one's step.
            now = float(sigma.flatten()[0])
            above = int((schedule.float() >= now * (1 - 1e-5)).sum())
            self._sigma = (sigma, min(max(above - 1, 0), steps - 1))
        found = self._sigma[1]
        assert found is not None
        return found + self.first, self.total or steps + self.first


def branch(which: Any) -> str:
    """Name the guidance branch: ComfyUI counts conditions as 0, unconditional ones as 1."""
    seen = sorted(set(which or (0,)))
    return {(0,): "cond", (1,): "uncond", (0, 1): "both"}.get(tuple(seen), f"branch{seen}")


def marked(original: Callable[..., Any], layer: int) -> Callable[..., Any]:
    """Tell the override, from within a layer's self-attention, which layer it is."""

    def forward(
        *args: Any, transformer_options: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        options = {**(transformer_options or {}), LAYER: layer}
        return original(*args, transformer_options=options, **kwargs)

    return forward


class DitSparseAttention:
    """The node: MODEL and the name of a strategy in, MODEL out."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "model_patches/attention"
    DESCRIPTION = (
        "Computes only part of a video model's self-attention, as a dit_sparse strategy says."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  (ComfyUI's name)
        """List the inputs, in ComfyUI's form."""
        count = {"default": 0, "min": 0, "max": 10_000}
        return {
            "required": {
                "model": ("MODEL",),
                "strategy": (
                    "STRING",
                    {
                        "default": "radial",
                        "tooltip": "A shipped strategy, a method, a file, a folder or a Hub name.",
                    },
                ),
            },
            "optional": {
                "stage": (
                    ["transformer", "transformer_2"],
                    {"tooltip": "Wan 2.2: transformer_2 is the low-noise model."},
                ),
                "first_step": (
                    "INT",
                    {**count, "tooltip": "Steps that ran before this sampler (start_at_step)."},
                ),
                "total_steps": (
                    "INT",
                    {**count, "tooltip": "Steps of the whole generation; 0: this sampler's."},
                ),
                "strict": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Stop instead of staying dense."},
                ),
            },
        }

    def patch(
        self,
        model: Any,
        strategy: str,
        stage: str = "transformer",
        first_step: int = 0,
        total_steps: int = 0,
        strict: bool = False,
    ) -> tuple[Any]:
        """Clone the model and set the override; the model that came in is left as it was."""
        core = model.get_model_object("diffusion_model")
        known = MODELS.get(type(core).__name__)
        if known is None:
            raise ValueError(
                f"dit_sparse's node knows {', '.join(MODELS)}, this model is a "
                f"{type(core).__name__}"
            )
        layers = getattr(core, known.layers)
        runtime = Runtime(
            Strategy.coerce(strategy.strip()),
            num_layers=len(layers),
            num_heads=core.num_heads,
            model_class=known.model_class,
            stage=stage,
            strict=strict,
        )
        patched = model.clone()
        options = dict(patched.model_options.get("transformer_options", {}))
        if isinstance(options.get(KEY), Override):
            message = "this model has a dit_sparse node already; use one"
            raise ValueError(message)  # noqa: TRY004  (the graph is wrong, not a type)
        options[KEY] = Override(runtime, options.get(KEY), first_step, total_steps)
        patched.model_options["transformer_options"] = options
        for i in range(len(layers)):
            path = f"diffusion_model.{known.layers}.{i}.{known.attention}.forward"
            patched.add_object_patch(path, marked(model.get_model_object(path), i))
        return (patched,)


NODE_CLASS_MAPPINGS = {"DitSparseAttention": DitSparseAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"DitSparseAttention": "Sparse attention (dit_sparse)"}
