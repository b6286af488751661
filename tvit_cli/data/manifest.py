"""CSV manifests: the rows of a file `path,label[,subset][,group]`, checked."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

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
