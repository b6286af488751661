"""The folder of a downloaded data set: complete files and their manifest `download.json`.

Note [Complete files only]
New files are completed in `.incoming/`, then listed in the manifest, then moved to `videos/` and `splits/`. If the
process dies, each file in `videos/` is complete and listed. The next run moves the files left in `.incoming/`, then
fetches those that the manifest lists and the disk lacks.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, Field

from tvit_cli import files
from tvit_cli.data.archives import Unpacked
from tvit_cli.errors import DataError
from tvit_cli.results import Progress, Report

FILE_NAME: Final = "download.json"
VERSION: Final = 1
FOLDERS: Final = ("videos", "splits")


class _Record(BaseModel, extra="forbid"):
    pass


class SourceRecord(_Record):
    """An archive that files came from. `verified`: its hash was known before it was fetched.

    `sha256` is None for a ZIP of which single members were read (each against its CRC-32 in the directory),
    `bytes` for lists that were made from file names.
    """

    part: str
    url: str
    bytes: int | None = None
    sha256: str | None = None
    etag: str | None = None
    verified: bool = False


class FileRecord(_Record):
    """A file: size in bytes, sha256, source (index into `sources`) and name in its archive."""

    bytes: int
    sha256: str
    source: int
    member: str


class Selection(_Record, frozen=True):
    """Fetched classes (None: all) and clips per class (None: all) of a part."""

    classes: tuple[str, ...] | None = None  # case-folded, sorted
    clips_per_class: int | None = None

    @property
    def is_whole(self) -> bool:
        return self.classes is None and self.clips_per_class is None


class Manifest(_Record):
    """`files` by path under the folder, with "/"; `done`: complete selections by part."""

    version: int = VERSION
    dataset: str
    sources: list[SourceRecord] = Field(default_factory=list)
    files: dict[str, FileRecord] = Field(default_factory=dict)
    done: dict[str, list[Selection]] = Field(default_factory=dict)

    def of_part(self, part: str) -> list[str]:
        """Files that came from a part's sources."""
        return [path for path, file in self.files.items() if self.sources[file.source].part == part]

    def is_whole(self, part: str) -> bool:
        """Whether all of a part was fetched."""
        return any(selection.is_whole for selection in self.done.get(part, []))


@dataclass(frozen=True)
class Difference:
    """A file that differs from its record in the manifest."""

    path: str
    kind: Literal["missing", "size", "content"]
    detail: str


def _load(folder: Path, dataset: str) -> Manifest:
    """The manifest of `folder`, or an empty one. Raises DataError if it is damaged or of another data set."""
    path = folder / FILE_NAME
    if not path.exists():
        return Manifest(dataset=dataset)
    advice = "Move the folder away and run `tvit download` again."
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: is no manifest that this version of tvit can read. {advice}") from error
    if manifest.dataset != dataset or manifest.version != VERSION:
        found = f"{manifest.dataset} (version {manifest.version})"
        raise DataError(f"{path}: describes {found}, not {dataset} (version {VERSION}). {advice}")
    if any(not 0 <= file.source < len(manifest.sources) for file in manifest.files.values()):
        raise DataError(f"{path}: refers to a source that it does not list. {advice}")
    return manifest


class DatasetFolder:
    """Files and manifest of a data set. `damaged`: files to fetch again; `added`: number of new files."""

    own: Final = re.compile(rf"({'|'.join(FOLDERS)})/.+")  # files of a working folder

    def __init__(self, path: Path, dataset: str) -> None:
        self.path, self.incoming, self.archives = path, path / ".incoming", path / "archives"
        self.manifest = _load(path, dataset)
        self.damaged: set[str] = set()
        self.added = 0
        self._move_incoming()

    def has(self, path: str) -> bool:
        """Whether a file exists with its recorded size and is not damaged; its bytes are not read."""
        record = self.manifest.files.get(path)
        if record is not None and path not in self.damaged:
            with suppress(OSError):
                return (self.path / path).stat().st_size == record.bytes
        return False

    def compare(self, paths: Iterable[str] | None, report: Report) -> list[Difference]:
        """Files (None: all) that are missing or have another size or sha256 than recorded; reads every byte."""
        records = self.manifest.files
        wanted = sorted(records if paths is None else paths)
        done, total = 0, sum(records[path].bytes for path in wanted)
        found = []
        for path in wanted:
            record = records[path]
            try:
                if (size := (self.path / path).stat().st_size) != record.bytes:
                    found.append(Difference(path, "size", f"{size} bytes, {record.bytes} were unpacked"))
                elif (sha256 := files.sha256(self.path / path)) != record.sha256:
                    found.append(
                        Difference(path, "content", f"sha256 {sha256}, {record.sha256} was unpacked")
                    )
            except OSError as error:
                found.append(Difference(path, "missing", error.strerror or "cannot be read"))
            done += record.bytes
            report(Progress(f"check {self.manifest.dataset}", done, total, "bytes"))
        return found

    def refuse_foreign_videos(self) -> None:
        """Raises DataError if `videos` holds files and no manifest lists any."""
        videos = self.path / "videos"
        if not self.manifest.files and videos.is_dir() and any(videos.iterdir()):
            command = f"tvit train --path-to-data {shlex.quote(str(videos))}"
            advice = f"Use them as they are (`{command}`), or move them away and repeat this command."
            raise DataError(f"{videos}: holds files that `tvit download` did not put there. {advice}")

    def clear_incoming(self) -> Path:
        """Path of the incoming folder, which does not exist afterwards."""
        files.remove_work(self.incoming, self.own)
        return self.incoming

    def new_incoming(self) -> Path:
        """A new empty folder for `add`."""
        new = self.incoming.with_name(f"{self.incoming.name}.unpacking")
        files.remove_work(new, self.own)
        new.mkdir(parents=True)
        return new

    def add(self, unpacked: Sequence[Unpacked], source: SourceRecord, new: Path | None = None) -> None:
        """Lists the incoming files, or those in `new`, and moves them. See Note [Complete files only]."""
        if new is not None:
            files.rename(new, self.clear_incoming())
        sources = self.manifest.sources
        if source not in sources:
            sources.append(source)
        index = sources.index(source)
        for file in unpacked:
            record = FileRecord(bytes=file.bytes, sha256=file.sha256, source=index, member=file.member)
            self.manifest.files[str(file.path)] = record
        self._save()
        self._move_incoming()
        self.added += len(unpacked)
        self.damaged.difference_update(str(file.path) for file in unpacked)

    def finish(self, part: str, selection: Selection) -> None:
        """Records that a selection of a part is complete."""
        done = self.manifest.done.setdefault(part, [])
        if selection not in done:
            done.append(selection)
            self._save()

    def _save(self) -> None:
        files.write_json(self.path / FILE_NAME, self.manifest.model_dump(mode="json"))

    def _move_incoming(self) -> None:
        """Moves the listed files and removes the others, which are incomplete."""
        incoming = {name: self.incoming / name for name in files.files_below(self.incoming)}
        for top in FOLDERS:  # a new folder at once, which is faster and atomic
            names = [name for name in incoming if name.startswith(f"{top}/")]
            if names and not (self.path / top).exists() and self.manifest.files.keys() >= set(names):
                files.rename(self.incoming / top, self.path / top)
        for name, path in incoming.items():
            record = self.manifest.files.get(name)
            if record is not None and path.is_file() and path.stat().st_size == record.bytes:
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                path.replace(self.path / name)
        files.remove_work(self.incoming, self.own)
