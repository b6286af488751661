"""Shards of a frame store, written complete or not at all, and the index that joins them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tvit_cli.data.layout import Layout
from tvit_cli.data.packing import Packed
from tvit_cli.data.storeformat import (
    CLIP,
    INDEX,
    NO_GROUP,
    SHARD,
    SUBSETS,
    Table,
    make_table,
    read_shard_table,
    to_key,
    write_shard_end,
    write_table,
)
from tvit_cli.errors import DataError, RunError


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
