# SPDX-License-Identifier: Apache-2.0
"""Measure what a guarantee costs and how sure its probes are: the figures of docs/guarantee.md.

Run from the repository's root: ``python samples/guarantee.py``. Takes some minutes on one CPU
thread; every time is processor time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline

from dit_sparse import LatentsGrid, sparse_attention
from dit_sparse.attach.envelope import Envelope, probe
from dit_sparse.attach.guarantee import Guarantee
from dit_sparse.attach.probe import dense_output, relative_error, spread_rows
from dit_sparse.core.call import AttentionCall

MODEL = Path(__file__).parent / "wan-tiny"
PROMPT = "a red circle moving right"
SIZE = {"height": 128, "width": 128, "num_frames": 33}
METHODS: dict[str, dict[str, Any]] = {
    "radial": {"block_size": 64, "decay_factor": 0.5},
    "adaspa": {"block_size": 64, "density": 0.25, "search_steps": (0.0, 0.5)},
    "pooled": {"block_size": 64, "density": 0.25},
    "rettention": {"mask_params": {"block_size": 64, "decay_factor": 0.5}, "refresh": 4},
    "svg2": {"query_clusters": 36, "key_clusters": 72, "first_iterations": 10, "top_p": 0.8},
}
STEPS = 8  # of the runs whose estimates are compared with the truth
LOOKED_AT = (2, 5)  # their steps
DRAWS = 200
CALLS = ((8192, 4, 128), (16384, 4, 128))  # tokens, heads, head_dim
HUNYUAN_720P = (33, 45, 80, 256)  # latents grid and text of 129 frames at 720 x 1280
SPARSE_STEPS = 50
GUARANTEE = Guarantee(0.4)


def pipeline() -> WanPipeline:
    """Load the shipped small model."""
    pipe = WanPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: WanPipeline, steps: int, guidance: float) -> None:
    """Generate latents."""
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": steps, "guidance_scale": guidance, **SIZE}
    with torch.no_grad():
        pipe(PROMPT, generator=generator, output_type="latent", **arguments)


def share_of_dense(tokens: int, sparse_steps: int) -> float:
    """Multiplications of probing as a share of those of dense attention, over a run."""
    turns = 1 + (sparse_steps - 1) / GUARANTEE.every  # all heads once, then in turn
    return min(GUARANTEE.rows, tokens) / tokens * turns / sparse_steps


def one_call(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[float, float]:
    """Processor seconds of dense attention and of a probe of every head, on one call."""
    random = torch.Generator().manual_seed(0)
    shape = (1, tokens, heads, head_dim)
    q, k, v = (torch.randn(shape, generator=random).to(dtype) for _ in range(3))
    call = AttentionCall(q, k, v, LatentsGrid(1, 1, tokens), head_dim**-0.5)
    rows = spread_rows(tokens, GUARANTEE.rows, random)

    def dense() -> None:
        parts = (x.transpose(1, 2) for x in (q, k, v))
        torch.nn.functional.scaled_dot_product_attention(*parts)

    def probing() -> None:
        probe(call, v, rows, tuple(range(heads)))

    found = []
    for work, repeats in ((dense, 3), (probing, 15)):
        times = []
        for _ in range(repeats):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        found.append(sorted(times[1:])[len(times[1:]) // 2])
    return found[0], found[1]


def cost() -> None:
    """Print what probing costs: computed, and measured on single calls and on a generation."""
    frames, height, width, text = HUNYUAN_720P
    tokens = frames * height * width + text
    for steps in (SPARSE_STEPS, 4):
        share = share_of_dense(tokens, steps)
        print(f"HunyuanVideo 720p, {tokens:,} tokens, {steps} sparse steps: {share:.4%} of dense")
    print("\n| call (tokens x heads x head_dim) | dense, ms | probe of all heads, ms | a run |")
    print("|---|---|---|---|")
    turns = (1 + (SPARSE_STEPS - 1) / GUARANTEE.every) / SPARSE_STEPS
    for shape in CALLS:
        for dtype in (torch.float32, torch.bfloat16):
            dense, probed = one_call(*shape, dtype)
            name = f"{' x '.join(map(str, shape))}, {str(dtype)[6:]}"
            run = f"{probed / dense * turns:.2%}"
            print(f"| {name} | {dense * 1e3:.0f} | {probed * 1e3:.1f} | {run} |")
    generation()


def generation() -> None:
    """Print the processor time of probing within a generation beside dense attention's."""
    pipe = pipeline()
    dense, _, _ = timed_run(pipe, "wan-tiny.dense", None)
    for guarantee in (GUARANTEE, replace(GUARANTEE, rows=32, every=8)):
        whole, probing, said = timed_run(pipe, "wan-tiny.adaspa", guarantee)
        print(
            f"\nwan-tiny, 20 steps, guidance, {guarantee.rows} rows, every {guarantee.every}: "
            f"dense attention {dense:.2f} s, wan-tiny.adaspa {whole:.2f} s, of which probing "
            f"{probing:.3f} s = {probing / dense:.2%} of dense\n{said}"
        )


def timed_run(
    pipe: WanPipeline, profile: str, guarantee: Guarantee | None
) -> tuple[float, float, str]:
    """Processor seconds in self-attention, those in probing, and the report's summary."""
    spent: defaultdict[str, float] = defaultdict(float)

    def timed(name: str, function: Any) -> Any:
        def run(*args: Any) -> Any:
            start = time.process_time()
            result = function(*args)
            spent[name] += time.process_time() - start
            return result

        return run

    check = Envelope.check
    with sparse_attention(pipe, profile, guarantee=guarantee) as handle:
        handle.attention = timed("all", handle.attention)
        Envelope.check = timed("probing", check)
        try:
            generate(pipe, 20, 4.0)
        finally:
            Envelope.check = check
        return spent["all"], spent["probing"], handle.report().summary()


def outputs(pipe: WanPipeline, method: str) -> list[tuple[AttentionCall, torch.Tensor]]:
    """Collect some calls of a run with their final outputs."""
    found = []
    with sparse_attention(pipe, method, **METHODS[method]) as handle:
        finish = handle._finish  # noqa: SLF001

        def listen(group: Any, *rest: Any) -> torch.Tensor:
            output = finish(group, *rest)
            if group.part.step in LOOKED_AT and not group.plan.complete:
                found.append((group.part, output.clone()))
            return output

        handle._finish = listen  # noqa: SLF001
        generate(pipe, STEPS, 1.0)
    return found


def estimates() -> None:
    """Print how near estimates come to the true error, and how uneven heads are."""
    pipe = pipeline()
    counts = (16, 64, 256)
    head = "".join(f" {count} rows |" for count in counts)
    print(f"\n| method | heads | RMS error | worst head |{head}")
    print("|---" * (4 + len(counts)) + "|")
    random = torch.Generator().manual_seed(0)
    for method in METHODS:
        truths, ratios = [], defaultdict(list)
        for call, output in outputs(pipe, method):
            every = torch.arange(output.shape[1])
            exact = dense_output(call.query, call.key, call.value, every, call.scale, 0, None)
            truth = relative_error(output, exact, every, 0, None)[0][0]
            truths.append(truth)
            for count in counts:
                for _ in range(DRAWS):
                    rows = spread_rows(output.shape[1], count, random)
                    found = relative_error(output, exact[:, rows], rows, 0, None)[0][0]
                    ratios[count].append((found / truth)[truth > 0])
        error = torch.cat(truths)
        rms = float(error.square().mean().sqrt())
        cells = []
        for count in counts:
            low, high = torch.cat(ratios[count]).quantile(torch.tensor([0.05, 0.95])).tolist()
            cells.append(f"{low:.2f}-{high:.2f}")
        worst = f"{float(error.max()):.3f} = {float(error.max()) / rms:.1f} x RMS"
        print(f"| {method} | {len(error)} | {rms:.3f} | {worst} | {' | '.join(cells)} |")


def main() -> None:
    """Print all figures."""
    torch.set_num_threads(1)
    cost()
    estimates()


if __name__ == "__main__":
    main()
