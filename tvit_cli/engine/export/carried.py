"""Modules that an export carries, imported from the export itself: what is proved is what is shipped."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tvit_cli.engine.export.sources import SOURCE


@contextmanager
def carried(folder: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Within the block, a function that imports a module of the package `source` of an export."""
    package = f"_tvit_export_{abs(hash(folder))}"
    spec = importlib.util.spec_from_file_location(
        package, folder / SOURCE / "__init__.py", submodule_search_locations=[str(folder / SOURCE)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[package] = module
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
        yield lambda name: importlib.import_module(f"{package}.{name}")
    finally:
        sys.dont_write_bytecode = writes_bytecode
        for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
            del sys.modules[name]


def read_frames(reading: ModuleType, video: Path, facts: dict[str, Any]) -> np.ndarray[Any, Any]:
    """A batch of one clip, uint8 (1, T, H, W, 3), read by the shipped file."""
    frames: np.ndarray[Any, Any] = reading.read_clip(
        video, n_frames=facts["n_frames"], short_side=facts["scale_to"], frame_grid=facts["frame_grid"]
    )
    return frames[None]
