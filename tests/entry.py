"""The program `tvit` as pyproject.toml names it, run in this process."""

from __future__ import annotations

import contextlib
import importlib
import io
import tomllib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Ended(NamedTuple):
    """Exit code and both streams of a command."""

    code: int
    out: str
    err: str


def program() -> ModuleType:
    """The module of the entry point `tvit`."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    return importlib.import_module(scripts["tvit"].partition(":")[0])


def tvit(*words: object) -> Ended:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            program().run([str(word) for word in words])
        except SystemExit as ended:
            code = ended.code or 0
    assert isinstance(code, int), code
    return Ended(code, out.getvalue(), err.getvalue())
