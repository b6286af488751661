"""Safety checks on archive members, made before a byte is unpacked."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import re
import stat
import tarfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Final, Literal, cast

from tvit_cli.errors import DataError
from tvit_cli.files import size_text

Kind = Literal["file", "dir", "link", "special"]

RATIO_FLOOR_BYTES: Final = 1024**2  # small texts may shrink as far as they like
MAX_NAME_BYTES: Final = 255  # of one part of a path; the limit of ext4, APFS, NTFS
MAX_PATH_BYTES: Final = 1024
# Names that Windows keeps for devices, whatever their suffix.
RESERVED: Final = frozenset(
    ["con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in "123456789¹²³")]
)
UNWRITABLE: Final = re.compile(r'[<>:"|?*\\]')  # no file of these on Windows; ":" and "\" can lead elsewhere


@dataclass(frozen=True, slots=True)
class Limits:
    """How much an archive may hold. UCF101: 13,320 files, 7 GB, ratio 1.02; Kinetics parts: 1.5 GB each."""

    members: int = 100_000
    member_bytes: int = 8 * 1024**3
    total_bytes: int = 256 * 1024**3
    ratio: float = 100.0  # unpacked over packed, beyond 1 MiB; zeros reach 1,030 in a ZIP


@dataclass(frozen=True, slots=True)
class Member:
    """One entry as the archive declares it: `name` as it is spelt, sizes in bytes (None: not told)."""

    index: int
    name: str
    size: int
    kind: Kind = "file"
    packed: int | None = None
    encrypted: bool = False
    crc32: int | None = None

    @property
    def path(self) -> PurePosixPath:
        """The name without "./" and a last "/"; safe only after `check_members`."""
        return PurePosixPath(self.name)


def check_members(
    members: Sequence[Member], *, archive: str, packed_bytes: int | None, limits: Limits | None = None
) -> None:
    """Raise DataError, naming the member and the reason, if an archive cannot be unpacked without harm.

    Refused: absolute names, drive letters, "..", links, devices, control characters, names that some system
    cannot hold, two names that one of Windows, macOS and Linux takes for the same, encryption, and more
    members or bytes than `limits` allow. `packed_bytes` is the size of the archive itself.
    """
    limits = limits or Limits()
    if len(members) > limits.members:
        raise _refused(archive, f"more than {limits.members:,} members")
    total = 0
    seen: dict[str, tuple[str, Kind]] = {}
    for member in members:
        reason = _bad_name(member.name) or _bad_kind(member) or _bad_size(member, limits)
        reason = reason or _collision(member, seen)
        if reason:
            raise _refused(archive, f"member {member.name[:200]!r} {reason}")
        total += member.size
    if total > limits.total_bytes:
        raise _refused(archive, f"{size_text(total)} unpacked, limit {size_text(limits.total_bytes)}")
    if packed_bytes is not None and total > max(RATIO_FLOOR_BYTES, packed_bytes * limits.ratio):
        raise _refused(
            archive, f"{size_text(total)} out of {size_text(packed_bytes)}, limit {limits.ratio:g} times"
        )
    packed = sum(member.packed or 0 for member in members)
    if packed_bytes is not None and packed > packed_bytes:
        raise _refused(archive, f"members of {packed} bytes in an archive of {packed_bytes}: they overlap")


def normalized_name(path: PurePosixPath | str) -> str:
    """The spelling under which names are the same on some file system: case and Unicode form set aside."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKD", str(path)).casefold())


def kind_of_mode(mode: int, *, folder: bool) -> Kind:
    """Kind by the Unix mode that an archive stores; 0 where it was made on another system."""
    form = stat.S_IFMT(mode)
    if form == stat.S_IFLNK:
        return "link"
    if form not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "special"
    return "dir" if folder or form == stat.S_IFDIR else "file"


def _refused(archive: str, what: str) -> DataError:
    return DataError(
        f"{archive}: {what}. Nothing was unpacked; take the archive from another source, "
        "or unpack it yourself if you trust it."
    )


def _bad_name(name: str) -> str | None:
    path = PurePosixPath(name)
    if not name:
        return "has no name"
    if name.startswith("/"):
        return "has an absolute name"
    if ".." in path.parts:
        return 'leads out of the folder by ".."'
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        return "has a control character in its name"
    if found := UNWRITABLE.search(name):
        return f"has {found.group()!r} in its name, as drive letters and foreign separators have"
    if len(name.encode()) > MAX_PATH_BYTES or any(len(part.encode()) > MAX_NAME_BYTES for part in path.parts):
        return f"has a name longer than {MAX_NAME_BYTES} bytes (whole path: {MAX_PATH_BYTES})"
    for part in path.parts:
        if part != part.rstrip(". "):
            return "has a name that ends in a dot or a space"
        if part.split(".")[0].rstrip().casefold() in RESERVED:
            return "has the name of a device on Windows"
    return None


def _bad_kind(member: Member) -> str | None:
    if member.kind == "link":
        return "is a link"
    if member.kind == "special":
        return "is neither a file nor a folder"
    if member.encrypted:
        return "is encrypted"
    return None


def _bad_size(member: Member, limits: Limits) -> str | None:
    if member.size < 0 or member.size > limits.member_bytes:
        return f"has {size_text(member.size)} unpacked, limit {size_text(limits.member_bytes)}"
    if member.packed is not None and member.size > max(RATIO_FLOOR_BYTES, member.packed * limits.ratio):
        return f"unpacks {member.packed} bytes to {member.size}, limit {limits.ratio:g} times"
    return None


def _collision(member: Member, seen: dict[str, tuple[str, Kind]]) -> str | None:
    """What `member` would be written over; `seen` grows by it and its folders."""
    path = member.path
    for parent in reversed(path.parents[:-1]):
        spelt, kind = seen.setdefault(normalized_name(parent), (str(parent), "dir"))
        if kind != "dir" or spelt != str(parent):
            return f"lies in a folder that collides with {spelt!r}"
    key = normalized_name(path)
    if key not in seen:
        seen[key] = (str(path), member.kind)
        return None
    if member.kind == "dir" and seen[key] == (str(path), "dir"):
        return None  # a folder may be listed after its files, or twice
    return f"collides with {seen[key][0]!r}"


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
