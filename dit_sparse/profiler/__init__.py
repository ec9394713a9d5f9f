# SPDX-License-Identifier: Apache-2.0
"""Find a strategy for a model by measuring: which method for which layer, head and step band.

``candidates.py`` names the choices, ``measure.py`` tries them on captured calls (``capture.py``),
on a sample of rows (``sampling.py``) and with what they have in common done once (``shared.py``);
``units.py`` goes through the prompts, ``greedy.py`` propagates choices on the way, ``expected.py``
says before how long it takes. ``cost.py`` predicts a strategy's time (``micro.py`` measures the
device, ``outcome.py`` the strategy itself), ``table.py`` sums up, ``choose.py`` applies the wish,
``search.py`` chooses, ``store.py`` keeps what was measured, ``build.py`` writes the strategy,
``run.py`` puts them together. ``differences.py`` tells two strategies apart, ``retiling.py`` fits
one to another size.
"""

from dit_sparse.profiler.candidates import Candidate, parse_candidates, resolve
from dit_sparse.profiler.capture import Bands
from dit_sparse.profiler.differences import difference
from dit_sparse.profiler.errors import ProfileError
from dit_sparse.profiler.retiling import retile
from dit_sparse.profiler.run import Profile, profile
from dit_sparse.profiler.store import Store
from dit_sparse.profiler.wish import Wish

__all__ = [
    "Bands",
    "Candidate",
    "Profile",
    "ProfileError",
    "Store",
    "Wish",
    "difference",
    "parse_candidates",
    "profile",
    "resolve",
    "retile",
]
