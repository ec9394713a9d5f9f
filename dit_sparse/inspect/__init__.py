# SPDX-License-Identifier: Apache-2.0
"""See what a strategy keeps and what a model looks at (``dit-sparse inspect``).

``view.py`` reads plans, ``mass.py`` attention, ``observe.py`` gets both from a method or from a
running pipeline, ``draw.py`` draws heads under each other. ``atlas.py`` is the map of a whole
strategy or model, ``survey.py`` fills in what is known, ``fill.py`` pictures; ``html.py`` and
``poster.py`` show it.
"""

from dit_sparse.inspect.atlas import Atlas
from dit_sparse.inspect.draw import draw_views
from dit_sparse.inspect.html import page
from dit_sparse.inspect.observe import observe_pipeline, observe_run, observe_synthetic
from dit_sparse.inspect.poster import draw_poster
from dit_sparse.inspect.survey import layout_of, strategy_atlas
from dit_sparse.inspect.view import HeadView, kept_keys, views_of

__all__ = [
    "Atlas",
    "HeadView",
    "draw_poster",
    "draw_views",
    "kept_keys",
    "layout_of",
    "observe_pipeline",
    "observe_run",
    "observe_synthetic",
    "page",
    "strategy_atlas",
    "views_of",
]
