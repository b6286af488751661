"""RAR archives, read by pybit7z (extra `tvit[rar]`) or by a 7-Zip program on the PATH.

Members are listed and checked first. The chosen ones are then extracted to an empty folder, and only plain files
are taken from it.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from tvit_cli.data.archive_safety import Kind, Limits, Member, kind_of_mode
from tvit_cli.errors import DataError

RAR5: Final = b"Rar!\x1a\x07\x01\x00"
UNIX_MODE: Final = 0x8000  # bit of 7-Zip's attributes: the upper half is a Unix mode
REPARSE_POINT: Final = 0x400  # bit of Windows' attributes: a link
RAR_CODEC: Final = re.compile(rb"\b4030\d\s+Rar\d")  # in the output of `7zz i`; Debian's 7zip has none


class RarError(Exception):
    """An archive that a reader cannot read."""


@dataclass(frozen=True)
class Rar:
    """An open RAR. `extract` writes members to an empty folder and raises RarError."""

    members: list[Member]
    extract: Callable[[Sequence[Member], Path], None]

    def read(self, chosen: Sequence[Member], folder: Path) -> Iterator[tuple[Member, Path]]:
        """Chosen members as plain files below the new folder. Raises RarError."""
        if not chosen:
            return
        folder.mkdir(parents=True)
        self.extract(chosen, folder)
        for path in folder.rglob("*"):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise RarError(f"{path.relative_to(folder)} is no plain file")
        for member in chosen:
            if not (path := folder / member.path).is_file():
                raise RarError(f"member {member.name!r} was not extracted")
            if (size := path.stat().st_size) != member.size:
                raise RarError(f"member {member.name!r} has {size} bytes, its header declares {member.size}")
            yield member, path


Reader = Callable[[Path, Limits], AbstractContextManager[Rar]]


def find_reader() -> Reader | None:
    """pybit7z, else the first 7-Zip program on the PATH that decodes RAR, else None."""
    return find_pybit7z() or find_program()


def find_pybit7z() -> Reader | None:
    return _open_pybit7z if importlib.util.find_spec("pybit7z") else None


def find_program() -> Reader | None:
    """The first 7-Zip program on the PATH that decodes RAR."""
    for program in filter(None, map(shutil.which, ("7zz", "7z"))):
        with suppress(RarError):
            if RAR_CODEC.search(_run([program, "i"])):
                return partial(_open_program, program)
    return None


def require_reader() -> Reader:
    """Returns the reader. Raises DataError if there is none; call it before a download."""
    if reader := find_reader():
        return reader
    advice = 'Install the extra: python -m pip install "tvit[rar]" (or put 7-Zip\'s 7zz on the PATH).'
    raise DataError(f"This Python and the PATH have no reader of RAR archives. {advice}")


@contextmanager
def open_rar(path: Path, limits: Limits) -> Iterator[Rar]:
    """An open RAR. Raises DataError if it cannot be read, also within the block."""
    try:
        with require_reader()(path, limits) as archive:
            yield archive
    except RarError as error:
        raise DataError(f"{path}: is damaged, encrypted or in parts ({error}). Take another copy.") from error


@contextmanager
def _open_pybit7z(path: Path, limits: Limits) -> Iterator[Rar]:
    import pybit7z  # an extra

    def extract(chosen: Sequence[Member], folder: Path) -> None:
        limit = sum(member.size for member in members)
        reader.set_progress_callback(lambda done: done <= limit)  # False stops the extraction
        reader.extract_to(str(folder), [member.index for member in chosen])

    form = pybit7z.FormatRar5 if _is_rar5(path) else pybit7z.FormatRar
    with pybit7z.lib7zip_context() as library:
        try:
            reader = pybit7z.BitArchiveReader(library, str(path), form)
            count = min(
                reader.items_count(), limits.members + 1
            )  # one more than allowed, so that it is refused
            members = [_pybit7z_member(index, reader.item_at(index)) for index in range(count)]
            yield Rar(members, extract)
        except pybit7z.BitException as error:
            raise RarError(str(error)) from error


def _pybit7z_member(index: int, item: Any) -> Member:
    from pybit7z import BitProperty

    attributes = item.attributes()
    has_mode = bool(attributes & UNIX_MODE)
    kind = kind_of_mode(attributes >> 16 if has_mode else 0, folder=item.is_dir())
    links = (BitProperty.SymLink, BitProperty.HardLink, BitProperty.CopyLink)
    is_link = any(item.item_property(link).is_string() for link in links)
    if is_link or (attributes & REPARSE_POINT and not has_mode):
        kind = "link"
    return Member(index, item.path(), item.size(), kind, encrypted=item.is_encrypted())


def _open_program(program: str, path: Path, _: Limits) -> AbstractContextManager[Rar]:
    def call(verb: str, *switches: str) -> bytes:
        form = "-tRar5" if _is_rar5(path) else "-tRar"
        return _run([program, verb, "-p-", form, *switches, "--", str(path)])

    def extract(chosen: Sequence[Member], folder: Path) -> None:
        names = folder.with_name(f"{folder.name}.txt")
        names.write_text("".join(f"{member.name}\n" for member in chosen), encoding="utf-8")
        try:  # -spd: no wildcards in names
            call("x", "-y", "-spd", "-scsUTF-8", f"-i@{names}", f"-o{folder}")
        finally:
            names.unlink()

    return nullcontext(Rar(_listed_members(call("l", "-slt", "-ba", "-sccUTF-8")), extract))


def _run(command: list[str]) -> bytes:
    """Standard output of a program. Raises RarError if it fails."""
    try:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError as error:
        raise RarError(f"{command[0]}: {error.strerror}") from error
    if ended.returncode:
        reason = (ended.stderr or ended.stdout).decode("utf-8", "replace").strip().split("\n")[-1].strip()
        raise RarError(reason or f"exit code {ended.returncode}")
    return ended.stdout


def _listed_members(listing: bytes) -> list[Member]:
    """Members in a `7zz l -slt` listing, which prints an underscore for a control character in a name."""
    members: list[Member] = []
    for block in listing.decode("utf-8", "surrogateescape").replace("\r\n", "\n").split("\n\n"):
        pairs = (line.partition(" = ") for line in block.splitlines() if " = " in line)
        fields = {key.strip(): value for key, _, value in pairs}
        if "Path" not in fields:
            continue
        kind: Kind = "dir" if fields.get("Folder") == "+" else "file"
        windows, _, mode = fields.get("Attributes", "").rpartition(" ")  # "AL", "D drwxr-xr-x", " -rw-r--r--"
        links = [fields.get(key) for key in ("Symbolic Link", "Hard Link", "Copy Link")]
        if any(links) or mode.startswith("l") or "L" in windows + mode:
            kind = "link"
        elif len(mode) == 10 and mode[0] not in "-d":
            kind = "special"
        try:
            size = int(fields.get("Size") or 0)
        except ValueError as error:
            raise RarError(f"its listing has an invalid size ({error})") from error
        encrypted = fields.get("Encrypted") == "+"
        members.append(Member(len(members), fields["Path"], size, kind, encrypted=encrypted))
    return members


def _is_rar5(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(RAR5)) == RAR5
