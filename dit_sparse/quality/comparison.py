# SPDX-License-Identifier: Apache-2.0
"""Compare a sparse clip with the dense one of the same seed: every row in one streamed pass."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dit_sparse.quality.catalogue import Needs, chosen, kinds, meters
from dit_sparse.quality.clips import Clip, open_clip
from dit_sparse.quality.errors import QualityInputError
from dit_sparse.quality.gates import Verdict, check, parse_gates
from dit_sparse.quality.pairs import Meter, pairs
from dit_sparse.quality.scores import Scores
from dit_sparse.quality.versions import versions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from dit_sparse.quality.pairs import Frame

    Watch = Callable[[int, int], None]

SCHEMA_VERSION = 1
LARGE = 8_000_000_000  # pixels of a clip above which a wrong path is likelier than a wish
TRUSTED_LOSSY = 34.0  # dB; mp4s for people are themselves some 36 dB from what they show
LATENT = "norm(z_sparse - z_dense) / norm(z_dense) of the latents before the decoder, float64"


@dataclass(frozen=True)
class Comparison:
    """What was measured of one pair.

    Args:
        dense: The reference.
        sparse: The clip under test.
        rows: Everything measured, by name, those without a number too.
        verdicts: What became of each gate.
        notes: What a reader must know before he believes the numbers.
        settings: How it was measured.
        context: What the caller knows beside (prompt, seed, density, times); shown, not used.
    """

    dense: Clip
    sparse: Clip
    rows: dict[str, Scores]
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """All gates passed; None where there are none."""
        return all(verdict.passed for verdict in self.verdicts) if self.verdicts else None

    def check(self, *gates: str) -> tuple[Verdict, ...]:
        """Hold the rows against more gates, e.g. ``check("psnr>=25", "ssim.worst>=0.8")``."""
        return check(parse_gates(gates, self.rows), self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Give everything, ready for strict JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "dit_sparse.comparison",
            "passed": self.passed,
            "gates": [
                {"gate": v.gate.text, "found": v.found, "passed": v.passed, "reason": v.reason}
                for v in self.verdicts
            ],
            "notes": list(self.notes),
            "metrics": {name: row.as_dict() for name, row in self.rows.items()},
            "dense": self.dense.described(),
            "sparse": self.sparse.described(),
            "settings": self.settings,
            "context": self.context,
        }


def compare(
    dense: Any,
    sparse: Any,
    *,
    metrics: Iterable[str] | None = None,
    gates: Iterable[str] = (),
    compat: Iterable[str] = (),
    align: Literal["exact", "first"] = "exact",
    every: int = 1,
    max_frames: int | None = None,
    device: str = "cpu",
    weights: dict[str, Path] | None = None,
    features: dict[str, Path] | None = None,
    latents: tuple[Tensor, Tensor] | None = None,
    fps: float | None = None,
    threads: int = 1,
    allow_large: bool = False,
    context: dict[str, Any] | None = None,
    watch: Watch | None = None,
) -> Comparison:
    """Measure how far ``sparse`` is from ``dense``, frame by frame, in bounded memory.

    Args:
        dense: The reference: anything that ``open_clip`` opens.
        sparse: The clip under test, as long and as large.
        metrics: Rows to measure; None: the usual ones; "all": every one.
        gates: Bounds such as ``psnr>=25``.
        compat: Other repositories' variants to add: "svg".
        align: "first" compares the frames that both have, and marks the result.
        every: Costly rows (SSIM, LPIPS, consistency) look at every so many frames only.
        max_frames: Look at the first frames only.
        device: Where networks run.
        weights: Files of weights by network: "alex", "vgg", "dists".
        features: Folders of feature models: "dino", "clip".
        latents: Dense and sparse latents before the decoder, for ``latent_rel_l2``.
        fps: Frames per second, for inputs that do not say.
        threads: Of ffmpeg's filters.
        allow_large: Measure clips above 8 gigapixels too.
        context: Facts for the report.
        watch: Told the number of frames done and of all.

    Raises:
        QualityInputError: A clip cannot be read or they do not fit each other.
    """
    if every < 1 or (max_frames is not None and max_frames < 1):
        raise QualityInputError(f"every and max_frames must be >= 1, got {every}, {max_frames}")
    names = chosen(metrics, compat, features or ())
    bounds = parse_gates(gates, (*names, "latent_rel_l2") if latents is not None else names)
    one, other = open_clip(dense, "the dense clip", fps), open_clip(sparse, "the sparse clip", fps)
    total, notes = _fit(one, other, align, max_frames, allow_large=allow_large)
    needs = Needs(
        total,
        one.height,
        one.width,
        device,
        weights or {},
        features or {},
        threads,
        frozenset({*names, "psnr"}),  # always: it says whether anything differs at all
    )
    extra = [] if latents is None else [_latent(*latents)]
    start = time.perf_counter()
    running, absent = meters(needs)
    found = {row.name: row for row in (*_run(running, one, other, total, every, watch), *absent)}
    notes += _remarks(found["psnr"], one, other, total, every, context or {})
    rows = {name: found[name] for name in (*kinds(), *found) if name in found and name in names}
    rows |= {row.name: row for row in extra}
    settings = {
        "frames_compared": total,
        "every": every,
        "max_frames": max_frames,
        "align": align,
        "device": device,
        "seconds": time.perf_counter() - start,
        "versions": versions(),
    }
    return Comparison(
        one, other, rows, check(bounds, rows), tuple(notes), settings, dict(context or {})
    )


def _fit(
    one: Clip, other: Clip, align: str, max_frames: int | None, *, allow_large: bool
) -> tuple[int, list[str]]:
    """Check that the clips fit each other; give the frames to compare and remarks."""
    notes = []
    if (one.height, one.width) != (other.height, other.width):
        raise QualityInputError(
            f"{one.name} is {one.width} x {one.height}, {other.name} is {other.width} x "
            f"{other.height}; frames are never rescaled, so generate both at the same size"
        )
    total = min(one.frames, other.frames)
    if one.frames != other.frames:
        if align != "first":
            raise QualityInputError(
                f"{one.name} has {one.frames} frames, {other.name} has {other.frames}; generate "
                f"both with the same length, or compare the first {total} with --align first "
                '(align="first")'
            )
        notes.append(
            f"The clips have {one.frames} and {other.frames} frames; only the first {total} of "
            "each were compared."
        )
    if one.fps is not None and other.fps is not None and abs(one.fps - other.fps) > 0.02:
        notes.append(
            f"The clips play at {one.fps:g} and {other.fps:g} frames per second; frames with the "
            "same number were compared."
        )
    if max_frames is not None and max_frames < total:
        notes.append(f"Only the first {max_frames} of {total} frames were compared.")
        total = max_frames
    pixels = total * one.height * one.width
    if pixels > LARGE and not allow_large:
        raise QualityInputError(
            f"{one.name}: {pixels / 1e9:.1f} gigapixels to compare, more than {LARGE / 1e9:.0f}; "
            "add --yes (allow_large=True) to compare them anyway, or limit them with "
            "--max-frames"
        )
    return total, notes


def _run(
    running: list[Meter], one: Clip, other: Clip, total: int, every: int, watch: Watch | None
) -> list[Scores]:
    try:
        with _both(one, other) as (left, right):
            for number, (a, b) in enumerate(pairs(islice(left, total), islice(right, total))):
                for meter in running:
                    if not meter.costly or number % every == 0:
                        meter.update(a, b)
                if watch is not None:
                    watch(number + 1, total)
        rows = []
        for meter in running:
            step = every if meter.costly else 1
            rows += [_stepped(row, step) for row in meter.finish()]
        return rows
    finally:
        for meter in running:
            meter.close()


def _stepped(row: Scores, step: int) -> Scores:
    return row if step == 1 else replace(row, step=step)


@contextmanager
def _both(one: Clip, other: Clip) -> Iterator[tuple[Iterator[Frame], Iterator[Frame]]]:
    """Read two clips, and stop their decoders whatever happens."""
    with ExitStack() as stack:
        readers = [clip.read() for clip in (one, other)]
        for reader in readers:
            if isinstance(reader, Generator):
                stack.enter_context(closing(reader))
        yield readers[0], readers[1]


def _remarks(
    psnr: Scores, one: Clip, other: Clip, total: int, every: int, context: dict[str, Any]
) -> list[str]:
    notes = []
    if psnr.identical_frames == total:
        density = context.get("density")
        known = "" if density is None else f" Its measured density was {density:.3f}."
        notes.append(f"Identical output: was the sparse path active?{known}")
    elif psnr.identical_frames:
        notes.append(f"{psnr.identical_frames} of {total} frames are identical.")
    lossy = [clip.name for clip in (one, other) if clip.kind == "lossy"]
    if lossy:
        notes.append(
            f"Measured on lossy files ({', '.join(lossy)}): PSNR values above {TRUSTED_LOSSY:g} "
            "dB are not trustworthy. Save lossless clips with record()."
        )
    if every > 1:
        notes.append(
            f"Expensive metrics were computed on every {every}th frame, starting with frame 0."
        )
    return notes


def _latent(dense: Tensor, sparse: Tensor) -> Scores:
    """Give the relative distance of latents."""
    if dense.shape != sparse.shape:
        raise QualityInputError(
            f"latents must have the same shape: dense {tuple(dense.shape)}, sparse "
            f"{tuple(sparse.shape)}"
        )
    one, other = dense.detach().double().cpu(), sparse.detach().double().cpu()
    for name, each in (("dense", one), ("sparse", other)):
        if not torch.isfinite(each).all():
            bad = int((~torch.isfinite(each)).sum())
            raise QualityInputError(f"{bad} values of the {name} latents are NaN or infinite")
    size = float(torch.linalg.vector_norm(one))
    if size == 0:
        reason = "the dense latents are all zero"
        return Scores("latent_rel_l2", LATENT, "", None, reason=reason, better="lower")
    value = float(torch.linalg.vector_norm(other - one)) / size
    return Scores("latent_rel_l2", LATENT, "", value, better="lower")
