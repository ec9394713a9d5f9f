# SPDX-License-Identifier: Apache-2.0
"""``accelerate launch -m dit_sparse.distill CONFIG.yaml``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dit_sparse.core.reading import visible
from dit_sparse.distill.config import read_config
from dit_sparse.errors import DitSparseError


def main(arguments: list[str] | None = None) -> int:
    """Run a training, or forecast it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="dit_sparse.distill",
        description="Train a video or image transformer under sparse attention.",
    )
    parser.add_argument("config", type=Path, help="a YAML configuration file, see docs/distill.md")
    parser.add_argument(
        "--forecast",
        action="store_true",
        help="print a forecast of memory and time per iteration, and exit; loads no weights",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="delete the checkpoints in the output folder and start again",
    )
    asked = parser.parse_args(arguments)
    try:
        config = read_config(asked.config)
        if asked.forecast:
            from dit_sparse.distill.forecast import forecast

            sys.stdout.write(forecast(config).text())
            return 0
        from accelerate import Accelerator

        from dit_sparse.distill.source import prepare

        accelerator = Accelerator(cpu=config.device == "cpu")
        result = prepare(config, accelerator, fresh=asked.fresh).run(
            show=accelerator.is_main_process
        )
        if accelerator.is_main_process:
            sys.stderr.write(f"result: {result}\n")
    except DitSparseError as error:
        line = "; ".join(part.strip() for part in str(error).splitlines() if part.strip())
        sys.stderr.write(f"error: {visible(line)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
