"""Chosen members of a ZIP on a server, read by HTTP Range: the directory first, then only their bytes."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import IO, Final

from tvit_cli.data.remote.http import OK, PARTIAL, Broken, Http, Refused

TAIL_BYTES: Final = 32 * 1024  # end record with a short comment, and the whole directory of a small archive
GAP_BYTES: Final = 16 * 1024  # between members: read over rather than asked around
WINDOW_BYTES: Final = 16 * 1024**2  # most that is asked for at once, hence held in memory
LOCAL_HEADER_BYTES: Final = 30  # APPNOTE 4.3.7, without name and extra field
EXTRA_BYTES: Final = 256  # for the local extra field, whose length only the local header tells


class RangeFile(io.RawIOBase):
    """A file on a server, seekable; `received` counts the bytes that came over the wire.

    Raises Refused where the server ignores Range, changes the file meanwhile or has another `size` than
    expected, and where more than `most_read` bytes are asked for in one read.
    """

    def __init__(
        self, url: str, http: Http, *, size: int | None = None, most_read: int = WINDOW_BYTES
    ) -> None:
        super().__init__()
        self.url, self._http, self._most_read = url, http, most_read
        self._position = 0
        self._ahead = 0  # reading may run ahead up to here
        self.received = 0
        self.etag: str | None = None
        self.size = -1
        tail = self._ask(f"bytes=-{TAIL_BYTES}")
        if size is not None and self.size != size:
            raise Refused(f"offers {self.size} bytes, {size} are expected")
        self._start, self._buffer = self.size - len(tail), tail

    def plan(self, start: int, stop: int) -> None:
        """Seek to `start`; let coming reads fetch ahead, up to `stop`."""
        self._position, self._ahead = start, min(stop, self.size)

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise OSError(f"seek before the start of {self.url}")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        stop = self.size if size is None or size < 0 else min(self._position + size, self.size)
        if stop - self._position > self._most_read:
            raise Refused(
                f"its directory asks for {stop - self._position} bytes at once, limit {self._most_read}"
            )
        out = bytearray()
        while self._position < stop:
            inside = self._position - self._start
            if not 0 <= inside < len(self._buffer):
                until = max(stop, min(self._ahead, self._position + WINDOW_BYTES))
                self._start, self._buffer = self._position, self._fetch(self._position, until)
                inside = 0
            piece = self._buffer[inside : inside + stop - self._position]
            out += piece
            self._position += len(piece)
        return bytes(out)

    def _fetch(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`, over as many connections as it takes."""
        got = bytearray()
        attempt = 0
        while len(got) < stop - start:
            before = len(got)
            try:
                self._ask(f"bytes={start + len(got)}-{stop - 1}", into=got)
            except Broken as failure:
                attempt = 1 if len(got) > before else attempt + 1
                self._http.retry.wait(attempt, failure)
        return bytes(got)

    def _ask(self, span: str, *, into: bytearray | None = None) -> bytes:
        """Bytes of one Range request, appended to `into` as they come."""
        got = bytearray() if into is None else into
        attempt = 0
        while True:
            try:
                with self._http.open(self.url, headers={"Range": span}) as answer:
                    if answer.status == OK:
                        raise Refused("ignores Range, so single members cannot be read from it")
                    if answer.status != PARTIAL or answer.total is None or answer.start is None:
                        raise Refused(f"HTTP {answer.status} to the Range request {span}")
                    if self.size < 0:
                        self.size, self.etag = answer.total, answer.etag
                    if answer.total != self.size or answer.etag != self.etag:
                        raise Refused("the file has changed on the server while it was read")
                    want = answer.length if answer.length is not None else WINDOW_BYTES
                    count = 0
                    while count < want and (chunk := answer.read(min(want - count, 256 * 1024))):
                        got += chunk
                        count += len(chunk)
                        self.received += len(chunk)
                    if answer.length is not None and count < want:
                        raise Broken(f"connection cut at {count} of {want} bytes")
                    return bytes(got)
            except Broken as failure:
                if into is not None:
                    raise
                got.clear()
                attempt += 1
                self._http.retry.wait(attempt, failure)


class RemoteZip:
    """A ZIP on a server: `infos` are its entries, in the order of the directory.

    Raises Refused where the server or the file is not fit for it.
    """

    def __init__(self, url: str, *, http: Http, size: int | None = None, most_directory: int) -> None:
        self.file = RangeFile(url, http, size=size, most_read=max(most_directory, WINDOW_BYTES))
        try:
            self._zip = zipfile.ZipFile(self.file)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise Refused(f"its ZIP directory cannot be read ({error})") from error
        self.infos = self._zip.infolist()

    @property
    def received(self) -> int:
        """Bytes that came over the wire so far, the directory included."""
        return self.file.received

    def read(self, chosen: Iterable[zipfile.ZipInfo]) -> Iterator[tuple[zipfile.ZipInfo, IO[bytes]]]:
        """Chosen entries as open files, in the order they lie in the archive; neighbours share one request.

        Reading a file to its end checks its CRC-32 (zipfile.BadZipFile where it is wrong).
        """
        for run in self._runs(chosen):
            begin, end = run[0].header_offset, self._end(run[-1])
            self.file.plan(begin, end)
            for info in run:
                with self._zip.open(info) as file:
                    yield info, file

    def _runs(self, chosen: Iterable[zipfile.ZipInfo]) -> list[list[zipfile.ZipInfo]]:
        runs: list[list[zipfile.ZipInfo]] = []
        for info in sorted(chosen, key=attrgetter("header_offset")):
            if runs and info.header_offset - self._end(runs[-1][-1]) <= GAP_BYTES:
                runs[-1].append(info)
            else:
                runs.append([info])
        return runs

    def _end(self, info: zipfile.ZipInfo) -> int:
        """Where an entry ends at the latest, its extra field taken as short."""
        name = len(info.orig_filename.encode("utf-8", "surrogateescape"))
        return info.header_offset + LOCAL_HEADER_BYTES + name + EXTRA_BYTES + info.compress_size
