"""Archives (ZIP, tar, RAR): listed and unpacked inside one folder, or not at all.

Names and sizes are read first and refused as `data.remote.members` tells; then tvit writes file by file
itself (RAR through pybit7z: into an empty folder, then looked at), counted against the declared sizes, into
a folder beside the target, which is renamed when all is there. A process that is killed leaves only that
folder, and the next one removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import lzma
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Final, Literal

from tvit_cli import files
from tvit_cli.data import archive_safety, rar
from tvit_cli.data.archive_safety import Limits, Member, check_members, kind_of_mode
from tvit_cli.errors import DataError, RunError

ArchiveKind = Literal["zip", "tar", "rar"]
Progress = Callable[[int, int | None], None]  # bytes unpacked, bytes in all
# Which members are wanted, by index, and where each one goes in the target folder.
Plan = Callable[[Sequence[Member]], Mapping[int, PurePosixPath]]

CHUNK_BYTES: Final = 256 * 1024
_WORK: Final = re.compile(r"(tree|raw)/.+")
ENTRY_BYTES: Final = 200  # generous mean of a ZIP directory entry; bounds what is read into memory
DAMAGED: Final = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    struct.error,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A file that was written: `path` in the target folder, `member` its name in the archive."""

    path: PurePosixPath
    member: str
    bytes: int
    sha256: str


def detect_kind(path: Path) -> ArchiveKind:
    """What an archive is by its first bytes; its name proves nothing. Raises DataError."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if head.startswith(b"Rar!\x1a\x07"):
        return "rar"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(tuple(archive_safety.COMPRESSED)):
        return "tar"
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        shown = head[:24].decode("latin-1").strip()
        hint = " The server sent a page in its place." if head.lstrip()[:1] == b"<" else ""
        raise DataError(f"{path}: is no ZIP, tar or RAR archive (it starts with {shown!r}).{hint}") from error
    return "tar"


def unpack(
    path: Path,
    target: Path,
    *,
    plan: Plan | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
    free: files.FreeBytes = files.free_bytes,
) -> list[Unpacked]:
    """Unpack an archive into the new folder `target`; without a `plan`, all files under their own names.

    Raises DataError where the archive is damaged or hostile, RunError where the disk is too small; `target`
    does not exist then.
    """
    limits = limits or Limits()
    beside = target.with_name(f".{target.name}.unpacking")
    files.remove_work(beside, _WORK)
    if target.exists():
        raise DataError(f"{target}: is already there; an archive is unpacked into a new folder only")
    with _opened(path, limits) as archive:
        members = archive.members
        check_members(members, archive=str(path), packed_bytes=path.stat().st_size, limits=limits)
        regular = [member for member in members if member.kind == "file"]
        placed = dict(plan(regular)) if plan else {member.index: member.path for member in regular}
        chosen = [member for member in regular if member.index in placed]
        need = sum(member.size for member in chosen)
        files.require_free(target.parent, need, purpose=f"unpacking {path.name}", free=free)
        (beside / "tree").mkdir(parents=True)
        done: list[Unpacked] = []
        written = 0
        try:
            with files.disk_full_errors(
                target.parent, purpose=f"unpacking {path.name}", need=lambda: need - written
            ):
                for member, content in archive.read(chosen, beside / "raw"):
                    where = placed[member.index]
                    sha256 = _land(content, beside / "tree" / where, member, archive=path)
                    done.append(Unpacked(where, member.name, member.size, sha256))
                    written += member.size
                    if progress:
                        progress(written, need)
                if len(done) != len(chosen):
                    raise DataError(
                        f"{path}: {len(done)} of {len(chosen)} files could be read; it is damaged"
                    )
                files.rename(beside / "tree", target)
        finally:
            files.remove_work(beside, _WORK)
    return done


def store(stream: rar.Readable, path: Path, member: Member, *, archive: Path | str) -> str:
    """Write a member's bytes to the new file `path`; its sha256. Raises DataError where the size is a lie."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    left = member.size
    with path.open("xb") as file:
        while chunk := stream.read(min(CHUNK_BYTES, left + 1)):
            left -= len(chunk)
            if left < 0:
                break
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        files.sync(file.fileno())
    if left:
        more = "more" if left < 0 else "fewer"
        raise DataError(
            f"{archive}: member {member.name!r} holds {more} than the {member.size} bytes it declares"
        )
    return digest.hexdigest()


def zip_members(infos: Sequence[zipfile.ZipInfo]) -> list[Member]:
    """Entries of a ZIP directory as members."""
    return [
        Member(
            index=index,
            name=info.orig_filename,  # `filename` is cut at a NUL
            size=info.file_size,
            kind=kind_of_mode(info.external_attr >> 16, folder=info.is_dir()),
            packed=info.compress_size,
            encrypted=bool(info.flag_bits & 1),
            crc32=info.CRC,
        )
        for index, info in enumerate(infos)
    ]


def max_directory_bytes(limits: Limits) -> int:
    """Most bytes that a ZIP's directory may have."""
    return max(limits.members * ENTRY_BYTES, 4 * CHUNK_BYTES)


def _land(content: rar.Readable | Path, path: Path, member: Member, *, archive: Path) -> str:
    """Write a stream, or move a file that pybit7z has written, to its place."""
    if not isinstance(content, Path):
        return store(content, path, member, archive=archive)
    with content.open("rb+") as file:
        files.sync(file.fileno())
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if size != member.size:
        raise DataError(f"{archive}: member {member.name!r} holds {size} bytes, it declares {member.size}")
    path.parent.mkdir(parents=True, exist_ok=True)
    content.rename(path)
    return sha256


def _opened(path: Path, limits: Limits) -> AbstractContextManager[_Zip | archive_safety.Tar | rar.Rar]:
    kind = detect_kind(path)
    if kind == "rar":
        return rar.opened(path, limits)
    return _std_opened(_Zip if kind == "zip" else archive_safety.Tar, path, limits)


@contextlib.contextmanager
def _std_opened(
    form: type[_Zip] | type[archive_safety.Tar], path: Path, limits: Limits
) -> Iterator[_Zip | archive_safety.Tar]:
    """An open ZIP or tar; what the standard library raises on damage becomes a DataError."""
    try:
        with contextlib.closing(form(path, limits)) as archive:
            yield archive
    except DAMAGED as error:
        raise DataError(f"{path}: is damaged ({error}). Fetch it again, or take another copy.") from error
    except OSError as error:
        if error.errno in files.FULL:
            raise
        if error.errno is None:  # gzip and bz2 say so where the data are bad
            raise DataError(f"{path}: is damaged ({error}). Fetch it again, or take another copy.") from error
        raise RunError(f"{path}: {error.strerror} ({error.filename or 'while unpacking'})") from error


class _Zip:
    def __init__(self, path: Path, limits: Limits) -> None:
        self._file = archive_safety.Bounded(path.open("rb"), path, most_read=max_directory_bytes(limits))
        try:
            self._zip = zipfile.ZipFile(self._file)
        except BaseException:
            self._file.close()
            raise
        self.members = zip_members(self._zip.infolist())

    def read(self, chosen: Sequence[Member], raw: Path) -> Iterator[tuple[Member, IO[bytes]]]:
        infos = self._zip.infolist()
        for member in chosen:
            with self._zip.open(infos[member.index]) as stream:
                yield member, stream

    def close(self) -> None:
        self._zip.close()
        self._file.close()
