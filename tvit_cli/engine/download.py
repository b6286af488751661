"""`tvit download`: fetches, verifies or repairs `data/<name>/{videos, splits, download.json}`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final

from tvit_cli import files
from tvit_cli.data.archives import Unpacked
from tvit_cli.data.catalog import CATALOG, CanonicalNames, Dataset, Part, find, is_selected, require_classes
from tvit_cli.data.dataset_folder import FILE_NAME, DatasetFolder, Difference, Selection, SourceRecord
from tvit_cli.data.http import Http, MirrorsFailed, fetch_files
from tvit_cli.data.split_files import CLASS_LIST, SPLITS, lists_from_groups, parse_split_lists, read_classes
from tvit_cli.data.transfer import PartRequest, Transfer
from tvit_cli.errors import DataError, RunError, SettingsError
from tvit_cli.results import Note, Report, silent
from tvit_cli.settings.base import flag
from tvit_cli.settings.download import DownloadSettings

# Options without effect on generated data sets.
FETCH_ONLY = ("classes", "clips_per_class", "archive", "splits_archive", "verify", "repair", "keep_archive")
MADE_LISTS: Final = "made from the file names by the rule of the official lists"


@dataclass(frozen=True)
class DownloadResult:
    """Contents of `folder`; `new_files` and `bytes_received` count this run only."""

    name: str
    folder: Path
    classes: int
    videos: int
    new_files: int
    bytes_received: int
    sources: tuple[SourceRecord, ...] = ()
    differences: tuple[Difference, ...] = ()


def known_datasets() -> Sequence[Dataset]:
    """The data sets that `tvit download` can fetch or generate."""
    return CATALOG


def download(
    settings: DownloadSettings,
    *,
    catalog: Sequence[Dataset] = CATALOG,
    makers: Mapping[str, Callable[[Path], int]] | None = None,
    http: Http | None = None,
    report: Report = silent,
) -> DownloadResult:
    """Fetches, unpacks, verifies or repairs one data set; complete files are not fetched again.

    `makers` generate the sets that are not downloaded, and return the number of new videos. `differences` of the
    result were found by verify, or not fixed by repair.

    Raises SettingsError, DataError, and RunError (MirrorsFailed if all sources failed).
    """
    assert settings.name is not None, "--list needs no engine"
    dataset = find(settings.name, catalog)
    for option, archive in (("--archive", settings.archive), ("--splits-archive", settings.splits_archive)):
        if archive is not None and not archive.is_file() and not archive.is_dir():
            pipe = "is a pipe or a device. Save it to a file first."
            raise DataError(
                f"{option} {archive}: {pipe if archive.exists() else 'no such file. Check the path.'}"
            )
    folder = settings.data_directory / dataset.name
    files.check_folder("--data-directory", settings.data_directory, folder)
    if not dataset.videos:
        return _generate(settings, dataset, folder, makers or {})
    busy = f"{folder}: another process is downloading to it. Wait until it ends, then repeat this command."
    try:
        with files.file_lock(folder / ".lock", busy):
            target = DatasetFolder(folder, dataset.name)
            job = _Job(settings, dataset, target, Transfer(dataset, target, http or Http(), report))
            return job.verify_or_repair() if settings.verify or settings.repair else job.complete()
    except OSError as error:
        raise RunError(f"{error.filename or folder}: {error.strerror or error}") from error


def _generate(
    settings: DownloadSettings, dataset: Dataset, folder: Path, makers: Mapping[str, Callable[[Path], int]]
) -> DownloadResult:
    for name in FETCH_ONLY:
        if getattr(settings, name):
            effect = f"{dataset.name} is generated, not fetched, so this has no effect"
            advice = "Leave it out; to generate the set again, remove its folder first."
            raise SettingsError(f"{flag(name)}: {effect}. {advice}")
    if dataset.name not in makers:
        raise DataError(f"{dataset.name}: is generated, not downloaded, and has no generator here.")
    made = makers[dataset.name](folder)
    return DownloadResult(dataset.name, folder, dataset.classes, dataset.clips, made, 0)


@dataclass
class _Job:
    settings: DownloadSettings
    dataset: Dataset
    folder: DatasetFolder
    transfer: Transfer

    def complete(self) -> DownloadResult:
        """Fetches all missing files, split lists first, since they define the spelling of names."""
        self.folder.refuse_foreign_videos()
        classes = tuple(sorted({name.casefold() for name in self.settings.classes})) or None
        selection = Selection(classes=classes, clips_per_class=self.settings.clips_per_class)
        failed: dict[str, MirrorsFailed] = {}
        if self.settings.archive is not None and self.dataset.test_groups:
            # Offline, the lists are made from the names in the archive, so one attempt is enough.
            http = self.transfer.http
            self.transfer.http = replace(http, retry=replace(http.retry, attempts=1), timeout=5.0)
        for part in self.dataset.splits:
            try:
                self._fetch_missing(part, Selection())
            except MirrorsFailed as error:
                failed[part.name] = error
        names = self._read_lists()
        if several := len(self.dataset.videos) > 1:
            names = [part.name for part in self.dataset.videos]
        if names is not None:
            require_classes(selection.classes, names)
        for part in self.dataset.videos:
            if not several or selection.classes is None or part.name.casefold() in selection.classes:
                self._fetch_missing(part, selection)
        for name, failure in failed.items():
            self._make_lists(name, failure)
        self._remove_archives()
        return self._result([])

    def verify_or_repair(self) -> DownloadResult:
        """Compares every file with the manifest; repair fetches those that differ."""
        if not self.folder.manifest.files:
            advice = f"Run `tvit download {self.dataset.name}` first."
            raise DataError(f"{self.folder.path}: has no {FILE_NAME}. {advice}")
        differences = self.folder.compare(None, self.transfer.report)
        if self.settings.verify or not differences:
            return self._result(differences)
        wrong = {difference.path for difference in differences}
        self.folder.damaged.update(wrong)
        for part in self.dataset.splits + self.dataset.videos:
            self._read_lists()
            paths = frozenset(map(PurePosixPath, wrong.intersection(self.folder.manifest.of_part(part.name))))
            if paths:
                self.transfer.fetch(PartRequest(part, Selection(), paths), self._archive_of(part))
        self._remove_archives()
        return self._result(self.folder.compare(wrong, self.transfer.report))

    def _fetch_missing(self, part: Part, selection: Selection) -> None:
        """Fetches the missing files of a part, without a request if there are none."""
        manifest, archive = self.folder.manifest, self._archive_of(part)
        paths: frozenset[PurePosixPath] | None = None
        if selection in manifest.done.get(part.name, []) or manifest.is_whole(part.name):
            missing = [path for path in manifest.of_part(part.name) if not self.folder.has(path)]
            paths = frozenset(path for path in map(PurePosixPath, missing) if is_selected(path, selection))
        if paths is None or paths:
            self.transfer.fetch(PartRequest(part, selection, paths), archive)
            self.folder.finish(part.name, selection)

    def _make_lists(self, part: str, error: MirrorsFailed) -> None:
        """See Note [Lists from groups] in `data.split_files`. Raises `error` if the lists cannot be made."""
        manifest = self.folder.manifest
        names = set(self.transfer.listed)
        for other in self.dataset.videos:
            if manifest.is_whole(other.name):
                names.update(map(PurePosixPath, manifest.of_part(other.name)))
        if not names or not self.dataset.test_groups:
            raise error
        texts = lists_from_groups([(path.parent.name, path.name) for path in names], self.dataset.test_groups)
        new = self.folder.new_incoming()
        (new / "splits").mkdir()
        unpacked = []
        for name, text in texts.items():
            path, data = PurePosixPath("splits", name), text.encode()
            (new / path).write_bytes(data)
            unpacked.append(Unpacked(path, name, len(data), hashlib.sha256(data).hexdigest()))
        self.folder.add(unpacked, SourceRecord(part=part, url=MADE_LISTS), new)
        self.folder.finish(part, Selection())
        self.transfer.report(Note(f"{error}\nSo the split lists were {MADE_LISTS}."))

    def _read_lists(self) -> list[str] | None:
        """Classes of the split lists if they exist; sets the canonical names, see Note [HandStandPushups]."""
        lists = self.folder.path / "splits"
        if not (lists / CLASS_LIST).is_file():
            return None
        classes = read_classes(lists)
        splits = [split for split in SPLITS if (lists / f"trainlist{split:02d}.txt").is_file()]
        subsets = [subset for split in splits for subset in parse_split_lists(lists, split).values()]
        self.transfer.names = CanonicalNames(classes, [file for subset in subsets for _, file in subset])
        return classes

    def _archive_of(self, part: Part) -> Path | None:
        """The user's archive of a part; for a set of several parts, a file in the given folder."""
        if part in self.dataset.splits:
            return self.settings.splits_archive
        archive = self.settings.archive
        if archive is None or len(self.dataset.videos) == 1:
            return archive
        for source in part.sources:
            if (archive / source.file_name).is_file():
                return archive / source.file_name
        wanted = ", ".join(other.sources[0].file_name for other in self.dataset.videos)
        advice = f"{self.dataset.name} has several archives: give the folder that holds them ({wanted})."
        raise DataError(f"{archive}: has no {part.sources[0].file_name}. {advice}")

    def _remove_archives(self) -> None:
        if self.settings.keep_archive:
            return
        archives = self.folder.archives
        for part in self.dataset.splits + self.dataset.videos:
            for source in part.sources:
                files.remove_files(archives, fetch_files(archives / source.file_name))
        with suppress(OSError):
            archives.rmdir()

    def _result(self, differences: Sequence[Difference]) -> DownloadResult:
        names = [path for path in self.folder.manifest.files if path.startswith("videos/")]
        videos = [PurePosixPath(path) for path in names if self.folder.has(path)]
        return DownloadResult(
            name=self.dataset.name,
            folder=self.folder.path,
            classes=len({path.parent.name for path in videos}),
            videos=len(videos),
            new_files=self.folder.added,
            bytes_received=self.transfer.received,
            sources=tuple(self.folder.manifest.sources),
            differences=tuple(differences),
        )
