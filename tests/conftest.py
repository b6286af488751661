"""Shared fixtures: numbered frames, class folders, tiny data and models, real clips, benchmarks."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tvit_cli.data.video_writer import write_video

if TYPE_CHECKING:
    from tvit_cli.results import TrainResult


# Tests run on every core at once, and so does what they start; torch's threads on top of that only wait for
# each other. Set before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# transformers copies remote code to a cache before it imports it, and reads where once: not into the home folder.
_remote_code = tempfile.TemporaryDirectory(prefix="tvit-remote-code-", ignore_cleanup_errors=True)
os.environ["HF_MODULES_CACHE"] = _remote_code.name
HEIGHT, WIDTH = 48, 64
_DARKEST, _STEP = 20, 5  # frame i is grey of this brightness plus i steps: read back after any codec


def pytest_collection_finish() -> None:
    """Exempts all that was imported from the garbage collection that ends each training: 0.2 s and more."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def load_bench() -> Callable[[str], ModuleType]:
    """Import a benchmark by the name of its file."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(
            f"bench_{name}", Path(__file__).parent / "bench" / f"{name}.py"
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look it up there
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def numbered_frames() -> Callable[..., np.ndarray]:
    """`numbered_frames(n)`: frames whose brightness tells their number, up to 46 of them."""

    def make(count: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
        assert count <= (255 - _DARKEST) // _STEP
        levels = (_DARKEST + _STEP * np.arange(count)).astype(np.uint8)
        return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()

    return make


@pytest.fixture(scope="session")
def read_numbers() -> Callable[[np.ndarray], list[int]]:
    """The inverse of `numbered_frames`, for (T, H, W, 3)."""

    def read(frames: np.ndarray) -> list[int]:
        return np.rint((frames.mean(axis=(1, 2, 3)) - _DARKEST) / _STEP).astype(int).tolist()

    return read


@pytest.fixture(scope="session")
def make_video(numbered_frames: Callable[..., np.ndarray]) -> Callable[..., Path]:
    """`make_video(path, frames=12, **how)`: a file of numbered frames; `how` goes to `write_video`."""

    def make(path: Path, frames: int = 12, height: int = HEIGHT, width: int = WIDTH, **how: Any) -> Path:
        write_video(path, numbered_frames(frames, height, width), **how)
        return path

    return make


@pytest.fixture(scope="session")
def make_classes(
    make_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path, Mapping[str, Sequence[str]]], Path]:
    """`make_classes(root, {"walk": ["a_g01_c01.avi"]})`: class folders of readable videos."""
    source = make_video(tmp_path_factory.mktemp("video") / "source.avi")

    def make(root: Path, classes: Mapping[str, Sequence[str]]) -> Path:
        for folder, names in classes.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for name in names:
                shutil.copyfile(source, root / folder / name)
        return root

    return make


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of six coloured clips each, in six groups. Not to be changed: shared by all tests."""
    from tiny import make_clips

    return make_clips(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretrained ViT in Hugging Face's format. Not to be changed: shared by all tests."""
    from tiny import make_pretrained

    return make_pretrained(tmp_path_factory.mktemp("weights") / "tiny-vit")


@pytest.fixture(scope="session")
def inputs(clips: Path, pretrained: Path) -> dict[str, Any]:
    """Settings that name the shared clips and pretrained model."""
    return {"path_to_data": str(clips), "hf_model_name": str(pretrained)}


@pytest.fixture
def trained(inputs: dict[str, Any], tmp_path: Path) -> Callable[..., TrainResult]:
    """`trained(**changes)` trains on the shared clips, in `tmp_path`."""
    from tiny import run

    return lambda **changes: run(**{**inputs, "working_directory": tmp_path, **changes})


@pytest.fixture(scope="session")
def finished(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run `mine` of two epochs on the shared clips. Not to be changed."""
    from tiny import run

    return run(**inputs, working_directory=tmp_path_factory.mktemp("finished"), experiment_name="mine")


@pytest.fixture
def mine(finished: TrainResult, tmp_path: Path) -> TrainResult:
    """A copy of `finished` in `tmp_path`, to be changed."""
    from tiny import run_in

    return run_in(Path(shutil.copytree(finished.run, tmp_path / "mine")))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the charts of reports undrawn: a third of the time of a tiny training."""
    monkeypatch.setattr("tvit_cli.report.html.to_png", lambda drawing, **how: b"")


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run trained from scratch, in `working_directory` beside its data `colours`. Not to be changed."""
    from tiny import SCRATCH, make_clips, run

    root = tmp_path_factory.mktemp("classifier")
    data = make_clips(root / "colours")
    return run(path_to_data=str(data), working_directory=root / "working_directory", epochs=8, **SCRATCH)


@pytest.fixture(scope="session")
def packed_xvid() -> Path:
    """39 numbered frames (grey below row 40) in 40 packets: B-frames packed as XviD does.

    Made once with Debian's `ffmpeg -f rawvideo ... -c:v libxvid -bf 2 -q:v 3 -g 300 -vtag XVID`, since PyAV's
    wheels have no libxvid.
    """
    return Path(__file__).parent / "fixtures" / "xvid_packed_bframes.avi"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real clips; skips where TVIT_TEST_DATA does not name one."""
    folder = os.environ.get("TVIT_TEST_DATA")
    if not folder:
        pytest.skip("TVIT_TEST_DATA is not set")
    return Path(folder)
