"""CSV manifests and UCF101's split lists.

Note [Lists from groups]
The server of the official lists sends an incomplete TLS chain and is often down. But the lists follow a rule:
the test side of split 1 is groups 1-7 of every class, of split 2 groups 8-14, of split 3 groups 15-21, the
training side is all the rest. Made from the file names alone they have the same members as the official
lists (a test compares all three), so that a host that is down does not stop anybody, and no check is skipped.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tvit_cli.errors import DataError

REQUIRED = ("path", "label")
OPTIONAL = ("subset", "group")
_DELIMITERS = ",;\t"
_PROBLEMS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One video of a manifest; `name` is the path as written, in posix form."""

    path: Path
    name: str
    label: str
    subset: str | None
    group: str | None


def read_manifest(path: Path, *, subsets: Mapping[str, str]) -> list[Row]:
    """Reads a manifest; paths are relative to it, `subsets` maps the accepted words to train, val and test.

    The delimiter is whichever of comma, semicolon and tab the header has most of. All rows name a subset, or
    none does. Other columns are not read.

    Raises DataError with line numbers, several problems at once.
    """
    lines = _lines(path)
    _, header = next(lines, (1, []))
    columns = [name.strip().lower() for name in header]
    for required in REQUIRED:
        if required not in columns:
            raise DataError(
                f'{path}, line 1: no column "{required}". The header has {", ".join(columns) or "nothing"}; '
                f"a manifest has {', '.join(REQUIRED)} and, if wanted, {', '.join(OPTIONAL)}."
            )
    records = [(number, dict(zip(columns, cells, strict=False))) for number, cells in lines if any(cells)]
    with_subset = any(record.get("subset") for _, record in records)
    rows: list[Row] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    for number, record in records:
        written, label = record.get("path", ""), record.get("label", "")
        word = record.get("subset", "")
        file = path.parent / written
        first = seen.setdefault(os.path.normpath(file), number)
        if not written or not label:
            problems.append(f"line {number} has no {'label' if written else 'path'}")
        elif with_subset and word.casefold() not in subsets:
            problems.append(f'line {number} has subset "{word}", which is none of train, val, test')
        elif not file.is_file():
            problems.append(f"line {number} names {file}, which is no file")
        elif first != number:
            problems.append(f"line {number} names {written}, as line {first} does")
        else:
            name = Path(os.path.normpath(written)).as_posix()
            subset = subsets[word.casefold()] if with_subset else None
            rows.append(Row(file, name, label, subset, record.get("group") or None))
    if problems:
        more = len(problems) - _PROBLEMS_SHOWN
        listed = "; ".join(problems[:_PROBLEMS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise DataError(f"{path}: {listed}.")
    if not rows:
        raise DataError(f"{path}: no rows below the header. Each names one video: path,label.")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and stripped cells."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(_DELIMITERS, key=header.count), strict=True)
            for cells in reader:
                yield reader.line_num, [cell.strip() for cell in cells]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: no text in UTF-8, so no CSV manifest. Give a folder of videos or a CSV file."
        ) from error
    except csv.Error as error:
        raise DataError(f"{path}: no CSV manifest ({error}).") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


SPLITS: Final = (1, 2, 3)
GROUP: Final = re.compile(r"_g(\d+)_c\d+\.\w+$", re.ASCII)
CLASS_LIST: Final = "classInd.txt"


def group_of(file_name: str) -> str | None:
    """UCF101's group in a file name. "v_Archery_g03_c01.avi" -> "g03"."""
    found = GROUP.search(file_name)
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
    """Official split 1-3: {"train", "test"} -> (class, file name) in the order of the list.

    Line ends may be mixed, labels present or absent on either side; class names come out as classInd.txt
    spells them, file names as the list does. Raises DataError where a list is missing, a class unknown, a
    label contradicts, or a video stands on both sides.
    """
    if split not in SPLITS:
        raise DataError(f"split {split}: UCF101 has splits {SPLITS[0]} to {SPLITS[-1]}")
    classes = read_classes(folder)
    by_name = {name.casefold(): (name, index) for index, name in enumerate(classes, start=1)}
    subsets: dict[str, list[tuple[str, str]]] = {}
    seen: dict[str, str] = {}
    for subset in ("train", "test"):
        path = folder / f"{subset}list{split:02d}.txt"
        subsets[subset] = []
        for number, line in _list_lines(path):
            where = f"{path}, line {number}: {line[:80]!r}"
            name, _, label = line.partition(" ")
            folder_name, _, file = name.replace("\\", "/").rpartition("/")
            found = by_name.get(folder_name.rpartition("/")[2].casefold())
            if found is None:
                raise DataError(f"{where} names a class that {CLASS_LIST} does not have")
            if label.strip() not in ("", str(found[1])):
                raise DataError(f"{where} has the wrong label: {found[0]} is {found[1]}")
            if file.casefold() in seen:
                raise DataError(f"{where} stands in {seen[file.casefold()]} too")
            seen[file.casefold()] = path.name
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
        sides: dict[bool, list[str]] = {False: [], True: []}
        for action, file in clips:
            found = GROUP.search(file)
            if found is None:
                raise DataError(
                    f"{file}: has no group in its name (v_Class_gNN_cNN.avi), so no split can be told"
                )
            is_test = first <= int(found[1]) <= last
            sides[is_test].append(f"{action}/{file}" + ("\n" if is_test else f" {labels[action]}\n"))
        texts[f"trainlist{split:02d}.txt"] = "".join(sides[False])
        texts[f"testlist{split:02d}.txt"] = "".join(sides[True])
    return texts


def _list_lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines that are not empty, whatever ends them."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # universal line ends
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); `tvit download ucf101 --repair` fetches it"
        ) from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
