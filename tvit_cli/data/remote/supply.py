"""Brings wished files of a part of a data set into its folder: from a given archive, or the best source."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from tvit_cli.data.remote import disk, rar
from tvit_cli.data.remote.archive import Unpacked, detect_kind, most_directory, store, unpack, zip_members
from tvit_cli.data.remote.catalog import Dataset, Layout, Part, Source
from tvit_cli.data.remote.fetch import MirrorsFailed, fetch, file_sha256, is_fetched
from tvit_cli.data.remote.http import Http, Refused
from tvit_cli.data.remote.landing import Landing
from tvit_cli.data.remote.manifest import Selection, SourceRecord
from tvit_cli.data.remote.members import Limits, Member, check_members
from tvit_cli.data.remote.placement import Spelling, choose, place_all
from tvit_cli.data.remote.remotezip import RemoteZip
from tvit_cli.errors import DataError

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


def quiet(_: object) -> None:
    """A callback that nobody listens to."""


@dataclass(frozen=True)
class Tools:
    """What the caller hands in."""

    http: Http = field(default_factory=Http)
    limits: Limits = field(default_factory=Limits)
    free: disk.FreeBytes = disk.free_bytes
    progress: Callable[[Progress], None] = quiet
    report: Callable[[str], None] = quiet

    def stage(self, name: Stage, what: str) -> Callable[[int, int | None], None]:
        """A callback of (bytes done, bytes in all)."""
        return lambda done, total: self.progress(Progress(name, what, done, total))


@dataclass(frozen=True)
class Wish:
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
class Supply:
    """`listed` are all videos of the archives that were looked into, `received` the bytes that came."""

    dataset: Dataset
    landing: Landing
    tools: Tools
    spelling: Spelling = field(default_factory=Spelling)
    listed: list[PurePosixPath] = field(default_factory=list)
    received: int = 0

    @property
    def archives(self) -> Path:
        """Where whole archives are fetched to."""
        return self.landing.folder / "archives"

    def fill(self, wish: Wish, given: Path | None) -> None:
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

    def _from_source(self, wish: Wish, source: Source, reasons: list[tuple[str, str]]) -> bool:
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
                f"a {source.kind.upper()} of {disk.size_text(size)} for a few clips is too much; leave out "
                "--classes and --clips-per-class to fetch it whole"
            )
        self._from_whole(wish, source, whole)
        return True

    def _from_members(self, wish: Wish, source: Source, url: str) -> bool:
        """Read members singly; False where most are wanted, so that the whole archive is the better way."""
        limits = self.tools.limits
        remote = RemoteZip(
            url, http=self.tools.http, size=source.bytes, most_directory=most_directory(limits)
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
            disk.require_free(self.landing.folder, need, purpose=f"fetching from {url}", free=self.tools.free)
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
        files = []
        note = self.tools.stage("fetch", record.part)
        with disk.full_disk_named(
            self.landing.folder, purpose=f"fetching from {record.url}", need=lambda: need - done
        ):
            for info, stream in remote.read(chosen):
                member, where = chosen[info]
                sha256 = store(stream, new / where, member, archive=record.url)
                files.append(Unpacked(where, member.name, member.size, sha256))
                done += member.size
                note(done, need)
            self.landing.accept(new)
            self.landing.land(files, record)
        return done

    def _from_whole(self, wish: Wish, source: Source, target: Path) -> None:
        if source.kind == "rar":
            rar.require_way()
        unpacked = self.dataset.unpacked_bytes or source.bytes or 0
        have = sum(file.stat().st_size for file in target.parent.glob("*") if file.is_file())
        need = max(0, (source.bytes or 0) + (0 if source.layout == "lists" else unpacked) - have)
        disk.require_free(
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

    def _from_given(self, wish: Wish, path: Path) -> None:
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

    def _unpack(self, wish: Wish, path: Path, layout: Layout, record: SourceRecord) -> None:
        files = unpack(
            path,
            self.landing.clear_incoming(),
            plan=lambda members: self._plan(wish, layout, members),
            limits=self.tools.limits,
            progress=self.tools.stage("unpack", path.name),
            free=self.tools.free,
        )
        self.landing.land(files, record)

    def _plan(self, wish: Wish, layout: Layout, members: Sequence[Member]) -> dict[int, PurePosixPath]:
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
