"""File format of a frame store.

    frames/
      store.json                header: version, parameters, source data
      shard-00000-00.frames     records, then a table of them; numbered by shard and by the writer's rank
      index.frames              one table of all clips in the order of their names; readers open it

A record is a row of FRAME for each stored frame, the CRC-32 of these rows, then the frames as JPEG. If frames are
stored by time (fps), a last row without bytes has the number of frames and the end of the video. Numbers are
little-endian. A shard's last TRAILER.size bytes are the offset of its table: a complete shard can be read
without any other file.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tvit_cli.data.layout import STORE_FORMAT, STORE_HEADER
from tvit_cli.errors import DataError

VERSION = 1
BY_TIME = 2  # version of a store of frames by time
INDEX = "index.frames"
SHARD = re.compile(r"shard-\d{5,}-\d{2,}\.frames")
TEMPORARY = re.compile(r"\.shard-\d{5,}-\d{2,}\.part|\.unreadable-\d{2,}\.json")  # of a killed process
FOLDER = "frames"  # beside the videos of the store; see default_folder
NO_GROUP = -1

FRAME = np.dtype([("crc32", "<u4"), ("bytes", "<u4"), ("index", "<u4"), ("pts_seconds", "<f8")])
CLIP = np.dtype(
    [
        ("offset", "<u8"),  # of the record in its shard
        ("bytes", "<u8"),
        ("source_bytes", "<u8"),
        ("source_mtime_ns", "<i8"),
        ("source_sha256", "u1", 32),
        ("frame_count", "<u4"),  # frames that decode from the source
        ("stored", "<u4"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("shard", "<u4"),  # from here on in the index only
        ("label", "<u4"),
        ("group", "<i4"),
        ("subset", "u1"),
    ]
)
CRC = struct.Struct("<I")
TRAILER = struct.Struct("<Q8s")
# Magic, version, CRC-32 of the rest, bytes of facts, clips, bytes of names.
_TABLE = struct.Struct("<8sIIQQQ")
_TABLE_MAGIC, _SHARD_MAGIC = b"tvit tbl", b"tvit end"
_BLOCK = 1 << 20  # bytes per read in the checksum test: tables may be larger than memory


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters of the stored frames; the defaults are those of `tvit extract`."""

    frames_per_video: int = 32
    quality: int = 90  # of JPEG, 1 to 100
    short_side: int = 256  # pixels; larger frames are scaled down to it
    fps: float | None = None  # frames shown every 1 / fps seconds, instead of frames_per_video, which is 0

    def __str__(self) -> str:
        frames = f"{self.frames_per_video} frames per video"
        frames = frames if self.fps is None else f"{self.fps:g} frames per second"
        return f"{frames}, short side up to {self.short_side}, quality {self.quality}"


_DEFAULTS = asdict(Parameters())


@dataclass(frozen=True, slots=True)
class Header:
    """Contents of `store.json`; `data` is the source folder or manifest."""

    parameters: Parameters
    data: str

    def command(self, folder: Path, *more: str) -> str:
        """The command line that makes this store."""
        output = [] if folder == default_folder(Path(self.data)) else ["--output", str(folder)]
        given = {key: value for key, value in asdict(self.parameters).items() if value != _DEFAULTS[key]}
        if self.parameters.fps is not None:
            del given["frames_per_video"]
        options = [f"--{key.replace('_', '-')} {value:g}" for key, value in given.items()]
        return " ".join(["tvit extract --path-to-data", self.data, *output, *options, *more])


def default_folder(data: Path) -> Path:
    """The store of a folder of videos, or of a manifest. mine -> mine/frames; mine.csv -> frames-mine"""
    return data.with_name(f"{FOLDER}-{data.stem}") if data.is_file() else data / FOLDER


def write_header(folder: Path, header: Header) -> None:
    """Writes `store.json` atomically; a new folder appears together with it. Raises OSError."""
    fields: dict[str, Any] = {"format": STORE_FORMAT, "version": BY_TIME, **asdict(header)}
    if header.parameters.fps is None:  # older versions of tvit read it
        fields["version"] = VERSION
        del fields["parameters"]["fps"]
    text = json.dumps(fields, indent=2)
    target = folder / STORE_HEADER
    if not folder.is_dir():  # a folder without its header would be read as a class without videos
        target = folder.with_name(f".{folder.name}.{os.getpid()}.part") / STORE_HEADER
        target.parent.mkdir(parents=True)
    temporary = target.with_suffix(".part")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(target)
    if target.parent != folder:
        target.parent.rename(folder)


def read_header(folder: Path) -> Header:
    """Reads `store.json`. Raises DataError if it is missing, damaged, or of a later version."""
    path = folder / STORE_HEADER
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["version"] > BY_TIME:
            raise DataError(
                f"{path}: the frame store has version {fields['version']}, this tvit reads up to {BY_TIME}. "
                "Update tvit, or make the store again with `tvit extract --overwrite`."
            )
        return Header(Parameters(**fields["parameters"]), fields["data"])
    except FileNotFoundError as error:
        raise DataError(
            f"{folder}: no frame store (no {STORE_HEADER}). Make one with `tvit extract`."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"cannot be read as a frame store's header ({type(error).__name__}: {error})"
        raise DataError(f"{path}: {reason}. Make the store again with `tvit extract --overwrite`.") from error


@dataclass(frozen=True)
class Table:
    """Rows of CLIP and their names; name i is `names[ends[i - 1]:ends[i]]`, UTF-8."""

    facts: Mapping[str, Any]
    clips: npt.NDArray[Any]  # (clips,) of CLIP
    ends: npt.NDArray[np.uint64]  # (clips,)
    names: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.clips)

    def key(self, row: int) -> bytes:
        """A row's name as stored."""
        start = int(self.ends[row - 1]) if row else 0
        return self.names[start : int(self.ends[row])].tobytes()

    def name(self, row: int) -> str:
        """A row's name."""
        return self.key(row).decode("utf-8", "surrogateescape")

    def find(self, name: str) -> int | None:
        """The row of a name; the table must be sorted by its keys, as an index is."""
        key = to_key(name)
        row = bisect_left(range(len(self)), key, key=self.key)
        return row if row < len(self) and self.key(row) == key else None


def make_table(facts: Mapping[str, Any], clips: npt.NDArray[Any], keys: list[bytes]) -> Table:
    """A table in memory."""
    ends = np.cumsum([len(key) for key in keys], dtype=np.uint64)
    return Table(facts, clips, ends, np.frombuffer(b"".join(keys), np.uint8))


def write_table(file: BinaryIO, table: Table) -> None:
    """Appends a table to a file."""
    facts = json.dumps(table.facts).encode("ascii")
    arrays = table.clips.tobytes() + table.ends.astype("<u8").tobytes() + table.names.tobytes()
    crc = zlib.crc32(arrays, zlib.crc32(facts))
    file.write(_TABLE.pack(_TABLE_MAGIC, VERSION, crc, len(facts), len(table), table.names.size))
    file.write(facts + arrays)


def read_table(path: Path, *, start: int = 0, end: int | None = None) -> Table:
    """Maps the table at bytes `start` to `end` of a file into memory, after checking its CRC-32.

    Raises DataError if it is damaged, OSError if the file cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END) if end is None else end
        file.seek(start)
        head = file.read(_TABLE.size)
        if len(head) < _TABLE.size:
            raise _damaged(path, f"it ends after {size} bytes")
        magic, version, expected, facts_bytes, count, names_bytes = _TABLE.unpack(head)
        if magic != _TABLE_MAGIC or version > VERSION:
            raise _damaged(path, "it does not begin as a table of this version")
        body = start + _TABLE.size
        offsets = np.cumsum([body, facts_bytes, count * CLIP.itemsize, count * 8, names_bytes]).tolist()
        if offsets[-1] != size:
            raise _damaged(path, f"{size - start} bytes instead of {offsets[-1] - start}")
        facts = file.read(facts_bytes)
        crc = zlib.crc32(facts)
        while block := file.read(min(_BLOCK, offsets[-1] - file.tell())):
            crc = zlib.crc32(block, crc)
        if crc != expected:
            raise _damaged(path, "its checksum differs")
    if count == 0:  # an empty file part cannot be mapped
        return make_table(json.loads(facts), np.zeros(0, CLIP), [])
    return Table(
        json.loads(facts),
        np.memmap(path, CLIP, "r", offsets[1], (count,)),
        np.memmap(path, np.dtype("<u8"), "r", offsets[2], (count,)),
        np.memmap(path, np.uint8, "r", offsets[3], (names_bytes,)),
    )


def read_shard_table(path: Path) -> Table:
    """The table at a shard's end. Raises DataError if the shard is damaged."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TRAILER.size))
            trailer = file.read()
        start, magic = TRAILER.unpack(trailer) if len(trailer) == TRAILER.size else (0, b"")
        if magic != _SHARD_MAGIC or start > size:
            raise _damaged(path, "its end is missing")
        return read_table(path, start=start, end=size - TRAILER.size)
    except OSError as error:
        raise _damaged(path, error.strerror or "it cannot be read") from error


def write_shard_end(file: BinaryIO, table: Table) -> None:
    """Appends a shard's table and trailer."""
    start = file.tell()
    write_table(file, table)
    file.write(TRAILER.pack(start, _SHARD_MAGIC))


def to_key(name: str) -> bytes:
    """A name as bytes; `Table.name` is the inverse, also for file names that are not UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: damaged file of a frame store: {reason}. Run `tvit extract` to repair it.")
