"""Reading a frame store: chosen frames of any clip, as `video.read_clip` gives them."""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg

from tvit_cli.data.framestore_format import (
    CRC,
    FOLDER,
    FRAME,
    INDEX,
    NO_GROUP,
    SUBSETS,
    Parameters,
    is_store,
    read_header,
    read_table,
)
from tvit_cli.data.layout import Layout, Video
from tvit_cli.data.pictures import Frames
from tvit_cli.data.video import Clip
from tvit_cli.errors import DataError, VideoError

MOST_OPEN_SHARDS = 128  # of 1,024 files that a process may usually hold open


class FrameStore:
    """Clips decoded once and read many times; the same in every thread and process that it is handed to.

    Raises DataError where the store is unfinished, a shard is missing, or the index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.header = read_header(folder)
        try:
            self._index = read_table(folder / INDEX)
        except FileNotFoundError as error:
            raise DataError(
                f"{folder}: the frame store is not finished (no {INDEX}). Go on with `{self._again()}`."
            ) from error
        except OSError as error:
            raise DataError(f"{folder / INDEX}: cannot be read ({error.strerror}).") from error
        self._check_shards()
        self._open: OrderedDict[int, _File] = OrderedDict()
        self._opening = threading.Lock()

    def __reduce__(self) -> tuple[type[FrameStore], tuple[Path]]:
        return FrameStore, (self.folder,)  # each process maps the files for itself

    def __len__(self) -> int:
        return len(self._index)

    @property
    def parameters(self) -> Parameters:
        """What the stored frames depend on, beside their sources."""
        return self.header.parameters

    @property
    def unreadable(self) -> dict[str, str]:
        """Videos that could not be extracted, with the reason."""
        return dict(self._index.facts["unreadable"])

    def name(self, index: int) -> str:
        """The name of a clip; clips are in the order of their names."""
        return self._index.name(index)

    def find(self, name: str) -> int | None:
        """The index of a clip, None where the store does not hold it."""
        return self._index.find(name)

    def layout(self) -> Layout:
        """Labels, subsets and groups as they were when the store was made, for data whose videos are gone."""
        facts, labels = self._index.facts, tuple(self._index.facts["labels"])
        root = self.folder.parent
        videos = []
        for index, clip in enumerate(self._index.clips):
            name, group = self.name(index), int(clip["group"])
            videos.append(
                Video(
                    root / name,
                    name,
                    labels[clip["label"]],
                    SUBSETS[clip["subset"]],
                    None if group == NO_GROUP else facts["groups"][group],
                )
            )
        return Layout(root, labels, tuple(videos), (f"Read from the frame store {self.folder}.",))

    def outdated(self, videos: Sequence[Video]) -> list[str]:
        """Names of videos that the store neither holds nor calls unreadable, or whose size is another now.

        Videos that are no longer on disk are none of these.
        """
        unreadable = self._index.facts["unreadable"]
        sizes = self._index.facts.get("unreadable_bytes", {})  # stores made before it was noted have none
        names = []
        for video in videos:
            index = self.find(video.name)
            if index is None and video.name not in unreadable:
                names.append(video.name)
                continue
            size = sizes.get(video.name) if index is None else self._index.clips[index]["source_bytes"]
            if size is not None and video.path.exists() and video.path.stat().st_size != size:
                names.append(video.name)
        return names

    def short_of(self, n_frames: int) -> int:
        """Of how many clips the store has fewer than `n_frames` frames, though their videos have more."""
        clips = self._index.clips
        return int((clips["stored"] < np.minimum(clips["frame_count"], n_frames)).sum())

    def smaller_than(self, frame_size: int) -> int:
        """How many clips were scaled down to a short side below `frame_size` pixels, or may have been."""
        limit, clips = self.parameters.short_side, self._index.clips
        shortest = np.minimum(clips["height"], clips["width"])
        return int((shortest == limit).sum()) if limit < frame_size else 0

    def read(
        self,
        clip: int | str,
        choose: Callable[[int], Sequence[int]],
        *,
        short_side: int | None = None,
    ) -> Clip:
        """The stored frames nearest to those that `choose(frame_count)` names, of two as near the earlier.

        `choose` speaks of the source's frames, as in `video.read_clip`; the indices of the answer are those
        of the frames given. Frames come as they are stored, or scaled down to a half, quarter or eighth where
        their short side stays at least `short_side`: what is left to scale is the model's device's work.

        Raises VideoError, `<name>: <reason>`, where the clip is not there or its record cannot be read.
        """
        name = clip if isinstance(clip, str) else self.name(clip)
        index = self.find(clip) if isinstance(clip, str) else clip
        if index is None:
            reason = self._index.facts["unreadable"].get(name)
            raise VideoError(
                reason or f"{name}: not in the frame store {self.folder}. Add it with `{self._again()}`."
            )
        row = self._index.clips[index]
        file = self._shard(int(row["shard"]))
        try:
            frames = _read_frame_rows(file, row)
            chosen = nearest(frames["index"], choose(int(row["frame_count"])))
            jpegs = _read_jpegs(file, row, frames, chosen)
            pixels = _decode(jpegs, chosen, int(row["height"]), int(row["width"]), short_side)
        except ValueError as error:
            raise VideoError(
                f"{name}: its record in {file.path} is damaged ({error}). Make it anew with "
                f"`{self._again('--repair')}`."
            ) from error
        except OSError as error:
            raise VideoError(
                f"{name}: {file.path} cannot be read there ({error.strerror}). Look at the disk; if it is sound, "
                f"make the record anew with `{self._again('--repair')}`."
            ) from error
        given = frames[chosen]
        return Clip(
            pixels,
            tuple(given["index"].tolist()),
            tuple(given["pts_seconds"].tolist()),
            int(row["frame_count"]),
        )

    def _check_shards(self) -> None:
        for name, expected in self._index.facts["shards"]:
            path = self.folder / name
            size = path.stat().st_size if path.exists() else None
            if size != expected:
                what = "is missing" if size is None else f"has {size:,} bytes, not {expected:,}"
                raise DataError(f"{path}: this shard of the frame store {what}. Run `{self._again()}`.")

    def _shard(self, number: int) -> _File:
        """A shard's file, kept open; the one that was not used for longest is let go."""
        with self._opening:
            if number in self._open:
                self._open.move_to_end(number)
            else:
                self._open[number] = _File(self.folder / self._index.facts["shards"][number][0])
                if len(self._open) > MOST_OPEN_SHARDS:
                    self._open.popitem(last=False)
            return self._open[number]

    def _again(self, *more: str) -> str:
        return self.header.command(self.folder, *more)


def find_store(root: Path) -> Path | None:
    """The finished store beside the videos of a folder or manifest; the folder itself if it is one."""
    base = root if root.is_dir() else root.parent
    for folder in (base, base / FOLDER):
        if is_store(folder) and (folder / INDEX).is_file():
            return folder
    return None


def check_record(shard: Path, row: npt.NDArray[Any]) -> str:
    """What is wrong with a record, read as a whole; empty where every byte is as it was written."""
    file = _File(shard)
    try:
        frames = _read_frame_rows(file, row)
        _read_jpegs(file, row, frames, list(range(len(frames))))
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def nearest(stored: npt.NDArray[Any], wanted: Sequence[int]) -> list[int]:
    """Positions in `stored`, ascending frame indices, of what lies nearest to each wanted index.

    stored 1 4 8, wanted 0 2 6 7 -> positions 0 0 1 2.
    """
    after = np.searchsorted(stored, wanted).clip(max=len(stored) - 1)
    before = (after - 1).clip(min=0)
    places, asked = stored.astype(np.int64), np.asarray(wanted)
    closer = np.abs(places[after] - asked) < np.abs(asked - places[before])
    positions: list[int] = np.where(closer, after, before).tolist()
    return positions


class _File:
    """One open shard, read at given places, so that threads and heirs of it do not disturb each other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seeking = threading.Lock()
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            self._descriptor = -1
            raise DataError(
                f"{path}: this shard of the frame store cannot be opened ({error.strerror}). Run "
                "`tvit extract` again; it makes anew what is missing."
            ) from error

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> memoryview:
        """That many bytes. Raises ValueError where the file ends before."""
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
    """The rows of FRAME at a record's beginning. Raises ValueError where they are damaged."""
    size = int(row["stored"]) * FRAME.itemsize
    head = file.read(int(row["offset"]), size + CRC.size)
    if CRC.unpack(head[size:])[0] != zlib.crc32(head[:size]):
        raise ValueError("the checksum of its list of frames differs")
    return np.frombuffer(head[:size], FRAME)


def _read_jpegs(
    file: _File, row: npt.NDArray[Any], frames: npt.NDArray[Any], chosen: Sequence[int]
) -> dict[int, memoryview]:
    """The chosen frames as JPEG, by position, in one read from the first to the last of them."""
    ends = np.cumsum(frames["bytes"], dtype=np.int64)
    starts = ends - frames["bytes"]
    first = int(starts[min(chosen)])
    body = int(row["offset"]) + frames.nbytes + CRC.size
    span = file.read(body + first, int(ends[max(chosen)]) - first)
    jpegs = {n: span[int(starts[n]) - first : int(ends[n]) - first] for n in dict.fromkeys(chosen)}
    for n, jpeg in jpegs.items():
        if zlib.crc32(jpeg) != frames["crc32"][n]:
            raise ValueError(f"the checksum of frame {frames['index'][n]} differs")
    return jpegs


def _decode(
    jpegs: dict[int, memoryview], chosen: Sequence[int], height: int, width: int, short_side: int | None
) -> Frames:
    """Pictures, uint8 (T, H, W, 3), one for each chosen position; one chosen twice is decoded once."""
    divisor = 1  # libjpeg-turbo decodes at any n/8 of the size, but fast only at 1/2, 1/4 and 1/8
    if short_side is not None:
        while divisor < 8 and -(-min(height, width) // (2 * divisor)) >= short_side:
            divisor *= 2
    height, width = -(-height // divisor), -(-width // divisor)
    pictures = np.empty((len(chosen), height, width, 3), np.uint8)
    for place, position in enumerate(chosen):
        if place and position == chosen[place - 1]:
            pictures[place] = pictures[place - 1]
            continue
        simplejpeg.decode_jpeg(
            jpegs[position],
            colorspace="RGB",
            min_height=height if divisor > 1 else 0,
            min_width=width if divisor > 1 else 0,
            buffer=pictures[place],
        )
    return pictures
