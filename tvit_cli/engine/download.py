"""`tvit download`: a known data set becomes the folder `data/<name>/{videos, splits, download.json}`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from tvit_cli import files
from tvit_cli.data import dataset_folder
from tvit_cli.data.archive_safety import Limits
from tvit_cli.data.archives import Unpacked
from tvit_cli.data.catalog import (
    CATALOG,
    Dataset,
    Part,
    Spelling,
    class_of,
    find,
    is_selected,
    require_classes,
)
from tvit_cli.data.dataset_folder import Difference, Landing, Selection, SourceRecord
from tvit_cli.data.http import Http, MirrorsFailed, fetch_files
from tvit_cli.data.split_files import (
    CLASS_LIST,
    SPLITS,
    lists_from_groups,
    parse_split_lists,
    read_classes,
)
from tvit_cli.data.transfer import PartRequest, Progress, Transfer, TransferTools, no_progress
from tvit_cli.errors import DataError, RunError, SettingsError
from tvit_cli.files import check_folder, remove_files
from tvit_cli.settings.base import flag
from tvit_cli.settings.download import DownloadSettings

MADE_LISTS: Final = "made from the file names by the rule of the official lists"


@dataclass(frozen=True)
class DownloadResult:
    """What lies in `folder` now; `landed` files and `bytes_received` are of this run."""

    name: str
    folder: Path
    classes: int
    videos: int
    landed: int
    bytes_received: int
    sources: tuple[SourceRecord, ...] = ()
    differences: tuple[Difference, ...] = ()


def known() -> Sequence[Dataset]:
    """The data sets that `tvit download` has facts on."""
    return CATALOG


def download(
    settings: DownloadSettings,
    *,
    catalog: Sequence[Dataset] = CATALOG,
    makers: Mapping[str, Callable[[Path], object]] | None = None,
    http: Http | None = None,
    limits: Limits | None = None,
    free: files.FreeBytes = files.free_bytes,
    progress: Callable[[Progress], None] = no_progress,
    report: Callable[[str], None] = no_progress,
) -> DownloadResult:
    """Fetch, unpack, verify or repair one data set; what is there already is left alone.

    `makers` make, in a folder, the sets that are not downloaded. `differences` of the result is what verify
    found, or what repair could not mend. Raises SettingsError, DataError, and RunError (MirrorsFailed where
    no source served).
    """
    assert settings.name is not None, "--list needs no engine"
    dataset = find(settings.name, catalog)
    for option, given in (("--archive", settings.archive), ("--splits-archive", settings.splits_archive)):
        if given is None or given.is_file() or given.is_dir():
            continue
        what = "is no file but a pipe or a device. Save it to one first" if given.exists() else "no such file"
        raise DataError(f"{option} {given}: {what}.")
    folder = settings.data_directory / dataset.name
    check_folder("--data-directory", settings.data_directory, folder)
    if not dataset.videos:
        _check_nothing_is_fetched(settings)
        return _made(dataset, folder, makers or {})
    tools = TransferTools(http or Http(), limits or Limits(), free, progress, report)
    try:
        busy = (
            f"{folder}: another process is downloading to it. Wait until it ends, then repeat this command."
        )
        with files.file_lock(folder / ".lock", busy):
            landing = Landing(folder, dataset.name)
            job = _Job(settings, dataset, folder, landing, Transfer(dataset, landing, tools))
            if settings.verify or settings.repair:
                return job.verify_or_repair()
            return job.complete()
    except OSError as error:
        raise RunError(f"{error.filename or folder}: {error.strerror or error}") from error


def _check_nothing_is_fetched(settings: DownloadSettings) -> None:
    """Refuse options of fetching for a set that is made. Raises SettingsError."""
    for name in (
        "classes",
        "clips_per_class",
        "archive",
        "splits_archive",
        "verify",
        "repair",
        "keep_archive",
    ):
        if getattr(settings, name):
            raise SettingsError(
                f"{flag(name)}: {settings.name} is made on this machine, not fetched, so this has no effect. "
                "Leave it out; to make the set anew, remove its folder first."
            )


def _made(dataset: Dataset, folder: Path, makers: Mapping[str, Callable[[Path], object]]) -> DownloadResult:
    if dataset.name not in makers:
        raise DataError(f"{dataset.name}: is made on this machine, not downloaded; nothing here makes it.")
    makers[dataset.name](folder)
    return DownloadResult(dataset.name, folder, dataset.classes, dataset.clips, landed=0, bytes_received=0)


@dataclass
class _Job:
    settings: DownloadSettings
    dataset: Dataset
    folder: Path
    landing: Landing
    supply: Transfer

    def complete(self) -> DownloadResult:
        """Bring all that is missing: the split lists first, since they say how names are spelt."""
        self.landing.require_own()
        classes = self.settings.classes
        selection = Selection(
            classes=tuple(sorted({name.casefold() for name in classes})) if classes else None,
            clips_per_class=self.settings.clips_per_class,
        )
        without_lists: dict[str, MirrorsFailed] = {}
        for part in self.dataset.splits:
            try:
                self._bring(part, self.settings.splits_archive, Selection())
            except MirrorsFailed as error:
                without_lists[part.name] = error
        self._read_spelling()
        several = len(self.dataset.videos) > 1
        require_classes(selection.classes, self._known_classes())
        for part in self.dataset.videos:
            if not several or selection.classes is None or part.name.casefold() in selection.classes:
                self._bring(part, self._given(part), selection)
        for name, why in without_lists.items():
            self._make_lists(name, why)
        self._tidy()
        return self._result([])

    def verify_or_repair(self) -> DownloadResult:
        """Compare every file with the manifest; fetch anew what differs, if that is asked for."""
        differences = self._compare(None)
        if self.settings.verify or not differences:
            return self._result(differences)
        wrong = sorted(difference.path for difference in differences)
        self.landing.damaged.update(wrong)
        self._read_spelling()
        for part in self.dataset.splits + self.dataset.videos:
            paths = frozenset(map(PurePosixPath, set(wrong) & set(self.landing.manifest.of_part(part.name))))
            is_list = part in self.dataset.splits
            if paths:
                self.supply.fill(
                    PartRequest(part, Selection(), paths),
                    self.settings.splits_archive if is_list else self._given(part),
                )
            if is_list:
                self._read_spelling()
        self._tidy()
        return self._result(self._compare(wrong))

    def _tidy(self) -> None:
        if not self.settings.keep_archive:
            folder = self.supply.archives
            for part in self.dataset.splits + self.dataset.videos:
                for source in part.sources:
                    remove_files(folder, fetch_files(folder / source.file_name))
            with suppress(OSError):
                folder.rmdir()

    def _bring(self, part: Part, given: Path | None, selection: Selection) -> None:
        """Bring what is missing of a part; no request where nothing is."""
        done = self.landing.manifest.done.get(part.name, [])
        paths: frozenset[PurePosixPath] | None = None
        if selection in done or any(other.is_whole for other in done):
            known = map(PurePosixPath, self.landing.manifest.of_part(part.name))
            paths = frozenset(
                path
                for path in known
                if is_selected(path, selection) and not self.landing.is_there(str(path))
            )
        if paths is None or paths:
            self.supply.fill(PartRequest(part, selection, paths), given)
            self.landing.finish(part.name, selection)

    def _make_lists(self, part: str, error: MirrorsFailed) -> None:
        """See Note [Lists from groups] in `data.splits`; raises `error` where that cannot be done."""
        names = set(self.supply.listed)
        for other in self.dataset.videos:
            if any(selection.is_whole for selection in self.landing.manifest.done.get(other.name, [])):
                names.update(map(PurePosixPath, self.landing.manifest.of_part(other.name)))
        if not names or not self.dataset.test_groups:
            raise error
        texts = lists_from_groups([(class_of(path), path.name) for path in names], self.dataset.test_groups)
        new = self.landing.new_incoming()
        (new / "splits").mkdir()
        files = []
        for name, text in texts.items():
            data = text.encode()
            (new / "splits" / name).write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            files.append(Unpacked(PurePosixPath("splits", name), name, len(data), digest))
        self.landing.accept(new)
        self.landing.land(
            files,
            SourceRecord(part=part, url=MADE_LISTS, bytes=None, sha256=None, etag=None, verified=False),
        )
        self.landing.finish(part, Selection())
        self.supply.tools.report(f"{error}\nSo the split lists were {MADE_LISTS}.")

    def _read_spelling(self) -> None:
        """See Note [HandStandPushups] in `data.remote.placement`."""
        lists = self.folder / "splits"
        if (lists / CLASS_LIST).is_file():
            known = [split for split in SPLITS if (lists / f"trainlist{split:02d}.txt").is_file()]
            sides = [side for split in known for side in parse_split_lists(lists, split).values()]
            self.supply.spelling = Spelling(read_classes(lists), [file for side in sides for _, file in side])

    def _known_classes(self) -> Sequence[str] | None:
        """Names of all classes, where they are known before an archive is looked into."""
        if len(self.dataset.videos) > 1:
            return [part.name for part in self.dataset.videos]
        lists = self.folder / "splits"
        return read_classes(lists) if (lists / CLASS_LIST).is_file() else None

    def _given(self, part: Part) -> Path | None:
        """The user's archive of a part; of a set with several parts, in the folder that was given."""
        archive = self.settings.archive
        if archive is None or len(self.dataset.videos) == 1:
            return archive
        for source in part.sources:
            if (archive / source.file_name).is_file():
                return archive / source.file_name
        wanted = ", ".join(other.sources[0].file_name for other in self.dataset.videos)
        raise DataError(
            f"{archive}: has no {part.sources[0].file_name}. {self.dataset.name} comes in several archives: "
            f"give the folder that holds them ({wanted})."
        )

    def _compare(self, paths: Sequence[str] | None) -> list[Difference]:
        if not self.landing.manifest.files:
            raise DataError(
                f"{self.folder}: has no {dataset_folder.FILE_NAME}. Run `tvit download {self.dataset.name}` first."
            )
        note = self.supply.tools.stage("check", self.dataset.name)
        return dataset_folder.compare(self.folder, self.landing.manifest, paths=paths, note=note)

    def _result(self, differences: Sequence[Difference]) -> DownloadResult:
        files = self.landing.manifest.files
        videos = [
            PurePosixPath(path)
            for path in files
            if path.startswith("videos/") and self.landing.is_there(path)
        ]
        return DownloadResult(
            name=self.dataset.name,
            folder=self.folder,
            classes=len({class_of(path) for path in videos}),
            videos=len(videos),
            landed=self.landing.landed,
            bytes_received=self.supply.received,
            sources=tuple(self.landing.manifest.sources),
            differences=tuple(differences),
        )
