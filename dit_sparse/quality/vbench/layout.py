# SPDX-License-Identifier: Apache-2.0
"""Export clips as VBench wants to find them: ``{prompt}-{0..4}.mp4``, flat in one folder.

A prompt that is no file name goes under another one, and ``manifest.json`` keeps which file shows
what; VBench then reads prompts from a map ("custom input"). VBench-2.0 reads the same layout.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_sparse.core.reading import load_json
from dit_sparse.quality.clips import file_hash, open_clip
from dit_sparse.quality.errors import QualityInputError
from dit_sparse.quality.files import write_json, writing
from dit_sparse.quality.recording import DEFAULT_FPS, write_preview
from dit_sparse.quality.vbench.dimensions import LONG_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MANIFEST = "manifest.json"
CRF = 8  # near lossless: the compression shall not be what VBench sees
LONGEST = 240  # bytes of a file name
UNFIT = re.compile(r'[/\\:*?"<>|\x00-\x1f]|^[.\s]|[.\s]$|^clip_\d+$', re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """One clip to export: what ``open_clip`` opens, its prompt and its seed."""

    source: Any
    prompt: str
    seed: int


def export(
    items: Sequence[Item],
    folder: str | Path,
    *,
    settings: dict[str, Any] | None = None,
    fps: float | None = None,
    watch: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the clips and ``manifest.json``; gives the manifest.

    Args:
        items: Clips; those of one prompt are numbered in their order.
        folder: New or empty.
        settings: Kept in the manifest: model, strategy, size.
        fps: Where a clip does not say; else 16.
        watch: Told how many are done.

    Raises:
        QualityInputError: Nothing to export, a folder that is not empty, an image.
    """
    place = Path(folder)
    if not items:
        raise QualityInputError("no clips to export")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise QualityInputError(f"{place}: must be a new or an empty folder; name another one")
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
    names = file_names([item.prompt for item in items])
    files: dict[str, Any] = {}
    for number, (item, name) in enumerate(zip(items, names, strict=True)):
        clip = open_clip(item.source, name, fps)
        if clip.frames < 2:
            raise QualityInputError(f"{clip.name}: is an image; VBench measures videos")
        rate = clip.fps or fps or DEFAULT_FPS
        with writing(place / name):
            write_preview(place / name, clip.read(), rate, crf=CRF)
        files[name] = {
            "prompt": item.prompt,
            "seed": item.seed,
            "frames": clip.frames,
            "fps": rate,
            "seconds": clip.frames / rate,
            "sha256": file_hash(place / name),
            "made_of": clip.sha256,
        }
        watch(number + 1)
    longest = max(file["seconds"] for file in files.values())
    manifest = {
        "schema_version": 1,
        "kind": "dit_sparse.vbench",
        "settings": settings or {},
        "named_by_prompt": all(
            name == f"{file['prompt']}{name[name.rindex('-') :]}" for name, file in files.items()
        ),
        "suite": "VBench-Long" if longest >= LONG_SECONDS else "VBench",
        "files": files,
    }
    with writing(place / MANIFEST):
        write_json(place / MANIFEST, manifest)
    return manifest


def file_names(prompts: Sequence[str]) -> list[str]:
    """Name each clip ``{prompt}-{number}.mp4``, and one that cannot be so ``clip_0007-0.mp4``."""
    order = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    # Names that differ in case only are one file on some systems.
    alike = Counter(prompt.casefold() for prompt in order)
    seen: Counter[str] = Counter()
    names = []
    for prompt in prompts:
        stem = prompt
        if fits(prompt) is not None or alike[prompt.casefold()] > 1:
            stem = f"clip_{order[prompt]:04d}"
        names.append(f"{stem}-{seen[prompt]}.mp4")
        seen[prompt] += 1
    return names


def fits(prompt: str) -> str | None:
    """Say why a prompt cannot be a file's name; None where it can."""
    if not prompt or UNFIT.search(prompt):
        return "it has characters that a file name may not have, or is a name of ours"
    if len(prompt.encode()) > LONGEST:
        return f"it is longer than {LONGEST} bytes"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read an exported folder's manifest; its files must be there.

    Raises:
        QualityInputError: No manifest, or files are missing.
    """
    path = folder / MANIFEST
    try:
        found: dict[str, Any] = load_json(path)
        files = found["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise QualityInputError(
            f"{path}: cannot be read: {error}; make the folder with 'dit-sparse vbench export'"
        ) from error
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise QualityInputError(
            f"{folder}: {len(missing)} of {len(files)} clips are missing, the first {missing[0]!r}"
        )
    return found
