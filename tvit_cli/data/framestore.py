"""Frame store reader: random access to the stored frames of any clip."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg

from tvit_cli.data import framestore_format as form
from tvit_cli.data.layout import SUBSETS, Layout, Video, is_store
from tvit_cli.data.video import ByTime, Choice, Clip, Frames
from tvit_cli.errors import DataError, VideoError
from tvit_cli.portable.reading import Times

MOST_OPEN_SHARDS = 128  # of 1,024 files that a process may usually open


class FrameStore:
    """A finished frame store; threads may share it, and pickling copies its path only.

    Raises DataError if the store is unfinished, a shard is missing, or the index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.header = form.read_header(folder)
        command = self.header.command(folder)
        try:
            self._index = form.read_table(folder / form.INDEX)
        except FileNotFoundError as error:
            raise DataError(f"{folder}: unfinished frame store, no {form.INDEX}. Run `{command}`.") from error
        except OSError as error:
            raise DataError(f"{folder / form.INDEX}: cannot be read ({error.strerror}).") from error
        shards = {folder / name: size for name, size in self._index.facts["shards"]}
        for path, expected in shards.items():
            size = path.stat().st_size if path.exists() else None
            if size != expected:
                fault = "is missing" if size is None else f"has {size:,} bytes, not {expected:,}"
                raise DataError(f"{path}: this shard of the frame store {fault}. Run `{command}`.")
        self.parameters = self.header.parameters
        # The name of a clip by its index (clips are sorted by name), and the reverse (None if it is absent).
        self.name, self.find = self._index.name, self._index.find
        self.unreadable: dict[str, str] = self._index.facts["unreadable"]  # video -> reason
        paths = tuple(shards)  # not `self`: a cycle would keep files open
        self._open_shard = lru_cache(MOST_OPEN_SHARDS)(lambda number: _File(paths[number]))

    def __reduce__(self) -> tuple[type[FrameStore], tuple[Path]]:
        return FrameStore, (self.folder,)

    def __len__(self) -> int:
        return len(self._index)

    def layout(self) -> Layout:
        """Labels, subsets and groups at the time of extraction, for data whose videos are gone."""
        groups, labels = self._index.facts["groups"], tuple(self._index.facts["labels"])
        root = self.folder.parent
        videos = []
        for index, clip in enumerate(self._index.clips):
            name, number = self.name(index), int(clip["group"])
            group = None if number == form.NO_GROUP else groups[number]
            videos.append(Video(root / name, name, labels[clip["label"]], SUBSETS[clip["subset"]], group))
        return Layout(root, labels, tuple(videos), (f"Read from the frame store {self.folder}.",))

    def outdated(self, videos: Sequence[Video]) -> list[str]:
        """Names of videos that are new or whose size has changed; deleted videos are not among them."""
        sizes = self._index.facts.get("unreadable_bytes", {})  # absent from older stores
        names = []
        for video in videos:
            index = self.find(video.name)
            size = sizes.get(video.name) if index is None else self._index.clips[index]["source_bytes"]
            is_new = index is None and video.name not in self.unreadable
            if is_new or (size is not None and video.path.exists() and video.path.stat().st_size != size):
                names.append(video.name)
        return names

    def short_of(self, n_frames: int) -> int:
        """Number of clips stored with fewer than `n_frames` frames although their videos have more."""
        clips = self._index.clips
        stored = clips["stored"] - int(self.parameters.fps is not None)  # the row of the end
        return int((stored < np.minimum(clips["frame_count"], n_frames)).sum())

    def seconds(self, index: int) -> float:
        """Length of a clip's video; 0 if its frames are not stored by time. Raises VideoError, OSError."""
        row = self._index.clips[index]
        end = _split(_read_frame_rows(self._open_shard(int(row["shard"])), row))[1]
        return 0.0 if end is None else end

    def smaller_than(self, frame_size: int) -> int:
        """Number of clips possibly scaled down to a short side below `frame_size` pixels."""
        limit, clips = self.parameters.short_side, self._index.clips
        shortest = np.minimum(clips["height"], clips["width"])
        return int((shortest == limit).sum()) if limit < frame_size else 0

    def read(self, clip: int | str, choose: Choice, *, short_side: int | None = None) -> Clip[Frames]:
        """The stored frames nearest to the source frames `choose(frame_count)`; of two as near, the earlier.

        With ByTime, which needs a store of frames by time (fps), the stored frames are all there is to choose from.

        The result has the indices of the frames it contains. Frames have their stored size, or a half, quarter
        or eighth of it with a short side of at least `short_side`.

        Raises VideoError, `<name>: <reason>`, if the clip is absent or its record cannot be read.
        """
        index = self.find(clip) if isinstance(clip, str) else clip
        name = clip if isinstance(clip, str) else self.name(clip)
        if index is None:
            command = self.header.command(self.folder)
            reason = f"{name}: not in the frame store {self.folder}. Add it with `{command}`."
            raise VideoError(self.unreadable.get(name) or reason)
        row = self._index.clips[index]
        file = self._open_shard(int(row["shard"]))
        again = f"Make the record again with `{self.header.command(self.folder, '--repair')}`."
        try:
            frames, end = _split(_read_frame_rows(file, row))
            times = None if end is None else Times(frames["pts_seconds"].tolist(), end)
            if isinstance(choose, ByTime):
                assert times is not None
                chosen = list(choose.choose(times))
            else:
                chosen = nearest(frames["index"], choose(int(row["frame_count"])))
            jpegs = _read_jpegs(file, row, frames, chosen)
            pixels = _decode(jpegs, chosen, int(row["height"]), int(row["width"]), short_side)
        except ValueError as error:
            raise VideoError(f"{name}: its record in {file.path} is damaged ({error}). {again}") from error
        except OSError as error:
            reason = f"{file.path} cannot be read there ({error.strerror}). Check the disk."
            raise VideoError(f"{name}: {reason} {again}") from error
        indices, seconds = frames["index"][chosen].tolist(), frames["pts_seconds"][chosen].tolist()
        return Clip(pixels, tuple(indices), tuple(seconds), int(row["frame_count"]), times=times)


def find_store(root: Path) -> Path | None:
    """The finished store of a folder or manifest, else one of all videos beside a manifest; `root` if it is one."""
    base = root if root.is_dir() else root.parent
    for folder in (base, own_store(root), base / form.FOLDER):
        if is_store(folder) and (folder / form.INDEX).is_file():
            return folder
    return None


def own_store(data: Path) -> Path:
    """The store that `tvit extract` writes by default; `frames` for a manifest that has its store there."""
    shared = data.parent / form.FOLDER
    is_older = data.is_file() and is_store(shared) and form.read_header(shared).data == str(data.absolute())
    return shared if is_older else form.default_folder(data)


def check_record(shard: Path, row: npt.NDArray[Any]) -> str:
    """The fault of a record, after reading all of it; empty if every checksum matches."""
    file = _File(shard)
    try:
        frames, _ = _split(_read_frame_rows(file, row))
        _read_jpegs(file, row, frames, list(range(len(frames))))
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def nearest(stored: npt.NDArray[Any], wanted: Sequence[int]) -> list[int]:
    """Positions in `stored`, ascending frame indices, of the nearest to each wanted index.

    stored 1 4 8, wanted 0 2 6 7 -> positions 0 0 1 2.
    """
    after = np.searchsorted(stored, wanted).clip(max=len(stored) - 1)
    before = (after - 1).clip(min=0)
    indices, targets = stored.astype(np.int64), np.asarray(wanted)
    closer = np.abs(indices[after] - targets) < np.abs(targets - indices[before])
    positions: list[int] = np.where(closer, after, before).tolist()
    return positions


class _File:
    """One open shard with positional reads, so that threads and forked processes may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seeking = threading.Lock()
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            reason = f"this shard of the frame store cannot be opened ({error.strerror})"
            raise DataError(f"{path}: {reason}. Run `tvit extract` again to repair it.") from error

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> memoryview:
        """`size` bytes from `offset`. Raises ValueError if the file ends before, OSError."""
        if hasattr(os, "pread"):
            data = os.pread(self._descriptor, size, offset)
        else:  # Windows, where no process inherits the descriptor
            with self._seeking:
                os.lseek(self._descriptor, offset, os.SEEK_SET)
                data = os.read(self._descriptor, size)
        if len(data) != size:
            raise ValueError(f"{len(data)} of {size} bytes")
        return memoryview(data)


def _read_frame_rows(file: _File, row: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The rows of FRAME at the start of a record. Raises ValueError if they are damaged."""
    size = int(row["stored"]) * form.FRAME.itemsize
    head = file.read(int(row["offset"]), size + form.CRC.size)
    if form.CRC.unpack(head[size:])[0] != zlib.crc32(head[:size]):
        raise ValueError("the checksum of its list of frames differs")
    return np.frombuffer(head[:size], form.FRAME)


def _split(rows: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], float | None]:
    """The rows of frames, and the end of the video in seconds where they are stored by time."""
    return (rows, None) if rows["bytes"][-1] else (rows[:-1], float(rows["pts_seconds"][-1]))


def _read_jpegs(
    file: _File, row: npt.NDArray[Any], frames: npt.NDArray[Any], chosen: Sequence[int]
) -> dict[int, memoryview]:
    """The chosen frames as JPEG, by position, in one read from the first to the last of them."""
    ends = np.cumsum(frames["bytes"], dtype=np.int64)
    starts = ends - frames["bytes"]
    first = int(starts[min(chosen)])
    body = int(row["offset"]) + int(row["stored"]) * form.FRAME.itemsize + form.CRC.size
    span = file.read(body + first, int(ends[max(chosen)]) - first)
    jpegs = {n: span[int(starts[n]) - first : int(ends[n]) - first] for n in dict.fromkeys(chosen)}
    for n, jpeg in jpegs.items():
        if zlib.crc32(jpeg) != frames["crc32"][n]:
            raise ValueError(f"the checksum of frame {frames['index'][n]} differs")
    return jpegs


def _decode(
    jpegs: dict[int, memoryview], chosen: Sequence[int], height: int, width: int, short_side: int | None
) -> Frames:
    """RGB, uint8 (T, H, W, 3), of each chosen position; repeats are decoded once."""
    divisor = 1  # libjpeg-turbo decodes at any n/8 of the size, but fast only at 1/2, 1/4 and 1/8
    if short_side is not None:
        while divisor < 8 and -(-min(height, width) // (2 * divisor)) >= short_side:
            divisor *= 2
    height, width = -(-height // divisor), -(-width // divisor)
    smallest = {"min_height": height, "min_width": width} if divisor > 1 else {}
    pictures = np.empty((len(chosen), height, width, 3), np.uint8)
    for out, position in enumerate(chosen):
        if out and position == chosen[out - 1]:
            pictures[out] = pictures[out - 1]
        else:
            simplejpeg.decode_jpeg(jpegs[position], colorspace="RGB", buffer=pictures[out], **smallest)
    return pictures
