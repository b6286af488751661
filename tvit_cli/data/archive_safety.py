"""Safety checks on archive members, made before unpacking."""

from __future__ import annotations

import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, Literal

from tvit_cli.errors import DataError, size_text

Kind = Literal["file", "dir", "link", "special"]

RATIO_FLOOR_BYTES: Final = 1024**2  # below it, any compression ratio is accepted
MAX_NAME_BYTES: Final = 255  # of one path component; the limit of ext4, APFS, NTFS
MAX_PATH_BYTES: Final = 1024
# Device names on Windows, whatever their suffix.
RESERVED: Final = frozenset(
    ["con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in "123456789¹²³")]
)
BAD_KINDS: Final = {"link": "is a link", "special": "is neither a file nor a folder"}
UNWRITABLE: Final = re.compile(r'[<>:"|?*\\]')  # invalid on Windows; ":" and "\" can lead out of the folder


@dataclass(frozen=True, slots=True)
class Limits:
    """Size limits of an archive. UCF101: 13,320 files, 7 GB, ratio 1.02; Kinetics parts: 1.5 GB each."""

    members: int = 100_000
    member_bytes: int = 8 * 1024**3
    total_bytes: int = 256 * 1024**3
    ratio: float = 100.0  # unpacked over packed bytes, beyond 1 MiB; zeros reach 1,030 in a ZIP


LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class Member:
    """One entry as the archive declares it; sizes in bytes (None: not declared)."""

    index: int
    name: str
    size: int
    kind: Kind = "file"
    packed: int | None = None
    encrypted: bool = False

    @property
    def path(self) -> PurePosixPath:
        """The name without "./" and a last "/"; safe only after `check_members`."""
        return PurePosixPath(self.name)


def check_members(
    members: Sequence[Member], *, archive: str, packed_bytes: int, limits: Limits = LIMITS
) -> None:
    """Raises DataError, naming the member and the reason, if an archive is unsafe to unpack.

    Refused: absolute names, drive letters, "..", links, devices, control characters, names that some system
    cannot store, names that are equal on Windows, macOS or Linux, encryption, and more members or bytes than
    `limits`. `packed_bytes` is the size of the archive itself.
    """
    if problem := next(_problems(members, packed_bytes, limits), None):
        advice = "take the archive from another source, or unpack it yourself if you trust it"
        raise DataError(f"{archive}: {problem}. Nothing was unpacked; {advice}.")


def _problems(members: Sequence[Member], packed_bytes: int, limits: Limits) -> Iterator[str]:
    if len(members) > limits.members:
        yield f"more than {limits.members:,} members"
    used: dict[str, tuple[str, Kind]] = {}
    for member in members:
        reason = BAD_KINDS.get(member.kind, "is encrypted" if member.encrypted else None)
        if member.kind == "file" and not member.path.parts:  # such as "."
            reason = "has no name"
        reason = _bad_name(member.name) or reason or _bad_size(member, limits) or _collision(member, used)
        if reason:
            yield f"member {member.name[:200]!r} {reason}"
    total = sum(member.size for member in members)
    if total > limits.total_bytes:
        yield f"{size_text(total)} unpacked, limit {size_text(limits.total_bytes)}"
    if total > max(RATIO_FLOOR_BYTES, packed_bytes * limits.ratio):
        yield f"{size_text(total)} out of {size_text(packed_bytes)}, limit {limits.ratio:g} times"
    if (packed := sum(member.packed or 0 for member in members)) > packed_bytes:
        yield f"members of {packed} bytes in an archive of {packed_bytes}: they overlap"


def normalized_name(path: PurePosixPath | str) -> str:
    """Form in which names compare equal if some file system treats them as equal (case, Unicode form)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKD", str(path)).casefold())


def kind_of_mode(mode: int, *, folder: bool) -> Kind:
    """Kind by the Unix mode in an archive; 0 if it was made on another system."""
    form = stat.S_IFMT(mode)
    if form == stat.S_IFLNK:
        return "link"
    if form not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "special"
    return "dir" if folder or form == stat.S_IFDIR else "file"


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
        return f"has {found.group()!r} in its name (a drive letter, a separator or invalid on Windows)"
    if len(name.encode()) > MAX_PATH_BYTES or any(len(part.encode()) > MAX_NAME_BYTES for part in path.parts):
        return f"has a name longer than {MAX_NAME_BYTES} bytes (whole path: {MAX_PATH_BYTES})"
    for part in path.parts:
        if part != part.rstrip(". "):
            return "has a name that ends in a dot or a space"
        if part.split(".")[0].rstrip().casefold() in RESERVED:
            return "has the name of a device on Windows"
    return None


def _bad_size(member: Member, limits: Limits) -> str | None:
    if not 0 <= member.size <= limits.member_bytes:
        return f"has {size_text(member.size)} unpacked, limit {size_text(limits.member_bytes)}"
    if member.packed is not None and member.size > max(RATIO_FLOOR_BYTES, member.packed * limits.ratio):
        return f"unpacks {member.packed} bytes to {member.size}, limit {limits.ratio:g} times"
    return None


def _collision(member: Member, used: dict[str, tuple[str, Kind]]) -> str | None:
    """The reason if `member` would overwrite another; adds it and its folders to `used`."""
    path = member.path
    for parent in reversed(path.parents[:-1]):
        name, kind = used.setdefault(normalized_name(parent), (str(parent), "dir"))
        if kind != "dir" or name != str(parent):
            return f"lies in a folder that collides with {name!r}"
    first = used.setdefault(normalized_name(path), entry := (str(path), member.kind))
    # A folder may be listed after its files, or twice.
    if first is entry or (member.kind == "dir" and first == entry):
        return None
    return f"collides with {first[0]!r}"
