"""Frame store writer: videos packed into shards, each complete or absent, and the index of all shards."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import simplejpeg

from tvit_cli.data import framestore_format as form
from tvit_cli.data.layout import SUBSETS, Layout
from tvit_cli.data.video import ByTime, Choice, Planes, read_frames
from tvit_cli.errors import DataError, RunError, VideoError
from tvit_cli.files import rename, sha256, sync
from tvit_cli.portable.reading import TOLERANCE, Times, grid_indices, shown_at

# Note [Frames are stored as YUV 4:2:0]
# Most videos are 4:2:0, as JPEG is. Planes copied to JPEG, apart from range and size, cost half as much time as
# frames converted to RGB and back, and are nearer to the source. On Weizmann at quality 90, 4:4:4 through RGB
# took a tenth more bytes for a mean error of 1.57 instead of 1.65 (of 255); 1.45 of either was brightness.


@dataclass(frozen=True, slots=True)
class Packed:
    """One video as a record, and its row of a shard's table without the offset."""

    record: bytes
    row: npt.NDArray[Any]  # () of CLIP


def pack_video(path: Path, parameters: form.Parameters) -> Packed:
    """Decodes a video once and packs the frames of its grid, or by time. Raises VideoError."""
    choose: Choice = lambda count: grid_indices(count, parameters.frames_per_video)  # noqa: E731
    if (fps := parameters.fps) is not None:
        choose = ByTime(lambda times: by_rate(times, fps))
    try:
        source = path.stat()
        clip = read_frames(
            path,
            choose,
            lambda kept, indices: [_jpeg(planes, parameters.quality) for planes in kept.planes(indices)],
            short_side=parameters.short_side,
        )
        digest = bytes.fromhex(sha256(path))
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror}).") from error
    jpegs = clip.frames
    frames = list(zip(map(zlib.crc32, jpegs), map(len, jpegs), clip.indices, clip.pts_seconds, strict=True))
    if clip.times is not None:
        frames.append((0, 0, clip.frame_count, clip.times.end))
    head = np.array(frames, form.FRAME).tobytes()
    record = b"".join([head, form.CRC.pack(zlib.crc32(head)), *jpegs])
    row = np.zeros((), form.CLIP)
    row["bytes"], row["stored"], row["frame_count"] = len(record), len(frames), clip.frame_count
    row["height"], row["width"] = simplejpeg.decode_jpeg_header(jpegs[0])[:2]
    row["source_bytes"], row["source_mtime_ns"] = source.st_size, source.st_mtime_ns
    row["source_sha256"] = np.frombuffer(digest, np.uint8)
    return Packed(record, row)


def by_rate(times: Times, fps: float) -> list[int]:
    """The frames shown every 1 / fps seconds, each once, and the last. 5 at 50 per second, 25 -> [0, 2, 4]."""
    count = max(1, math.ceil((times.end - TOLERANCE) * fps))
    return list(
        dict.fromkeys(shown_at(times.starts, [*(number / fps for number in range(count)), times.end]))
    )


def is_unchanged(path: Path, row: npt.NDArray[Any]) -> bool:
    """Whether a video still has the bytes that were packed; compares hashes only after a change of mtime."""
    try:
        source = path.stat()
        return source.st_size == int(row["source_bytes"]) and (
            source.st_mtime_ns == int(row["source_mtime_ns"])
            or sha256(path) == row["source_sha256"].tobytes().hex()
        )
    except OSError:
        return False


def _jpeg(planes: Planes, quality: int) -> bytes:
    """See Note [Frames are stored as YUV 4:2:0]."""
    y = planes.y
    height, width = y.shape
    if height % 2 or width % 2:  # libjpeg-turbo reads memory up to the next even row and column
        y = np.pad(y, ((0, height % 2), (0, width % 2)), mode="edge")[:height, :width]
    jpeg: bytes = simplejpeg.encode_jpeg_yuv_planes(y, planes.u, planes.v, quality=quality)
    return jpeg


class ShardWriter:
    """Appends records to shards of a bounded size, each of which is complete or absent.

    Leaving the context completes the last shard, also after an error. Raises RunError if the disk is full or fails;
    the videos that fit are kept as a shard then.
    """

    def __init__(self, folder: Path, *, rank: int, shard_bytes: int) -> None:
        self._folder, self._rank, self._limit = folder, rank, shard_bytes
        self._number = 1 + max((_number(path) for path in shard_paths(folder)), default=-1)
        self._file: BinaryIO | None = None
        self._rows: list[npt.NDArray[Any]] = []
        self._keys: list[bytes] = []
        self.bytes = 0  # of all records so far

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._complete()

    def add(self, name: str, packed: Packed) -> None:
        """Appends one video."""
        if self._file is not None and self._file.tell() + len(packed.record) > self._limit:
            self._complete()
        row = packed.row.copy()
        with self._write_errors():
            if self._file is None:
                self._file = self._temporary.open("wb")
            row["offset"] = self._file.tell()
            self._file.write(packed.record)
        self._rows.append(row)
        self._keys.append(form.to_key(name))
        self.bytes += len(packed.record)

    @property
    def _temporary(self) -> Path:
        return self._folder / f".shard-{self._number:05d}-{self._rank:02d}.part"

    def _complete(self) -> None:
        if self._file is None:
            return
        with self._write_errors():
            self._publish(self._file)
        self._file, self._rows, self._keys = None, [], []
        self._number += 1

    def _publish(self, file: BinaryIO) -> None:
        form.write_shard_end(file, form.make_table({}, np.array(self._rows, form.CLIP), self._keys))
        _publish(file, self._folder / f"shard-{self._number:05d}-{self._rank:02d}.frames")

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._keep_what_fits()
            raise _write_error(self._folder, error, " Videos that were stored are kept.") from error

    def _keep_what_fits(self) -> None:
        """Completes the shard after a failed write, without its last videos where the disk has no room."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # its buffer cannot be written either
                file.close()
        while self._rows:
            end = int(self._rows[-1]["offset"] + self._rows[-1]["bytes"])
            with suppress(OSError), self._temporary.open("r+b") as file:
                if file.seek(0, os.SEEK_END) >= end:
                    file.truncate(end)
                    file.seek(end)
                    self._publish(file)
                    return
            self._rows.pop()
            self._keys.pop()
        self._temporary.unlink(missing_ok=True)


def shard_paths(folder: Path) -> list[Path]:
    """The complete shards, oldest first: a later record of a clip replaces an earlier one."""
    shards = (path for path in folder.iterdir() if form.SHARD.fullmatch(path.name)) if folder.is_dir() else ()
    return sorted(shards, key=lambda path: (_number(path), path.name))


@dataclass(frozen=True)
class Contents:
    """All complete shards of a store, whether or not the index lists them."""

    tables: Mapping[Path, form.Table]  # by shard, oldest first
    rows: Mapping[bytes, tuple[Path, int]]  # a name's key -> shard and row of its latest record

    def row(self, name: str) -> npt.NDArray[Any] | None:
        """The latest row of a video."""
        found = self.rows.get(form.to_key(name))
        return None if found is None else self.tables[found[0]].clips[found[1]]

    def shard(self, name: str) -> Path:
        """The shard of that row."""
        return self.rows[form.to_key(name)][0]


def read_contents(folder: Path) -> tuple[Contents, list[DataError]]:
    """Reads the tables of all shards; the errors are those of damaged shards, which are left out."""
    tables: dict[Path, form.Table] = {}
    damaged: list[DataError] = []
    for path in shard_paths(folder):
        try:
            tables[path] = form.read_shard_table(path)
        except DataError as error:
            damaged.append(error)
    rows = {table.key(row): (path, row) for path, table in tables.items() for row in range(len(table))}
    return Contents(tables, rows), damaged


def write_index(folder: Path, layout: Layout, unreadable: Mapping[str, str]) -> int:
    """Writes the index of all shards' clips with the layout's labels, groups and subsets; returns their number.

    Clips that are `unreadable` or absent from the layout are left out; shards without any other clip are removed.
    Raises RunError if the index cannot be written.
    """
    contents, _ = read_contents(folder)
    videos = sorted(
        (form.to_key(video.name), video)
        for video in layout.videos
        if form.to_key(video.name) in contents.rows and video.name not in unreadable
    )
    groups = sorted({video.group for _, video in videos if video.group is not None})
    labels = {label: number for number, label in enumerate(layout.labels)}
    group_numbers = {group: number for number, group in enumerate(groups)} | {None: form.NO_GROUP}
    used = {contents.rows[key][0] for key, _ in videos}
    shards = {path: number for number, path in enumerate(path for path in contents.tables if path in used)}
    clips = np.zeros(len(videos), form.CLIP)
    for i, (key, video) in enumerate(videos):
        shard, row = contents.rows[key]
        clips[i] = contents.tables[shard].clips[row]
        clips[i]["shard"], clips[i]["label"] = shards[shard], labels[video.label]
        clips[i]["group"] = group_numbers[video.group]
        clips[i]["subset"] = SUBSETS.index(video.subset)
    facts = {
        "labels": list(layout.labels),
        "groups": groups,
        "shards": [[path.name, path.stat().st_size] for path in shards],
        "unreadable": dict(unreadable),
        "unreadable_bytes": {
            video.name: video.path.stat().st_size
            for video in layout.videos
            if video.name in unreadable and video.path.exists()
        },
    }
    temporary = folder / f".{form.INDEX}.part"
    try:
        with temporary.open("wb") as file:
            form.write_table(file, form.make_table(facts, clips, [key for key, _ in videos]))
            _publish(file, folder / form.INDEX)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _write_error(folder / form.INDEX, error) from error
    for path in contents.tables.keys() - used:
        path.unlink()
    return len(videos)


def _write_error(path: Path, error: OSError, kept: str = "") -> RunError:
    return RunError(f"{path}: cannot be written ({error.strerror}).{kept} Free space, then run it again.")


def _publish(file: BinaryIO, target: Path) -> None:
    """Closes a temporary file and renames it, durably."""
    file.flush()
    sync(file.fileno())
    file.close()
    rename(Path(file.name), target)


def _number(path: Path) -> int:
    """`shard-00012-01.frames` -> 12."""
    return int(path.name.split("-")[1])
