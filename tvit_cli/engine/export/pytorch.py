"""`--format safetensors` and `--format torch`: weights with source files, and programs of torch.export."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.export import ExportedProgram

from tvit_cli.engine.export import formats
from tvit_cli.engine.export.formats import Format, Job, Predictor
from tvit_cli.files import sha256
from tvit_cli.model.folder import CARD_FILE, WEIGHTS_FILE, save_tensors


def write_weights(job: Job, folder: Path) -> None:
    """Writes model.safetensors, card.json and the package `source`."""
    state = {name: tensor.contiguous() for name, tensor in job.trained.model.state_dict().items()}
    save_tensors(state, folder / WEIGHTS_FILE, {"format": "pt"})
    job.write_card(folder, weights_sha256=sha256(folder / WEIGHTS_FILE))
    formats.copy_source(folder)


@contextmanager
def load_weights(folder: Path) -> Iterator[Predictor]:
    """The exported weights in the export's own network."""
    card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
    facts = card["preprocessing"]
    how = {key: facts[key] for key in ("frame_size", "resize", "scale_to", "mean", "std")}
    with formats.import_source(folder) as source:
        config = source("config").ViTConfig.from_dict(card["model"])
        model = source("vit").TemporalViT(config, initialise=False).eval()
        model.load_state_dict(load_file(folder / WEIGHTS_FILE), assign=True)

        def predict(video: Path) -> Tensor:
            (frames,) = torch.from_numpy(formats.read_frames(source, video, facts)).permute(0, 1, 4, 2, 3)
            clip = source("preprocessing").frames_to_input(frames, **how)
            logits: Tensor = model(clip[None])[0]
            return logits

        yield predict


def write_programs(job: Job, folder: Path) -> None:
    """Writes model.pt2, preprocessing.pt2 unless it is inside the model, card.json and the package `source`."""
    for name, graph in formats.graphs(job).items():
        traced = torch.export.export(graph.module, (graph.example,), dynamic_shapes=(graph.dynamic,))
        save_program(traced, folder / f"{name}.pt2")
    job.write_card(folder)
    formats.copy_source(folder)


def save_program(program: ExportedProgram, path: Path) -> None:
    """Writes a program. Raises OSError, where torch itself aborts the process (SIGABRT)."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


def load_programs(folder: Path) -> AbstractContextManager[Predictor]:
    """The exported programs, on frames read by the export's own `reading.py`."""
    facts = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))["preprocessing"]
    outside = folder / "preprocessing.pt2"
    preprocess = torch.export.load(outside).module() if outside.is_file() else None
    model = torch.export.load(folder / "model.pt2").module()
    return formats.graph_predictor(folder, facts, model, preprocess)


SAFETENSORS = Format(write_weights, load_weights, packages=("torch", "safetensors"), library="pytorch")
PROGRAM = Format(
    write_programs,
    load_programs,
    packages=("torch",),
    library="pytorch",
    suffix="pt2",
    preprocess='clips = torch.export.load("FOLDER/preprocessing.pt2").module()(clips)\n',
)
