"""The folder of a downloaded set: new files come in whole, are written into the manifest, then moved.

Note [Landing]
New files come whole into `.incoming/`; the manifest that names them is written; then they are moved to their
places. So whatever moment a process dies at, each file in `videos/` is whole and the manifest knows it; the
next run moves what is left in `.incoming/`, then fetches what the manifest names and the disk lacks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tvit_cli.data.remote import disk, manifest
from tvit_cli.data.remote.archive import Unpacked
from tvit_cli.data.remote.manifest import FileRecord, Selection, SourceRecord
from tvit_cli.errors import DataError

TOPS: Final = ("videos", "splits")


class Landing:
    """What lies in `folder`. `damaged` are files known to be wrong, `landed` counts those that came in."""

    own: Final = re.compile(rf"({'|'.join(TOPS)})/.+")  # files of a working folder

    def __init__(self, folder: Path, dataset: str) -> None:
        self.folder = folder
        self.incoming = folder / ".incoming"
        self.manifest = manifest.load(folder, dataset)
        self.damaged: set[str] = set()
        self.landed = 0
        self._move()

    def is_there(self, path: str) -> bool:
        """Whether a file is there as the manifest says; its bytes are not read."""
        record = self.manifest.files.get(path)
        return (
            record is not None and path not in self.damaged and manifest.is_there(self.folder, path, record)
        )

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
        disk.remove_work(self.incoming, self.own)
        return self.incoming

    def new_incoming(self) -> Path:
        """A new folder to fill file by file; `accept` makes it the incoming one."""
        new = self.incoming.with_name(f"{self.incoming.name}.unpacking")
        disk.remove_work(new, self.own)
        new.mkdir(parents=True)
        return new

    def accept(self, new: Path) -> None:
        """Take a filled folder as whole."""
        disk.rename(new, self.clear_incoming())

    def land(self, files: Sequence[Unpacked], source: SourceRecord) -> None:
        """Record the incoming files and move them to their places. See Note [Landing]."""
        index = self.manifest.source_index(source)
        for file in files:
            self.manifest.files[str(file.path)] = FileRecord(
                bytes=file.bytes, sha256=file.sha256, source=index, member=file.member
            )
        manifest.save(self.folder, self.manifest)
        self._move()
        self.landed += len(files)
        self.damaged.difference_update(str(file.path) for file in files)

    def finish(self, part: str, selection: Selection) -> None:
        """Record that all that a selection asks of a part is there."""
        done = self.manifest.done.setdefault(part, [])
        if selection not in done:
            done.append(selection)
            manifest.save(self.folder, self.manifest)

    def _move(self) -> None:
        """Move what the manifest knows; what it does not know was never whole."""
        for top in TOPS:
            new = self.incoming / top
            if new.is_dir() and not (self.folder / top).exists() and self._knows_all(new):
                disk.rename(new, self.folder / top)
        for path in sorted(self.incoming.rglob("*")):
            name = path.relative_to(self.incoming).as_posix()
            record = self.manifest.files.get(name)
            if record is not None and path.is_file() and path.stat().st_size == record.bytes:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                path.replace(self.folder / name)
        disk.remove_work(self.incoming, self.own)

    def _knows_all(self, folder: Path) -> bool:
        names = (path.relative_to(folder.parent).as_posix() for path in folder.rglob("*") if path.is_file())
        return all(name in self.manifest.files for name in names)
