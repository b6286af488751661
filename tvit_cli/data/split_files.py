"""CSV manifests and UCF101's split lists.

Note [Lists from groups]
The server of UCF101's official lists sends an incomplete TLS chain and is often down. But the lists follow a rule:
the test set of split 1 is groups 1-7 of every class, of split 2 groups 8-14, of split 3 groups 15-21, and the
training set is the rest. Lists made from the file names have the same members as the official ones (a test compares
all three), so TLS verification stays on and the download does not depend on that server.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tvit_cli.errors import DataError, shorten
from tvit_cli.settings.types import GROUP_PATTERN

SPLITS: Final = (1, 2, 3)
CLASS_LIST: Final = "classInd.txt"


@dataclass(frozen=True, slots=True)
class Row:
    """One video of a manifest; `name` is its path as written, with "/"."""

    path: Path
    name: str
    label: str
    subset: str | None
    group: str | None


def read_manifest(path: Path, *, subsets: Mapping[str, str]) -> list[Row]:
    """Reads a manifest; paths are relative to it, `subsets` maps the accepted words to train, val and test.

    The delimiter is the most frequent one in the header: comma, semicolon or tab. All rows name a subset, or none
    does. Other columns are ignored. Raises DataError with line numbers, several problems at once.
    """
    lines = _lines(path)
    _, header = next(lines, (1, []))
    columns = [name.strip().lower() for name in header]
    for required in ("path", "label"):
        if required not in columns:
            found = f'no column "{required}". The header has {", ".join(columns) or "nothing"}'
            raise DataError(
                f"{path}, line 1: {found}; a manifest has path and label (optional: subset, group)."
            )
    records = [(number, dict(zip(columns, cells, strict=False))) for number, cells in lines if any(cells)]
    with_subset = any(record.get("subset") for _, record in records)
    rows: list[Row] = []
    problems: list[str] = []
    first_lines: dict[str, int] = {}
    for number, record in records:
        written, label = record.get("path", ""), record.get("label", "")
        word = record.get("subset", "")
        file = path.parent / written
        first = first_lines.setdefault(os.path.normpath(file), number)
        if not written or not label:
            problems.append(f"line {number} has no {'label' if written else 'path'}")
        elif with_subset and word.casefold() not in subsets:
            problems.append(f'line {number} has subset "{word}", not train, val or test')
        elif not file.is_file():
            problems.append(f"line {number} names {file}, which is not a file")
        elif first != number:
            problems.append(f"line {number} names {written}, as line {first} does")
        else:
            name = Path(os.path.normpath(written)).as_posix()
            subset = subsets[word.casefold()] if with_subset else None
            rows.append(Row(file, name, label, subset, record.get("group") or None))
    if problems:
        raise DataError(f"{path}: {shorten(problems, 5, '; ')}.")
    if not rows:
        raise DataError(f"{path}: no rows below the header. Each names one video: path,label.")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = max(",;\t", key=file.readline().count)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for cells in reader:
                yield reader.line_num, [cell.strip() for cell in cells]
    except (UnicodeDecodeError, csv.Error) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise DataError(
            f"{path}: no CSV manifest ({reason}). Give a folder of videos or a CSV file."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def group_of(file_name: str) -> str | None:
    """UCF101's group in a file name. "v_Archery_g03_c01.avi" -> "g03"."""
    found = re.search(GROUP_PATTERN, file_name)
    return f"g{found[1]}" if found else None


def read_classes(folder: Path) -> list[str]:
    """Class names in the order of classInd.txt ("12 Bowling" per line). Raises DataError."""
    names = []
    for number, line in _list_lines(folder / CLASS_LIST):
        label, _, name = line.partition(" ")
        if not label.isdigit() or not name.strip():
            raise DataError(f'{folder / CLASS_LIST}, line {number}: {line[:80]!r} is not "<number> <class>"')
        names.append(name.strip())
    return names


def parse_split_lists(folder: Path, split: int) -> dict[str, list[tuple[str, str]]]:
    """(class, file name) of the videos in "train" and "test" of official split 1-3, in the order of the lists.

    Line ends may be mixed, labels present or absent in either list. Class names are spelt as in classInd.txt, file
    names as in the list. Raises DataError for a missing list, an unknown class, a wrong label or a repeated video.
    """
    if split not in SPLITS:
        raise DataError(f"split {split}: UCF101 has splits {SPLITS[0]} to {SPLITS[-1]}")
    classes = read_classes(folder)
    by_name = {name.casefold(): (name, index) for index, name in enumerate(classes, start=1)}
    subsets: dict[str, list[tuple[str, str]]] = {}
    list_names: dict[str, str] = {}
    for subset in ("train", "test"):
        path = folder / f"{subset}list{split:02d}.txt"
        subsets[subset] = []
        for number, line in _list_lines(path):
            where = f"{path}, line {number}: {line[:80]!r}"
            name, _, label = line.partition(" ")
            folder_name, _, file = name.replace("\\", "/").rpartition("/")
            found = by_name.get(folder_name.rpartition("/")[2].casefold())
            if found is None:
                raise DataError(f"{where} names a class that is not in {CLASS_LIST}")
            if label.strip() not in ("", str(found[1])):
                raise DataError(f"{where} has the wrong label: {found[0]} is {found[1]}")
            if file.casefold() in list_names:
                raise DataError(f"{where} is in {list_names[file.casefold()]} too")
            list_names[file.casefold()] = path.name
            subsets[subset].append((found[0], file))
    return subsets


def lists_from_groups(
    videos: Iterable[tuple[str, str]], test_groups: Sequence[tuple[int, int]]
) -> dict[str, str]:
    """Text of each list file, from (class, file name) of all videos. See Note [Lists from groups]."""
    clips = sorted(videos, key=lambda clip: (clip[0].casefold(), clip[1].casefold()))
    classes = sorted({action for action, _ in clips}, key=str.casefold)
    labels = {action: index for index, action in enumerate(classes, start=1)}
    texts = {CLASS_LIST: "".join(f"{label} {action}\n" for action, label in labels.items())}
    for split, (first, last) in enumerate(test_groups, start=1):
        train, test = "", ""
        for action, file in clips:
            if (group := group_of(file)) is None:
                raise DataError(f"{file}: no group in its name (v_Class_gNN_cNN.avi), so no split for it")
            if first <= int(group[1:]) <= last:
                test += f"{action}/{file}\n"
            else:
                train += f"{action}/{file} {labels[action]}\n"
        texts[f"trainlist{split:02d}.txt"], texts[f"testlist{split:02d}.txt"] = train, test
    return texts


def _list_lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # universal line ends
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({error}). Fetch it with `tvit download ucf101 --repair`."
        raise DataError(f"{path}: {reason}") from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
