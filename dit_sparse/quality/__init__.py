# SPDX-License-Identifier: Apache-2.0
"""What sparse attention cost: a generation against the dense one of the same seed."""

from dit_sparse.quality.metrics import Scores, psnr, psnr_pooled, ssim

__all__ = ["Scores", "psnr", "psnr_pooled", "ssim"]
