"""File format of a frame store, byte by byte.

    frames/
      store.json                header: version, parameters, the data they were made from
      shard-00000-00.frames     records, then a table of them; number and rank of the process that wrote it
      index.frames              one table of all clips in the order of their names; what a reader opens

A record is a row of FRAME for each stored frame, the crc32 of these rows, then the frames as JPEG. Numbers
are little-endian. A shard's last TRAILER.size bytes say where its table begins, so that a complete shard
needs no other file to be understood.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tvit_cli.errors import DataError

VERSION = 1
FORMAT = "tvit frame store"
HEADER, INDEX = "store.json", "index.frames"
SHARD = re.compile(r"shard-\d{5,}-\d{2,}\.frames")
LEFTOVER = re.compile(r"\.shard-\d{5,}-\d{2,}\.part|\.unreadable-\d{2,}\.json")  # of a killed process
FOLDER = "frames"  # beside the videos that a store was made from

SUBSETS = ("train", "val", "test")
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
        ("shard", "<u4"),  # this column and those below count in the index only
        ("label", "<u4"),
        ("group", "<i4"),
        ("subset", "u1"),
    ]
)
CRC = struct.Struct("<I")
TRAILER = struct.Struct("<Q8s")
_TABLE = struct.Struct("<8sIIQQQ")  # magic, version, crc32 of the rest, bytes of facts, clips, bytes of names
_TABLE_MAGIC, _SHARD_MAGIC = b"tvit tbl", b"tvit end"
_BLOCK = 1 << 20  # bytes read at once to check a table: it is never in memory as a whole


@dataclass(frozen=True, slots=True)
class Parameters:
    """What the stored frames depend on, beside their source."""

    frames_per_video: int
    quality: int  # of JPEG, 1 to 100
    short_side: int  # in pixels; larger frames are scaled down to it, smaller ones kept

    def __str__(self) -> str:
        return (
            f"{self.frames_per_video} frames per video, short side up to {self.short_side}, "
            f"quality {self.quality}"
        )


@dataclass(frozen=True, slots=True)
class Header:
    """`store.json`; `data` is the folder or manifest the store was made from."""

    parameters: Parameters
    data: str

    def command(self, folder: Path, *more: str) -> str:
        """The command line that makes this store."""
        words = ["tvit extract --path-to-data", self.data]
        if folder != Path(self.data) / FOLDER:
            words += ["--output", str(folder)]
        return " ".join([*words, *more])


def is_store(folder: Path) -> bool:
    """Whether a folder is a frame store, finished or not; another program's store.json makes none."""
    try:
        facts = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (folder / HEADER).is_file()  # damaged, which its reader says
    return isinstance(facts, dict) and facts.get("format") == FORMAT


def write_header(folder: Path, header: Header) -> None:
    """Makes the folder of a store, complete with its header or not at all."""
    text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(header)}, indent=2)
    target = folder / HEADER
    if not folder.is_dir():  # half made, it would be a class without videos to who reads the data
        target = folder.with_name(f".{folder.name}.{os.getpid()}.part") / HEADER
        target.parent.mkdir(parents=True)
    unfinished = target.with_suffix(".part")
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(target)
    if target.parent != folder:
        target.parent.rename(folder)


def read_header(folder: Path) -> Header:
    """Reads `store.json`. Raises DataError where it is missing, damaged, or of a later version."""
    path = folder / HEADER
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["version"] > VERSION:
            raise DataError(
                f"{path}: the frame store has version {facts['version']}, this tvit reads up to {VERSION}. "
                "Update tvit, or make the store again with `tvit extract --overwrite`."
            )
        return Header(Parameters(**facts["parameters"]), facts["data"])
    except FileNotFoundError as error:
        raise DataError(
            f"{folder}: no frame store (no {HEADER} in it). Make one with `tvit extract`."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: cannot be read as a frame store's header ({type(error).__name__}: {error}). Make the "
            "store again with `tvit extract --overwrite`."
        ) from error


@dataclass(frozen=True)
class Table:
    """Rows of CLIP with a name for each: name i is `names[ends[i - 1]:ends[i]]`, UTF-8."""

    facts: Mapping[str, Any]
    clips: npt.NDArray[Any]  # (clips,) of CLIP
    ends: npt.NDArray[np.uint64]  # (clips,)
    names: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.clips)

    def key(self, row: int) -> bytes:
        """A row's name as it is stored."""
        start = int(self.ends[row - 1]) if row else 0
        return self.names[start : int(self.ends[row])].tobytes()

    def name(self, row: int) -> str:
        """A row's name."""
        return from_key(self.key(row))

    def find(self, name: str) -> int | None:
        """The row of a name, by bisection; the table must be sorted by its keys, as an index is."""
        key = to_key(name)
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self.key(middle) < key:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self) and self.key(low) == key else None


def make_table(facts: Mapping[str, Any], clips: npt.NDArray[Any], keys: list[bytes]) -> Table:
    """A table in memory."""
    ends = np.cumsum([len(key) for key in keys], dtype=np.uint64)
    return Table(facts, clips, ends, np.frombuffer(b"".join(keys), np.uint8))


def write_table(file: BinaryIO, table: Table) -> None:
    """Appends a table to a file."""
    facts = json.dumps(table.facts).encode("ascii")
    parts = (facts, table.clips.tobytes(), table.ends.astype("<u8").tobytes(), table.names.tobytes())
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    file.write(_TABLE.pack(_TABLE_MAGIC, VERSION, crc, len(facts), len(table), table.names.size))
    for part in parts:
        file.write(part)


def read_table(path: Path, *, start: int = 0, end: int | None = None) -> Table:
    """Maps the table between two places of a file into memory, after its checksum was compared.

    Raises DataError where it is damaged; OSError where the file cannot be read.
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
        places = np.cumsum([body, facts_bytes, count * CLIP.itemsize, count * 8, names_bytes]).tolist()
        if places[-1] != size:
            raise _damaged(path, f"{size - start} bytes where its head promises {places[-1] - start}")
        facts = file.read(facts_bytes)
        crc = zlib.crc32(facts)
        while block := file.read(min(_BLOCK, places[-1] - file.tell())):
            crc = zlib.crc32(block, crc)
        if crc != expected:
            raise _damaged(path, "its checksum differs")
    if count == 0:  # nothing can be mapped
        return make_table(json.loads(facts), np.zeros(0, CLIP), [])
    return Table(
        json.loads(facts),
        np.memmap(path, CLIP, "r", places[1], (count,)),
        np.memmap(path, np.dtype("<u8"), "r", places[2], (count,)),
        np.memmap(path, np.uint8, "r", places[3], (names_bytes,)),
    )


def read_shard_table(path: Path) -> Table:
    """The table at a shard's end. Raises DataError where the shard is damaged."""
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
    """A name as bytes; file names that are no UTF-8 survive the way there and back."""
    return name.encode("utf-8", "surrogateescape")


def from_key(key: bytes) -> str:
    """The inverse of `to_key`."""
    return key.decode("utf-8", "surrogateescape")


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"{path}: this file of the frame store is damaged: {why}. Run `tvit extract` again; it makes anew "
        "what is missing."
    )
