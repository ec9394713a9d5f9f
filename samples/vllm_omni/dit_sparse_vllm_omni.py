# SPDX-License-Identifier: Apache-2.0
"""A strategy of dit_sparse in vLLM-Omni, by its sparse attention entry point.

Contract: vLLM-Omni's dispatcher ``SPARSE_ATTN`` (vllm-omni RFC #2233, PR #4493) calls
``fn(query, key, value, params, is_causal, softmax_scale)`` with ``[batch, seq_len, heads,
head_dim]`` and gets the same back. ``params`` holds what the configuration says, then, a row for
each sample, ``denoise_step_idx``, ``total_denoise_steps``, ``latent_shape`` and ``patch_size``.

It does not say which layer calls. Layers run one after the other, so they are counted within a
step, and the count is checked at every step's end: one that does not come out raises.
"""

from __future__ import annotations

from typing import Any

import torch

from dit_sparse import LatentsGrid, Runtime, Strategy

WANTED = {"strategy": str, "num_layers": int, "num_heads": int}
OPTIONAL = {
    "text_length": 0,  # text tokens in the same sequence
    "text_first": False,  # they stand before the video
    "grid_width": 0,  # tokens of a row, where only frames and tokens of a frame are told
    "kernel": None,
    "strict": False,  # raise instead of staying dense
}


class Session:
    """One configuration's runtime, and where its generation stands."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Load the strategy; errors of the configuration are raised here."""
        strategy = Strategy.coerce(config["strategy"])
        if staged := [rule.stage for rule in strategy.rules if rule.stage is not None]:
            raise ValueError(
                f"{strategy.name} has rules for {staged[0]!r} alone, and vLLM-Omni does not say "
                "which of two transformers runs; use a strategy without stages"
            )
        self.config = config
        self.runtime = Runtime(
            strategy,
            num_layers=config["num_layers"],
            num_heads=config["num_heads"],
            text_first=config["text_first"],
            kernel=config["kernel"],
            strict=config["strict"],
        )
        self.forget()

    def forget(self) -> None:
        """Take the next call for the first one of a generation."""
        self.step, self.total, self.calls = -1, -1, 0
        self.runtime.restart()

    def place(self, step: int, total: int) -> tuple[int, str]:
        """Count one call: its layer and its guidance branch."""
        layers = self.config["num_layers"]
        if step < self.step or total != self.total:
            self.forget()
        elif step != self.step and self.calls % layers:
            raise RuntimeError(
                f"step {self.step} had {self.calls} self-attention calls, which is no multiple of "
                f"num_layers = {layers}: num_layers is wrong, another attention is routed here, a "
                "cache skipped layers, or a generation was stopped in its middle"
            )
        if step != self.step:
            self.calls = 0
        self.step, self.total = step, total
        passed, layer = divmod(self.calls, layers)
        self.calls += 1
        return layer, ("cond", "uncond")[passed] if passed < 2 else f"pass{passed}"


class Plugin:
    """The callable of the entry point; one session for each configuration."""

    capabilities = {"supports_attention_mask": False, "supports_full_attn_spans": False}  # noqa: RUF012  (the contract asks for a plain dict)

    def __init__(self) -> None:
        """Know no configuration yet."""
        self.sessions: dict[tuple[Any, ...], Session] = {}
        self._read: dict[str, tuple[Any, Any]] = {}

    @torch.compiler.disable  # it counts: a compiled graph would count once
    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        params: dict[str, Any],
        is_causal: bool = False,
        softmax_scale: float | None = None,
    ) -> torch.Tensor:
        """Compute one self-attention call; see the module."""
        for name in ("attn_mask", "full_attn_spans"):
            if params.get(name) is not None:
                raise ValueError(f"dit_sparse does not take {name}; use a dense backend here")
        if is_causal or query.shape != key.shape:
            raise ValueError(
                "dit_sparse computes full self-attention, got "
                + ("a causal one" if is_causal else f"{query.shape[1]} queries, ")
                + ("" if is_causal else f"{key.shape[1]} keys of {key.shape[2]} heads")
                + '; configure it for the role "self" alone'
            )
        session = self._session(params)
        step = self._number(params, "denoise_step_idx")
        total = self._number(params, "total_denoise_steps")
        try:
            if step is None or total is None:
                layer, branch = 0, "cond"
            else:
                layer, branch = session.place(step, total)
            return session.runtime.attend(
                query,
                key,
                value,
                grid=self._grid(params, session.config),
                layer=layer,
                step=step,
                num_steps=0 if total is None else total,
                branch=branch,
                scale=softmax_scale,
            )
        except Exception:
            session.forget()  # the next request starts anew
            raise

    def _session(self, params: dict[str, Any]) -> Session:
        config = {name: params.get(name, default) for name, default in OPTIONAL.items()}
        for name, kind in WANTED.items():
            config[name] = params.get(name)
            if type(config[name]) is not kind or config[name] in {"", 0}:
                raise ValueError(
                    f"dit_sparse needs {name} ({kind.__name__}) in its params, got "
                    f'{config[name]!r}; as in {{"strategy": "radial", "num_layers": 40, '
                    '"num_heads": 40}'
                )
        key = tuple(sorted(config.items(), key=lambda item: item[0]))
        if key not in self.sessions:
            self.sessions[key] = Session(config)
        return self.sessions[key]

    def _rows(self, params: dict[str, Any], name: str) -> Any:
        """Read a value, the same for all samples; None where it is not there, or differs."""
        value = params.get(name)
        if not isinstance(value, torch.Tensor):
            return value
        known = self._read.get(name)
        if known is None or known[0] is not value:  # once per pass: it may wait for the device
            rows = value.tolist()
            if isinstance(rows, list) and value.ndim > (name in {"latent_shape", "patch_size"}):
                rows = rows[0] if all(row == rows[0] for row in rows) else None
            known = self._read[name] = (value, rows)
        return known[1]

    def _number(self, params: dict[str, Any], name: str) -> int | None:
        value = self._rows(params, name)
        return None if value is None else int(value)

    def _grid(self, params: dict[str, Any], config: dict[str, Any]) -> LatentsGrid | None:
        text = (config["text_length"], config["text_first"] and config["text_length"] > 0)
        shape, patch = self._rows(params, "latent_shape"), self._rows(params, "patch_size")
        if shape is not None and patch is not None:
            frames, height, width = (n // p for n, p in zip(shape, patch, strict=True))
            return LatentsGrid(frames, height, width, *text)
        told = (
            self._number(params, "total_latent_frames"),
            self._number(params, "patches_per_frame"),
        )
        width = config["grid_width"]
        if None in told or not width or told[1] % width:  # type: ignore[operator]
            return None
        return LatentsGrid(told[0], told[1] // width, width, *text)  # type: ignore[arg-type, operator]


attention = Plugin()
