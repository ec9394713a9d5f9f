# SPDX-License-Identifier: Apache-2.0
"""What sparse attention cost: a generation against the dense one of the same seed.

found = compare("dense.mkv", "sparse.mkv", gates=["psnr>=25"])
print(found.rows["psnr"].value, found.passed)
write_comparison(found, "report")
"""

from dit_sparse.quality.clips import Clip, open_clip
from dit_sparse.quality.comparison import Comparison, compare
from dit_sparse.quality.errors import QualityInputError
from dit_sparse.quality.metrics import ms_ssim, psnr, psnr_pooled, ssim
from dit_sparse.quality.recording import record
from dit_sparse.quality.report import write_comparison
from dit_sparse.quality.scores import Scores
from dit_sparse.quality.weights import find_weights

__all__ = [
    "Clip",
    "Comparison",
    "QualityInputError",
    "Scores",
    "compare",
    "find_weights",
    "ms_ssim",
    "open_clip",
    "psnr",
    "psnr_pooled",
    "record",
    "ssim",
    "write_comparison",
]
