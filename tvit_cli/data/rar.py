"""RAR archives, read by pybit7z (extra `tvit[rar]`) or by a tool on the PATH that can.

Tools write no file: 7-Zip prints the members one after the other, bsdtar turns the archive into a tar stream,
and tvit cuts them apart. pybit7z writes members that were listed and found harmless into an empty folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Final, Protocol

from tvit_cli.data import archive_safety
from tvit_cli.data.archive_safety import Kind, Limits, Member, kind_of_mode
from tvit_cli.errors import DataError

RAR5: Final = b"Rar!\x1a\x07\x01\x00"
UNIX_MODE: Final = 0x8000  # bit of 7-Zip's attributes: the upper half is a Unix mode
REPARSE_POINT: Final = 0x400  # bit of Windows' attributes: a link
SEVEN_ZIPS: Final = ("7zz", "7z", "7za")
BSDTARS: Final = ("bsdtar", "tar")
PADDING_BYTES: Final = 64 * 1024  # more than a tar stream may have after its end
ADVICE: Final = (
    'To unpack RAR, install the extra: python -m pip install "tvit[rar]" (or put 7-Zip\'s 7zz on the PATH).'
)


class Rar(Protocol):
    """An open RAR: its members, and the bytes of chosen ones in the order of the archive."""

    members: list[Member]

    def read(self, chosen: Sequence[Member], raw: Path) -> Iterator[tuple[Member, Readable | Path]]:
        """Bytes as a stream, or as a file under the new folder `raw`."""


class Readable(Protocol):
    """What bytes are read from."""

    def read(self, size: int = -1, /) -> bytes: ...


class CannotRead(Exception):
    """One way of reading did not work; another may."""


Way = Callable[[Path, Limits], AbstractContextManager[Rar]]


def ways() -> dict[str, Way]:
    """What can read RAR on this machine, by name, best first."""
    found: dict[str, Way] = {}
    if importlib.util.find_spec("pybit7z"):
        found["pybit7z"] = _library
    for name in SEVEN_ZIPS:
        if tool := shutil.which(name):
            found[name] = lambda path, limits, tool=tool: _seven_zip(tool, path)  # type: ignore[misc]
    for name in BSDTARS:
        if (tool := shutil.which(name)) and _is_bsdtar(tool):
            found[name] = lambda path, limits, tool=tool: _bsdtar(tool, path, limits)  # type: ignore[misc]
    return found


def require_way() -> None:
    """Raise DataError, saying what to install, where nothing here reads RAR; call it before a download."""
    if not ways():
        raise DataError(f"This Python and this PATH have nothing that reads RAR archives. {ADVICE}")


@contextlib.contextmanager
def opened(path: Path, limits: Limits, *, using: Mapping[str, Way] | None = None) -> Iterator[Rar]:
    """An open RAR, by the first way that can list it. Raises DataError with what each way said."""
    using = ways() if using is None else using
    reasons = []
    try:
        with contextlib.ExitStack() as stack:
            for name, way in using.items():
                try:
                    archive = stack.enter_context(way(path, limits))
                except CannotRead as error:
                    reasons.append(f"{name}: {error}")
                else:
                    yield archive
                    return
    except CannotRead as error:
        raise DataError(f"{path}: is damaged ({error}). Fetch it again, or take another copy.") from error
    said = "; ".join(reasons) or "nothing here reads RAR archives"
    advice = "" if "pybit7z" in using else f" {ADVICE}"
    raise DataError(f"{path}: cannot be read ({said}); it may be damaged, encrypted or in parts.{advice}")


@contextlib.contextmanager
def _library(path: Path, limits: Limits) -> Iterator[Rar]:
    import pybit7z  # an extra

    form = pybit7z.FormatRar5 if _is_rar5(path) else pybit7z.FormatRar
    with pybit7z.lib7zip_context() as library:
        try:
            yield _Library(pybit7z.BitArchiveReader(library, str(path), form), limits)
        except pybit7z.BitException as error:
            raise CannotRead(str(error)) from error


class _Library:
    def __init__(self, reader: object, limits: Limits) -> None:
        from pybit7z import BitArchiveReader

        assert isinstance(reader, BitArchiveReader)
        self._reader = reader
        count = min(reader.items_count(), limits.members + 1)  # one more than may be: it will be refused
        self.members = [self._member(index) for index in range(count)]

    def read(self, chosen: Sequence[Member], raw: Path) -> Iterator[tuple[Member, Path]]:
        if not chosen:
            return
        raw.mkdir(parents=True)
        most = sum(member.size for member in self.members)
        self._reader.set_progress_callback(lambda done: done <= most)  # else it is stopped
        self._reader.extract_to(str(raw), [member.index for member in chosen])
        for found in raw.rglob("*"):
            if found.is_symlink() or not (found.is_file() or found.is_dir()):
                raise CannotRead(f"{found.relative_to(raw)} is no plain file")
        for member in chosen:
            if not (path := raw / member.path).is_file():
                raise CannotRead(f"member {member.name!r} did not come out")
            yield member, path

    def _member(self, index: int) -> Member:
        from pybit7z import BitProperty

        item = self._reader.item_at(index)
        links = (BitProperty.SymLink, BitProperty.HardLink, BitProperty.CopyLink)
        attributes = item.attributes()
        kind = kind_of_mode(attributes >> 16 if attributes & UNIX_MODE else 0, folder=item.is_dir())
        if attributes & REPARSE_POINT and not attributes & UNIX_MODE:
            kind = "link"
        if any(item.item_property(link).is_string() for link in links):
            kind = "link"
        return Member(index, item.path(), item.size(), kind, encrypted=item.is_encrypted())


@contextlib.contextmanager
def _seven_zip(tool: str, path: Path) -> Iterator[Rar]:
    yield _SevenZip(tool, path)


class _SevenZip:
    def __init__(self, tool: str, path: Path) -> None:
        form = "-tRar5" if _is_rar5(path) else "-tRar"
        self._print = [tool, "x", "-so", "-p-", form, "--", str(path)]
        with _running([tool, "l", "-slt", "-ba", "-sccUTF-8", "-p-", form, "--", str(path)]) as listing:
            text = listing.read().decode("utf-8", "surrogateescape")
        self.members = [_of_listing(index, block) for index, block in enumerate(_blocks(text))]

    def read(self, chosen: Sequence[Member], raw: Path) -> Iterator[tuple[Member, Readable]]:
        wanted = {member.index for member in chosen}
        with _running(self._print) as stream:
            for member in self.members:
                if member.kind != "file":
                    continue
                part = _Slice(stream, member)
                if member.index in wanted:
                    yield member, part
                part.finish()


def _blocks(text: str) -> Iterator[dict[str, str]]:
    """Entries of a `7zz l -slt` listing. A name with a line end can forge lines; sizes and CRCs then fail."""
    for block in text.replace("\r\n", "\n").split("\n\n"):
        pairs = (line.partition(" = ") for line in block.splitlines() if " = " in line)
        fields = {key.strip(): value for key, _, value in pairs}
        if "Path" in fields:
            yield fields


def _of_listing(index: int, fields: Mapping[str, str]) -> Member:
    kind: Kind = "dir" if fields.get("Folder") == "+" else "file"
    mode = fields.get("Attributes", "").split(" ")[-1]
    if any(fields.get(key) for key in ("Symbolic Link", "Hard Link", "Copy Link")) or mode.startswith("l"):
        kind = "link"
    elif len(mode) == 10 and mode[0] not in "-d":
        kind = "special"
    try:
        size = int(fields.get("Size") or 0)
        crc32 = int(fields["CRC"], 16) if fields.get("CRC") else None
    except ValueError as error:
        raise CannotRead(f"a listing that makes no sense ({error})") from error
    return Member(index, fields["Path"], size, kind, encrypted=fields.get("Encrypted") == "+", crc32=crc32)


class _Slice(io.RawIOBase):
    """The share of one member in the stream of all; its CRC-32 is checked at the end."""

    def __init__(self, stream: IO[bytes], member: Member) -> None:
        super().__init__()
        self._stream, self._member, self._left, self._crc = stream, member, member.size, 0

    def read(self, size: int | None = -1) -> bytes:
        size = self._left if size is None or size < 0 else min(size, self._left)
        chunk = self._stream.read(size)
        if len(chunk) < size:
            raise CannotRead(f"it ends inside member {self._member.name!r}")
        self._left -= size
        self._crc = zlib.crc32(chunk, self._crc)
        return chunk

    def finish(self) -> None:
        while self._left:
            self.read(256 * 1024)
        if self._member.crc32 not in (None, self._crc):
            raise CannotRead(f"member {self._member.name!r} has a wrong CRC")


@contextlib.contextmanager
def _bsdtar(tool: str, path: Path, limits: Limits) -> Iterator[Rar]:
    yield _BsdTar(tool, path, limits)


class _BsdTar:
    def __init__(self, tool: str, path: Path, limits: Limits) -> None:
        self._command = [tool, "-c", "-f", "-", "--format", "pax", f"@{path.absolute()}"]
        with self._stream() as tar:
            self.members, _ = archive_safety.list_entries(tar, limits)

    def read(self, chosen: Sequence[Member], raw: Path) -> Iterator[tuple[Member, IO[bytes]]]:
        with self._stream() as tar:
            yield from archive_safety.read_entries(tar, chosen)

    @contextlib.contextmanager
    def _stream(self) -> Iterator[tarfile.TarFile]:
        with _running(self._command) as stream:
            try:
                with tarfile.open(fileobj=stream, mode="r|", errorlevel=2) as tar:
                    yield tar
            except tarfile.TarError as error:
                raise CannotRead(str(error)) from error


@contextlib.contextmanager
def _running(command: list[str]) -> Iterator[IO[bytes]]:
    """Output of a tool, which must end well if it is read to its end. Raises CannotRead."""
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said) as process,
    ):
        assert process.stdout is not None
        try:
            yield process.stdout
        except BaseException:
            process.kill()
            process.wait()
            raise
        if len(process.stdout.read(PADDING_BYTES)) == PADDING_BYTES:
            process.kill()  # the rest is not wanted
            process.wait()
            return
        if code := process.wait():
            said.seek(0)
            lines = said.read(64 * 1024).decode("utf-8", "replace").strip().splitlines()
            raise CannotRead(lines[-1].strip() if lines else f"exit code {code}")


def _is_rar5(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(RAR5)) == RAR5


def _is_bsdtar(tool: str) -> bool:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        told = subprocess.run([tool, "--version"], capture_output=True, timeout=10, check=False)
        return told.stdout.startswith(b"bsdtar")
    return False
