"""Transfer of a data set's files to its folder, from a local archive or the best source."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate, groupby
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import IO, Final

from tvit_cli import files
from tvit_cli.data import archives, rar
from tvit_cli.data.archive_safety import LIMITS, Member, check_members
from tvit_cli.data.catalog import CanonicalNames, Dataset, Layout, Part, Source, choose, target_paths
from tvit_cli.data.dataset_folder import DatasetFolder, Selection, SourceRecord
from tvit_cli.data.http import OK, Download, Http, MirrorsFailed, PermanentError, TransientError, is_fetched
from tvit_cli.errors import DataError, size_text
from tvit_cli.results import Note, Progress, Report, silent

TAIL_BYTES: Final = 32 * 1024  # the end record with a short comment, and the directory of a small archive
GAP_BYTES: Final = 16 * 1024  # largest gap between members that is read to save a request
WINDOW_BYTES: Final = 16 * 1024**2  # largest request, buffered in memory
LOCAL_HEADER_BYTES: Final = 30  # APPNOTE 4.3.7, without name and extra field
EXTRA_BYTES: Final = 256  # for the local extra field, whose length only the local header has
WHOLE_BYTES: Final = 512 * 1024**2  # up to this size, an archive is fetched whole even for a few members
BATCH_BYTES: Final = 64 * 1024**2  # members that are added to the folder together


class RangeFile(io.RawIOBase):
    """A seekable file on a server, read by Range requests; `received` counts bytes of response bodies.

    Raises PermanentError if the server ignores Range, the file changes, its size is not `size`, or a read asks for
    more than `most_read` bytes.
    """

    def __init__(
        self,
        url: str,
        http: Http,
        *,
        size: int | None = None,
        most_read: int = WINDOW_BYTES,
        report: Report = silent,
    ) -> None:
        super().__init__()
        self.url, self._http, self._most_read, self._report = url, http, most_read, report
        self._position = self._prefetch_end = self.received = 0
        self.etag: str | None = None
        self.size = -1
        self._buffer = self._fetch(None, 0)
        if size is not None and self.size != size:
            raise PermanentError(f"offers {self.size} bytes, {size} are expected")
        self._start = self.size - len(self._buffer)

    def prefetch(self, start: int, stop: int) -> None:
        """Seeks to `start`; the next reads may fetch ahead up to `stop`."""
        self._position, self._prefetch_end = start, min(stop, self.size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise OSError(f"seek before the start of {self.url}")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        stop = self.size if size is None or size < 0 else min(self._position + size, self.size)
        if stop - self._position > self._most_read:
            raise PermanentError(f"reads {stop - self._position} bytes at once, limit {self._most_read}")
        out = bytearray()
        while self._position < stop:
            inside = self._position - self._start
            if not 0 <= inside < len(self._buffer):
                until = max(stop, min(self._prefetch_end, self._position + WINDOW_BYTES))
                self._start, self._buffer = self._position, self._fetch(self._position, until)
                inside = 0
            piece = self._buffer[inside : inside + stop - self._position]
            out += piece
            self._position += len(piece)
        return bytes(out)

    def _fetch(self, start: int | None, stop: int) -> bytearray:
        """Bytes `start` (None: the last ones) to `stop`, resumed if the connection breaks."""
        body = bytearray()

        def request() -> None:
            if start is None:
                body.clear()
                self._request(f"bytes=-{TAIL_BYTES}", TAIL_BYTES, body)
            while start is not None and (left := stop - start - len(body)) > 0:
                self._request(f"bytes={stop - left}-{stop - 1}", left, body)

        retry = self._http.retry
        retry.run(request, lambda: 0 if start is None else len(body), self.url, self._report)
        return body

    def _request(self, span: str, most: int, body: bytearray) -> None:
        """Appends the bytes of a range to `body`, at most `most`."""
        with self._http.open(self.url, {"Range": span}) as response:
            if response.status == OK:
                raise PermanentError("ignores Range, so single members cannot be read from it")
            if response.total is None or response.start is None:
                raise PermanentError(f"HTTP {response.status} to the Range request {span}")
            if self.size < 0:
                self.size, self.etag = response.total, response.etag
            if response.total != self.size or response.etag != self.etag:
                raise PermanentError("the file has changed on the server while it was read")
            left = most if response.length is None else min(most, response.length)
            while left and (chunk := response.read(min(left, archives.CHUNK_BYTES))):
                body += chunk
                left -= len(chunk)
                self.received += len(chunk)
            if left and (response.length is not None or left == most):
                raise TransientError(f"connection cut {left} bytes before the end")


class RemoteZip:
    """A ZIP on a server; `infos` are its entries in the order of the directory.

    Raises PermanentError if the directory cannot be read by Range requests.
    """

    def __init__(
        self,
        url: str,
        *,
        http: Http,
        size: int | None = None,
        most_directory: int,
        report: Report = silent,
    ) -> None:
        most_read = max(most_directory, WINDOW_BYTES)
        self.file = RangeFile(url, http, size=size, most_read=most_read, report=report)
        try:
            self._zip = zipfile.ZipFile(self.file)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise PermanentError(f"its ZIP directory cannot be read ({error})") from error
        self.infos = self._zip.infolist()

    def read(self, chosen: Iterable[zipfile.ZipInfo]) -> Iterator[tuple[zipfile.ZipInfo, IO[bytes]]]:
        """Chosen entries as open files in the order of their offsets; neighbours share a request.

        Reading a file to its end checks its CRC-32. Raises zipfile.BadZipFile.
        """
        runs: list[list[zipfile.ZipInfo]] = []
        for info in sorted(chosen, key=attrgetter("header_offset")):
            if runs and info.header_offset - self._end(runs[-1][-1]) <= GAP_BYTES:
                runs[-1].append(info)
            else:
                runs.append([info])
        for run in runs:
            self.file.prefetch(run[0].header_offset, self._end(run[-1]))
            for info in run:
                try:
                    opened = self._zip.open(info)
                except OSError as error:
                    raise zipfile.BadZipFile(f"its directory is wrong ({error})") from error
                with opened as file:
                    yield info, file

    def _end(self, info: zipfile.ZipInfo) -> int:
        """Upper bound of an entry's end, for a short extra field."""
        name = len(info.orig_filename.encode("utf-8", "surrogateescape"))
        return info.header_offset + LOCAL_HEADER_BYTES + name + EXTRA_BYTES + info.compress_size


@dataclass(frozen=True)
class PartRequest:
    """Files to fetch of a part: `paths` if given, else those of `selection`."""

    part: Part
    selection: Selection
    paths: frozenset[PurePosixPath] | None


@dataclass
class Transfer:
    """Fetches parts to a folder. `listed`: all videos in the archives; `received`: bytes over the network."""

    dataset: Dataset
    folder: DatasetFolder
    http: Http
    report: Report
    names: CanonicalNames = field(default_factory=CanonicalNames)
    listed: list[PurePosixPath] = field(default_factory=list)
    received: int = 0

    def fetch(self, request: PartRequest, archive: Path | None) -> None:
        """Adds the requested files from the user's archive, else from the first source that serves them.

        Raises MirrorsFailed, DataError, RunError.
        """
        if archive is not None:
            self._from_local(request, archive)
            return
        reasons: list[tuple[str, str]] = []
        for source in request.part.sources:
            try:
                self._from_source(request, source, reasons)
                return
            except MirrorsFailed as error:
                reasons.extend(error.reasons)
            except DataError as error:
                self._failed(source.urls[0], error, reasons)
        advice = (
            "Try again later: the received bytes are kept. Or give an archive from "
            f"{self.dataset.homepage} with --archive (split lists: --splits-archive)."
        )
        raise MirrorsFailed(f"{self.dataset.name}: {request.part.name}", reasons, advice=advice)

    def _failed(self, url: str, error: Exception, reasons: list[tuple[str, str]]) -> None:
        reasons.append((url, str(error)))
        self.report(Note(f"{url}: {error}"))

    def _from_source(self, request: PartRequest, source: Source, reasons: list[tuple[str, str]]) -> None:
        archive = self.folder.archives / source.file_name
        is_partial = request.paths is not None or not request.selection.is_whole
        if is_partial and source.kind == "zip" and not archive.exists():
            for url in source.urls:
                try:
                    if self._from_members(request, source, url):
                        return
                    break
                except (PermanentError, *archives.DAMAGED) as error:
                    self._failed(url, error, reasons)
        size = source.bytes or self.dataset.unpacked_bytes or 0
        if not request.selection.is_whole and size > WHOLE_BYTES and not archive.exists():
            found = f"a {source.kind.upper()} of {size_text(size)} is too large for a few clips"
            raise DataError(f"{found}; leave out --classes and --clips-per-class to fetch it whole")
        self._from_archive(request, source, archive)

    def _from_members(self, request: PartRequest, source: Source, url: str) -> bool:
        """Reads single members; False if most are requested, so that the whole archive is faster."""
        most_directory = archives.max_directory_bytes(LIMITS)
        remote = RemoteZip(
            url, http=self.http, size=source.bytes, most_directory=most_directory, report=self.report
        )
        try:
            members = archives.zip_members(remote.infos)
            check_members(members, archive=url, packed_bytes=remote.file.size)
            paths = self._plan(request, source.layout, [one for one in members if one.kind == "file"])
            packed = sum(remote.infos[index].compress_size for index in paths)
            if request.selection.is_whole and packed > remote.file.size / 2:
                return False
            done, need, purpose = 0, sum(members[index].size for index in paths), f"fetching from {url}"
            files.require_free(self.folder.path, need, purpose=purpose)
            part = request.part.name
            record = SourceRecord(part=part, url=url, bytes=remote.file.size, etag=remote.file.etag)
            order = sorted(paths, key=lambda index: remote.infos[index].header_offset)
            starts = accumulate((members[index].size for index in order), initial=0)
            batches = groupby(zip(starts, order, strict=False), key=lambda pair: pair[0] // BATCH_BYTES)
            with files.disk_full_errors(self.folder.path, purpose=purpose, need=lambda: need - done):
                for _, batch in batches:
                    new = self.folder.new_incoming()
                    unpacked = []
                    indices = [index for _, index in batch]
                    entries = remote.read(remote.infos[index] for index in indices)
                    for index, (_, stream) in zip(indices, entries, strict=True):
                        path, member = paths[index], members[index]
                        sha256 = archives.store(stream, new / path, member, archive=url)
                        unpacked.append(archives.Unpacked(path, member.name, member.size, sha256))
                        done += member.size
                        self.report(Progress(f"fetch {part}", done, need, "bytes"))
                    self.folder.add(unpacked, record, new)
            return True
        finally:
            self.received += remote.file.received

    def _from_archive(self, request: PartRequest, source: Source, archive: Path) -> None:
        if source.kind == "rar":
            rar.require_reader()
        unpacked = 0 if source.layout == "lists" else self.dataset.unpacked_bytes or source.bytes or 0
        have = sum(file.stat().st_size for file in archive.parent.glob("*") if file.is_file())
        need = max(0, (source.bytes or 0) + unpacked - have)
        files.require_free(self.folder.path, need, purpose=f"{source.file_name} with its files")
        fetched = Download(archive, source.bytes, source.sha256, self.http, self.report).fetch(source.urls)
        facts = asdict(fetched)
        self.received += facts.pop("bytes_received")
        record = SourceRecord(part=request.part.name, **facts)
        try:
            self._unpack(request, archive, source.layout, record)
        except DataError:
            if is_fetched(archive, fetched.sha256):
                archive.unlink()  # the next run would fail in the same way
            raise

    def _from_local(self, request: PartRequest, archive: Path) -> None:
        """Unpacks the user's archive. Raises DataError if all sources have known hashes and its hash is another."""
        kind, sources = archives.detect_kind(archive), request.part.sources
        check = partial(Progress, f"check {archive.name}", unit="bytes")
        sha256 = files.sha256(archive, progress=lambda done, total: self.report(check(done, total)))
        source = next((one for one in sources if one.sha256 == sha256), None)
        if source is None and all(one.sha256 for one in sources):
            expected = " or ".join(f"{one.sha256} ({one.file_name})" for one in sources)
            found = f"has sha256 {sha256}, {self.dataset.name} has {expected}: damaged or another version"
            raise DataError(f"{archive}: {found}. Fetch it again, or give `tvit train` the unpacked folder.")
        similar = source or next((one for one in sources if one.kind == kind), sources[0])
        record = SourceRecord(part=request.part.name, url=str(archive), bytes=archive.stat().st_size)
        record.sha256, record.verified = sha256, source is not None
        self._unpack(request, archive, similar.layout, record)

    def _unpack(self, request: PartRequest, archive: Path, layout: Layout, record: SourceRecord) -> None:
        plan, target = partial(self._plan, request, layout), self.folder.clear_incoming()
        self.folder.add(archives.unpack(archive, target, plan=plan, report=self.report), record)

    def _plan(self, request: PartRequest, layout: Layout, members: Sequence[Member]) -> archives.Targets:
        """Targets of the requested members that the folder lacks."""
        paths = target_paths(members, layout, part=request.part.name, names=self.names)
        if layout != "lists":
            self.listed.extend(paths.values())
        chosen = choose(paths.values(), request.selection) if request.paths is None else request.paths
        if missing := chosen - set(paths.values()):
            raise DataError(f"{len(missing)} requested files are not in it, such as {min(missing)}")
        wanted = {path for path in chosen if not self.folder.has(str(path))}
        return {index: path for index, path in paths.items() if path in wanted}
