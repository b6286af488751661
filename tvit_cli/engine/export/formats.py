"""Code shared by the export formats: their interface, traced graphs, and the carried source files.

Letters: B clips, T frames, H W pixels, S the side of the model's frame, O outputs along an axis, I inputs.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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


@contextmanager
def suppress_logs() -> Iterator[None]:
    """Within the block nothing below an error is logged or warned of; transformers, if loaded, shows no bars."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    transformers = sys.modules.get("transformers.utils.logging")
    has_bars = transformers is not None and transformers.is_progress_bar_enabled()
    try:
        if transformers is not None:
            transformers.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if transformers is not None and has_bars:
            transformers.enable_progress_bar()


PORTABLE = Path(tvit_cli.__file__).parent / "portable"
SOURCE = "source"  # the package that they form in an export


def ship(folder: Path) -> None:
    """Copies the modules of `tvit_cli.portable` into a folder, beside each other."""
    folder.mkdir(exist_ok=True)
    for path in PORTABLE.glob("*.py"):
        if path.name != "__init__.py":
            shutil.copyfile(path, folder / path.name)


def ship_package(folder: Path) -> None:
    """Copies `tvit_cli.portable` into an export, as the package `source`."""
    ship(folder / SOURCE)
    shutil.copyfile(PORTABLE / "__init__.py", folder / SOURCE / "__init__.py")


@contextmanager
def import_source(folder: Path) -> Iterator[Callable[[str], ModuleType]]:
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


Answerer = Callable[[Sequence[Path]], Tensor]  # videos -> logits, or the logarithms of scores, (videos, K)
PRIVATE = ("working_directory", "resume_from_checkpoint")  # settings that say where, not what
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # NAME or OWNER/NAME


@dataclass(frozen=True)
class Job:
    """An opened model, what was asked for, and whom to tell."""

    trained: Trained
    settings: ExportSettings
    report: Report

    @property
    def run(self) -> Path:
        """The folder that the model folder lies in."""
        return self.trained.run

    @property
    def card(self) -> ModelCard:
        """The model's card for others to read: folders of this machine are left out or reduced to their names."""
        card = self.trained.card
        settings = {key: value for key, value in card.settings.items() if key not in PRIVATE}
        if settings.get("path_to_data"):
            settings["path_to_data"] = _last(settings["path_to_data"])
        if settings.get("hf_model_name"):
            settings["hf_model_name"] = _public(settings["hf_model_name"])
        base = card.base
        if base is not None:
            base = base.model_copy(update={"name": _public(base.name)})
        return card.model_copy(update={"settings": settings, "base": base})

    def write_card(self, folder: Path, *, weights_sha256: str | None = None) -> None:
        """Write card.json into an export, with the hash of weights that lie beside it."""
        card = self.card
        if weights_sha256 is not None:
            card = card.model_copy(update={"weights_sha256": weights_sha256})
        (folder / CARD_FILE).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Format:
    """How one format is written, how an export of it answers on its own, and what its README says of that.

    `check` finds what is missing before anything is computed. The rest of the README is `use/<format>.md`.
    """

    write: Callable[[Job, Path], None]
    opened: Callable[[Path], AbstractContextManager[Answerer]]
    packages: tuple[str, ...]  # whose versions the proof is for
    library: str  # what opens it, as the Hugging Face hub calls that
    check: Callable[[Job], None] = lambda job: None
    suffix: str = ""  # of the files of its graphs, for a format that has graphs
    preprocess: str = ""  # in Python, what goes before the model where it is not inside


def _public(name: str) -> str:
    """A name on the hub as it is; of a folder or file, here or elsewhere, its own name."""
    return name if HUB_NAME.fullmatch(name) and not Path(name).exists() else _last(name)


def _last(path: str) -> str:
    return PureWindowsPath(Path(path).resolve()).name  # which takes either slash for one


# Note [The same bits without a resize operator]
# On a CPU, torch resizes uint8 with weights rounded to 16 bits and rounds to uint8 after each axis. No operator of
# ONNX does that, and one level of grey is up to a hundred times what the proof allows a logit. All of it is whole
# numbers, so a product with the matrix of these weights, in float64, gives the same bits; a test compares them
# over many sizes. The number of fractional bits depends on the largest weight of all outputs, also of those that
# the crop leaves out: they are looked at up to an aspect of MAX_ASPECT.
MAX_ASPECT = 4
WEIGHT_BITS = 15  # below 2**15: int16
MAX_PRECISION = 22


class PreprocessingGraph(nn.Module):
    """RGB frames as decoded, uint8 (B, T, H, W, 3) of any size, to what the model sees, (B, T, 3, S, S)."""

    powers: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.size = preprocessing.frame_size
        self.scale_to = preprocessing.scale_to
        self.crops = preprocessing.resize == "crop"
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64).view(3, 1, 1)
        std = torch.tensor(preprocessing.std, dtype=torch.float64).view(3, 1, 1)
        self.register_buffer("powers", 2.0 ** torch.arange(MAX_PRECISION + 2, dtype=torch.float64))
        self.register_buffer("shift", (255 * mean).float())
        self.register_buffer("scale", (1 / (255 * std)).float())

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, H, W, 3) -> (B, T, 3, S, S)."""
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
        """Whole weights (S, I) of the outputs that the crop keeps, and their power of two."""
        count = inputs[-1] + 1
        full = torch.full_like(count, self.scale_to)
        if self.crops:
            full = (count * self.scale_to / short).round()
        outputs = torch.arange(self.size, dtype=torch.float64)
        every = torch.arange(MAX_ASPECT * self.scale_to, dtype=torch.float64)
        largest = _triangles(every.clamp(max=full - 1), inputs, count, full).max()
        first = ((full - self.size) / 2).floor()
        kept = _triangles(first + outputs, inputs, count, full)
        fits = (0.5 + largest * self.powers[1:-1]).floor() < 2**WEIGHT_BITS
        power = self.powers.index_select(0, fits.sum().reshape(1))  # (1,)
        return (kept * power + 0.5).floor(), power

    @staticmethod
    def _rounded(sums: Tensor, power: Tensor) -> Tensor:
        return ((sums + power / 2) / power).floor().clamp(0, 255)


class Scoring(nn.Module):
    """Preprocessing, model and softmax in one: uint8 (B, T, H, W, 3) -> scores (B, K)."""

    def __init__(self, preprocessing: Preprocessing, model: nn.Module) -> None:
        super().__init__()
        self.preprocessing = PreprocessingGraph(preprocessing)
        self.model = model

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, H, W, 3) -> (B, K)."""
        scores: Tensor = self.model(self.preprocessing(frames)).softmax(1)
        return scores


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
EXAMPLE_CLIPS = 2  # a size of 1 is taken for one that never changes
EXAMPLE_FRAME = (56, 72)  # height and width


@dataclass(frozen=True)
class Graph:
    """A module with an example of its input, which of the input's sizes may change, and the tensors' names."""

    module: nn.Module
    example: Tensor
    dynamic: dict[int, Any]
    input_name: str
    output_name: str

    @property
    def input_kind(self) -> str:
        """The input in words."""
        if self.input_name == FRAMES:
            return "uint8 (B, T, H, W, 3), RGB as decoded"
        return "float32 (B, T, 3, S, S), resized and normalised"


def graphs(job: Job) -> dict[str, Graph]:
    """What is exported, by file name: the model alone and its preprocessing, or one graph of both."""
    card, model = job.trained.card, job.trained.model
    if job.settings.with_preprocessing:
        both = Scoring(card.preprocessing, model).eval()
        return {"model": Graph(both, _frames(card), _any_frame(), FRAMES, SCORES)}
    preprocessing = PreprocessingGraph(card.preprocessing).eval()
    size = card.preprocessing.frame_size
    pixels = torch.zeros(EXAMPLE_CLIPS, card.preprocessing.n_frames, 3, size, size)
    return {
        "model": Graph(model, pixels, {0: Dim.DYNAMIC}, PIXELS, LOGITS),
        "preprocessing": Graph(preprocessing, _frames(card), _any_frame(), FRAMES, PIXELS),
    }


def _frames(card: ModelCard) -> Tensor:
    return torch.zeros(EXAMPLE_CLIPS, card.preprocessing.n_frames, *EXAMPLE_FRAME, 3, dtype=torch.uint8)


def _any_frame() -> dict[int, Any]:
    return {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
