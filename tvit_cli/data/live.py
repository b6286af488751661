"""Live sources: cameras, streams of the network, bytes of a pipe, files that are still being written.

Note [Live sources]
A camera's number, a URL of a protocol without an end (RTSP, UDP, …) and a named pipe are live by their names, any
other URL or file by `--follow`. A URL or camera that is cut is opened again after DELAYS, then given up; bytes and
files end once. Stream time counts from the first frame. After a cut it goes on by the clock, so that no window lies
over the cut, and it stays beside the time of day.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import av

from tvit_cli.data.layout import VIDEO_SUFFIXES
from tvit_cli.data.video import Live, TimedFrame, iter_frames, open_video
from tvit_cli.errors import RunError, VideoError, plural
from tvit_cli.results import Note, Report, silent

DELAYS = (1, 2, 4, 8, 15, 30, 30, 30)  # seconds before each attempt to open a source again: 2 min in all
GROWTH_SECONDS = 30.0  # after which a file that has not grown is complete
POLL_SECONDS = 0.1  # between two looks at a file that has not grown
CUT = 0.001  # seconds; the least time between the frames on both sides of a cut

_SCHEMES = frozenset({"rtsp", "rtsps", "rtmp", "rtmps", "rtmpt", "rtp", "srtp", "udp", "tcp", "srt"})
_CAMERA = re.compile(r"\d{1,2}|/dev/video\d+")
_FAST = {"analyzeduration": "1000000", "rtsp_flags": "prefer_tcp"}  # a second to find the streams
_UNTIMED = frozenset({"mpjpeg"})  # formats without times of their own
_BYTES = "Send MPEG-TS, Matroska or fragmented MP4: other MP4 files have their index at the end."


class _Bytes:
    """Bytes of stdin (None) or a named pipe, as they come; FFmpeg would wait for full buffers."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._file: Any = None

    def read(self, size: int) -> bytes:
        if self._file is None:
            self._file = self.path.open("rb") if self.path else sys.stdin.buffer
        return bytes(self._file.read1(size))

    def close(self) -> None:
        if self._file is not None and self.path:
            self._file.close()


class _GrowingFile(_Bytes):
    """Bytes of a file that is still being written; it ends when it has not grown for GROWTH_SECONDS."""

    is_caught_up = False  # its end was reached once
    _waited = 0.0

    def read(self, size: int) -> bytes:
        while not (data := super().read(size)) and self._waited < GROWTH_SECONDS:
            self.is_caught_up = True
            time.sleep(POLL_SECONDS)
            self._waited += POLL_SECONDS
        if data:
            self._waited = 0.0
        return data  # empty: FFmpeg asks again for the rest of a packet, and must not wait anew


@dataclass
class LiveSource:
    """A live source and its name, without a password; see Note [Live sources].

    `reopens` after a cut. Where it is not `certain`, its header tells whether it is live. `cuts` are counted.
    """

    name: str
    live: Live
    reopens: bool
    follows: bool = False
    certain: bool = True
    cuts: int = field(default=0, init=False)

    @property
    def drops(self) -> bool:
        """Whether it goes on without a slow reader: no pipe that waits, and no file that is not read to its end."""
        return bool(getattr(self.live.source, "is_caught_up", self.reopens or self.follows))

    def is_live(self) -> bool:
        """Opens and closes a camera or URL. Raises VideoError."""
        if not self.reopens:
            return True
        with open_video(self.name, self.live) as (container, _):
            if container.format.name in _UNTIMED:
                clock = {"use_wallclock_as_timestamps": "1"}
                self.live = replace(self.live, options={**self.live.options, **clock})
            return self.certain or container.duration is None

    def frames(self, *, short_side: int | None = None, report: Report = silent) -> Iterator[TimedFrame]:
        """Frames with their stream time; notes tell of cuts. See `iter_frames` for `short_side`.

        Raises VideoError where it cannot be opened first, RunError where it cannot be opened again.
        """
        end, ended_at, attempt = 0.0, time.monotonic(), 0
        while True:
            offset: float | None = None if end else 0.0
            reason, is_over = "", False  # a recording ends
            try:
                for frame in iter_frames(self.name, short_side=short_side, live=self.live):
                    if offset is None:
                        offset = end + max(time.monotonic() - ended_at, CUT)
                    attempt = 0
                    yield replace(frame, start=frame.start + offset, end=frame.end + offset)
                    end, ended_at = frame.end + offset, time.monotonic()
                    is_over = frame.length is not None and frame.end > frame.length - 1
            except VideoError as error:
                if not end or not self.reopens:
                    raise
                reason = str(error).removeprefix(f"{self.name}: ")
            finally:
                if isinstance(self.live.source, _Bytes):
                    self.live.source.close()
            if is_over or not self.reopens:
                return
            if attempt == 0:
                self.cuts += 1
            if attempt == len(DELAYS):
                text = f"cut after {end:.1f} s, and {plural(attempt, 'attempt')} to open it again failed"
                raise RunError(f"{self.name}: {text}. {f'The last: {reason}' if reason else 'Check it.'}")
            delay, attempt = DELAYS[attempt], attempt + 1
            text = f"cut after {end:.1f} s; attempt {attempt} of {len(DELAYS)} to open it again in {delay} s"
            report(Note(f"{self.name}: {text}.", "warning"))
            time.sleep(delay)


def find_live(name: str, *, follow: bool = False) -> LiveSource | None:
    """The live source of a name, or None for another video; "-" stands for the bytes on stdin.

    Raises VideoError for a file to follow that does not exist.
    """
    path = Path(name)
    if _CAMERA.fullmatch(name) and (name.startswith("/") or not path.exists()):
        return LiveSource(name, _camera(name), reopens=True)
    scheme = re.match("([A-Za-z][A-Za-z0-9+.-]+)://", name)
    if scheme and scheme[1].lower() != "file":
        is_live = scheme[1].lower() in _SCHEMES or follow
        if not is_live and PurePosixPath(name.partition("?")[0]).suffix.lower() in VIDEO_SUFFIXES:
            return None
        live = Live(name, advice="Check the address, and that it sends.", options=_FAST)
        shown = re.sub("//[^/@]*@", "//", name)
        return LiveSource(shown, live, reopens=True, follows=follow, certain=is_live)
    if name == "-" or path.is_fifo():
        return _of_bytes(name, _Bytes(None if name == "-" else path), follow)
    if not follow:
        return None
    if not path.is_file():
        raise VideoError(f"{path}: no such file to follow. Check its name.")
    return _of_bytes(name, _GrowingFile(path), follow)


def _of_bytes(name: str, source: Any, follow: bool) -> LiveSource:
    live = Live(source, "not a video that FFmpeg can read", _BYTES, options=_FAST)
    return LiveSource(name, live, reopens=False, follows=follow)


def _camera(name: str) -> Live:
    form = {"darwin": "avfoundation", "win32": "dshow"}.get(sys.platform, "v4l2")
    names: list[str] = []
    with suppress(av.FFmpegError, AttributeError, ValueError):  # PyAV lists devices since 17
        names = [d.name for d in av.enumerate_input_devices(form) if "video" in (d.media_types or ["video"])]
    url = name if name.startswith("/") else f"/dev/video{name}"
    if form == "avfoundation":
        url = f"{name}:none"
    elif form == "dshow":
        url = f"video={names[int(name)] if int(name) < len(names) else name}"
    advice = f"Cameras here: {', '.join(names)}." if names else "No camera is found on this machine."
    options = {"framerate": "30"} if form == "avfoundation" else {}
    return Live(url, f"camera {url} cannot be opened", advice, form, options)
