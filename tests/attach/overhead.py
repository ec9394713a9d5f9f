# SPDX-License-Identifier: Apache-2.0
"""What an attention call costs beside its kernel, in microseconds of processor time.

    python tests/attach/overhead.py

One attention layer of a tiny Wan transformer is called many times on one thread, as it is and
with sparse attention enabled. ``dense`` stays dense, ``radial`` reuses one plan, ``pooled`` plans
every call. Attention itself (torch, or our kernel) is timed inside and taken off. Printed is what
is left over what the plain layer needs, the best of several rounds, and the Python functions that
the call enters beyond the plain one's.
"""

import argparse
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from diffusers import WanTransformer3DModel

sys.path.insert(0, str(Path(__file__).parents[2]))

import dit_sparse
from dit_sparse.kernels import native
from dit_sparse.pipelines.site import HERE

METHODS = {"dense": {}, "radial": {"block_size": 16}, "pooled": {"block_size": 16, "density": 0.5}}
SHAPE = (3, 8, 8, 0)  # frames, height, width, text


class Timed:
    """Calls a function and adds up its processor time."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args, **kwargs):
        start = time.thread_time()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.thread_time() - start


def functions(call):
    """Python functions entered by a call."""
    seen = []
    sys.setprofile(lambda frame, event, _: seen.append(frame) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(seen)


def main() -> None:
    """Do it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--calls", type=int, default=300)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=16,
        in_channels=4, out_channels=4, text_dim=8, freq_dim=8,
    ).eval()  # fmt: skip
    frames, height, width, _ = SHAPE
    given = {
        "hidden_states": torch.randn(1, 4, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 4, 8),
    }
    layer, kept = model.blocks[0].attn1, {}

    def keep(_, args, kwargs, __):
        kept["call"] = args, kwargs

    hook = layer.register_forward_hook(keep, with_kwargs=True)
    model(**given)
    hook.remove()
    args, kwargs = kept["call"]
    attention = Timed(torch.nn.functional.scaled_dot_product_attention)
    kernel = Timed(native.attend)

    def call():
        layer(*args, **kwargs)

    def outside():
        """Microseconds of a call that are not spent in attention, the best round's."""
        best = float("inf")
        for _ in range(chosen.rounds):
            before = attention.seconds + kernel.seconds
            start = time.thread_time()
            for _ in range(chosen.calls):
                call()
            spent = time.thread_time() - start - (attention.seconds + kernel.seconds - before)
            best = min(best, spent / chosen.calls * 1e6)
        return best

    with (
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
        mock.patch.object(native, "attend", kernel),
    ):
        entered = functions(call)
        for method, params in METHODS.items():
            plain = outside()
            with dit_sparse.sparse_attention(model, method, **params) as handle:
                handle.at(2, 4)
                model(**given)
                HERE.passing, HERE.shape = handle.begin_pass(None), SHAPE
                spent, more = outside(), functions(call) - entered
                row = handle.report().rows[-1]
                HERE.passing = HERE.shape = None
            assert list(row["methods"]) == [method], row
            assert not row["reason"], row
            added = spent - min(plain, outside())
            print(f"{method}: {added:.0f} us a call, {more} functions")  # noqa: T201


if __name__ == "__main__":
    with torch.no_grad():
        main()
