# SPDX-License-Identifier: Apache-2.0
"""Open anything that holds a clip: arrays, tensors, lists of pictures, files and folders.

A ``Clip`` is checked whole when it is opened (count, size, finite, in range) and read as often as
is wanted, a frame at a time.
"""

from __future__ import annotations

import hashlib
import math
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from dit_sparse.quality.decode import check_video
from dit_sparse.quality.errors import QualityInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from dit_sparse.quality.pairs import Frame

PICTURES = {".png", ".bmp", ".tif", ".tiff", ".ppm", ".jpg", ".jpeg", ".webp"}
LOSSY_PICTURES = {".jpg", ".jpeg", ".webp"}
VIDEOS = {".mp4", ".mkv", ".gif", ".mov", ".webm", ".avi", ".m4v"}
MAX_UNPACKED = 4 * 2**30  # bytes of an .npz's array: 20 s of 720p video in float32
SLACK = 1e-3  # a float this far outside [0, 1] is rounding, and clipped
WANTED = (
    "a clip must be an array or tensor [frames, height, width, 3] (or [frames, 3, height, "
    "width]), uint8 or float in [0, 1]; a list of images; a video file; an image; a folder of "
    "images; an .npy or .npz file"
)


@dataclass(frozen=True)
class Clip:
    """A checked clip.

    Args:
        name: What messages call it: the path, or which argument it was.
        frames: How many.
        height: Pixels.
        width: Pixels.
        fps: Frames per second, where known.
        kind: "arrays", "lossless" (what was written comes back, bit for bit) or "lossy".
        detail: Codec and pixel format, or how frames were given.
        sha256: Of the file; None for arrays and folders.
        read: Gives the frames from the first on, ``[height, width, 3]`` uint8.
    """

    name: str
    frames: int
    height: int
    width: int
    fps: float | None
    kind: Literal["arrays", "lossless", "lossy"]
    detail: str
    sha256: str | None
    read: Callable[[], Iterator[Frame]] = field(repr=False, compare=False)

    def pick(self, numbers: Sequence[int]) -> dict[int, Frame]:
        """Read these frames, by number."""
        wanted, found = set(numbers), {}
        for number, frame in enumerate(self.read()):
            if number in wanted:
                found[number] = frame
            if len(found) == len(wanted):
                break
        return found

    def described(self) -> dict[str, Any]:
        """Give what a report says of it."""
        keys = ("name", "frames", "height", "width", "fps", "kind", "detail", "sha256")
        return {key: getattr(self, key) for key in keys}


def open_clip(source: Any, name: str = "clip", fps: float | None = None) -> Clip:
    """Open and check a clip.

    Args:
        source: See ``WANTED``; a ``Clip`` is given back.
        name: What to call it where it has no path.
        fps: Frames per second where the source does not say.

    Raises:
        QualityInputError: It cannot be read, is damaged, or holds values that are no colours.
    """
    if isinstance(source, Clip):
        return source
    if isinstance(source, str | Path):
        return _from_path(Path(source).expanduser(), fps)
    if isinstance(source, list | tuple) and source and not np.isscalar(source[0]):
        frames = [_frame_array(item, f"{name}, frame {i}") for i, item in enumerate(source)]
        return _from_frames(frames, name, fps, f"list of {type(source[0]).__name__}")
    if isinstance(source, torch.Tensor):
        # bfloat16 has no numpy twin.
        plain = source.detach().cpu()
        array = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
        return _from_array(array, name, fps, "tensor")
    if isinstance(source, np.ndarray):
        return _from_array(source, name, fps, "array")
    raise QualityInputError(f"{name}: {WANTED}; got {type(source).__name__}")


def _from_path(path: Path, fps: float | None) -> Clip:
    name, ending = str(path), path.suffix.lower()
    if path.is_dir():
        return _from_folder(path, fps)
    if not path.is_file():
        raise QualityInputError(f"{path}: file or folder not found")
    if ending in PICTURES:
        lossy = ending in LOSSY_PICTURES
        return _from_pictures([path], name, fps, "lossy" if lossy else "lossless", file_hash(path))
    if ending in {".npy", ".npz"}:
        array = _load_numpy(path)
        clip = _from_array(array, name, fps, ending[1:])
        return Clip(**{**vars(clip), "kind": "lossless", "sha256": file_hash(path)})
    if ending not in VIDEOS:
        known = " ".join(sorted(VIDEOS | PICTURES | {".npy", ".npz"}))
        raise QualityInputError(f"{path}: unsupported file type; supported: {known}")
    video = check_video(path)
    kind: Literal["lossless", "lossy"] = "lossless" if video.exact else "lossy"
    return Clip(
        name,
        video.frames,
        video.height,
        video.width,
        video.fps or fps,
        kind,
        video.codec,
        file_hash(path),
        video.read,
    )


def _from_folder(folder: Path, fps: float | None) -> Clip:
    paths = [p for p in folder.iterdir() if p.suffix.lower() in PICTURES and p.is_file()]
    if not paths:
        raise QualityInputError(
            f"{folder}: has no images ({' '.join(sorted(PICTURES))}); give a video file, or the "
            "folder that contains the frames"
        )
    endings = {path.suffix.lower() for path in paths}
    kind: Literal["lossless", "lossy"] = "lossy" if endings & LOSSY_PICTURES else "lossless"
    return _from_pictures(sorted(paths, key=_natural), str(folder), fps, kind, None)


def _from_pictures(
    paths: list[Path],
    name: str,
    fps: float | None,
    kind: Literal["lossless", "lossy"],
    sha256: str | None,
) -> Clip:
    from PIL import Image

    def load(path: Path) -> Frame:
        try:
            with Image.open(path) as picture:
                return _frame_array(picture, str(path))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            # Pillow says SyntaxError of a broken PNG.
            raise QualityInputError(f"{path}: not a readable image: {error}") from error

    sizes = {path: load(path).shape[:2] for path in paths}  # decodes each: damage is found here
    (height, width), first = sizes[paths[0]], paths[0]
    for path, size in sizes.items():
        if size != (height, width):
            raise QualityInputError(
                f"{path}: is {size[1]} x {size[0]}, {first.name} is {width} x {height}; all "
                "frames of a clip must have the same size"
            )
    endings = ", ".join(sorted({path.suffix.lower()[1:] for path in paths}))

    def read() -> Iterator[Frame]:
        for path in paths:
            yield load(path)

    return Clip(name, len(paths), height, width, fps, kind, f"{endings} images", sha256, read)


def _from_frames(frames: list[Frame], name: str, fps: float | None, detail: str) -> Clip:
    height, width = frames[0].shape[:2]
    for number, frame in enumerate(frames):
        if frame.shape != (height, width, 3):
            raise QualityInputError(
                f"{name}: frame {number} is {frame.shape[1]} x {frame.shape[0]}, frame 0 is "
                f"{width} x {height}; all frames of a clip must have the same size"
            )
    return Clip(
        name, len(frames), height, width, fps, "arrays", detail, None, lambda: iter(frames)
    )


def _from_array(array: NDArray[Any], name: str, fps: float | None, detail: str) -> Clip:
    shape = array.shape
    if array.ndim == 5 and shape[0] == 1:  # a pipeline's batch of one
        array = array[0]
    if array.ndim == 3:  # one image
        array = array[None]
    if array.ndim != 4 or 3 not in (array.shape[-1], array.shape[1]) or 0 in array.shape:
        raise QualityInputError(f"{name}: {WANTED}; got shape {tuple(shape)}")
    if array.shape[-1] != 3:
        array = np.moveaxis(array, 1, -1)
    _check_values(array, name)
    count, height, width = array.shape[:3]

    def read() -> Iterator[Frame]:
        for frame in array:
            yield _bytes(frame)

    about = f"{detail} of {array.dtype}"
    return Clip(name, count, height, width, fps, "arrays", about, None, read)


def _check_values(array: NDArray[Any], name: str) -> None:
    """Look at every value, a frame at a time."""
    if array.dtype == np.uint8:
        return
    if array.dtype.kind != "f":
        raise QualityInputError(
            f"{name}: values must be uint8 or float in [0, 1], got {array.dtype}"
        )
    bad = [int((~np.isfinite(frame)).sum()) for frame in array]
    if any(bad):
        first = next(i for i, count in enumerate(bad) if count)
        raise QualityInputError(
            f"{name}: {sum(bad)} values are NaN or infinite, the first in frame {first}; these "
            "are not valid pixels, so look for the cause in the model or in a kernel"
        )
    low, high = float(min(map(np.min, array))), float(max(map(np.max, array)))
    if low < -SLACK or high > 1 + SLACK:
        raise QualityInputError(
            f"{name}: float values must lie in [0, 1], got values in [{low:.4g}, {high:.4g}]; "
            "divide by 255, or map from [-1, 1] with (x + 1) / 2"
        )


def _bytes(frame: NDArray[Any]) -> Frame:
    if frame.dtype == np.uint8:
        return np.ascontiguousarray(frame)
    levels: NDArray[np.float64] = np.clip(frame, 0, 1).astype(np.float64) * 255
    return levels.round().astype(np.uint8)


def _frame_array(item: Any, name: str) -> Frame:
    """Turn one picture, array or tensor into a frame."""
    from PIL import Image

    if isinstance(item, Image.Image):
        if item.mode not in {"RGB", "L", "P", "RGBA", "1"}:
            raise QualityInputError(f"{name}: must be 8-bit RGB, got mode {item.mode}")
        if item.mode == "RGBA" and np.asarray(item.getchannel("A")).min() < 255:
            raise QualityInputError(
                f"{name}: is partly transparent; composite it onto a background first"
            )
        return np.asarray(item.convert("RGB"))
    clip = open_clip(item if isinstance(item, np.ndarray | torch.Tensor) else None, name)
    return next(clip.read())


def _load_numpy(path: Path) -> NDArray[Any]:
    array: NDArray[Any]
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            return array
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = list(archive)
            key = names[0] if len(names) == 1 else "frames"
            _check_unpacked(archive.zip, f"{key}.npy")
            array = archive[key]
            return array
    except Exception as error:  # zip, header and pickle errors of many kinds
        raise QualityInputError(
            f"{path}: must be a NumPy file with one array, or with an array named frames: {error}"
        ) from error


def _check_unpacked(archive: zipfile.ZipFile, name: str) -> None:
    """Raise ``ValueError`` where an array would take too much memory, before any is asked for."""
    size = archive.getinfo(name).file_size
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = header(file)
    asked = math.prod(shape) * dtype.itemsize
    if max(asked, size) > MAX_UNPACKED:
        raise ValueError(
            f"{name} unpacks to {max(asked, size) / 2**30:,.1f} GiB, at most "
            f"{MAX_UNPACKED / 2**30:g} GiB are allowed; save it as .npy, which is memory-mapped"
        )
    if asked > size:
        raise ValueError(f"{name} declares {asked:,} bytes, but contains {size:,}")


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Sort frame_2 before frame_10."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def file_hash(path: Path) -> str:
    """Give a file's SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
