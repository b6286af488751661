"""Known data sets: archives, sizes, hashes, licences, and where each archive member goes in the data folder.

`bytes` and `sha256` are None where nobody has published them; what was received is then recorded.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, Literal

from tvit_cli.data.archive_safety import Member, normalized_name
from tvit_cli.data.archives import ArchiveKind
from tvit_cli.data.dataset_folder import Selection
from tvit_cli.data.http import file_name
from tvit_cli.data.split_files import group_of
from tvit_cli.errors import DataError, SettingsError
from tvit_cli.settings.base import suggestion

# How members map to `videos/<Class>/<file>`; see `data.remote.placement`.
Layout = Literal["ucf101", "class folders", "subset folders", "one class", "lists"]


@dataclass(frozen=True)
class Source:
    """One archive, and the addresses that serve the very same bytes."""

    urls: tuple[str, ...]
    kind: ArchiveKind
    layout: Layout
    bytes: int | None = None
    sha256: str | None = None

    @property
    def file_name(self) -> str:
        """The archive's name on disk: that of its first address."""
        return file_name(self.urls[0])


@dataclass(frozen=True)
class Part:
    """A piece of a data set; `sources` are alternatives, best first. One of several is named by its class."""

    name: str
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Dataset:
    """Counts for people, parts for `tvit download`; a set without `videos` is made, not downloaded."""

    name: str
    title: str
    classes: int
    clips: int
    licence: str
    homepage: str
    videos: tuple[Part, ...] = ()
    splits: tuple[Part, ...] = ()
    # Groups of the test side of each official split, where the lists follow from them; see `data.splits`.
    test_groups: tuple[tuple[int, int], ...] = ()
    unpacked_bytes: int | None = None

    @property
    def bytes(self) -> int | None:
        """What is downloaded from the first source of each part; None where that is not known."""
        sizes = [part.sources[0].bytes for part in self.videos + self.splits]
        return sum(size for size in sizes if size is not None) if sizes and None not in sizes else None


_CRCV: Final = "https://www.crcv.ucf.edu"
_WEIZMANN: Final = "https://www.wisdom.weizmann.ac.il/~vision/VideoAnalysis/Demos/SpaceTimeActions"
_WEIZMANN_CLASSES: Final = ("bend", "jack", "jump", "pjump", "run", "side", "skip", "walk", "wave1", "wave2")

CATALOG: Final[tuple[Dataset, ...]] = (
    Dataset(
        name="ucf101",
        title="UCF101: 101 actions from web videos",
        classes=101,
        clips=13_320,
        licence="none stated; for research, see its home page",
        homepage=f"{_CRCV}/data/UCF101.php",
        videos=(
            Part(
                "videos",
                (
                    Source(  # size and hash as in TensorFlow Datasets
                        urls=("https://storage.googleapis.com/thumos14_files/UCF101_videos.zip",),
                        kind="zip",
                        layout="ucf101",
                        bytes=6_960_400_115,
                        sha256="dabf56f573cd19c79e096563529fec8126a2a34e18e10c72eb621dd687532b0d",
                    ),
                    Source(
                        urls=(
                            f"{_CRCV}/data/UCF101/UCF101.rar",
                            f"{_CRCV}/datasets/human-actions/ucf101/UCF101.rar",
                        ),
                        kind="rar",
                        layout="ucf101",
                        bytes=6_932_971_618,
                        sha256="ca8dfadb4c891cb11316f94d52b6b0ac2a11994e67a0cae227180cd160bd8e55",
                    ),
                ),
            ),
        ),
        splits=(
            Part(
                "splits",
                (
                    Source(
                        urls=(f"{_CRCV}/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip",),
                        kind="zip",
                        layout="lists",
                        bytes=113_943,
                        sha256="5c0d1a53b8ed364a2ac830a73f405e51bece7d98ce1254fd19ed4a36b224bd27",
                    ),
                ),
            ),
        ),
        test_groups=((1, 7), (8, 14), (15, 21)),
        unpacked_bytes=7_000_000_000,
    ),
    Dataset(
        name="ucf101-subset",
        title="UCF101, 10 classes in train, val and test",
        classes=10,
        clips=405,
        licence="as UCF101",
        homepage="https://huggingface.co/datasets/sayakpaul/ucf101-subset",
        videos=(
            Part(
                "videos",
                (
                    Source(  # a plain tar in truth; the hash is the hub's
                        urls=(
                            "https://huggingface.co/datasets/sayakpaul/ucf101-subset/resolve/main/UCF101_subset.tar.gz",
                        ),
                        kind="tar",
                        layout="subset folders",
                        sha256="e9fcc76af48d320be88c5265f2e0576ecd615956976f6ce4742fdf2b042b71eb",
                    ),
                ),
            ),
        ),
        unpacked_bytes=171_000_000,
    ),
    Dataset(
        name="weizmann",
        title="Weizmann: 10 actions of 9 people before a still wall",
        classes=10,
        clips=90,
        licence="published for research (Gorelick et al. 2005)",
        homepage=f"{_WEIZMANN}.html",
        videos=tuple(
            Part(name, (Source(urls=(f"{_WEIZMANN}/DB/{name}.zip",), kind="zip", layout="one class"),))
            for name in _WEIZMANN_CLASSES
        ),
    ),
    Dataset(
        name="motions",
        title="motions: tvit's demo, made on this machine; its classes are told apart by motion alone",
        classes=8,
        clips=1_600,
        licence="made by tvit, free of terms",
        homepage="",
    ),
)


def find(name: str, catalog: Sequence[Dataset] = CATALOG) -> Dataset:
    """The data set of this name, case set aside. Raises SettingsError with near names."""
    by_name = {dataset.name: dataset for dataset in catalog}
    if (found := by_name.get(name.casefold())) is not None:
        return found
    near = difflib.get_close_matches(name.casefold(), by_name, n=3, cutoff=0.5)
    known = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(by_name)}."
    raise SettingsError(
        f"{name}: no data set of this name is known. {known} `tvit download --list` shows them."
    )


VIDEO_SUFFIXES: Final = frozenset({".avi", ".mp4", ".mkv", ".webm", ".mov", ".mpg", ".mpeg", ".m4v"})
SUBSETS: Final = ("train", "val", "test")
UCF101_NAME: Final = re.compile(r"v_(?P<action>.+)_g\d+_c\d+\.\w+", re.ASCII)


class Spelling:
    """The names that the split lists use, found without regard to case; first come, first kept elsewhere.

    Note [HandStandPushups]
    UCF101 spells this class with a small and a capital s, in lists, folders and file names. Taken at their
    word, its clips make 102 classes, or are missing from the lists. So a class, and a file, has the name that
    the lists give it, whichever way an archive spells it.
    """

    def __init__(self, classes: Iterable[str] = (), files: Iterable[str] = ()) -> None:
        self._classes = {name.casefold(): name for name in classes}
        self._files = {name.casefold(): name for name in files}

    def of_class(self, name: str) -> str:
        return self._classes.setdefault(name.casefold(), name)

    def of_file(self, name: str) -> str:
        return self._files.get(name.casefold(), name)


def place(member: PurePosixPath, layout: Layout, *, part: str, spelling: Spelling) -> PurePosixPath | None:
    """Path of a member under `data/<name>/`; None for what is not part of the set."""
    if member.name.startswith(".") or "__MACOSX" in member.parts:
        return None
    if layout == "lists":
        return PurePosixPath("splits", member.name) if member.suffix.casefold() == ".txt" else None
    if member.suffix.casefold() not in VIDEO_SUFFIXES:
        return None
    folders = member.parts[:-1]
    subset: tuple[str, ...] = ()
    if layout == "one class":
        action: str | None = part
    elif layout == "subset folders":
        at = next((index for index, folder in enumerate(folders) if folder in SUBSETS), None)
        if at is None or at + 1 >= len(folders):
            return None
        subset, action = (folders[at],), folders[at + 1]
    elif layout == "ucf101" and (named := UCF101_NAME.fullmatch(member.name)):
        action = named["action"]  # a flat archive has no class folders
    else:
        action = folders[-1] if folders else None
    if action is None:
        return None
    return PurePosixPath("videos", *subset, spelling.of_class(action), spelling.of_file(member.name))


def place_all(
    members: Sequence[Member], layout: Layout, *, part: str, spelling: Spelling
) -> dict[int, PurePosixPath]:
    """Path of each member of the set, by index. Raises DataError where there is none, or two collide."""
    placed: dict[int, PurePosixPath] = {}
    names: dict[str, str] = {}
    for member in members:
        where = place(member.path, layout, part=part, spelling=spelling)
        if where is None:
            continue
        if (other := names.setdefault(normalized_name(where), member.name)) != member.name:
            raise DataError(f"{member.name!r} and {other!r} would both become {where}")
        placed[member.index] = where
    if not placed:
        raise DataError(f"nothing in the archive belongs to {part}")
    return placed


def choose(paths: Iterable[PurePosixPath], selection: Selection) -> set[PurePosixPath]:
    """The files that a selection takes. Raises SettingsError for a class that none of them has."""
    paths = set(paths)
    require_classes(selection.classes, {class_of(path) for path in paths})
    chosen = {path for path in paths if is_selected(path, selection)}
    return chosen if selection.clips_per_class is None else take_clips(chosen, selection.clips_per_class)


def is_selected(path: PurePosixPath, selection: Selection) -> bool:
    """Whether a file is of a selected class; split lists always are."""
    return (
        path.parts[0] != "videos"
        or selection.classes is None
        or class_of(path).casefold() in selection.classes
    )


def require_classes(wanted: Iterable[str] | None, known: Iterable[str] | None) -> None:
    """Raise SettingsError, with near names, for a case-folded class that is not among `known` (None: any)."""
    if known is None:
        return
    spelt = {name.casefold(): name for name in known}
    for name in wanted or ():
        if name not in spelt:
            hint = suggestion(name, spelt.values(), most=3) or f" Known: {', '.join(sorted(spelt.values()))}."
            raise SettingsError(f"--classes {name}: no such class.{hint}")


def class_of(path: PurePosixPath) -> str:
    """Class of a placed video: the folder that it lies in."""
    return path.parent.name


def take_clips(paths: Iterable[PurePosixPath], count: int) -> set[PurePosixPath]:
    """`count` videos of each folder, from groups as many and as far apart as can be, the same everywhere.

    With 5 of UCF101's 25 groups both sides of each official split get clips.
    """
    folders: dict[PurePosixPath, dict[str, list[PurePosixPath]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(paths):
        folders[path.parent][group_of(path.name) or path.name].append(path)
    taken: set[PurePosixPath] = set()
    for groups in folders.values():
        taken.update(_spread(groups, count))
    return taken


def _spread(groups: Mapping[str, list[PurePosixPath]], count: int) -> list[PurePosixPath]:
    if count < len(groups):
        names = sorted(groups)
        return [groups[names[index * len(names) // count]][0] for index in range(count)]
    turns = max(map(len, groups.values()))
    in_turn = [
        clips[turn] for turn in range(turns) for _, clips in sorted(groups.items()) if turn < len(clips)
    ]
    return in_turn[:count]
