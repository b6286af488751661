"""`--format torch`: programs of torch.export, which run without any model code."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from tvit_cli.engine.export.formats import (
    Answerer,
    Format,
    Job,
    graphs,
    import_source,
    read_frames,
    ship_package,
)
from tvit_cli.model.folder import CARD_FILE

MODEL_FILE = "model.pt2"
PREPROCESSING_FILE = "preprocessing.pt2"


def write(job: Job, folder: Path) -> None:
    """Write model.pt2, preprocessing.pt2 where that is not inside, card.json and the package `source`."""
    for name, graph in graphs(job).items():
        traced = torch.export.export(graph.module, (graph.example,), dynamic_shapes=(graph.dynamic,))
        save_program(traced, folder / f"{name}.pt2")
    job.write_card(folder)
    ship_package(folder)


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write a program. Raises OSError; torch itself ends the process (SIGABRT) where a file cannot be written."""
    held = io.BytesIO()
    torch.export.save(program, held)
    path.write_bytes(held.getbuffer())


@contextmanager
def opened(folder: Path) -> Iterator[Answerer]:
    """The exported programs, on the frames that the shipped file reads."""
    card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
    model = torch.export.load(folder / MODEL_FILE).module()
    is_outside = (folder / PREPROCESSING_FILE).is_file()
    preprocess = torch.export.load(folder / PREPROCESSING_FILE).module() if is_outside else None
    with import_source(folder) as module:

        @torch.inference_mode()
        def answer(videos: Sequence[Path]) -> Tensor:
            rows = []
            for video in videos:
                frames = torch.from_numpy(read_frames(module("reading"), video, card["preprocessing"]))
                rows.append(model(frames)[0].log() if preprocess is None else model(preprocess(frames))[0])
            return torch.stack(rows)

        yield answer


FORMAT = Format(
    write,
    opened,
    packages=("torch",),
    library="pytorch",
    suffix="pt2",
    preprocess='clips = torch.export.load("FOLDER/preprocessing.pt2").module()(clips)\n',
)
