"""Tar archives, plain or compressed, read entry by entry within bounds."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Final, cast

from tvit_cli.data.remote.disk import size_text
from tvit_cli.data.remote.members import Kind, Limits, Member
from tvit_cli.errors import DataError

MOST_HEADER_BYTES: Final = 1024**2  # of one header with its PAX records; tarfile reads them whole
# First bytes, and what reads such a file. A name proves nothing: ucf101-subset's "tar.gz" is a plain tar.
COMPRESSED: Final[dict[bytes, Callable[[Path], object]]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}


class Tar:
    """A tar file; it is read twice, since its entries are found only one after the other."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path = path
        with self._opened() as tar:
            self.members, whole = list_entries(tar, limits)
            if whole:
                self._require_end(tar)

    def read(self, chosen: Sequence[Member], raw: Path) -> Iterator[tuple[Member, IO[bytes]]]:
        with self._opened() as tar:
            yield from read_entries(tar, chosen)

    def close(self) -> None:
        """Nothing stays open between the two passes."""

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tarfile.TarFile]:
        with self._path.open("rb") as file:
            head = file.read(6)
        opener = next((way for magic, way in COMPRESSED.items() if head.startswith(magic)), None)
        stream = cast(IO[bytes], opener(self._path) if opener else self._path.open("rb"))
        with (
            Bounded(stream, self._path, most_read=MOST_HEADER_BYTES) as bounded,
            tarfile.open(fileobj=bounded, mode="r:", errorlevel=2) as tar,
        ):
            yield tar

    def _require_end(self, tar: tarfile.TarFile) -> None:
        """Raise ReadError where no end mark follows: tarfile takes a broken header for the end."""
        if tar.fileobj is not None:
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end mark after {len(self.members)} entries")


def list_entries(tar: tarfile.TarFile, limits: Limits) -> tuple[list[Member], bool]:
    """Entries of a tar up to the first that makes it too large, and whether these are all.

    What lies behind an entry that `check_members` will refuse is not even decompressed.
    """
    members: list[Member] = []
    total = 0
    while (info := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
        members.append(Member(len(members), info.name, info.size, _kind(info)))
        total += info.size
        if len(members) > limits.members or info.size > limits.member_bytes or total > limits.total_bytes:
            return members, False
    return members, True


def read_entries(tar: tarfile.TarFile, chosen: Sequence[Member]) -> Iterator[tuple[Member, IO[bytes]]]:
    """Chosen members as open files, in the order of the tar."""
    wanted = {member.index: member for member in chosen}
    index = 0
    while wanted and (info := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        member = wanted.pop(index, None)
        index += 1
        if member is None:
            continue
        stream = tar.extractfile(info) if _kind(info) == "file" else None
        if stream is None or info.name != member.name:
            raise DataError(f"{member.name!r}: the archive changed while it was read")
        with stream:
            yield member, stream


def _kind(info: tarfile.TarInfo) -> Kind:
    if info.issym() or info.islnk():
        return "link"
    if info.isdir():
        return "dir"
    return "file" if info.isreg() and not info.issparse() else "special"


class Bounded(io.RawIOBase):
    """A file that is not read in pieces larger than `most_read`: a header may lie about its own size."""

    def __init__(self, file: IO[bytes], path: Path, *, most_read: int) -> None:
        super().__init__()
        self._file, self._path, self._most_read = file, path, most_read

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = self._most_read
        if size > self._most_read:
            raise DataError(
                f"{self._path}: its directory or a header has {size_text(size)}, "
                f"limit {size_text(self._most_read)}. Nothing was unpacked; take another source."
            )
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
