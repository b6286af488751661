"""Skips of tests whose optional packages or programs are missing."""

import os
from importlib.util import find_spec

import pytest


def need(*packages: str, program: str | None = "", name: str = "") -> None:
    """Skip where a package is not installed or `program` was not found; fail there if NO_SKIPS is set."""
    missing = [package for package in packages if find_spec(package) is None]
    if program is None:
        missing.append(name)
    if missing:
        tell = pytest.fail if os.environ.get("NO_SKIPS") else pytest.skip
        tell(f"not installed: {', '.join(missing)}")
