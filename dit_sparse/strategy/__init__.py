# SPDX-License-Identifier: Apache-2.0
"""Which method runs where: the strategy, its file form, and where strategies come from."""

from dit_sparse.strategy.files import CONFIG_NAME, shipped_names
from dit_sparse.strategy.form import Grid, Model, Receipt, Rule
from dit_sparse.strategy.schedule import Schedule
from dit_sparse.strategy.strategy import Choice, Strategy, config_hash

__all__ = [
    "CONFIG_NAME",
    "Choice",
    "Grid",
    "Model",
    "Receipt",
    "Rule",
    "Schedule",
    "Strategy",
    "config_hash",
    "shipped_names",
]
