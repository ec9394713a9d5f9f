# SPDX-License-Identifier: Apache-2.0
"""What every test runs under: one thread, no network, one profile of Hypothesis.

``pytest --examples 2000`` is the long run: as many random examples of every property, new ones
each time. Without it few are drawn, in CI always the same.
"""

import gc
import os
import zlib
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

EXAMPLES = 25
# Files that take a minute or more come first: one that began last would keep one process busy
# when the others are done.
LONG = (
    "composition/test_compile.py",
    "parallel/test_ulysses.py",
    "kernels/test_native_sanitized.py",
    "test_packaging.py",
    "pipelines/test_conformance.py",
    "parallel/test_several_gpus.py",
    "pipelines/test_size.py",
    "cli/test_quality.py",
    "distill/test_two_processes.py",
    "docs/test_site.py",
)
IN_CI = os.environ.get("CI", "").lower() not in {"", "0", "false"}

torch.set_num_threads(1)  # a second process uses the second core


def pytest_addoption(parser):
    parser.addoption(
        "--examples",
        type=int,
        default=None,
        metavar="N",
        help=f"draw N random examples of every property (default {EXAMPLES})",
    )


def pytest_configure(config):
    chosen = config.getoption("--examples")
    settings.register_profile(
        "dit_sparse",
        deadline=None,  # time says nothing on a shared machine
        derandomize=IN_CI and chosen is None,
        max_examples=EXAMPLES if chosen is None else chosen,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],  # drawing tensors is slow, not wrong
    )
    settings.load_profile("dit_sparse")


def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """Keep what was imported out of every later collection: torch and diffusers stay anyway."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # else libraries report what is left at the exit as leaks


@pytest.fixture(autouse=True)
def _seeded():
    """Start every test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root():
    """Return the root of the repository."""
    return Path(__file__).parents[1]


@pytest.fixture
def huge_picture(tmp_path):
    """A PNG of 16 x 16 pixels whose header claims 16,000 x 16,000: 0.7 GiB when decoded."""
    path = tmp_path / "huge.png"
    Image.new("RGB", (16, 16)).save(path)
    path.write_bytes(_claiming(path.read_bytes()))
    return path


@pytest.fixture
def huge_video(tmp_path):
    """The same picture as the one frame of a video."""
    # Not at the top: beside torch 2.9 it loads Triton, which must find the setting above.
    from dit_sparse.core.video import encode

    path = tmp_path / "huge.mkv"
    encode(path, [np.zeros((16, 16, 3), np.uint8)], (16, 16), 1, ["-c:v", "png"])
    path.write_bytes(_claiming(path.read_bytes()))
    return path


def _claiming(data):
    at = data.index(b"IHDR")
    header = data[at : at + 4] + (16_000).to_bytes(4, "big") * 2 + data[at + 12 : at + 17]
    return data[:at] + header + zlib.crc32(header).to_bytes(4, "big") + data[at + 21 :]
