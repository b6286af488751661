"""tvit's own files that an export carries, so that nothing of it is written twice."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Sequence
from pathlib import Path

import tvit_cli

ROOMS = tuple(Path(tvit_cli.__file__).parent / room for room in ("hub", "model", "data"))
SOURCE = "source"  # the package that they form in an export


def shipped(names: Sequence[str]) -> dict[str, Path]:
    """The named modules and all that they import relatively: name -> file. They lie in one folder later."""
    found: dict[str, Path] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = next(path for room in ROOMS if (path := room / f"{name}.py").is_file())
            waiting += _neighbours(found[name])
    return dict(sorted(found.items()))


def ship(folder: Path, names: Sequence[str]) -> None:
    """Copy modules and what they import into a folder."""
    folder.mkdir(exist_ok=True)
    for path in shipped(names).values():
        shutil.copyfile(path, folder / path.name)


def ship_package(folder: Path, names: Sequence[str]) -> None:
    """Copy modules and what they import into the package `source` of an export."""
    ship(folder / SOURCE, names)
    (folder / SOURCE / "__init__.py").write_text('"""Files of tvit that go with this model."""\n')


def _neighbours(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1
            and node.module]  # fmt: skip
