"""Data sets for download: archives, sizes, hashes, licences, and the target path of each archive member.

`bytes` and `sha256` are None if unpublished; the values of the received file are then recorded.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import PurePosixPath
from typing import Final, Literal
from urllib.parse import unquote, urlsplit

from tvit_cli.data.archive_safety import Member, normalized_name
from tvit_cli.data.archives import ArchiveKind, Targets
from tvit_cli.data.dataset_folder import Selection
from tvit_cli.data.layout import SUBSETS, VIDEO_SUFFIXES
from tvit_cli.data.split_files import group_of
from tvit_cli.errors import DataError, SettingsError
from tvit_cli.settings.base import suggestion
from tvit_cli.settings.types import GROUP_PATTERN

# Arrangement of the members of an archive; `target_path` maps each to `videos/<Class>/<file>`.
Layout = Literal["ucf101", "class folders", "subset folders", "one class", "lists"]


@dataclass(frozen=True)
class Source:
    """One archive, and the URLs that serve identical bytes."""

    urls: tuple[str, ...]
    kind: ArchiveKind
    layout: Layout
    bytes: int | None = None
    sha256: str | None = None

    @property
    def file_name(self) -> str:
        """Name on disk, from the first URL. "https://a.org/x/UCF101.rar?download=1" -> "UCF101.rar"."""
        return PurePosixPath(unquote(urlsplit(self.urls[0]).path)).name


@dataclass(frozen=True)
class Part:
    """A part of a data set with alternative sources, best first. In a set of several parts, each is one class."""

    name: str
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Dataset:
    """Description and parts of a data set; one without `videos` is generated, not downloaded."""

    name: str
    title: str
    classes: int
    clips: int
    licence: str
    homepage: str = ""
    videos: tuple[Part, ...] = ()
    splits: tuple[Part, ...] = ()
    # Groups in the test set of each official split, if they define it; see `split_files.lists_from_groups`.
    test_groups: tuple[tuple[int, int], ...] = ()
    unpacked_bytes: int | None = None

    @property
    def bytes(self) -> int | None:
        """Download size with the first source of each part; None if unknown."""
        sizes = [part.sources[0].bytes for part in self.videos + self.splits]
        return sum(size for size in sizes if size is not None) if sizes and None not in sizes else None


_CRCV: Final = "https://www.crcv.ucf.edu"
_WEIZMANN: Final = "https://www.wisdom.weizmann.ac.il/~vision/VideoAnalysis/Demos/SpaceTimeActions"
_SUBSET: Final = "https://huggingface.co/datasets/sayakpaul/ucf101-subset"

# Sizes and hashes as in TensorFlow Datasets.
_UCF101_ZIP: Final = Source(
    urls=("https://storage.googleapis.com/thumos14_files/UCF101_videos.zip",),
    kind="zip",
    layout="ucf101",
    bytes=6_960_400_115,
    sha256="dabf56f573cd19c79e096563529fec8126a2a34e18e10c72eb621dd687532b0d",
)
_UCF101_RAR: Final = Source(
    urls=(f"{_CRCV}/data/UCF101/UCF101.rar", f"{_CRCV}/datasets/human-actions/ucf101/UCF101.rar"),
    kind="rar",
    layout="ucf101",
    bytes=6_932_971_618,
    sha256="ca8dfadb4c891cb11316f94d52b6b0ac2a11994e67a0cae227180cd160bd8e55",
)
_UCF101_LISTS: Final = Source(
    urls=(f"{_CRCV}/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip",),
    kind="zip",
    layout="lists",
    bytes=113_943,
    sha256="5c0d1a53b8ed364a2ac830a73f405e51bece7d98ce1254fd19ed4a36b224bd27",
)
_UCF101_SUBSET: Final = Source(  # a plain tar; the hash is from the Hugging Face Hub
    urls=(f"{_SUBSET}/resolve/main/UCF101_subset.tar.gz",),
    kind="tar",
    layout="subset folders",
    sha256="e9fcc76af48d320be88c5265f2e0576ecd615956976f6ce4742fdf2b042b71eb",
)
CATALOG: Final[tuple[Dataset, ...]] = (
    Dataset(
        name="ucf101",
        title="UCF101: 101 actions from web videos",
        classes=101,
        clips=13_320,
        licence="none stated; for research, see its home page",
        homepage=f"{_CRCV}/data/UCF101.php",
        videos=(Part("videos", (_UCF101_ZIP, _UCF101_RAR)),),
        splits=(Part("splits", (_UCF101_LISTS,)),),
        test_groups=((1, 7), (8, 14), (15, 21)),
        unpacked_bytes=7_000_000_000,
    ),
    Dataset(
        name="ucf101-subset",
        title="UCF101, 10 classes in train, val and test",
        classes=10,
        clips=405,
        licence="as UCF101",
        homepage=_SUBSET,
        videos=(Part("videos", (_UCF101_SUBSET,)),),
        unpacked_bytes=171_000_000,
    ),
    Dataset(
        name="weizmann",
        title="Weizmann: 10 actions of 9 people before a static background",
        classes=10,
        clips=90,
        licence="published for research (Gorelick et al. 2005)",
        homepage=f"{_WEIZMANN}.html",
        videos=tuple(
            Part(name, (Source((f"{_WEIZMANN}/DB/{name}.zip",), "zip", "one class"),))
            for name in ("bend", "jack", "jump", "pjump", "run", "side", "skip", "walk", "wave1", "wave2")
        ),
    ),
    Dataset(
        name="motions",
        title="motions: tvit's demo, generated on this machine; classes differ in motion only",
        classes=8,
        clips=1_600,
        licence="generated by tvit, no restrictions",
    ),
)


def find(name: str, catalog: Sequence[Dataset] = CATALOG) -> Dataset:
    """The data set of this name in any case. Raises SettingsError with similar names."""
    names = {dataset.name: dataset for dataset in catalog}
    if dataset := names.get(name.casefold()):
        return dataset
    hint = suggestion(name, names, most=3) or f" Known: {', '.join(names)}."
    raise SettingsError(f"{name}: unknown data set.{hint} `tvit download --list` lists all.")


class CanonicalNames:
    """Class and file names as in the split lists, looked up without case; other classes keep their first spelling.

    Note [HandStandPushups]
    UCF101 spells this class with a small and a capital s, in lists, folders and file names. Taken literally, its
    clips make 102 classes, or are missing from the lists. So classes and files are named as in the lists.
    """

    def __init__(self, classes: Iterable[str] = (), files: Iterable[str] = ()) -> None:
        self._classes = {name.casefold(): name for name in classes}
        self._files = {name.casefold(): name for name in files}

    def of_class(self, name: str) -> str:
        """Canonical name of a class."""
        return self._classes.setdefault(name.casefold(), name)

    def of_file(self, name: str) -> str:
        """Canonical name of a file."""
        return self._files.get(name.casefold(), name)


def target_path(
    member: PurePosixPath, layout: Layout, *, part: str, names: CanonicalNames
) -> PurePosixPath | None:
    """Path of a member under `data/<name>/`; None if it is not part of the data set."""
    if member.name.startswith(".") or "__MACOSX" in member.parts:
        return None
    if layout == "lists":
        return PurePosixPath("splits", member.name) if member.suffix.casefold() == ".txt" else None
    folders = member.parts[:-1]
    subset: tuple[str, ...] = ()
    if layout == "one class":
        folders = (part,)
    elif layout == "subset folders":
        at = next((index for index, folder in enumerate(folders) if folder in SUBSETS), len(folders))
        subset, folders = folders[at : at + 1], folders[at + 1 : at + 2]
    elif layout == "ucf101" and (named := re.match(rf"v_(.+?){GROUP_PATTERN}", member.name)):
        folders = (named[1],)  # a flat archive has no class folders
    if not folders or member.suffix.casefold() not in VIDEO_SUFFIXES:
        return None
    return PurePosixPath("videos", *subset, names.of_class(folders[-1]), names.of_file(member.name))


def target_paths(members: Sequence[Member], layout: Layout, *, part: str, names: CanonicalNames) -> Targets:
    """Target path of each member of the data set by index. Raises DataError if there is none, or two are equal."""
    paths: Targets = {}
    members_of: dict[str, str] = {}
    for member in members:
        if path := target_path(member.path, layout, part=part, names=names):
            if (other := members_of.setdefault(normalized_name(path), member.name)) != member.name:
                raise DataError(f"{member.name!r} and {other!r} would both become {path}")
            paths[member.index] = path
    if not paths:
        raise DataError(f"nothing in the archive belongs to {part}")
    return paths


def choose(paths: Collection[PurePosixPath], selection: Selection) -> set[PurePosixPath]:
    """The files of a selection. Raises SettingsError for a class that has none."""
    require_classes(selection.classes, {path.parent.name for path in paths})
    chosen = {path for path in paths if is_selected(path, selection)}
    return chosen if selection.clips_per_class is None else take_clips(chosen, selection.clips_per_class)


def is_selected(path: PurePosixPath, selection: Selection) -> bool:
    """Whether a file belongs to a selected class; split lists always do."""
    is_video = path.parts[0] == "videos"
    return not is_video or selection.classes is None or path.parent.name.casefold() in selection.classes


def require_classes(wanted: Iterable[str] | None, classes: Collection[str]) -> None:
    """Raises SettingsError, with similar names, for a case-folded class that is not in `classes`."""
    names = {name.casefold() for name in classes}
    for name in wanted or ():
        if name not in names:
            hint = suggestion(name, classes, most=3) or f" Known: {', '.join(sorted(classes))}."
            raise SettingsError(f"--classes {name}: no such class.{hint}")


def take_clips(paths: Iterable[PurePosixPath], count: int) -> set[PurePosixPath]:
    """`count` videos of each folder, deterministic, from as many groups, evenly spaced, as possible.

    With 5 of UCF101's 25 groups, training and test set of each official split get clips.
    """
    folders: dict[PurePosixPath, dict[str, list[PurePosixPath]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(paths):
        folders[path.parent][group_of(path.name) or path.name].append(path)
    taken: set[PurePosixPath] = set()
    for by_group in folders.values():
        groups = [by_group[name] for name in sorted(by_group)]
        if count < len(groups):
            groups = [groups[index * len(groups) // count] for index in range(count)]
        rounds = zip_longest(*groups)  # one clip of each group in turn
        taken.update([path for paths in rounds for path in paths if path is not None][:count])
    return taken
