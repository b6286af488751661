"""One video as a record of a frame store."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg

from tvit_cli.data.pictures import Planes
from tvit_cli.data.sampling import grid_indices
from tvit_cli.data.storeformat import CLIP, CRC, FRAME, Parameters
from tvit_cli.data.video import read_pictures
from tvit_cli.errors import VideoError

# Note [Frames are stored as YUV 4:2:0]
# Most videos are 4:2:0 themselves, and so is what JPEG holds: where their planes go into it as they are, but
# for range and size, a frame costs half of what it does by way of RGB, and is nearer to its source. On
# Weizmann at q 90, 4:4:4 by way of RGB took a tenth more bytes for a mean error of 1.57 instead of 1.65
# (of 255), and 1.45 of either was brightness.


@dataclass(frozen=True, slots=True)
class Packed:
    """One video as a record, and its row of a shard's table (offset not yet known)."""

    record: bytes
    row: npt.NDArray[Any]  # () of CLIP


def pack_video(path: Path, parameters: Parameters) -> Packed:
    """Decodes a video once and packs the frames of its grid. Raises VideoError."""
    source = _Source.of(path)
    clip = read_pictures(
        path,
        lambda count: grid_indices(count, parameters.frames_per_video),
        lambda kept, indices: [_jpeg(planes, parameters.quality) for planes in kept.planes(indices)],
        short_side=parameters.short_side,
    )
    pictures = clip.pictures
    frames = np.zeros(len(pictures), FRAME)
    frames["crc32"] = [zlib.crc32(picture) for picture in pictures]
    frames["bytes"] = [len(picture) for picture in pictures]
    frames["index"] = clip.indices
    frames["pts_seconds"] = clip.pts_seconds
    head = frames.tobytes()
    record = b"".join([head, CRC.pack(zlib.crc32(head)), *pictures])
    row = np.zeros((), CLIP)
    row["bytes"], row["stored"], row["frame_count"] = len(record), len(pictures), clip.frame_count
    row["height"], row["width"] = simplejpeg.decode_jpeg_header(pictures[0])[:2]
    row["source_bytes"], row["source_mtime_ns"] = source.bytes, source.mtime_ns
    row["source_sha256"] = np.frombuffer(_sha256(path), np.uint8)
    return Packed(record, row)


def is_unchanged(path: Path, row: npt.NDArray[Any]) -> bool:
    """Whether a video is the file that a row was made from; hashed only if it was touched since."""
    try:
        source = _Source.of(path)
        if source.bytes != int(row["source_bytes"]):
            return False
        return (
            source.mtime_ns == int(row["source_mtime_ns"]) or _sha256(path) == row["source_sha256"].tobytes()
        )
    except VideoError:
        return False


def _jpeg(planes: Planes, quality: int) -> bytes:
    """A picture as JPEG. See Note [Frames are stored as YUV 4:2:0]."""
    y = planes.y
    height, width = y.shape
    if height % 2 or width % 2:
        # libjpeg-turbo reads on to the next even row and column, into whatever lies there.
        y = np.pad(y, ((0, height % 2), (0, width % 2)), mode="edge")[:height, :width]
    jpeg: bytes = simplejpeg.encode_jpeg_yuv_planes(y, planes.u, planes.v, quality=quality)
    return jpeg


@dataclass(frozen=True, slots=True)
class _Source:
    """The file a clip was made from, as the file system knows it."""

    bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> _Source:
        """Asks the file system. Raises VideoError."""
        try:
            facts = path.stat()
        except OSError as error:
            raise VideoError(f"{path}: cannot be read ({error.strerror}).") from error
        return cls(facts.st_size, facts.st_mtime_ns)


def _sha256(path: Path) -> bytes:
    """The hash of a file. It costs a hundredth of decoding it."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror}).") from error
