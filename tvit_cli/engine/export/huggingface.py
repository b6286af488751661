"""`--format huggingface`: a folder that transformers loads with its Auto classes and its pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvit_cli.engine.export.formats import Answerer, Format, Job, ship, suppress_logs
from tvit_cli.errors import ModelError
from tvit_cli.model.families import EXPORTED
from tvit_cli.model.folder import CONFIG_FILE, WEIGHTS_FILE, save_tensors
from tvit_cli.settings.card import ModelCard

PROCESSOR_FILE = "video_preprocessor_config.json"
PREFIX = "network."  # where TvitForVideoClassification holds its TemporalViT
LEAST = 5  # major version of transformers: earlier ones take their own frames in the pipeline


def check(job: Job) -> None:
    """Raise ModelError where transformers is too old to prove the export with."""
    version = metadata.version("transformers")
    if int(version.split(".")[0]) < LEAST:
        raise ModelError(
            f"--format {job.settings.format} needs transformers {LEAST} or newer, and {version} is installed. "
            "Upgrade it: python -m pip install --upgrade transformers"
        )


def write(job: Job, folder: Path) -> None:
    """Write weights, configuration, processor, card.json and the files of the network, all side by side."""
    write_model(folder, job.trained.model.state_dict(), job.trained.card)
    job.write_card(folder)


def write_model(folder: Path, state: Mapping[str, Tensor], card: ModelCard) -> None:
    """What transformers needs to load a network with these weights."""
    weights = {PREFIX + name: tensor.detach().contiguous() for name, tensor in state.items()}
    save_tensors(weights, folder / WEIGHTS_FILE, {"format": "pt"})
    _write(folder / CONFIG_FILE, _config(card))
    _write(folder / PROCESSOR_FILE, _processor(card))
    ship(folder)


@contextmanager
def opened(folder: Path) -> Iterator[Answerer]:
    """The pipeline that transformers makes of the folder."""
    from transformers import pipeline

    with suppress_logs():
        classify = pipeline("video-classification", model=str(folder), trust_remote_code=True, device="cpu")
        yield answer_of(classify)


def answer_of(classify: Any) -> Answerer:
    """Logits as a video classification pipeline gives them, in the order of the labels."""
    labels = classify.model.config.id2label

    def answer(videos: Sequence[Path]) -> Tensor:
        rows = []
        for video in videos:
            found = classify(str(video), top_k=len(labels), function_to_apply="none")
            by_label = {entry["label"]: entry["score"] for entry in found}
            rows.append([by_label[labels[index]] for index in range(len(labels))])
        return torch.tensor(rows)

    return answer


def _config(card: ModelCard) -> dict[str, Any]:
    network = {key: value for key, value in card.model.items() if key != "num_classes"}
    return {
        "architectures": ["TvitForVideoClassification"],
        "auto_map": {
            "AutoConfig": "modeling_tvit.TvitConfig",
            "AutoModel": "modeling_tvit.TvitModel",
            "AutoModelForVideoClassification": "modeling_tvit.TvitForVideoClassification",
        },
        "model_type": EXPORTED,
        "network": network,
        "id2label": {str(index): label for index, label in enumerate(card.labels)},
        "label2id": {label: index for index, label in enumerate(card.labels)},
        "problem_type": "single_label_classification",
        "dtype": "float32",
        "tvit_version": card.tvit_version,
        "weights_sha256": card.weights_sha256,
    }


def _processor(card: ModelCard) -> dict[str, Any]:
    facts = card.preprocessing
    return {
        "auto_map": {"AutoVideoProcessor": "processing_tvit.TvitVideoProcessor"},
        "video_processor_type": "TvitVideoProcessor",
        "n_frames": facts.n_frames,
        "frame_grid": facts.frame_grid,
        "frame_size": facts.frame_size,
        "resize": facts.resize,
        "scale_to": facts.scale_to,
        "image_mean": facts.mean,
        "image_std": facts.std,
    }


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


FORMAT = Format(write, opened, packages=("torch", "transformers"), library="transformers", check=check)
