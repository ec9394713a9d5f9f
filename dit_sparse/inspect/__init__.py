# SPDX-License-Identifier: Apache-2.0
"""See what a strategy keeps (``dit-sparse inspect``): which tokens each head reads.

``view.py`` reads plans, ``observe.py`` gets them from a method or from a running pipeline,
``draw.py`` makes the picture.
"""

from dit_sparse.inspect.draw import draw_views
from dit_sparse.inspect.observe import observe_pipeline, observe_synthetic
from dit_sparse.inspect.view import HeadView, kept_keys, views_of

__all__ = [
    "HeadView",
    "draw_views",
    "kept_keys",
    "observe_pipeline",
    "observe_synthetic",
    "views_of",
]
