# SPDX-License-Identifier: Apache-2.0
"""Measure what sparse attention gains, side by side with dense (``dit-sparse bench``).

``attention.py`` times the kernels on given plans, ``methods.py`` whole methods with their
planning and ordering, ``memory.py`` what a call takes; ``result.py`` is what comes out.
"""

from dit_sparse.bench.attention import make_plan
from dit_sparse.bench.memory import measure_peak_memory
from dit_sparse.bench.result import BenchReport, Measurement, MethodMeasurement, PeakMemory
from dit_sparse.bench.run import run_bench, run_method_bench
from dit_sparse.bench.shapes import CPU_SHAPES, METHOD_SHAPES, MODEL_SHAPES, Shape, find_shapes

__all__ = [
    "CPU_SHAPES",
    "METHOD_SHAPES",
    "MODEL_SHAPES",
    "BenchReport",
    "Measurement",
    "MethodMeasurement",
    "PeakMemory",
    "Shape",
    "find_shapes",
    "make_plan",
    "measure_peak_memory",
    "run_bench",
    "run_method_bench",
]
