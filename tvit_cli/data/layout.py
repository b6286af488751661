"""Data set layouts on disk: folders or a manifest become labelled videos in subsets."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tvit_cli.data.framestore_format import is_store
from tvit_cli.data.split_files import CLASS_LIST, parse_split_lists, read_manifest
from tvit_cli.data.video import VIDEO_SUFFIXES
from tvit_cli.errors import DataError
from tvit_cli.settings.base import suggestion

_SHOWN = 12  # how many names a message lists


def listed(names: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    every = list(names)
    more = len(every) - _SHOWN
    return ", ".join(every[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def printable(name: str) -> str:
    r"""A file's name as text that can be written anywhere: a byte that is not UTF-8 in six letters, `\udcXX`."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def same_class(label: str) -> str:
    """What the spellings of one class have in common: neither case nor how accents are put together counts.

    macOS writes an accented letter as two characters, other systems as one.
    """
    return unicodedata.normalize("NFC", label).casefold()


def matching_label(labels: Iterable[str]) -> Callable[[str], str]:
    """What spells a label as it is spelt in `labels`, where one of them is the same class; itself comes first."""
    known = list(labels)
    spelt = {same_class(label): label for label in known} | {label: label for label in known}
    return lambda label: spelt.get(label, spelt.get(same_class(label), label))


def is_hidden(path: Path) -> bool:
    """Whether a path, relative to where it was looked for, is hidden or an archiver's dropping."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


Groups = str | tuple[str, ...]  # as --val-groups is typed, or the names themselves, which may hold commas

AUTO_SHARE = {"val": 0.15, "test": 0.20}  # of the groups in train at that moment; test is taken first


def groups_to_hold_out(
    train: Mapping[str, Counter[str]], subset: str, wanted: Groups, *, automatic: bool, notes: list[str]
) -> tuple[str, ...]:
    """Sorted names of the groups that `--val-groups` or `--test-groups` moves from train to `subset`.

    `train` maps each group to its number of videos by label. What is `wanted`: `auto`, which holds none out unless
    `automatic`; `none`; a count; names with commas between; a tuple of names that were held out before, of which
    some may be gone. What was done is added to the notes.

    Raises DataError for a group that is not in train, and for a count that would take a class its last video.
    """
    wanted = wanted.strip() if isinstance(wanted, str) else wanted
    if wanted in ("none", ()) or (wanted == "auto" and not automatic):
        return ()
    groups: Sequence[str]
    if wanted == "auto":
        count = min(max(1, round(AUTO_SHARE[subset] * len(train))), len(train) - 1)
        groups = _spread(train, count)
        if not groups:
            notes.append(f"No {subset} subset: no group can be spared from train without emptying a class.")
            return ()
    elif isinstance(wanted, str) and _is_count(wanted):
        groups = _spread(train, int(wanted))
        if len(groups) < int(wanted):
            raise DataError(
                f"--{subset}-groups {wanted}: train has {len(train)} groups, of which {len(groups)} can be "
                "held out so that each class keeps a video to train on."
            )
    else:
        groups = _typed(wanted, subset) if isinstance(wanted, str) else _left(wanted, subset, train, notes)
        for group in groups:
            if group not in train:
                raise DataError(
                    f'--{subset}-groups: no group "{group}" in train.{suggestion(group, train, most=3)} '
                    f"Its groups are {listed(sorted(train))}."
                )
    held = set(groups)
    moved = sum(sum(train[group].values()) for group in held)
    if moved:
        notes.append(
            f"{len(held)} of {len(train)} groups ({moved} videos) are held out of train as {subset}: "
            f"{listed(sorted(held))}."
        )
    return tuple(sorted(held))


def _typed(wanted: str, subset: str) -> list[str]:
    """Names with commas between. Raises DataError where there is none."""
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if not names:
        raise DataError(f'--{subset}-groups "{wanted}": names no group. To hold none out, say none.')
    return names


def _left(
    before: tuple[str, ...], subset: str, train: Mapping[str, Counter[str]], notes: list[str]
) -> list[str]:
    """Of the groups that were held out before, those that are still there."""
    gone = [group for group in before if group not in train]
    if gone:
        notes.append(
            f"{len(gone)} of the {len(before)} groups that were held out as {subset} are gone: {listed(gone)}."
        )
    return [group for group in before if group in train]


def _is_count(text: str) -> bool:
    """`4` is a count, `04` a name: UCF101's groups are written with two digits."""
    return text.isdecimal() and text == str(int(text))


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


SUBSETS = ("train", "val", "test")

# fmt: off
_ALIASES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}
# fmt: on


@dataclass(frozen=True, slots=True)
class Video:
    """One labelled file; `name`, its posix path below the root as text, is its identity from run to run."""

    path: Path
    name: str
    label: str
    subset: str  # train, val or test
    group: str | None  # None: a group of its own
    url: str = ""  # where it is read from instead of a file

    @property
    def unit(self) -> str:
        """What is held out together, and counts as one in a statistic: its group, or the video alone."""
        return self.name if self.group is None else self.group


@dataclass(frozen=True)
class Layout:
    """All videos of a data set, its sorted labels, and remarks in plain words on how it was read."""

    root: Path
    labels: tuple[str, ...]
    videos: tuple[Video, ...]
    notes: tuple[str, ...]
    held_out: dict[str, tuple[str, ...]] = field(default_factory=dict)  # subset -> groups taken out of train

    def subset(self, name: str) -> tuple[Video, ...]:
        """Videos of `train`, `val` or `test`, or `all`, in the order of their names."""
        return tuple(video for video in self.videos if name in (video.subset, "all"))

    def counts(self) -> dict[str, int]:
        """Number of videos in each subset."""
        return {name: len(self.subset(name)) for name in SUBSETS}


def read_layout(
    root: Path,
    *,
    group_pattern: str,
    val_groups: Groups,
    test_groups: Groups,
    split: int = 1,
    need_training: bool = True,
    need_test: bool = False,
) -> Layout:
    """Finds all videos below a folder, or in a CSV manifest, and gives each a label, a subset and a group.

    Recognised are a manifest `path,label[,subset][,group]`, `train|val|test/<class>/*`, `<class>/*` and the
    latter two one folder down. A group is what `group_pattern` finds in the file name: its group named
    `group`, else its first, else the whole match. `val_groups` and `test_groups` hold whole groups out of
    train: `auto`, `none`, a count, names with commas between, or a tuple of names. Groups are chosen without
    chance, evenly over their sorted names, and so that every class keeps a video to train on.

    Where the lists of UCF101's official splits lie in `splits/`, `split` (1 to 3) says which one is followed.

    Raises DataError; with `need_training` also where all is one class, or a class has nothing to train on.
    """
    videos, notes = _find(root)
    videos = _merge_spellings(videos, notes)
    if (root / "splits" / CLASS_LIST).is_file():
        videos = _follow_lists(videos, root / "splits", split, notes)
    videos = _give_groups(videos, group_pattern, notes)
    has_subsets = any(video.subset != "train" for video in videos)
    videos, test_held = _hold_out(videos, "test", test_groups, automatic=not has_subsets, notes=notes)
    has_val = any(video.subset == "val" for video in videos)
    videos, val_held = _hold_out(videos, "val", val_groups, automatic=not has_val, notes=notes)
    layout = Layout(
        root=root if root.is_dir() else root.parent,
        labels=tuple(sorted({video.label for video in videos})),
        videos=tuple(sorted(videos, key=lambda video: video.name)),
        notes=tuple(notes),
        held_out={"val": val_held, "test": test_held},
    )
    if need_training:
        _refuse_untrainable(layout, root)
    if need_test and not layout.subset("test"):
        raise DataError(
            f"{root}: no test subset. Add a folder test/<class>/, or hold groups out of train with "
            "--test-groups (names, or a count)."
        )
    return layout


def _find(root: Path) -> tuple[list[Video], list[str]]:
    """Every video with its label and the subset that its folder or row states; `train` where none does."""
    if root.is_file():
        return _from_manifest(root), []
    if not root.is_dir():
        siblings = [path.name for path in _visible(root.parent)] if root.parent.is_dir() else []
        raise DataError(f"{root}: no such folder.{suggestion(root.name, siblings, most=3)}")
    notes: list[str] = []
    for base in (root, *_one_down(root)):
        if subsets := _subset_folders(base):
            videos = [v for folder, name in subsets for v in _read_classes(folder, root, name, notes)]
            if others := [f.name for f in _folders(base) if f.name.casefold() not in _ALIASES]:
                notes.append(f"Folders beside train, val and test are not read: {listed(others)}.")
            return videos, notes
        if _has_classes(base) and not all(f.name.casefold() in _ALIASES for f in _folders(base)):
            return _read_classes(base, root, "train", notes), notes
    loose = bool(_videos_in(root)) or _has_classes(root)
    raise DataError(
        f"{root}: {'videos, but no class folders' if loose else 'no videos found'}. "
        "Put each class into a folder of its own (<class>/*.avi), or give a CSV manifest with the columns "
        "path and label."
    )


def _one_down(root: Path) -> list[Path]:
    """`root/videos`, or the only folder there is, as archives unpack."""
    folders = _folders(root)
    named = [folder for folder in folders if folder.name.casefold() == "videos"]
    return named or (folders if len(folders) == 1 else [])


def _subset_folders(base: Path) -> list[tuple[Path, str]]:
    """Folders of subsets with the subset of each; empty unless one is for training and holds classes."""
    found = [(folder, _ALIASES.get(folder.name.casefold(), "")) for folder in _folders(base)]
    subsets = [(folder, subset) for folder, subset in found if subset]
    # `train` may be a class, beside `car` and `ship`: then no class folders lie in it.
    trains = [folder for folder, subset in subsets if subset == "train"]
    return subsets if any(_has_classes(folder) for folder in trains) else []


def _has_classes(base: Path) -> bool:
    return any(_videos_in(folder) for folder in _folders(base))


def _read_classes(base: Path, root: Path, subset: str, notes: list[str]) -> list[Video]:
    videos: list[Video] = []
    ignored = len(_videos_in(base))
    for folder in _folders(base):
        inside = _videos_in(folder)
        others = sorted(set(_visible(folder)) - set(inside))
        if not inside:
            held = f"only {listed(path.name for path in others)}" if others else "nothing"
            raise DataError(
                f"{folder}: a class folder without videos; it holds {held}. Remove it, or put videos in."
            )
        ignored += len(others)
        videos += [
            Video(path, printable(path.relative_to(root).as_posix()), printable(folder.name), subset, None)
            for path in inside
        ]
    if ignored:
        notes.append(
            f"{base}: {ignored} entries are not read: videos outside class folders, folders inside them, and "
            "files whose suffix is no video's."
        )
    return videos


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, without hidden files and the droppings of archivers."""
    return sorted(path for path in folder.iterdir() if not is_hidden(Path(path.name)))


def _folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir() and not is_store(path)]


def _videos_in(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()]


def _from_manifest(path: Path) -> list[Video]:
    rows = read_manifest(path, subsets=_ALIASES)
    return [Video(row.path, row.name, row.label, row.subset or "train", row.group) for row in rows]


def _merge_spellings(videos: list[Video], notes: list[str]) -> list[Video]:
    """Gives labels that are the `same_class` the spelling that most videos have.

    UCF101 writes HandStandPushups and HandstandPushups: taken as they stand, 102 classes.
    """
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for video in videos:
        spellings[same_class(video.label)][video.label] += 1
    chosen = {key: min(found, key=lambda label: (-found[label], label)) for key, found in spellings.items()}
    for key, found in spellings.items():
        if len(found) > 1:
            notes.append(f"{' and '.join(sorted(found))} are read as one class, {chosen[key]}.")
    return [replace(video, label=chosen[same_class(video.label)]) for video in videos]


def match_labels(layout: Layout, labels: Iterable[str]) -> Layout:
    """A layout whose classes are spelt as they are in `labels`, where they are the same classes."""
    spelt = matching_label(labels)
    return replace(
        layout,
        labels=tuple(sorted(map(spelt, layout.labels))),
        videos=tuple(replace(video, label=spelt(video.label)) for video in layout.videos),
    )


def _follow_lists(videos: list[Video], lists: Path, split: int, notes: list[str]) -> list[Video]:
    """Gives each video the subset that an official split list states; unlisted videos are left out."""
    subsets = {
        (same_class(label), file.casefold()): subset
        for subset, entries in parse_split_lists(lists, split).items()
        for label, file in entries
    }
    found = [(video, subsets.get((same_class(video.label), video.path.name.casefold()))) for video in videos]
    chosen = [replace(video, subset=subset) for video, subset in found if subset is not None]
    if not chosen:
        raise DataError(f"{lists}: none of the {len(videos)} videos is in the lists of split {split}.")
    notes.append(f"Official split {split}: {len(chosen)} of the {len(subsets)} listed videos are here.")
    if len(chosen) < len(videos):
        names = listed(video.name for video, subset in found if subset is None)
        notes.append(f"{len(videos) - len(chosen)} videos are in no list and left out: {names}.")
    return chosen


def _give_groups(videos: list[Video], pattern: str, notes: list[str]) -> list[Video]:
    """Reads each group off its file's name, unless a manifest gave it."""
    expression = re.compile(pattern)
    videos = [
        video
        if video.group is not None
        else replace(video, group=_group(printable(video.path.name), expression))
        for video in videos
    ]
    alone = [video.name for video in videos if video.group is None]
    if alone:
        which = f"{len(alone)} of {len(videos)} videos" if len(alone) < len(videos) else "No video"
        does = "do not match" if len(alone) < len(videos) else "matches"
        notes.append(
            f'{which} {does} the group pattern "{pattern}"; each such video is a group of its own. If '
            "several clips are cut from one recording, they leak from train into val and test: give "
            "--group-pattern."
        )
    return videos


def _group(file_name: str, expression: re.Pattern[str]) -> str | None:
    match = expression.search(file_name)
    if match is None:
        return None
    if "group" in expression.groupindex:
        return match["group"]
    return match[1] if expression.groups else match[0]


def _hold_out(
    videos: list[Video], subset: str, wanted: Groups, *, automatic: bool, notes: list[str]
) -> tuple[list[Video], tuple[str, ...]]:
    """Moves whole groups from train to `subset`, as `--val-groups` or `--test-groups` says; names them, too."""
    train: dict[str, Counter[str]] = defaultdict(Counter)
    for video in videos:
        if video.subset == "train":
            train[video.unit][video.label] += 1
    groups = groups_to_hold_out(train, subset, wanted, automatic=automatic, notes=notes)
    held = set(groups)
    moved_videos = [
        replace(video, subset=subset) if video.subset == "train" and video.unit in held else video
        for video in videos
    ]
    return moved_videos, groups


def _refuse_untrainable(layout: Layout, root: Path) -> None:
    if len(layout.labels) < 2:
        raise DataError(
            f'{root}: one class only ("{layout.labels[0]}"). A classifier needs two or more, each in a '
            "folder of its own."
        )
    trained = {video.label for video in layout.subset("train")}
    for subset in ("val", "test"):
        if missing := sorted({video.label for video in layout.subset(subset)} - trained):
            raise DataError(
                f"{root}: {listed(missing)} in {subset}, but no video of that class in train. Put one "
                "there, or hold out other groups."
            )
