"""Shared parts of the export formats: job and format, network source files, traced graphs.

Letters: B clips, T frames, H W pixels, S the side of the model's frame, O outputs along an axis, I inputs.
"""

from __future__ import annotations

import importlib
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

import tvit_cli
from tvit_cli.engine.trained import Trained
from tvit_cli.model.folder import CARD_FILE
from tvit_cli.results import Report
from tvit_cli.settings.card import ModelCard, Preprocessing
from tvit_cli.settings.export import ExportSettings

PORTABLE = Path(tvit_cli.__file__).parent / "portable"
SOURCE = "source"  # package of the network's source files in an export

Predictor = Callable[[Path], Tensor]  # one video -> its logits, or log probabilities, (K,)


@dataclass(frozen=True)
class Job:
    """A trained model, the export settings, and the callback for progress."""

    trained: Trained
    settings: ExportSettings
    report: Report

    @property
    def card(self) -> ModelCard:
        """The public card: paths of this machine are left out or reduced to their last part."""
        card = self.trained.card
        left_out = ("working_directory", "resume_from_checkpoint")
        settings = {key: value for key, value in card.settings.items() if key not in left_out}
        for key, public in (
            ("path_to_data", _last_part),
            ("from_", _last_part),
            ("hf_model_name", _public_name),
        ):
            if settings.get(key):
                settings[key] = public(settings[key])
        name = settings.get("from_") or (card.base and _public_name(card.base.name))
        base = card.base and card.base.model_copy(update={"name": name})
        return card.model_copy(update={"settings": settings, "base": base})

    def write_card(self, folder: Path, **changes: str) -> None:
        """Writes card.json into an export, with changed fields."""
        card = self.card.model_copy(update=changes)
        (folder / CARD_FILE).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Format:
    """Functions that write one format and load an export of it without tvit, and values for its README.

    `check` raises before anything is computed. The rest of the README is `use/<format>.md`.
    """

    write: Callable[[Job, Path], None]
    load: Callable[[Path], AbstractContextManager[Predictor]]
    packages: tuple[str, ...]  # whose versions parity.json records
    library: str  # the Hugging Face hub's name of the library that loads it
    check: Callable[[Job], None] = lambda job: None
    suffix: str = ""  # of graph files, for formats of traced graphs
    preprocess: str = ""  # Python code in the README that runs the preprocessing graph


def _public_name(name: str) -> str:
    is_on_hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not Path(name).exists()
    return name if is_on_hub else _last_part(name)


def _last_part(path: str) -> str:
    return PureWindowsPath(Path(path).resolve()).name  # splits at either slash


@contextmanager
def suppress_logs() -> Iterator[None]:
    """Suppresses logs below errors, warnings, and progress bars of transformers where it is loaded."""
    with ExitStack() as after, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        transformers = sys.modules.get("transformers.utils.logging")
        if transformers is not None and transformers.is_progress_bar_enabled():
            after.callback(transformers.enable_progress_bar)
            transformers.disable_progress_bar()
        yield


def copy_source(folder: Path, *, package: bool = True) -> None:
    """Copies the modules of `tvit_cli.portable` into an export: as the package `source`, or beside its files."""
    target = folder / SOURCE if package else folder
    target.mkdir(exist_ok=True)
    for path in PORTABLE.glob("*.py"):
        if package or path.name != "__init__.py":
            shutil.copyfile(path, target / path.name)


@contextmanager
def import_source(folder: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Within the block, a function that imports a module of the package `source` of an export."""
    package = f"_tvit_export_{abs(hash(folder))}"
    sys.modules[package] = ModuleType(package)
    sys.modules[package].__path__ = [str(folder / SOURCE)]
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield lambda name: importlib.import_module(f"{package}.{name}")
    finally:
        sys.dont_write_bytecode = writes_bytecode
        for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
            del sys.modules[name]


def read_frames(source: Callable[[str], ModuleType], video: Path, facts: dict[str, Any]) -> np.ndarray:
    """A batch of one clip, uint8 (1, T, H, W, 3), read by the export's own `reading.py`."""
    frames: np.ndarray = source("reading").read_clip(
        video,
        n_frames=facts["n_frames"],
        short_side=facts["scale_to"],
        frame_grid=facts["frame_grid"],
        clip_seconds=facts["clip_seconds"],
    )
    return frames[None]


@contextmanager
def graph_predictor(
    folder: Path,
    facts: dict[str, Any],
    model: Callable[[Tensor], Tensor],
    preprocess: Callable[[Tensor], Tensor] | None,
) -> Iterator[Predictor]:
    """Exported graphs on frames read by the export's own `reading.py`; without `preprocess`, it is in the model."""
    with import_source(folder) as source:

        def predict(video: Path) -> Tensor:
            frames = torch.from_numpy(read_frames(source, video, facts))
            return model(frames)[0].log() if preprocess is None else model(preprocess(frames))[0]

        yield predict


# Note [Bit-exact preprocessing without a resize operator]
# On a CPU, torch resizes uint8 with weights rounded to 16 bits and rounds to uint8 after each axis. ONNX has no
# such operator, and one grey level changes a logit by up to a hundred times the parity limit. A product with the
# matrix of these integer weights, in float64, gives the same bits. The number of fractional bits depends on the
# largest weight, also outside the crop: weights are computed up to an aspect ratio of MAX_ASPECT.
MAX_ASPECT = 4
MAX_PRECISION = 22


class PreprocessingGraph(nn.Module):
    """Decoded RGB frames, uint8 (B, T, H, W, 3) of any size, to the model's input, float32 (B, T, 3, S, S)."""

    powers: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.size = preprocessing.frame_size
        self.scale_to = preprocessing.scale_to
        self.crops = preprocessing.resize == "crop"
        moments = (preprocessing.mean, preprocessing.std)
        mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in moments)
        self.register_buffer("powers", 2.0 ** torch.arange(MAX_PRECISION + 2, dtype=torch.float64))
        self.register_buffer("shift", (255 * mean).float())
        self.register_buffer("scale", (1 / (255 * std)).float())

    def forward(self, frames: Tensor) -> Tensor:
        height, width = frames.shape[2:4]
        rows = torch.arange(height, dtype=torch.float64)  # (H,)
        columns = torch.arange(width, dtype=torch.float64)  # (W,)
        short = torch.minimum(rows[-1], columns[-1]) + 1
        pixels = frames.permute(0, 1, 4, 2, 3).to(torch.float64)  # (B, T, 3, H, W)
        weights, precision = self._weights(columns, short)  # (S, W)
        pixels = self._rounded(pixels @ weights.T, precision)  # (B, T, 3, H, S)
        weights, precision = self._weights(rows, short)  # (S, H)
        pixels = self._rounded(weights @ pixels, precision)  # (B, T, 3, S, S)
        return (pixels.float() - self.shift) * self.scale

    def _weights(self, inputs: Tensor, short: Tensor) -> tuple[Tensor, Tensor]:
        """Integer weights (S, I) of the outputs inside the crop, and their power of two."""
        count, to = inputs[-1] + 1, self.scale_to
        full = (count * to / short).round() if self.crops else torch.full_like(count, to)
        outputs = torch.arange(self.size, dtype=torch.float64)
        every = torch.arange(MAX_ASPECT * to, dtype=torch.float64)
        largest = _triangles(every.clamp(max=full - 1), inputs, count, full).max()
        first = ((full - self.size) / 2).floor()
        kept = _triangles(first + outputs, inputs, count, full)
        fits = (0.5 + largest * self.powers[1:-1]).floor() < 2**15  # int16
        power = self.powers.index_select(0, fits.sum().reshape(1))  # (1,)
        return (kept * power + 0.5).floor(), power

    @staticmethod
    def _rounded(sums: Tensor, power: Tensor) -> Tensor:
        return ((sums + power / 2) / power).floor().clamp(0, 255)


def _triangles(outputs: Tensor, inputs: Tensor, count: Tensor, full: Tensor) -> Tensor:
    """Weights of an antialiased bilinear resize from `count` to `full` pixels, (O,) and (I,) -> (O, I)."""
    scale = count / full
    support = scale.clamp(min=1)
    centre = ((outputs + 0.5) * scale).unsqueeze(1)  # (O, 1)
    low = (centre - support + 0.5).floor()
    high = (centre + support + 0.5).floor()
    weights = (1 - ((inputs - centre + 0.5) / support).abs()).clamp(min=0)
    weights = torch.where((inputs >= low) & (inputs < high), weights, torch.zeros_like(weights))
    return weights / weights.sum(1, keepdim=True)


FRAMES, PIXELS, LOGITS, SCORES = "frames", "pixel_values", "logits", "scores"


@dataclass(frozen=True)
class Graph:
    """A module to trace, an example input, its dynamic dimensions, and the names of input and output."""

    module: nn.Module
    example: Tensor
    dynamic: dict[int, Any]
    input_name: str
    output_name: str


def graphs(job: Job) -> dict[str, Graph]:
    """The graphs to trace by file name: model and preprocessing, or one graph of both."""
    facts, model = job.trained.card.preprocessing, job.trained.model
    preprocessing = PreprocessingGraph(facts).eval()
    clips = 2  # tracing specialises a size of 1
    frames = torch.zeros(clips, facts.n_frames, 56, 72, 3, dtype=torch.uint8)
    any_size = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    if job.settings.with_preprocessing:
        whole = nn.Sequential(preprocessing, model, nn.Softmax(1)).eval()  # -> probabilities (B, K)
        return {"model": Graph(whole, frames, any_size, FRAMES, SCORES)}
    pixels = torch.zeros(clips, facts.n_frames, 3, facts.frame_size, facts.frame_size)
    return {
        "model": Graph(model, pixels, {0: Dim.DYNAMIC}, PIXELS, LOGITS),
        "preprocessing": Graph(preprocessing, frames, any_size, FRAMES, PIXELS),
    }
