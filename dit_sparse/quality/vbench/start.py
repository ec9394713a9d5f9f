# SPDX-License-Identifier: Apache-2.0
"""Start the runner in another interpreter and believe only a whole result.

VBench's own command builds a shell line out of file names, wants NCCL, and exits 0 after a
failure; so it is called through our runner, with a list of arguments and a job file, and clips in
must equal clips scored.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_sparse.quality.errors import QualityInputError
from dit_sparse.quality.vbench.dimensions import DIMENSIONS
from dit_sparse.quality.vbench.layout import read_manifest
from dit_sparse.quality.vbench.results import Results, of_runner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RUNNER = Path(__file__).with_name("runner.py")
TIMEOUT = 24 * 3600.0  # seconds


def run_vbench(
    folder: str | Path,
    python: str | Path,
    *,
    dimensions: Sequence[str] | None = None,
    cache: str | Path = "~/.cache/vbench",
    torch_hub: str | Path = "~/.cache/torch/hub",
    device: str = "cpu",
    standard: bool = False,
    allow_download: bool = False,
    torchvision_stub: bool = False,
    timeout: float = TIMEOUT,
    environment: Mapping[str, str] | None = None,
) -> Results:
    """Score an exported folder with the official evaluator.

    Args:
        folder: Made by ``export``.
        python: Interpreter of an environment that has ``vbench``.
        dimensions: Names; None: all that the mode can do.
        cache: VBench's folder of weights.
        torch_hub: torch's folder of weights.
        device: "cpu" or "cuda".
        standard: The clips show VBench's own prompts and are named by them; else "custom input".
        allow_download: Let VBench fetch weights that are missing.
        torchvision_stub: Declare the operators that a torchvision without a build for its torch
            asks for.
        timeout: Seconds, all dimensions together.
        environment: Of the process; None: as this one's.

    Raises:
        QualityInputError: A name that does not exist, an interpreter that cannot be started, or
            that gave no whole result.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    names = _chosen(dimensions, standard=standard)
    if standard and not manifest["named_by_prompt"]:
        raise QualityInputError(
            f"{place}: some prompts do not fit a file name, which VBench tells its own prompts "
            "by; leave standard out"
        )
    prompts = {name: file["prompt"] for name, file in manifest["files"].items()}
    with tempfile.TemporaryDirectory(prefix="dit-sparse-vbench-") as scratch:
        videos = Path(scratch) / "videos"  # links: VBench takes every file of a folder for a clip
        videos.mkdir()
        for name in prompts:
            _link(place / name, videos / name)
        job = {
            "videos": str(videos),
            "prompts": prompts,
            "dimensions": names,
            "needs": {name: _files(name, cache, torch_hub) for name in names},
            "mode": "vbench_standard" if standard else "custom_input",
            "device": device,
            "allow_download": allow_download,
            "torchvision_stub": torchvision_stub,
            "scratch": scratch,
            "output": str(Path(scratch) / "result.json"),
        }
        (Path(scratch) / "job.json").write_text(json.dumps(job), encoding="utf-8")
        told = _run(str(python), Path(scratch), timeout, environment)
    return of_runner(told, set(prompts), every=not standard)


def _link(file: Path, place: Path) -> None:
    try:
        place.symlink_to(file.resolve())
    except OSError:  # a system that allows no links
        shutil.copyfile(file, place)


def _chosen(dimensions: Sequence[str] | None, *, standard: bool) -> list[str]:
    can = [name for name, each in DIMENSIONS.items() if standard or each.custom]
    if dimensions is None:
        return can
    for name in dimensions:
        if name not in DIMENSIONS:
            raise QualityInputError(
                f"dimension {name!r:.100} is not one of: {', '.join(DIMENSIONS)}"
            )
        if name not in can:
            raise QualityInputError(
                f"dimension {name} scores VBench's own prompts only (--standard); for any prompt "
                f"there are: {', '.join(can)}"
            )
    return list(dimensions)


def _files(name: str, cache: str | Path, hub: str | Path) -> list[str]:
    found = []
    for file in DIMENSIONS[name].files:
        folder, inside = (hub, file[6:]) if file.startswith("torch:") else (cache, file)
        found.append(str(Path(folder).expanduser() / inside))
    return found


def _run(
    python: str, scratch: Path, timeout: float, environment: Mapping[str, str] | None
) -> dict[str, Any]:
    command = [python, str(RUNNER), str(scratch / "job.json")]
    try:
        with (scratch / "log").open("w+b") as log:
            done = subprocess.run(  # noqa: S603  (a list, no shell)
                command,
                stdout=log,
                stderr=log,
                timeout=timeout,
                check=False,
                env=environment,
                cwd=scratch,
            )
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()
    except OSError as error:
        raise QualityInputError(f"{python}: cannot be started: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise QualityInputError(
            f"{python}: VBench gave no result within {timeout:.0f} s"
        ) from error
    last = said[-1] if said else "it said nothing"
    try:
        told: dict[str, Any] = json.loads((scratch / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QualityInputError(
            f"{python}: VBench ended with code {done.returncode} and left no whole result: {last}"
        ) from error
    if told.get("error"):
        raise QualityInputError(f"{python}: VBench could not run: {told['error']}")
    return told
