"""The folder of a downloaded data set: its manifest `download.json`, and files moved in complete.

Note [Landing]
New files come whole into `.incoming/`; the manifest that names them is written; then they are moved to their
places. So whatever moment a process dies at, each file in `videos/` is whole and the manifest knows it; the
next run moves what is left in `.incoming/`, then fetches what the manifest names and the disk lacks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tvit_cli import files
from tvit_cli.data.archives import Unpacked
from tvit_cli.data.http import file_sha256
from tvit_cli.errors import DataError

FILE_NAME: Final = "download.json"
VERSION: Final = 1


class SourceRecord(BaseModel):
    """An archive that files came from. `verified`: its hash was known before it was fetched.

    `sha256` is None for a ZIP of which single members were read (each against its CRC-32 in the directory),
    `bytes` for lists that were made from file names.
    """

    model_config = ConfigDict(extra="forbid")

    part: str
    url: str
    bytes: int | None
    sha256: str | None
    etag: str | None
    verified: bool


class FileRecord(BaseModel):
    """A file: its size, its sha256, the source (index into `sources`) and the member that it was there."""

    model_config = ConfigDict(extra="forbid")

    bytes: int
    sha256: str
    source: int
    member: str


class Selection(BaseModel):
    """Classes (None: all) and clips per class (None: all) of a part that have been fetched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    classes: tuple[str, ...] | None = None  # case-folded, sorted
    clips_per_class: int | None = None

    @property
    def is_whole(self) -> bool:
        return self.classes is None and self.clips_per_class is None


class Manifest(BaseModel):
    """`files` are by path under the folder, with "/"; `done` holds, by part, selections that are there."""

    model_config = ConfigDict(extra="forbid")

    version: int = VERSION
    dataset: str
    sources: list[SourceRecord] = Field(default_factory=list)
    files: dict[str, FileRecord] = Field(default_factory=dict)
    done: dict[str, list[Selection]] = Field(default_factory=dict)

    def source_index(self, record: SourceRecord) -> int:
        """Index of a source, which is added where it is new."""
        if record not in self.sources:
            self.sources.append(record)
        return self.sources.index(record)

    def of_part(self, part: str) -> list[str]:
        """Files that came from a part's sources."""
        return [path for path, file in self.files.items() if self.sources[file.source].part == part]


@dataclass(frozen=True)
class Difference:
    """A file that is not as the manifest says."""

    path: str
    kind: Literal["missing", "size", "content"]
    detail: str


def load(folder: Path, dataset: str) -> Manifest:
    """The manifest of `folder`, or an empty one. Raises DataError where it is damaged or another set's."""
    path = folder / FILE_NAME
    if not path.exists():
        return Manifest(dataset=dataset)
    advice = "Move the folder away and run `tvit download` again."
    try:
        manifest = Manifest.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValidationError, ValueError, OSError) as error:
        raise DataError(f"{path}: is no manifest that this tvit can read. {advice}") from error
    if manifest.dataset != dataset or manifest.version != VERSION:
        raise DataError(
            f"{path}: describes {manifest.dataset} (version {manifest.version}), "
            f"not {dataset} (version {VERSION}). {advice}"
        )
    if any(not 0 <= file.source < len(manifest.sources) for file in manifest.files.values()):
        raise DataError(f"{path}: names a source that it does not list. {advice}")
    return manifest


def save(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, whole or not at all."""
    files.write_json(folder / FILE_NAME, manifest.model_dump(mode="json"))


def is_there(folder: Path, path: str, record: FileRecord) -> bool:
    """Whether a file is there in its size; its bytes are not read."""
    try:
        return (folder / path).stat().st_size == record.bytes
    except OSError:
        return False


def compare(
    folder: Path, manifest: Manifest, *, paths: Iterable[str] | None = None, note: Callable[[int, int], None]
) -> list[Difference]:
    """Files that are missing, or have another size or sha256 than the manifest says; every byte is read."""
    wanted = sorted(manifest.files if paths is None else paths)
    total = sum(manifest.files[path].bytes for path in wanted)
    done = 0
    found = []
    for path in wanted:
        record = manifest.files[path]
        try:
            size = (folder / path).stat().st_size
            sha256 = file_sha256(folder / path) if size == record.bytes else ""
        except OSError as error:
            found.append(Difference(path, "missing", error.strerror or "cannot be read"))
        else:
            if size != record.bytes:
                found.append(Difference(path, "size", f"{size} bytes, {record.bytes} were unpacked"))
            elif sha256 != record.sha256:
                found.append(Difference(path, "content", f"sha256 {sha256}, {record.sha256} was unpacked"))
        done += record.bytes
        note(done, total)
    return found


TOPS: Final = ("videos", "splits")


class Landing:
    """What lies in `folder`. `damaged` are files known to be wrong, `landed` counts those that came in."""

    own: Final = re.compile(rf"({'|'.join(TOPS)})/.+")  # files of a working folder

    def __init__(self, folder: Path, dataset: str) -> None:
        self.folder = folder
        self.incoming = folder / ".incoming"
        self.manifest = load(folder, dataset)
        self.damaged: set[str] = set()
        self.landed = 0
        self._move()

    def is_there(self, path: str) -> bool:
        """Whether a file is there as the manifest says; its bytes are not read."""
        record = self.manifest.files.get(path)
        return record is not None and path not in self.damaged and is_there(self.folder, path, record)

    def require_own(self) -> None:
        """Raise DataError where somebody else has put videos in the folder."""
        videos = self.folder / "videos"
        if not self.manifest.files and videos.is_dir() and any(videos.iterdir()):
            raise DataError(
                f"{videos}: holds files that `tvit download` did not put there. Use them as they are "
                f"(`tvit train {videos}`), or move them away and run this command again."
            )

    def clear_incoming(self) -> Path:
        """Where the next archive may be unpacked: a folder that does not exist."""
        files.remove_work(self.incoming, self.own)
        return self.incoming

    def new_incoming(self) -> Path:
        """A new folder to fill file by file; `accept` makes it the incoming one."""
        new = self.incoming.with_name(f"{self.incoming.name}.unpacking")
        files.remove_work(new, self.own)
        new.mkdir(parents=True)
        return new

    def accept(self, new: Path) -> None:
        """Take a filled folder as whole."""
        files.rename(new, self.clear_incoming())

    def land(self, files: Sequence[Unpacked], source: SourceRecord) -> None:
        """Record the incoming files and move them to their places. See Note [Landing]."""
        index = self.manifest.source_index(source)
        for file in files:
            self.manifest.files[str(file.path)] = FileRecord(
                bytes=file.bytes, sha256=file.sha256, source=index, member=file.member
            )
        save(self.folder, self.manifest)
        self._move()
        self.landed += len(files)
        self.damaged.difference_update(str(file.path) for file in files)

    def finish(self, part: str, selection: Selection) -> None:
        """Record that all that a selection asks of a part is there."""
        done = self.manifest.done.setdefault(part, [])
        if selection not in done:
            done.append(selection)
            save(self.folder, self.manifest)

    def _move(self) -> None:
        """Move what the manifest knows; what it does not know was never whole."""
        for top in TOPS:
            new = self.incoming / top
            if new.is_dir() and not (self.folder / top).exists() and self._knows_all(new):
                files.rename(new, self.folder / top)
        for path in sorted(self.incoming.rglob("*")):
            name = path.relative_to(self.incoming).as_posix()
            record = self.manifest.files.get(name)
            if record is not None and path.is_file() and path.stat().st_size == record.bytes:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                path.replace(self.folder / name)
        files.remove_work(self.incoming, self.own)

    def _knows_all(self, folder: Path) -> bool:
        names = (path.relative_to(folder.parent).as_posix() for path in folder.rglob("*") if path.is_file())
        return all(name in self.manifest.files for name in names)
