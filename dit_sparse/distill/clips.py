# SPDX-License-Identifier: Apache-2.0
"""Videos and pictures for fine-tuning: read, encoded by the pipeline's VAE, kept on disk."""

from __future__ import annotations

import io
import subprocess
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_sparse.core.video import MAX_PIXELS, frame_too_large
from dit_sparse.distill.errors import DistillError
from dit_sparse.distill.files import read_tensors, write_tensors
from dit_sparse.distill.inputs import encoding_inputs
from dit_sparse.strategy.identity import file_digest, pipeline_identity, text_digest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from PIL import Image

    from dit_sparse.distill.config import Size

VIDEOS = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".gif")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def list_clips(folder: Path) -> list[tuple[Path, str]]:
    """List clips with their captions, in the order of their names.

    Raises:
        DistillError: No folder, no clips, or a clip without its caption.
    """
    if not folder.is_dir():
        raise DistillError(f"data.clips: {folder}: folder not found")
    kinds = (*VIDEOS, *PICTURES)
    clips = sorted(path for path in folder.iterdir() if path.suffix.lower() in kinds)
    if not clips:
        raise DistillError(
            f"data.clips: {folder}: contains no clips; supported files: {', '.join(kinds)}"
        )
    found = []
    for clip in clips:
        caption = clip.with_suffix(".txt")
        if not caption.is_file():
            raise DistillError(
                f"data.clips: {clip}: has no caption; add {caption.name} next to it"
            )
        try:
            found.append((clip, caption.read_text(encoding="utf-8-sig").strip()))
        except (OSError, UnicodeDecodeError) as error:
            raise DistillError(f"data.clips: {caption}: cannot be read: {error}") from error
    return found


def hash_clips(clips: list[Path]) -> list[str]:
    """Hash the files.

    Raises:
        DistillError: One cannot be read.
    """
    try:
        return [file_digest(path) for path in clips]
    except OSError as error:
        raise DistillError(f"data.clips: {error.filename}: cannot be read: {error}") from error


def read_frames(path: Path, count: int) -> list[Image.Image]:
    """Read the first ``count`` frames of a video, or the one picture."""
    from PIL import Image

    if path.suffix.lower() in PICTURES:
        try:
            return [Image.open(path).convert("RGB")]
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            # Pillow says SyntaxError of a broken PNG.
            raise DistillError(f"{path}: not a readable image: {error}") from error
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin"]
    command += ["-max_pixels", str(MAX_PIXELS), "-i", str(path)]
    command += ["-frames:v", str(count), "-c:v", "ppm", "-f", "image2pipe", "-"]
    done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 (its own ffmpeg)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        why = frame_too_large(said) or (said.splitlines() or ["ffmpeg gave no reason"])[-1]
        raise DistillError(f"{path}: not a readable video: {why}")
    stream, frames = io.BytesIO(done.stdout), []
    while stream.readline():  # P6, then width and height, then 255, then the pixels
        width, height = map(int, stream.readline().split())
        stream.readline()
        frames.append(Image.frombytes("RGB", (width, height), stream.read(3 * width * height)))
    if len(frames) < count:
        raise DistillError(f"{path}: has {len(frames)} frames, but size.num_frames is {count}")
    return frames


@torch.no_grad()
def encode_clip(pipe: Any, frames: list[Image.Image], size: Size) -> Tensor:
    """Encode one clip as the pipeline's transformer takes it, without a batch.

    The mean of the VAE's posterior, scaled as the pipeline undoes it before decoding.
    """
    vae = pipe.vae
    if size.num_frames is None:
        pixels = pipe.image_processor.preprocess(frames[0], size.height, size.width)
    else:
        pixels = pipe.video_processor.preprocess_video(frames, size.height, size.width)
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
    return normalized(pipe, latents)[0].cpu()


def normalized(pipe: Any, latents: Tensor) -> Tensor:
    """Scale and lay out the VAE's latents ``[batch, channels, ...]`` for the transformer."""
    config, kind = pipe.vae.config, type(pipe.transformer).__name__
    if kind == "WanTransformer3DModel":
        shape = (1, -1, 1, 1, 1)
        mean, std = (
            torch.tensor(getattr(config, f"latents_{n}"), device=latents.device).view(shape)
            for n in ("mean", "std")
        )
        return (latents - mean) / std
    latents = (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor
    if kind == "FluxTransformer2DModel":
        packed: Tensor = pipe._pack_latents(latents, *latents.shape)  # noqa: SLF001
        return packed
    if kind == "CogVideoXTransformer3DModel":
        latents = latents.transpose(1, 2)
        of = pipe.transformer.config.patch_size_t or 1  # whole tokens: the first frame again
        missing = -latents.shape[1] % of
        latents = torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], 1)
    return latents


def encode_clips(
    pipe: Any,
    clips: list[Path],
    size: Size,
    folder: Path,
    wanted: tuple[int, ...],
    *,
    fingerprint: str | None = None,
    hashes: list[str] | None = None,
    tell: Callable[[int, int], None] | None = None,
    process: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> tuple[Path, ...]:
    """Encode clips that are not on disk yet.

    Args:
        pipe: With its VAE.
        clips: The files.
        size: To which they are brought.
        folder: Where the encoded ones are kept, by content of the clip.
        wanted: Shape that the transformer takes.
        fingerprint: Of ``encoding_inputs``: another one makes other files; None: the pipeline's.
        hashes: Of ``hash_clips``, where they are known.
        tell: Called with (done, of how many).
        process: This process's index and their number: each encodes its share.
        wait: Waits for the others.
    """
    if fingerprint is None:
        fingerprint = encoding_inputs(pipeline_identity(pipe))
    hashes = hash_clips(clips) if hashes is None else hashes
    names = [text_digest([fingerprint, size.model_dump(), one]) for one in hashes]
    files = [folder / f"clip-{name}.safetensors" for name in names]
    todo = [i for i, file in enumerate(files) if not file.is_file()][process[0] :: process[1]]
    for done, i in enumerate(todo):
        latents = encode_clip(pipe, read_frames(clips[i], size.num_frames or 1), size)
        if tuple(latents.shape) != wanted:
            raise DistillError(
                f"{clips[i]}: encoded as {tuple(latents.shape)}, but the transformer expects "
                f"{wanted}"
            )
        write_tensors(files[i], {"latents": latents}, {})
        if tell is not None:
            tell(done + 1, len(todo))
    wait()
    for file in files[:1]:
        read_tensors(file)
    return tuple(files)
