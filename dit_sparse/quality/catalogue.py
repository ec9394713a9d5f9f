# SPDX-License-Identifier: Apache-2.0
"""Every row that a comparison can have: what it needs, what it means, which meter gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dit_sparse.quality import (
    compat,
    consistency,
    dists,
    motion,
    perceptual,
    pixels,
    structure,
    vmaf,
)
from dit_sparse.quality.errors import QualityInputError
from dit_sparse.quality.pairs import Meter
from dit_sparse.quality.scores import Better, Scores
from dit_sparse.quality.weights import find_dists, find_weights

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dit_sparse.quality.consistency import Model
    from dit_sparse.quality.weights import Net


@dataclass(frozen=True)
class Needs:
    """What meters are made for.

    Args:
        frames: In each clip.
        height: Pixels.
        width: Pixels.
        device: Where networks run.
        weights: Files of weights by network ("alex", "vgg", "dists"); empty: those found here.
        features: Folders of feature models by name ("dino", "clip").
        threads: Of ffmpeg's filters.
        wanted: Names of the rows that were asked for.
    """

    frames: int
    height: int
    width: int
    device: str = "cpu"
    weights: dict[str, Path] = field(default_factory=dict)
    features: dict[str, Path] = field(default_factory=dict)
    threads: int = 1
    wanted: frozenset[str] = frozenset()


class Kind(NamedTuple):
    """What a row means, for where it has no number."""

    definition: str
    unit: str = ""
    better: Better = "higher"


class Family(NamedTuple):
    """Rows that come of one pass.

    Args:
        rows: What each means, by name.
        make: Gives the meter, or says why it cannot be had here.
        least_frames: Below, the rows are "n/a".
        least_side: Pixels, likewise.
    """

    rows: dict[str, Kind]
    make: Callable[[Needs], Meter | str]
    least_frames: int = 1
    least_side: int = 1


def _lpips(net: Net, name: str, low: float, text: str) -> Callable[[Needs], Meter | str]:
    def make(needs: Needs) -> Meter | str:
        found = find_weights(net, needs.weights.get(net))
        if isinstance(found, str):
            return found
        return perceptual.Lpips(found, needs.device, name, low, text)

    return make


def _dists(needs: Needs) -> Meter | str:
    found = find_weights("vgg", needs.weights.get("vgg"))
    numbers = find_dists(needs.weights.get("dists"))
    if isinstance(found, str) or isinstance(numbers, str):
        return found if isinstance(found, str) else str(numbers)
    return dists.Dists(found, *numbers, device=needs.device)


def _consistency(model: Model) -> Callable[[Needs], Meter | str]:
    def make(needs: Needs) -> Meter | str:
        folder = needs.features.get(model)
        if folder is None:
            return f"no feature model given; use --features {model}=FOLDER"
        extract = consistency.load_extractor(model, folder, needs.device)
        name = f"consistency.{model}"
        return consistency.Consistency(name, consistency.TEXTS[model], extract, str(folder))

    return make


def _vmaf(needs: Needs) -> Meter | str:
    return vmaf.unavailable() or vmaf.Vmaf(needs.height, needs.width, needs.threads)


def _structure(needs: Needs) -> Meter:
    return structure.Structure(scales="ms_ssim" in needs.wanted)


_ALEX, _VGG = (perceptual.LPIPS.format(net=net) for net in ("alex", "vgg"))
FAMILIES = (
    Family(
        {"psnr": Kind(pixels.PSNR, "dB"), "psnr_pooled": Kind(pixels.PSNR_POOLED, "dB")},
        lambda _: pixels.Psnr(),
    ),
    Family(
        {"psnr_temporal": Kind(pixels.PSNR_TEMPORAL, "dB")}, lambda _: pixels.TemporalPsnr(), 2
    ),
    Family({"ssim": Kind(structure.SSIM), "ms_ssim": Kind(structure.MS_SSIM)}, _structure),
    Family(
        {"lpips_alex": Kind(_ALEX, "", "lower")},
        _lpips("alex", "lpips_alex", -1.0, _ALEX),
        least_side=perceptual.SMALLEST["alex"],
    ),
    Family(
        {"lpips_vgg": Kind(_VGG, "", "lower")},
        _lpips("vgg", "lpips_vgg", -1.0, _VGG),
        least_side=perceptual.SMALLEST["vgg"],
    ),
    Family({"dists": Kind(dists.DISTS, "", "lower")}, _dists, least_side=dists.SMALLEST),
    Family({"vmaf": Kind(vmaf.VMAF)}, _vmaf, vmaf.FEWEST, vmaf.SMALLEST),
    Family({"sharpness_ratio": Kind(motion.SHARPNESS, "", "one")}, lambda _: motion.Sharpness()),
    Family(
        {
            "motion_ratio": Kind(motion.MOTION, "", "one"),
            "vbench.temporal_flickering": Kind(motion.FLICKER, "", "zero"),
        },
        lambda _: motion.Transitions(),
        2,
    ),
    Family({"colour_shift": Kind(motion.COLOUR, "levels", "zero")}, lambda _: motion.Colour()),
    Family(
        {"consistency.dino": Kind(consistency.TEXTS["dino"], "", "zero")}, _consistency("dino"), 2
    ),
    Family(
        {"consistency.clip": Kind(consistency.TEXTS["clip"], "", "zero")}, _consistency("clip"), 2
    ),
    Family({"svg.psnr": Kind(compat.SVG_PSNR, "dB")}, lambda _: compat.SvgPsnr()),
    Family({"svg.ssim": Kind(compat.SVG_SSIM)}, lambda _: compat.SvgSsim()),
    Family(
        {"svg.lpips": Kind(compat.SVG_LPIPS, "", "lower")},
        _lpips("vgg", "svg.lpips", 0.0, compat.SVG_LPIPS),
        least_side=perceptual.SMALLEST["vgg"],
    ),
)
DEFAULT = (
    "psnr",
    "psnr_pooled",
    "psnr_temporal",
    "ssim",
    "ms_ssim",
    "lpips_alex",
    "vmaf",
    "sharpness_ratio",
    "motion_ratio",
    "colour_shift",
    "vbench.temporal_flickering",
)
COMPAT = {"svg": ("svg.psnr", "svg.ssim", "svg.lpips")}


def kinds() -> dict[str, Kind]:
    """Give what every row means, by name, in the order of the report."""
    return {name: kind for family in FAMILIES for name, kind in family.rows.items()}


def chosen(
    metrics: Iterable[str] | None, sets: Iterable[str] = (), features: Iterable[str] = ()
) -> tuple[str, ...]:
    """Give the rows that were asked for, in the order of the report.

    Args:
        metrics: Names; "all" is every row; None: ``DEFAULT``.
        sets: Of other repositories' variants, as in ``COMPAT``.
        features: Feature models that are there: their rows are added to the usual ones.

    Raises:
        QualityInputError: A name that does not exist.
    """
    usual = [*DEFAULT, *(f"consistency.{name}" for name in features)]
    names = usual if metrics is None else list(metrics)
    known = list(kinds())
    for name in names:
        if name not in {*known, "all"}:
            raise QualityInputError(
                f"metric {name!r:.100} is unknown; available metrics: all, {', '.join(known)}"
            )
    for each in sets:
        if each not in COMPAT:
            raise QualityInputError(
                f"compat {each!r:.100} is unknown; available: {', '.join(COMPAT)}"
            )
        names += COMPAT[each]
    wanted = set(known) if "all" in names else set(names)
    return tuple(name for name in known if name in wanted)


def meters(needs: Needs) -> tuple[list[Meter], list[Scores]]:
    """Make the meters of the wanted rows; give the rows that cannot be had, with the reason."""
    made, absent = [], []
    try:
        for family in FAMILIES:
            names = [name for name in family.rows if name in needs.wanted]
            if not names:
                continue
            reason = _inapplicable(family, needs)
            if reason is not None:
                absent += [_absent(name, "n/a", reason) for name in names]
                continue
            meter = family.make(needs)
            if isinstance(meter, str):
                absent += [_absent(name, "skipped", meter) for name in names]
            else:
                made.append(meter)
    except BaseException:
        for meter in made:
            meter.close()
        raise
    return made, absent


def now_there(names: Iterable[str]) -> bool:
    """Say whether one of these rows, skipped for want of something, can be measured now."""
    needs = Needs(1, 1, 1, wanted=frozenset(names))
    for family in FAMILIES:
        if needs.wanted.isdisjoint(family.rows):
            continue
        meter = family.make(needs)
        if not isinstance(meter, str):
            meter.close()
            return True
    return False


def _inapplicable(family: Family, needs: Needs) -> str | None:
    if needs.frames < family.least_frames:
        least = family.least_frames
        return f"requires at least {least} frames, but the clips have {needs.frames}"
    if min(needs.height, needs.width) < family.least_side:
        return (
            f"frames of {needs.width} x {needs.height} are too small: each side must have at "
            f"least {family.least_side} pixels"
        )
    return None


def _absent(name: str, status: str, reason: str) -> Scores:
    kind = kinds()[name]
    return Scores(
        name,
        kind.definition,
        kind.unit,
        None,
        reason=reason,
        better=kind.better,
        status="n/a" if status == "n/a" else "skipped",
    )
