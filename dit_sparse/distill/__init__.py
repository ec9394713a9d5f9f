# SPDX-License-Identifier: Apache-2.0
"""Train a model with its sparsity: few-step distillation (BLADE) and sparse LoRA fine-tuning.

``accelerate launch -m dit_sparse.distill CONFIG.yaml``; docs/distill.md has the settings.
"""

from dit_sparse.distill.errors import DistillError

__all__ = ["DistillError"]
