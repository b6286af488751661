"""Transfer of a data set's files into its folder, from a local archive or the best source."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import IO, Final, Literal

from tvit_cli import files
from tvit_cli.data import rar
from tvit_cli.data.archive_safety import Limits, Member, check_members
from tvit_cli.data.archives import (
    Unpacked,
    detect_kind,
    max_directory_bytes,
    store,
    unpack,
    zip_members,
)
from tvit_cli.data.catalog import Dataset, Layout, Part, Source, Spelling, choose, place_all
from tvit_cli.data.dataset_folder import Landing, Selection, SourceRecord
from tvit_cli.data.http import (
    OK,
    PARTIAL,
    Broken,
    Http,
    MirrorsFailed,
    Refused,
    fetch,
    file_sha256,
    is_fetched,
)
from tvit_cli.errors import DataError

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


WHOLE_BYTES: Final = (
    512 * 1024**2
)  # an archive up to this size is fetched whole even for a few of its members
BATCH_BYTES: Final = 64 * 1024**2  # members read singly that land together

Stage = Literal["fetch", "unpack", "check"]


@dataclass(frozen=True)
class Progress:
    """Bytes done of `total` (None: not known) in a stage of the work on `what`."""

    stage: Stage
    what: str
    done: int
    total: int | None


def no_progress(_: object) -> None:
    """A callback that nobody listens to."""


@dataclass(frozen=True)
class TransferTools:
    """What the caller hands in."""

    http: Http = field(default_factory=Http)
    limits: Limits = field(default_factory=Limits)
    free: files.FreeBytes = files.free_bytes
    progress: Callable[[Progress], None] = no_progress
    report: Callable[[str], None] = no_progress

    def stage(self, name: Stage, what: str) -> Callable[[int, int | None], None]:
        """A callback of (bytes done, bytes in all)."""
        return lambda done, total: self.progress(Progress(name, what, done, total))


@dataclass(frozen=True)
class PartRequest:
    """What is asked of a part: `paths`, where they are known, else what `selection` takes from a listing."""

    part: Part
    selection: Selection
    paths: frozenset[PurePosixPath] | None

    @property
    def is_few(self) -> bool:
        """Whether it may be less than the whole archive."""
        return self.paths is not None or not self.selection.is_whole


class _WholeOnly(Exception):
    """Single members cannot be had from a source, and all of it is too much for a few clips."""


@dataclass
class Transfer:
    """`listed` are all videos of the archives that were looked into, `received` the bytes that came."""

    dataset: Dataset
    landing: Landing
    tools: TransferTools
    spelling: Spelling = field(default_factory=Spelling)
    listed: list[PurePosixPath] = field(default_factory=list)
    received: int = 0

    @property
    def archives(self) -> Path:
        """Where whole archives are fetched to."""
        return self.landing.folder / "archives"

    def fill(self, wish: PartRequest, given: Path | None) -> None:
        """Take what is wished for from the user's archive, else from the first source that serves it."""
        if given is not None:
            self._from_given(wish, given)
            return
        reasons: list[tuple[str, str]] = []
        for source in wish.part.sources:
            try:
                if self._from_source(wish, source, reasons):
                    return
            except MirrorsFailed as error:
                reasons.extend(error.reasons)
            except (DataError, _WholeOnly) as error:
                reasons.append((source.urls[0], str(error)))
                self.tools.report(f"{source.urls[0]}: {error}")
        advice = (
            f"Try again later: what has come is kept. Or take the archive from {self.dataset.homepage} "
            "and give it with --archive (split lists: --splits-archive)."
        )
        raise MirrorsFailed(f"{self.dataset.name}: {wish.part.name}", reasons, advice=advice)

    def _from_source(self, wish: PartRequest, source: Source, reasons: list[tuple[str, str]]) -> bool:
        whole = self.archives / source.file_name
        if wish.is_few and source.kind == "zip" and not whole.exists():
            for url in source.urls:
                try:
                    if self._from_members(wish, source, url):
                        return True
                    break
                except (Refused, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
                    self.tools.report(f"{url}: {error}")
                    reasons.append((url, str(error)))
        size = source.bytes or self.dataset.unpacked_bytes or 0
        if not wish.selection.is_whole and size > WHOLE_BYTES and not whole.exists():
            raise _WholeOnly(
                f"a {source.kind.upper()} of {files.size_text(size)} for a few clips is too much; leave out "
                "--classes and --clips-per-class to fetch it whole"
            )
        self._from_whole(wish, source, whole)
        return True

    def _from_members(self, wish: PartRequest, source: Source, url: str) -> bool:
        """Read members singly; False where most are wanted, so that the whole archive is the better way."""
        limits = self.tools.limits
        remote = RemoteZip(
            url, http=self.tools.http, size=source.bytes, most_directory=max_directory_bytes(limits)
        )
        try:
            members = zip_members(remote.infos)
            check_members(members, archive=url, packed_bytes=remote.file.size, limits=limits)
            placed = self._plan(wish, source.layout, [member for member in members if member.kind == "file"])
            order = sorted(placed, key=lambda index: remote.infos[index].header_offset)
            packed = sum(remote.infos[index].compress_size for index in order)
            if wish.selection.is_whole and packed > remote.file.size / 2:
                return False
            need = sum(members[index].size for index in order)
            files.require_free(
                self.landing.folder, need, purpose=f"fetching from {url}", free=self.tools.free
            )
            record = SourceRecord(
                part=wish.part.name,
                url=url,
                bytes=remote.file.size,
                sha256=None,
                etag=remote.file.etag,
                verified=False,
            )
            done = 0
            for batch in _batches(order, members):
                chosen = {remote.infos[index]: (members[index], placed[index]) for index in batch}
                done = self._land_members(remote, chosen, record, done, need)
            return True
        finally:
            self.received += remote.received

    def _land_members(
        self,
        remote: RemoteZip,
        chosen: Mapping[zipfile.ZipInfo, tuple[Member, PurePosixPath]],
        record: SourceRecord,
        done: int,
        need: int,
    ) -> int:
        """Bytes done after this batch of members has landed."""
        new = self.landing.new_incoming()
        fetched = []
        note = self.tools.stage("fetch", record.part)
        with files.disk_full_errors(
            self.landing.folder, purpose=f"fetching from {record.url}", need=lambda: need - done
        ):
            for info, stream in remote.read(chosen):
                member, where = chosen[info]
                sha256 = store(stream, new / where, member, archive=record.url)
                fetched.append(Unpacked(where, member.name, member.size, sha256))
                done += member.size
                note(done, need)
            self.landing.accept(new)
            self.landing.land(fetched, record)
        return done

    def _from_whole(self, wish: PartRequest, source: Source, target: Path) -> None:
        if source.kind == "rar":
            rar.require_way()
        unpacked = self.dataset.unpacked_bytes or source.bytes or 0
        have = sum(file.stat().st_size for file in target.parent.glob("*") if file.is_file())
        need = max(0, (source.bytes or 0) + (0 if source.layout == "lists" else unpacked) - have)
        files.require_free(
            self.landing.folder, need, purpose=f"{source.file_name} with its files", free=self.tools.free
        )
        fetched = fetch(
            source.urls,
            target,
            size=source.bytes,
            sha256=source.sha256,
            http=self.tools.http,
            progress=self.tools.stage("fetch", source.file_name),
            report=self.tools.report,
            free=self.tools.free,
        )
        self.received += fetched.bytes_received
        record = SourceRecord(
            part=wish.part.name,
            url=fetched.url,
            bytes=fetched.bytes,
            sha256=fetched.sha256,
            etag=fetched.etag,
            verified=fetched.verified,
        )
        try:
            self._unpack(wish, target, source.layout, record)
        except DataError:
            if is_fetched(target, fetched.sha256):
                target.unlink()  # it would only be found wanting again
            raise

    def _from_given(self, wish: PartRequest, path: Path) -> None:
        """Unpack an archive that the user has; its hash must be a known one where all are known."""
        kind = detect_kind(path)
        sha256 = file_sha256(path, progress=self.tools.stage("check", path.name))
        sources = wish.part.sources
        source = next((one for one in sources if one.sha256 == sha256), None)
        if source is None and all(one.sha256 for one in sources):
            known = " or ".join(f"{one.sha256} ({one.file_name})" for one in sources)
            raise DataError(
                f"{path}: has sha256 {sha256}, {self.dataset.name} has {known}. The file is damaged or "
                "another version; fetch it again, or unpack it yourself and give `tvit train` the folder."
            )
        like = source or next((one for one in sources if one.kind == kind), sources[0])
        record = SourceRecord(
            part=wish.part.name,
            url=str(path),
            bytes=path.stat().st_size,
            sha256=sha256,
            etag=None,
            verified=source is not None,
        )
        self._unpack(wish, path, like.layout, record)

    def _unpack(self, wish: PartRequest, path: Path, layout: Layout, record: SourceRecord) -> None:
        fetched = unpack(
            path,
            self.landing.clear_incoming(),
            plan=lambda members: self._plan(wish, layout, members),
            limits=self.tools.limits,
            progress=self.tools.stage("unpack", path.name),
            free=self.tools.free,
        )
        self.landing.land(fetched, record)

    def _plan(self, wish: PartRequest, layout: Layout, members: Sequence[Member]) -> dict[int, PurePosixPath]:
        """Which members are wanted, and where each goes."""
        placed = place_all(members, layout, part=wish.part.name, spelling=self.spelling)
        if layout != "lists":
            self.listed.extend(placed.values())
        if wish.paths is None:
            chosen = choose(placed.values(), wish.selection)
        else:
            chosen = set(wish.paths)
            if lost := chosen - set(placed.values()):
                raise DataError(f"{len(lost)} of the wanted files are not in it, {min(lost)} among them")
        return {
            index: where
            for index, where in placed.items()
            if where in chosen and not self.landing.is_there(str(where))
        }


def _batches(indices: Sequence[int], members: Sequence[Member]) -> list[list[int]]:
    """Runs of members of about BATCH_BYTES each."""
    batches: list[list[int]] = []
    size = BATCH_BYTES
    for index in indices:
        if size >= BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(index)
        size += members[index].size
    return batches
