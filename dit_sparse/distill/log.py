# SPDX-License-Identifier: Apache-2.0
"""What a run tells: a CSV always, TensorBoard where asked for, and a progress line."""

from __future__ import annotations

import csv
import sys
from typing import TYPE_CHECKING, Any

from dit_sparse.distill.errors import DistillError
from dit_sparse.distill.files import writing

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

CSV_NAME = "log.csv"


class Log:
    """Rows of one run, one an iteration; a resumed run cuts what it does again.

    Args:
        folder: Where.
        columns: Their names; "iteration" is the first.
        iteration: Rows of later iterations are dropped.
        total: Iterations of the whole run, for the progress line.
        tensorboard: Write its files too.
        show: Draw the progress line.
    """

    def __init__(
        self,
        folder: Path,
        columns: list[str],
        iteration: int,
        total: int,
        *,
        tensorboard: bool = False,
        show: bool = False,
    ) -> None:
        self.path, self.columns = folder / CSV_NAME, columns
        rows = self._read(iteration) if self.path.is_file() and iteration else []
        scratch = self.path.with_name(f".{CSV_NAME}")
        with writing(self.path):
            with scratch.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            scratch.replace(self.path)
        self._board = self._open_board(folder, iteration) if tensorboard else None
        self._show, self._total = show, total

    def _read(self, iteration: int) -> list[dict[str, str]]:
        """Read the rows up to an iteration; a killed run may leave half a row, without a LF."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            return [r for r in csv.DictReader(whole) if int(r["iteration"]) <= iteration]
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise DistillError(
                f"{self.path}: not a log of this training run ({type(error).__name__}: {error}); "
                "delete it, the checkpoints do not depend on it"
            ) from error

    @staticmethod
    def _open_board(folder: Path, iteration: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise DistillError(
                "train.tensorboard: the package tensorboard is not installed; install "
                "dit-sparse[distill], or remove this option: a CSV log is always written"
            ) from error
        return SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Add the row of one iteration."""
        with writing(self.path), self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)
        iteration = row["iteration"]
        if self._board is not None:
            for key, value in row.items():
                if key != "iteration" and value != "":
                    self._board.add_scalar(key, value, iteration)
        if self._show:
            parts = ", ".join(
                f"{k} {v:.4g}" for k, v in row.items() if k.endswith("loss") and v != ""
            )
            sys.stderr.write(f"\riteration {iteration} of {self._total}: {parts}\033[K")
            sys.stderr.flush()

    def close(self) -> None:
        """End the progress line and TensorBoard's file."""
        if self._show:
            sys.stderr.write("\n")
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()
