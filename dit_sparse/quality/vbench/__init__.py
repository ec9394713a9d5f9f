# SPDX-License-Identifier: Apache-2.0
"""VBench beside us: export clips in its layout, run it in another interpreter, read its results.

Huang et al. 2024, "VBench: Comprehensive Benchmark Suite for Video Generative Models",
arXiv:2311.17982. Its packages cannot live in one environment with a current Diffusers, so it is
never imported here.
"""

from dit_sparse.quality.vbench.layout import Item, export
from dit_sparse.quality.vbench.results import Results, read_results, totals
from dit_sparse.quality.vbench.start import run_vbench

__all__ = ["Item", "Results", "export", "read_results", "run_vbench", "totals"]
