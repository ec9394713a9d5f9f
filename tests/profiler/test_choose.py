# SPDX-License-Identifier: Apache-2.0
"""A search for density keeps to it, and finds the least error of all choices that do."""

from itertools import product

import numpy as np
import pytest

from dit_sparse.profiler import ProfileError, Wish
from dit_sparse.profiler.choose import choose
from dit_sparse.profiler.table import Row

HEADS, CANDIDATES = 2, 4
STEPS = (1, 3)  # bands of unequal length: a share of the run is no mean over bands


def rows_of(seed):
    random = np.random.default_rng(seed)
    found = {}
    for band, steps in enumerate(STEPS):
        error = random.uniform(0, 1, (HEADS, CANDIDATES))
        density = random.uniform(0.1, 0.9, (HEADS, CANDIDATES))
        error[:, 0], density[:, 0] = 0, 1
        blank = np.zeros_like(error)
        # A kernel computes more than it keeps: the wish is about what is kept.
        row = Row(steps, error, blank, density, np.minimum(1, 1.5 * density), blank,
                  np.ones(HEADS), (False,) * CANDIDATES, (0.0,) * CANDIDATES)  # fmt: skip
        found["transformer", 0, band] = row
    return found


def summed(rows, choices, name):
    total = sum(
        row.steps * getattr(row, name)[np.arange(HEADS), list(chosen)].sum()
        for row, chosen in zip(rows.values(), choices, strict=True)
    )
    return total / (HEADS * sum(STEPS))


def test_a_density_is_kept_and_little_is_lost_to_the_best_choice_within_it():
    """Against all choices; the search is a relaxation with exchanges, so near and often exact."""
    layer = list(product(range(CANDIDATES), repeat=HEADS))
    every = list(product(layer, layer))
    lost = []
    for seed, density in product(range(12), (0.45, 0.6, 0.8)):
        rows = rows_of(seed)
        fits = [c for c in every if summed(rows, c, "density") <= density]
        if not fits:
            continue
        found = choose([], rows, Wish(density=density))
        assert summed(rows, found, "density") <= density * (1 + 1e-9)
        best = min(summed(rows, choices, "error") for choices in fits)
        lost.append(summed(rows, found, "error") / best - 1)
    assert min(lost) >= -1e-9
    assert np.mean(lost) < 0.1
    assert np.mean(np.array(lost) < 1e-9) > 0.5


def test_a_density_of_one_needs_no_error():
    assert choose([], rows_of(0), Wish(density=1.0)) == [(0,) * HEADS] * len(STEPS)


def test_a_density_below_every_candidate_is_refused():
    with pytest.raises(ProfileError, match=r"density: 0\.01 of dense cannot be reached"):
        choose([], rows_of(0), Wish(density=0.01))


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"density": 0.0}, "density must be in"),
        ({"density": 1.5}, "density must be in"),
        ({"density": 0.5, "target": 0.1}, "cannot be combined"),
        ({"density": 0.5, "budget": 0.5}, "cannot be combined"),
    ],
)
def test_wishes_for_density_are_checked(wish, words):
    with pytest.raises(ProfileError, match=words):
        Wish(**wish)
