"""Where a member of a known archive goes in the tidy folder, and which clips a first experiment takes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Final

from tvit_cli.data.remote.catalog import Layout
from tvit_cli.data.remote.manifest import Selection
from tvit_cli.data.remote.members import Member, folded
from tvit_cli.data.splits import group_of
from tvit_cli.errors import DataError, SettingsError
from tvit_cli.settings.base import suggestion

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
        if (other := names.setdefault(folded(where), member.name)) != member.name:
            raise DataError(f"{member.name!r} and {other!r} would both become {where}")
        placed[member.index] = where
    if not placed:
        raise DataError(f"nothing in the archive belongs to {part}")
    return placed


def choose(paths: Iterable[PurePosixPath], selection: Selection) -> set[PurePosixPath]:
    """The files that a selection takes. Raises SettingsError for a class that none of them has."""
    paths = set(paths)
    require_classes(selection.classes, {class_of(path) for path in paths})
    chosen = {path for path in paths if is_within(path, selection)}
    return chosen if selection.clips_per_class is None else take_clips(chosen, selection.clips_per_class)


def is_within(path: PurePosixPath, selection: Selection) -> bool:
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
