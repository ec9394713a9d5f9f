# SPDX-License-Identifier: Apache-2.0
"""What an attention call costs beside its kernel, in microseconds of processor time.

    python tests/attach/overhead.py

A tiny Wan transformer of eight layers runs as it is and with sparse attention enabled, in turns on
one thread. ``dense`` stays dense, ``radial`` reuses one plan, ``pooled`` plans at every step.
Attention itself (torch's, or our kernel) is timed inside and taken off; what is left over what the
plain model needs, a call, is printed: the median of many rounds. ``frames`` are the Python
functions entered in such a call.
"""

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import dit_sparse
from dit_sparse.kernels import native

LAYERS = 8
METHODS = {"dense": {}, "radial": {"block_size": 16}, "pooled": {"block_size": 16, "density": 0.5}}


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


def frames(call):
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
    from diffusers import WanTransformer3DModel

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_layers=LAYERS, num_attention_heads=2, attention_head_dim=12, ffn_dim=16,
        in_channels=4, out_channels=4, text_dim=8, freq_dim=8,
    ).eval()  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 4, 3, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 4, 8),
    }
    attention = Timed(torch.nn.functional.scaled_dot_product_attention)
    kernel = Timed(native.attend)

    def outside():
        """Microseconds of one pass that are not spent in attention, for each layer."""
        before = attention.seconds + kernel.seconds
        start = time.thread_time()
        model(**given)
        spent = time.thread_time() - start
        return (spent - (attention.seconds + kernel.seconds - before)) / LAYERS * 1e6

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for owner, name, timed in (
            (torch.nn.functional, "scaled_dot_product_attention", attention),
            (native, "attend", kernel),
        ):
            stack.enter_context(mock.patch.object(owner, name, timed))
        count = {}
        for method, params in METHODS.items():
            added = []
            for number in range(rounds):
                plain = outside()
                with dit_sparse.sparse_attention(model, method, kernel=None, **params) as handle:
                    handle.at(number % 3, 4)
                    outside()
                    added.append(outside() - plain)
                    handle.at(2, 4)
                    count[method] = frames(lambda: model(**given))
            plain = frames(lambda: model(**given))
            print(  # noqa: T201
                f"{method}: {statistics.median(added):.0f} us a call, "
                f"{(count[method] - plain) / LAYERS:.0f} frames"
            )


if __name__ == "__main__":
    main()
