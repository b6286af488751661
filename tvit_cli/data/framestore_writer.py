"""Frame stores written: videos packed into shards, complete or not at all, and their index."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import simplejpeg

from tvit_cli.data.framestore_format import (
    CLIP,
    CRC,
    FRAME,
    INDEX,
    NO_GROUP,
    SHARD,
    SUBSETS,
    Parameters,
    Table,
    make_table,
    read_shard_table,
    to_key,
    write_shard_end,
    write_table,
)
from tvit_cli.data.layout import Layout
from tvit_cli.data.pictures import Planes
from tvit_cli.data.video import read_pictures
from tvit_cli.errors import DataError, RunError, VideoError
from tvit_cli.portable.reading import grid_indices

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


class ShardWriter:
    """Appends records to shards of a bounded size, each of which is complete or absent.

    Leaving the context completes the last shard, after an error too, unless writing itself failed. Raises
    RunError where the disk does not take the bytes.
    """

    def __init__(self, folder: Path, *, rank: int, shard_bytes: int) -> None:
        self._folder = folder
        self._rank = rank
        self._limit = shard_bytes
        self._number = 1 + max((_number(path) for path in shard_paths(folder)), default=-1)
        self._file: BinaryIO | None = None
        self._rows: list[npt.NDArray[Any]] = []
        self._keys: list[bytes] = []
        self._failed = False
        self.bytes = 0  # of all records so far

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._failed:
            self._complete()
        if self._file is not None:
            with suppress(OSError):  # a full disk, of which the failure before has told
                self._file.close()
            self._unfinished.unlink(missing_ok=True)

    def add(self, name: str, packed: Packed) -> None:
        """Appends one video."""
        if self._file is not None and self._file.tell() + len(packed.record) > self._limit:
            self._complete()
        try:
            if self._file is None:
                self._file = self._unfinished.open("wb")
            row = packed.row.copy()
            row["offset"] = self._file.tell()
            self._file.write(packed.record)
        except OSError as error:
            raise self._failure(error) from error
        self._rows.append(row)
        self._keys.append(to_key(name))
        self.bytes += len(packed.record)

    @property
    def _unfinished(self) -> Path:
        return self._folder / f".shard-{self._number:05d}-{self._rank:02d}.part"

    def _complete(self) -> None:
        if self._file is None:
            return
        try:
            write_shard_end(self._file, make_table({}, np.array(self._rows, CLIP), self._keys))
            _put(self._file, self._folder / f"shard-{self._number:05d}-{self._rank:02d}.frames")
        except OSError as error:
            raise self._failure(error) from error
        self._file, self._rows, self._keys = None, [], []
        self._number += 1

    def _failure(self, error: OSError) -> RunError:
        self._failed = True
        return RunError(
            f"{self._folder}: the frame store could not be written ({error.strerror}). What was completed is "
            "kept; make room and run the same command again."
        )


def shard_paths(folder: Path) -> list[Path]:
    """The complete shards, oldest first: a later record of a clip takes the place of an earlier one."""
    shards = (path for path in folder.iterdir() if SHARD.fullmatch(path.name)) if folder.is_dir() else ()
    return sorted(shards, key=lambda path: (_number(path), path.name))


@dataclass(frozen=True)
class Contents:
    """What the complete shards of a store hold, whether or not an index lists it."""

    shards: tuple[Path, ...]
    tables: tuple[Table, ...]
    places: Mapping[bytes, tuple[int, int]]  # a name's key -> shard and row of its latest record

    def row(self, name: str) -> npt.NDArray[Any] | None:
        """The latest row of a video."""
        place = self.places.get(to_key(name))
        return None if place is None else self.tables[place[0]].clips[place[1]]

    def shard(self, name: str) -> Path:
        """The shard of that row."""
        return self.shards[self.places[to_key(name)][0]]


def read_contents(folder: Path) -> tuple[Contents, list[DataError]]:
    """Reads the tables of all shards; those that are damaged are left out and told why."""
    shards: list[Path] = []
    tables: list[Table] = []
    damaged: list[DataError] = []
    for path in shard_paths(folder):
        try:
            tables.append(read_shard_table(path))
            shards.append(path)
        except DataError as error:
            damaged.append(error)
    places = {
        table.key(row): (number, row) for number, table in enumerate(tables) for row in range(len(table))
    }
    return Contents(tuple(shards), tuple(tables), places), damaged


def write_index(folder: Path, layout: Layout, unreadable: Mapping[str, str]) -> int:
    """Joins all shards' tables to the index that readers open; returns how many clips it lists.

    Labels, groups and subsets are the layout's; clips that it does not know and those that are `unreadable`
    now are left out, and shards that hold nothing else are removed. Raises RunError where the disk is full.
    """
    contents, _ = read_contents(folder)
    videos = sorted(
        (to_key(video.name), video)
        for video in layout.videos
        if to_key(video.name) in contents.places and video.name not in unreadable
    )
    groups = sorted({video.group for _, video in videos if video.group is not None})
    number_of = {
        "label": {label: number for number, label in enumerate(layout.labels)},
        "group": {group: number for number, group in enumerate(groups)},
    }
    places = [contents.places[key] for key, _ in videos]
    live = sorted({shard for shard, _ in places})
    clips = np.zeros(len(videos), CLIP)
    for i, ((_, video), (shard, row)) in enumerate(zip(videos, places, strict=True)):
        clips[i] = contents.tables[shard].clips[row]
        clips[i]["shard"] = live.index(shard)
        clips[i]["label"] = number_of["label"][video.label]
        clips[i]["group"] = NO_GROUP if video.group is None else number_of["group"][video.group]
        clips[i]["subset"] = SUBSETS.index(video.subset)
    facts = {
        "labels": list(layout.labels),
        "groups": groups,
        "shards": [[contents.shards[n].name, contents.shards[n].stat().st_size] for n in live],
        "unreadable": dict(unreadable),
        "unreadable_bytes": {
            video.name: video.path.stat().st_size
            for video in layout.videos
            if video.name in unreadable and video.path.exists()
        },
    }
    unfinished = folder / f".{INDEX}.part"
    try:
        with unfinished.open("wb") as file:
            write_table(file, make_table(facts, clips, [key for key, _ in videos]))
            _put(file, folder / INDEX)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise RunError(
            f"{folder / INDEX}: could not be written ({error.strerror}). Make room and run "
            "the same command again."
        ) from error
    for n in set(range(len(contents.shards))) - set(live):
        contents.shards[n].unlink()
    return len(videos)


def _put(file: BinaryIO, target: Path) -> None:
    """Closes a file written beside its target and names it so: a crash leaves all of it or nothing."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    Path(file.name).replace(target)
    if hasattr(os, "O_DIRECTORY"):  # a folder can be synced
        descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _number(path: Path) -> int:
    """`shard-00012-01.frames` -> 12."""
    return int(path.name.split("-")[1])
