"""The program `tvit` as pyproject.toml names it, in this process or in one of its own."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
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


class _Stream(io.StringIO):
    """A stream of a command; `flushed` is the text that the reader of a pipe has."""

    flushed = ""

    def flush(self) -> None:
        self.flushed = self.getvalue()


def tvit(*words: object) -> Ended:
    """Run a command line in this process."""
    out, err = _Stream(), _Stream()
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            program().run([str(word) for word in words])
        except SystemExit as ended:
            code = ended.code or 0
    assert isinstance(code, int), code
    return Ended(code, out.getvalue(), err.getvalue())


def start(*words: object, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
    """Start `python WORDS` in a process group of its own, without TVIT_* variables of the caller."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("TVIT_")}
    return subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=cwd, env={**environ, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def run_python(*words: object, cwd: Path | None = None, timeout: float = 120, **variables: str) -> Ended:
    """Run `python WORDS` to its end."""
    with start(*words, cwd=cwd, **variables) as child:
        try:
            out, err = child.communicate(timeout=timeout)
        finally:
            child.kill()
    return Ended(child.returncode, out, err)
