"""`download.json`: what lies in a downloaded data set, and where every file came from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tvit_cli.data.remote import disk
from tvit_cli.data.remote.fetch import file_sha256
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
    disk.write_json(folder / FILE_NAME, manifest.model_dump(mode="json"))


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
