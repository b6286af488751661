"""Hostile archives: ZIP, tar, RAR4 and RAR5 with stored members and any header."""

import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """A member: `mode` is its Unix mode, `data` its bytes or a link's target, `declared` its claimed size."""

    name: str
    data: bytes = b"data"
    mode: int = 0o100644
    declared: int | None = None
    encrypted: bool = False
    hard_link: bool = False

    @property
    def size(self) -> int:
        return len(self.data) if self.declared is None else self.declared


def write_zip(path: Path, entries: Sequence[Entry]) -> None:
    """A ZIP in which names and sizes are what the entries say, true or not."""
    body, directory = bytearray(), bytearray()
    for entry in entries:
        name = entry.name.encode("utf-8", "surrogateescape")
        common = struct.pack(
            "<HHHHHIIIHH",
            *(20, 0x800 | entry.encrypted, 0, 0, 0x21, zlib.crc32(entry.data)),
            *(len(entry.data), entry.size, len(name), 0),
        )
        directory += b"PK\x01\x02" + struct.pack("<H", 0x0314) + common
        directory += struct.pack("<HHHII", 0, 0, 0, entry.mode << 16, len(body)) + name
        body += b"PK\x03\x04" + common + name + entry.data
    end = struct.pack("<HHHHIIH", 0, 0, len(entries), len(entries), len(directory), len(body), 0)
    path.write_bytes(body + directory + b"PK\x05\x06" + end)


def write_tar(path: Path, entries: Sequence[Entry]) -> None:
    """A tar; a member that declares more than it has makes the archive end early."""
    types = {stat.S_IFLNK: tarfile.SYMTYPE, stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFCHR: tarfile.CHRTYPE}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.mode = stat.S_IMODE(entry.mode)
            info.type = (
                tarfile.LNKTYPE if entry.hard_link else types.get(stat.S_IFMT(entry.mode), tarfile.REGTYPE)
            )
            if info.type == tarfile.REGTYPE:
                info.size = len(entry.data)
            elif info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = entry.data.decode()
            stream = io.BytesIO(entry.data)
            if info.isreg() and entry.declared is not None:
                info.size = entry.declared
                archive.fileobj.write(info.tobuf(archive.format))  # type: ignore[union-attr]
                archive.fileobj.write(entry.data.ljust(-(-len(entry.data) // 512) * 512, b"\0"))  # type: ignore[union-attr]
            else:
                archive.addfile(info, stream if info.isreg() else None)


def write_rar4(path: Path, entries: Sequence[Entry], *, locked: bool = False, host: int = 3) -> None:
    """A RAR 2.9 archive of stored members; `locked`: its headers are encrypted, `host`: 3 Unix, 2 Windows."""

    def block(kind: int, flags: int, fields: bytes) -> bytes:
        head = struct.pack("<BHH", kind, flags, 7 + len(fields)) + fields
        return struct.pack("<H", zlib.crc32(head) & 0xFFFF) + head

    out = bytearray(b"Rar!\x1a\x07\x00" + block(0x73, 0x80 if locked else 0, bytes(6)))
    for entry in entries:
        name = entry.name.encode("utf-8", "surrogateescape")
        directory = 0xE0 if stat.S_ISDIR(entry.mode) else 0
        fields = struct.pack(
            "<IIBIIBBHI",
            *(len(entry.data), entry.size & 0xFFFFFFFF, host, zlib.crc32(entry.data), 0x21),
            *(20, 0x30, len(name), entry.mode),
        )
        out += block(0x74, 0x8000 | directory | (0x04 if entry.encrypted else 0), fields + name) + entry.data
    path.write_bytes(out + block(0x7B, 0x4000, b""))


def write_rar5(path: Path, entries: Sequence[Entry]) -> None:
    """A RAR 5 archive of stored members; links are its redirection records."""

    def number(value: int) -> bytes:
        out = bytearray()
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*out, value])

    def block(kind: int, fields: bytes, *, extra: bytes = b"", data: bytes | None = None) -> bytes:
        flags = (1 if extra else 0) | (2 if data is not None else 0)
        head = number(kind) + number(flags)
        head += number(len(extra)) if extra else b""
        head += number(len(data)) if data is not None else b""
        head += fields + extra
        head = number(len(head)) + head
        return struct.pack("<I", zlib.crc32(head)) + head + (data or b"")

    out = bytearray(b"Rar!\x1a\x07\x01\x00" + block(1, number(0)))
    for entry in entries:
        name = entry.name.encode("utf-8", "surrogateescape")
        link = 4 if entry.hard_link else 1 if stat.S_ISLNK(entry.mode) else 0
        data = b"" if link else entry.data
        extra = b""
        if link:
            record = number(5) + number(link) + number(0) + number(len(entry.data)) + entry.data
            extra = number(len(record)) + record
        size = 0 if link else entry.size
        fields = number(5 if stat.S_ISDIR(entry.mode) else 4) + number(size) + number(entry.mode)
        fields += struct.pack("<I", zlib.crc32(data)) + number(0) + number(1) + number(len(name)) + name
        out += block(2, fields, extra=extra, data=data)
    path.write_bytes(out + block(5, number(0)))


WRITERS: dict[str, Callable[[Path, Sequence[Entry]], None]] = {
    "zip": write_zip, "tar": write_tar, "rar4": write_rar4, "rar5": write_rar5,
}  # fmt: skip


def deflated_zeros(path: Path, name: str, size: int) -> None:
    """A ZIP with one member of zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w") as file:
        for _ in range(size // 2**20):
            file.write(bytes(2**20))
