"""`--format safetensors` and `--format torch`: weights with source files, and programs of torch.export."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.export import ExportedProgram

from tvit_cli.engine.export.formats import (
    Format,
    Job,
    Predictor,
    copy_source,
    graphs,
    import_source,
    read_frames,
)
from tvit_cli.files import sha256
from tvit_cli.model.folder import CARD_FILE, WEIGHTS_FILE, save_tensors

MODEL_FILE = "model.pt2"
PREPROCESSING_FILE = "preprocessing.pt2"


def write_weights(job: Job, folder: Path) -> None:
    """Writes model.safetensors, card.json and the package `source`."""
    state = {name: tensor.contiguous() for name, tensor in job.trained.model.state_dict().items()}
    save_tensors(state, folder / WEIGHTS_FILE, {"format": "pt"})
    job.write_card(folder, weights_sha256=sha256(folder / WEIGHTS_FILE))
    copy_source(folder)


@contextmanager
def load_weights(folder: Path) -> Iterator[Predictor]:
    """The exported weights in the export's own network."""
    card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
    facts = card["preprocessing"]
    how = {key: facts[key] for key in ("frame_size", "resize", "scale_to", "mean", "std")}
    with import_source(folder) as source:
        config = source("config").ViTConfig.from_dict(card["model"])
        model = source("vit").TemporalViT(config, initialise=False).eval()
        model.load_state_dict(load_file(folder / WEIGHTS_FILE), assign=True)

        def predict(video: Path) -> Tensor:
            (frames,) = torch.from_numpy(read_frames(source, video, facts)).permute(0, 1, 4, 2, 3)
            clip = source("preprocessing").frames_to_input(frames, **how)
            logits: Tensor = model(clip[None])[0]
            return logits

        yield predict


def write_programs(job: Job, folder: Path) -> None:
    """Writes model.pt2, preprocessing.pt2 unless it is inside the model, card.json and the package `source`."""
    for name, graph in graphs(job).items():
        traced = torch.export.export(graph.module, (graph.example,), dynamic_shapes=(graph.dynamic,))
        save_program(traced, folder / f"{name}.pt2")
    job.write_card(folder)
    copy_source(folder)


def save_program(program: ExportedProgram, path: Path) -> None:
    """Writes a program. Raises OSError, where torch itself aborts the process (SIGABRT)."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


@contextmanager
def load_programs(folder: Path) -> Iterator[Predictor]:
    """The exported programs, on frames read by the export's own `reading.py`."""
    facts = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))["preprocessing"]
    model = torch.export.load(folder / MODEL_FILE).module()
    is_outside = (folder / PREPROCESSING_FILE).is_file()
    preprocess = torch.export.load(folder / PREPROCESSING_FILE).module() if is_outside else None
    with import_source(folder) as source:

        def predict(video: Path) -> Tensor:
            frames = torch.from_numpy(read_frames(source, video, facts))
            output: Tensor = model(frames)[0].log() if preprocess is None else model(preprocess(frames))[0]
            return output

        yield predict


SAFETENSORS = Format(write_weights, load_weights, packages=("torch", "safetensors"), library="pytorch")
PROGRAM = Format(
    write_programs,
    load_programs,
    packages=("torch",),
    library="pytorch",
    suffix="pt2",
    preprocess='clips = torch.export.load("FOLDER/preprocessing.pt2").module()(clips)\n',
)
