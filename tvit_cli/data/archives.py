"""Archives (ZIP, tar, RAR), listed, checked and unpacked into one folder.

Names and sizes are read and checked first (see `archive_safety`). The members are then written to a temporary
folder beside the target, counted against their declared sizes, and the complete folder is renamed. A killed process
leaves only the temporary folder, which the next one removes.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import io
import lzma
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final, Literal

from tvit_cli import files
from tvit_cli.data import rar
from tvit_cli.data.archive_safety import LIMITS, Kind, Limits, Member, check_members, kind_of_mode
from tvit_cli.errors import DataError, RunError, size_text
from tvit_cli.results import Progress, Report, silent

ArchiveKind = Literal["zip", "tar", "rar"]
Targets = dict[int, PurePosixPath]  # target path of each member to unpack, by its index
Plan = Callable[[Sequence[Member]], Targets]

CHUNK_BYTES: Final = 256 * 1024
ENTRY_BYTES: Final = 200  # generous mean of a ZIP directory entry; bounds the directory in memory
HEADER_BYTES: Final = 1024**2  # limit of one tar header with its PAX records, which tarfile reads whole
_WORK: Final = re.compile(r"(tree|raw)/.+|raw\.txt")
# First bytes and reader of compressed tars. ucf101-subset's "tar.gz" is a plain tar.
COMPRESSED: Final[dict[bytes, Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_FORMAT_ERRORS = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error)
DAMAGED: Final = (*_FORMAT_ERRORS, EOFError, NotImplementedError, ValueError)


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A written file: `path` in the target folder, `member` its name in the archive."""

    path: PurePosixPath
    member: str
    bytes: int
    sha256: str


def detect_kind(path: Path) -> ArchiveKind:
    """Kind of an archive by its first bytes, whatever its name. Raises DataError."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if head.startswith(b"Rar!\x1a\x07"):
        return "rar"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(tuple(COMPRESSED)):
        return "tar"
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        shown = head[:24].decode("latin-1").strip()
        hint = " The server sent a page, not the file." if head.lstrip()[:1] == b"<" else ""
        raise DataError(f"{path}: is no ZIP, tar or RAR archive (it starts with {shown!r}).{hint}") from error
    return "tar"


def unpack(
    path: Path, target: Path, *, plan: Plan | None = None, limits: Limits = LIMITS, report: Report = silent
) -> list[Unpacked]:
    """Unpacks an archive to the new folder `target`; without a `plan`, all files under their own names.

    Raises DataError for a damaged or unsafe archive, RunError if the disk is too small; no `target` is left then.
    """
    temporary = target.with_name(f".{target.name}.unpacking")
    files.remove_work(temporary, _WORK)
    if target.exists():
        raise DataError(f"{target}: already exists; archives are unpacked to new folders only. Move it away.")
    with _open(path, limits) as archive:
        members = archive.members
        check_members(members, archive=str(path), packed_bytes=path.stat().st_size, limits=limits)
        regular = [member for member in members if member.kind == "file"]
        paths = plan(regular) if plan else {member.index: member.path for member in regular}
        chosen = [member for member in regular if member.index in paths]
        need, done, purpose = sum(member.size for member in chosen), 0, f"unpacking {path.name}"
        unpacked: list[Unpacked] = []
        files.require_free(target.parent, need, purpose=purpose)
        (temporary / "tree").mkdir(parents=True)
        try:
            with files.disk_full_errors(target.parent, purpose=purpose, need=lambda: need - done):
                for member, content in archive.read(chosen, temporary / "raw"):
                    new = temporary / "tree" / paths[member.index]
                    if isinstance(content, Path):  # written by a RAR reader
                        with content.open("rb+") as file:
                            files.sync(file.fileno())
                        new.parent.mkdir(parents=True, exist_ok=True)
                        content.rename(new)
                        sha256 = files.sha256(new)
                    else:
                        sha256 = store(content, new, member, archive=path)
                    unpacked.append(Unpacked(paths[member.index], member.name, member.size, sha256))
                    done += member.size
                    report(Progress(f"unpack {path.name}", done, need, "bytes"))
                if len(unpacked) != len(chosen):
                    raise EOFError(f"{len(unpacked)} of {len(chosen)} files are readable")
                files.rename(temporary / "tree", target)
        finally:
            files.remove_work(temporary, _WORK)
    return unpacked


def store(stream: IO[bytes], path: Path, member: Member, *, archive: Path | str) -> str:
    """Writes a member to the new file `path` and returns its sha256. Raises DataError for a wrong declared size."""
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
        raise DataError(f"{archive}: {member.name!r} holds {more} than the {member.size} bytes it declares")
    return digest.hexdigest()


def zip_members(infos: Sequence[zipfile.ZipInfo]) -> list[Member]:
    """Entries of a ZIP directory as members."""
    return [
        Member(
            index=index,
            name=info.orig_filename,  # `filename` is cut at a NUL
            size=info.file_size,
            kind=kind_of_mode(info.external_attr >> 16, folder=info.filename.endswith("/")),
            packed=info.compress_size,
            encrypted=bool(info.flag_bits & 1),
        )
        for index, info in enumerate(infos)
    ]


def max_directory_bytes(limits: Limits) -> int:
    """Size limit of a ZIP's directory."""
    return max(limits.members * ENTRY_BYTES, 4 * CHUNK_BYTES)


@contextmanager
def _open(path: Path, limits: Limits) -> Iterator[_Zip | _Tar | rar.Rar]:
    """An open archive; errors of the standard library about damaged archives become a DataError."""
    kind = detect_kind(path)
    try:
        if kind == "rar":
            with rar.open_rar(path, limits) as archive:
                yield archive
        elif kind == "tar":
            yield _Tar(path, limits)
        else:
            with (
                _Bounded(path.open("rb"), path, max_directory_bytes(limits)) as file,
                zipfile.ZipFile(file) as directory,
            ):
                yield _Zip(directory)
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # gzip and bz2 set none for bad data
            if error.errno in files.FULL:
                raise
            raise RunError(f"{path}: {error.strerror} ({error.filename or 'while unpacking'})") from error
        raise DataError(f"{path}: is damaged ({error}). Fetch it again, or take another copy.") from error


class _Zip:
    def __init__(self, directory: zipfile.ZipFile) -> None:
        self._zip = directory
        self.members = zip_members(directory.infolist())

    def read(self, chosen: Sequence[Member], _: Path) -> Iterator[tuple[Member, IO[bytes]]]:
        infos = self._zip.infolist()
        for member in chosen:
            with self._zip.open(infos[member.index]) as stream:
                yield member, stream


class _Tar:
    """A tar, read twice: to list its entries, then to unpack them."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path = path
        self.members: list[Member] = []
        total = 0
        with self._opened() as tar:
            for info in _entries(tar):
                self.members.append(Member(len(self.members), info.name, info.size, _tar_kind(info)))
                total += info.size
                sizes = (len(self.members), info.size, total)
                most = (limits.members, limits.member_bytes, limits.total_bytes)
                if any(size > limit for size, limit in zip(sizes, most, strict=True)):
                    return  # `check_members` will refuse it, so the rest is not even decompressed
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                # tarfile takes a broken header for the end
                raise tarfile.ReadError(f"no end mark after {len(self.members)} entries")

    def read(self, chosen: Sequence[Member], _: Path) -> Iterator[tuple[Member, IO[bytes]]]:
        wanted = {member.index: member for member in chosen}
        with self._opened() as tar:
            for index, info in enumerate(_entries(tar)):
                if (member := wanted.pop(index, None)) is not None:
                    stream = tar.extractfile(info) if _tar_kind(info) == "file" else None
                    if stream is None or info.name != member.name:
                        raise tarfile.ReadError("it changed during the read")
                    with stream:
                        yield member, stream
                if not wanted:
                    return

    @contextmanager
    def _opened(self) -> Iterator[tarfile.TarFile]:
        with self._path.open("rb") as file:
            head = file.read(6)
        opener = next((opener for magic, opener in COMPRESSED.items() if head.startswith(magic)), Path.open)
        with (
            _Bounded(opener(self._path, "rb"), self._path, HEADER_BYTES) as bounded,
            tarfile.open(fileobj=bounded, mode="r:", errorlevel=2) as tar,
        ):
            yield tar


def _entries(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (info := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
        yield info


def _tar_kind(info: tarfile.TarInfo) -> Kind:
    if info.issym() or info.islnk():
        return "link"
    if info.isdir():
        return "dir"
    return "file" if info.isreg() and not info.issparse() else "special"


class _Bounded(io.RawIOBase):
    """A file with a limit on the bytes of one read, since a header may declare any size."""

    def __init__(self, file: IO[bytes], path: Path, limit: int) -> None:
        super().__init__()
        self._file, self._path, self._limit = file, path, limit

    def read(self, size: int | None = -1) -> bytes:
        size = self._limit if size is None or size < 0 else size
        if size > self._limit:
            found = f"its directory or a header has {size_text(size)}, limit {size_text(self._limit)}"
            raise DataError(f"{self._path}: {found}. Nothing was unpacked; take another source.")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, OverflowError) as error:
            if getattr(error, "errno", errno.EINVAL) != errno.EINVAL:
                raise
            # Without errno: the archive is damaged, not the disk.
            raise OSError(f"it refers to the offset {offset}, outside of the file") from error

    def close(self) -> None:
        self._file.close()
        super().close()
