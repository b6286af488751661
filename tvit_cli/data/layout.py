"""Data set layouts on disk: folders or a manifest become labelled videos in subsets."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict, Unpack, cast

from tvit_cli.data.split_files import CLASS_LIST, parse_split_lists, read_manifest
from tvit_cli.errors import DataError, plural, shorten
from tvit_cli.files import FrameArray, Source
from tvit_cli.settings.base import suggestion
from tvit_cli.settings.types import GROUP_PATTERN, DataSettings

SUBSETS = ("train", "val", "test")  # in the order of a frame store's numbers
_ALIASES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
_ALIASES |= {name: name for name in SUBSETS}
# fmt: off
VIDEO_SUFFIXES = frozenset({
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".f4v", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4",
    ".mpeg", ".mpg", ".mts", ".mxf", ".ogg", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m",
})
# fmt: on
PICTURES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
MOST_SEARCHED = 10_000  # entries, for an error
AUTO_SHARE = {"val": 0.15, "test": 0.20}  # of the groups in train at that moment; test is taken first
_shorten = partial(shorten, most=12)

# `re` has no time limit and cannot be stopped, so a pattern is tried in a process of its own.
MOST_SECONDS = 10.0
TRIAL = "import json, re, sys; pattern, names = json.load(sys.stdin); [re.search(pattern, n) for n in names]"

# Proposed in this order where no name matches the group pattern; the last ones fit most names.
PATTERNS = (
    r"^(.{11})_\d{6}_\d{6}",  # Kinetics: the video on YouTube
    r"^(.+?)[-_][fhlu][-_][cn]m[-_]np\d",  # HMDB51: the film
    r"^([a-z]+)_",
    r"^([A-Za-z]+)_",
    r"^([A-Za-z]+\d+)_",
    r"P\d+",  # NTU RGB+D: S001C001P001R001A001
    r"(?i)(?<![a-z])(?:person|subject|actor|scene|session|s|p)[-_]?\d+",
    r"[-_ ]([A-Za-z]+)\.\w+$",
    r"^([^_]+)_",
    r"^([^-]+)-",
    r"^([^ ]+) ",
    r"^(.+)[-_ ]\D?\d+\.\w+$",
)

STORE_HEADER, STORE_FORMAT = "store.json", "tvit frame store"


@dataclass(frozen=True)
class HeldOut:
    """Groups held out by the earlier training that one goes on from, and its classes (`same_class`).

    They stay held out, beside a share of the groups that hold new classes only. Without any of them left,
    `otherwise`, the value of --val-groups, chooses from all groups.
    """

    names: tuple[str, ...]
    classes: frozenset[str]
    otherwise: str


# The value of --val-groups, or group names, which may contain commas.
Groups = str | tuple[str, ...] | HeldOut


class SplitChoice(TypedDict):
    """Settings that assign videos to subsets."""

    group_pattern: str
    val_groups: Groups
    test_groups: Groups
    split: NotRequired[int]


def split_choice(settings: DataSettings) -> SplitChoice:
    """The settings that assign videos to subsets."""
    return cast(SplitChoice, settings.model_dump(include=set(SplitChoice.__annotations__)))


@dataclass(frozen=True, slots=True)
class Video:
    """One labelled file; `name`, its printable posix path below the root, identifies it across runs."""

    path: Path
    name: str
    label: str
    subset: str  # train, val or test
    group: str | None  # None: a group of its own
    url: str = ""  # read instead of the file
    array: FrameArray | None = None  # read instead of both

    @property
    def source(self) -> Source:
        """The frames in memory, the URL, or the file."""
        return self.array or self.url or self.path

    @property
    def unit(self) -> str:
        """The unit of hold-out and of statistics: the group, or the video alone."""
        return self.name if self.group is None else self.group


@dataclass(frozen=True)
class Layout:
    """All videos of a data set in the order of their names, its sorted labels, and notes for the user."""

    root: Path
    labels: tuple[str, ...]
    videos: tuple[Video, ...]
    notes: tuple[str, ...]
    held_out: dict[str, tuple[str, ...]] = field(default_factory=dict)  # subset -> groups taken out of train

    def subset(self, name: str) -> tuple[Video, ...]:
        """Videos of `train`, `val`, `test` or `all`."""
        return tuple(video for video in self.videos if name in (video.subset, "all"))

    def counts(self) -> dict[str, int]:
        """Number of videos in each subset."""
        return {name: len(self.subset(name)) for name in SUBSETS}


def printable(name: str) -> str:
    r"""A file name as valid text; each byte that is not UTF-8 becomes `\udcXX`."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def same_class(label: str) -> str:
    """A key of all spellings of a class: case-folded, in Unicode's composed form (macOS writes the other)."""
    return unicodedata.normalize("NFC", label).casefold()


def matching_label(labels: Iterable[str]) -> Callable[[str], str]:
    """A function that returns the spelling in `labels` of a label's class; an exact match has priority."""
    exact = {label: label for label in labels}
    spelling = {same_class(label): label for label in exact} | exact
    return lambda label: spelling.get(label, spelling.get(same_class(label), label))


def match_labels(layout: Layout, labels: Iterable[str]) -> Layout:
    """The layout with its labels spelt as in `labels`, where they are the same classes."""
    spell = matching_label(labels)
    return replace(
        layout,
        labels=tuple(sorted(map(spell, layout.labels))),
        videos=tuple(replace(video, label=spell(video.label)) for video in layout.videos),
    )


def is_hidden(path: Path) -> bool:
    """Whether a relative path is hidden or an archiver's metadata."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def is_store(folder: Path) -> bool:
    """Whether a folder is a frame store, finished or not; other programs may write a store.json as well."""
    path = folder / STORE_HEADER
    if not path.is_file():
        return False
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True  # damaged: read_header raises the error
    return isinstance(header, dict) and header.get("format") == STORE_FORMAT


def read_layout(
    root: Path, *, need_training: bool = True, need_test: bool = False, **choice: Unpack[SplitChoice]
) -> Layout:
    """Finds all videos of a folder or CSV manifest, each with its label, subset and group.

    Supported are a manifest `path,label[,subset][,group]`, `train|val|test/<class>/*`, `<class>/*` and the
    latter two one folder down. The group is the match of `group_pattern` in the file name: its group named
    `group`, else its first, else the whole match. `val_groups` and `test_groups` hold whole groups out of
    train: `auto`, `none`, a count, comma-separated names, or a tuple of names. The choice is deterministic, even
    over the sorted names, and leaves every class a training video.

    `split` selects one of UCF101's official splits (1 to 3) where their lists are in `splits/`.

    Raises DataError; with `need_training` also for a single class or a class without training videos.
    """
    videos, notes = _find(root)
    videos = _merge_spellings(videos, notes)
    if (root / "splits" / CLASS_LIST).is_file():
        videos = _follow_lists(videos, root / "splits", choice.get("split", 1), notes)
    videos = _give_groups(videos, choice["group_pattern"], notes)
    one_subset = all(video.subset == "train" for video in videos)
    videos, test = _hold_out(videos, "test", choice["test_groups"], automatic=one_subset, notes=notes)
    no_val = all(video.subset != "val" for video in videos)
    videos, val = _hold_out(videos, "val", choice["val_groups"], automatic=no_val, notes=notes)
    layout = Layout(
        root=root if root.is_dir() else root.parent,
        labels=tuple(sorted({video.label for video in videos})),
        videos=tuple(sorted(videos, key=lambda video: video.name)),
        notes=tuple(notes),
        held_out={"val": val, "test": test},
    )
    if need_training:
        _check_trainable(layout, root)
    if need_test and not layout.subset("test"):
        ways = (
            "Add a folder test/<class>/, or hold groups out of train with --test-groups (names or a count)."
        )
        raise DataError(f"{root}: no test subset. {ways}")
    return layout


def _find(root: Path) -> tuple[list[Video], list[str]]:
    """All videos, in subset `train` unless their folder or row states another, and notes."""
    if root.is_file():
        rows = read_manifest(root, subsets=_ALIASES)
        return [Video(row.path, row.name, row.label, row.subset or "train", row.group) for row in rows], []
    if not root.is_dir():
        raise DataError(f"{root}: no such folder.{similar_names(root)}")
    notes: list[str] = []
    folders = _folders(root)
    named = [folder for folder in folders if folder.name.casefold() == "videos"]
    for base in (root, *(named or (folders if len(folders) == 1 else []))):  # archives unpack one folder down
        folders = _folders(base)
        subsets = {f: _ALIASES[f.name.casefold()] for f in folders if f.name.casefold() in _ALIASES}
        # `train` may be a class beside `car` and `ship`: it contains no class folders then.
        if any(_has_classes(folder) for folder, subset in subsets.items() if subset == "train"):
            if others := [folder.name for folder in folders if folder not in subsets]:
                notes.append(f"Folders beside train, val and test are not read: {_shorten(others)}.")
            return [v for f, subset in subsets.items() for v in _read_classes(f, root, subset, notes)], notes
        if _has_classes(base) and len(subsets) < len(folders):
            return _read_classes(base, root, "train", notes), notes
    loose = bool(_videos_in(root)) or _has_classes(root)
    reason = "videos, but no class folders" if loose else _without_videos(root)
    raise DataError(
        f"{root}: {reason}. Move each class to a folder of its own (<class>/*.avi), or give a CSV manifest with "
        "the columns path and label."
    )


def _without_videos(root: Path) -> str:
    """Why no class folders were found: videos lie deeper, frames are pictures, or there is nothing."""
    below = list(itertools.islice(root.rglob("*"), MOST_SEARCHED))
    if deep := [path for path in below if path.suffix.lower() in VIDEO_SUFFIXES]:
        return f"no videos found in class folders, but deeper, as {min(deep).relative_to(root).as_posix()}"
    if pictures := [path for path in below if path.suffix.lower() in PICTURES]:
        folder = min(pictures).parent
        join = (
            f"ffmpeg -framerate 25 -pattern_type glob -i '{folder}/*{pictures[0].suffix}' {folder.name}.mp4"
        )
        return f"pictures, but no videos. Join the frames of a clip to a video ({join})"
    return "no videos found"


def similar_names(path: Path) -> str:
    """A question with the entries beside a missing path that have similar names; "" without one."""
    siblings = [entry.name for entry in _visible(path.parent)] if path.parent.is_dir() else []
    return suggestion(path.name, siblings, most=3)


def _has_classes(base: Path) -> bool:
    return any(_videos_in(folder) for folder in _folders(base))


def _read_classes(base: Path, root: Path, subset: str, notes: list[str]) -> list[Video]:
    videos: list[Video] = []
    ignored = _videos_in(base)
    for folder in _folders(base):
        paths = _videos_in(folder)
        others = sorted(set(_visible(folder)) - set(paths))
        if not paths:
            found = f"only {_shorten(path.name for path in others)}" if others else "nothing"
            fault = f"a class folder without videos; it contains {found}"
            raise DataError(f"{folder}: {fault}. Remove it, or add videos.")
        ignored += others
        videos += [
            Video(path, printable(path.relative_to(root).as_posix()), printable(folder.name), subset, None)
            for path in paths
        ]
    if ignored:
        count = "1 entry is" if len(ignored) == 1 else f"{len(ignored)} entries are"
        kinds = "videos outside class folders, folders inside them, files without a video suffix"
        names = _shorten(printable(path.relative_to(base).as_posix()) for path in ignored)
        notes.append(f"{base}: {count} not read ({kinds}): {names}.")
    return videos


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not is_hidden(Path(path.name)))


def _folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir() and not is_store(path)]


def _videos_in(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()]


def _merge_spellings(videos: list[Video], notes: list[str]) -> list[Video]:
    """Gives labels of one class the spelling of most of its videos: UCF101 has HandStand- and HandstandPushups."""
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for video in videos:
        spellings[same_class(video.label)][video.label] += 1
    chosen = {key: min(found, key=lambda label: (-found[label], label)) for key, found in spellings.items()}
    for key, found in spellings.items():
        if len(found) > 1:
            notes.append(f"{' and '.join(sorted(found))} are read as one class, {chosen[key]}.")
    return [replace(video, label=chosen[same_class(video.label)]) for video in videos]


def _follow_lists(videos: list[Video], lists: Path, split: int, notes: list[str]) -> list[Video]:
    """Gives each video its subset in an official split; unlisted videos are left out."""
    subsets = {
        (same_class(label), file.casefold()): subset
        for subset, entries in parse_split_lists(lists, split).items()
        for label, file in entries
    }
    found = [(video, subsets.get((same_class(video.label), video.path.name.casefold()))) for video in videos]
    chosen = [replace(video, subset=subset) for video, subset in found if subset is not None]
    if not chosen:
        raise DataError(f"{lists}: none of the {len(videos)} videos is in the lists of split {split}.")
    notes.append(f"Official split {split}: {len(chosen)} of the {len(subsets)} listed videos are present.")
    if unlisted := [video.name for video, subset in found if subset is None]:
        notes.append(f"{len(unlisted)} videos are in no list and left out: {_shorten(unlisted)}.")
    return chosen


def _give_groups(videos: list[Video], pattern: str, notes: list[str]) -> list[Video]:
    """Derives each group from the file name, unless a manifest has it. Raises DataError for a slow pattern."""
    if pattern != GROUP_PATTERN:
        _try_pattern(pattern, [printable(video.path.name) for video in videos if video.group is None])
    result = _match_groups(videos, pattern)
    alone, groups = sum(video.group is None for video in result), {video.unit for video in result}
    if alone or len(groups) == 1:
        some = "No video matches" if alone == len(videos) else f"{alone} of {len(videos)} videos do not match"
        fault = f'{some} the group pattern "{pattern}"; each such video is a group of its own.'
        if not alone:
            fault = f'The group pattern "{pattern}" puts all videos into one group, {groups.pop()}.'
        proposals = propose_patterns(videos) if alone in (0, len(videos)) else {}
        advice = "Patterns that match:" if proposals else "Give --group-pattern."
        note = f"{fault} Clips cut from one recording would leak from train into val and test. {advice}"
        for other, names in proposals.items():
            note += (
                f"\n  --group-pattern {shlex.quote(other)}  {plural(len(names), 'group')}: {shorten(names)}"
            )
        notes.append(note)
    return result


def propose_patterns(videos: Sequence[Video], most: int = 3) -> dict[str, list[str]]:
    """Group patterns that fit these file names, each with its sorted groups; names of classes are no groups.

    A pattern fits if 90 % of the names match, some videos share a group, none has more than 3/4 of them, and most
    classes have videos of two groups. One that only divides the groups of an earlier one is left out.
    """
    found: dict[str, list[str]] = {}
    units: list[list[str]] = []  # of the videos, by pattern
    for pattern in PATTERNS:
        grouped = _match_groups(videos, pattern)
        own = [video.unit for video in grouped]
        sizes = Counter(video.group for video in grouped if video.group is not None)
        per_class = Counter(label for label, _ in {(video.label, video.unit) for video in grouped})
        if (
            sum(sizes.values()) >= 0.9 * len(videos)
            and 2 <= len(set(own)) < len(videos)
            and max(sizes.values()) <= 0.75 * len(videos)
            and 2 * sum(count > 1 for count in per_class.values()) > len(per_class)
            and all(len(set(zip(own, earlier, strict=True))) > len(set(own)) for earlier in units)
        ):
            found[pattern] = sorted(sizes)
            units.append(own)
    return dict(list(found.items())[:most])


def _match_groups(videos: Iterable[Video], pattern: str) -> list[Video]:
    expression = re.compile(pattern)
    key = "group" if "group" in expression.groupindex else min(1, expression.groups)
    result: list[Video] = []
    for video in videos:
        match = expression.search(printable(video.path.name)) if video.group is None else None
        result.append(video if match is None else replace(video, group=match[key]))
    return result


def _try_pattern(pattern: str, names: list[str]) -> None:
    trial = partial(subprocess.run, text=True, check=False, stderr=subprocess.DEVNULL)
    try:
        trial([sys.executable, "-I", "-c", TRIAL], input=json.dumps([pattern, names]), timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired as error:
        fault = f"matching {len(names)} file names takes more than {MOST_SECONDS:g} s"
        advice = "Give one without nested repeats, as in (a+)+."
        raise DataError(f'--group-pattern "{pattern}": {fault}. {advice}') from error


def _hold_out(
    videos: list[Video], subset: str, wanted: Groups, *, automatic: bool, notes: list[str]
) -> tuple[list[Video], tuple[str, ...]]:
    """Moves the groups of `--val-groups` or `--test-groups` from train to `subset`; also returns their names."""
    train: dict[str, Counter[str]] = defaultdict(Counter)  # group -> number of videos by label
    for video in videos:
        if video.subset == "train":
            train[video.unit][video.label] += 1
    groups = set(_choose_groups(train, subset, wanted, automatic=automatic, notes=notes))
    if groups:
        moved = sum(sum(train[group].values()) for group in groups)
        are_videos = moved == len(groups) and len(train) == sum(video.subset == "train" for video in videos)
        kinds = "video" if are_videos else "group"
        counts = f"{len(groups)} of {plural(len(train), kinds)}"
        counts += "" if are_videos else f" ({plural(moved, 'video')})"
        names = shorten(sorted(groups), 3 if are_videos else 12)
        notes.append(f"{counts} held out of train as {subset}: {names}.")
    return [
        replace(video, subset=subset) if video.subset == "train" and video.unit in groups else video
        for video in videos
    ], tuple(sorted(groups))


def _choose_groups(
    train: Mapping[str, Counter[str]], subset: str, wanted: Groups, *, automatic: bool, notes: list[str]
) -> list[str]:
    if isinstance(wanted, HeldOut):
        kept = [group for group in wanted.names if group in train]
        if not kept:
            return _choose_groups(train, subset, wanted.otherwise, automatic=automatic, notes=notes)
        new = {g: c for g, c in train.items() if not wanted.classes.intersection(map(same_class, c))}
        return kept + (
            _spread(new, min(max(1, round(AUTO_SHARE[subset] * len(new))), len(new) - 1)) if new else []
        )
    if isinstance(wanted, tuple):  # held out before; some may be gone
        if gone := [group for group in wanted if group not in train]:
            notes.append(
                f"{len(gone)} of {len(wanted)} groups held out as {subset} are gone: {_shorten(gone)}."
            )
        return [group for group in wanted if group in train]
    wanted = wanted.strip()
    if wanted == "none" or (wanted == "auto" and not automatic):
        return []
    if wanted == "auto":
        groups = _spread(train, min(max(1, round(AUTO_SHARE[subset] * len(train))), len(train) - 1))
        if not groups:
            notes.append(f"No {subset} subset: no group can be spared from train without emptying a class.")
        return groups
    if wanted.isdecimal() and wanted == str(int(wanted)):  # 4 is a count, 04 a name as in UCF101
        groups = _spread(train, int(wanted))
        if len(groups) < int(wanted):
            most = f"{len(groups)} can be held out so that each class keeps a training video"
            raise DataError(f"--{subset}-groups {wanted}: train has {len(train)} groups, of which {most}.")
        return groups
    groups = [name.strip() for name in wanted.split(",") if name.strip()]
    if not groups:
        raise DataError(f'--{subset}-groups "{wanted}": names no group. To hold none out, give none.')
    for group in groups:
        if group not in train:
            raise DataError(
                f'--{subset}-groups: no group "{group}" in train.{suggestion(group, train, most=3)} '
                f"Its groups are {_shorten(sorted(train))}."
            )
    return groups


def _spread(train: Mapping[str, Counter[str]], count: int) -> list[str]:
    """`count` groups, evenly over the sorted names; fewer where a class would lose its last video."""
    names = sorted(train)
    left = sum(train.values(), Counter[str]())
    chosen: dict[str, None] = {}
    for turn in range(count):
        start = (2 * turn + 1) * len(names) // (2 * count)
        for name in names[start:] + names[:start]:
            if name not in chosen and all(left[label] > n for label, n in train[name].items()):
                chosen[name] = None
                left -= train[name]
                break
    return list(chosen)


def _check_trainable(layout: Layout, root: Path) -> None:
    if len(layout.labels) < 2:
        only = f'one class only ("{layout.labels[0]}")'
        raise DataError(f"{root}: {only}. A classifier needs two or more, each in a folder.")
    trained = {video.label for video in layout.subset("train")}
    for subset in ("val", "test"):
        if missing := sorted({video.label for video in layout.subset(subset)} - trained):
            fault = f"{_shorten(missing)} in {subset}, but no video of that class in train"
            raise DataError(f"{root}: {fault}. Add one, or hold out other groups.")
