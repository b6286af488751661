"""`--format huggingface`: a folder for the Auto classes and the pipeline of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvit_cli.engine.export.formats import Format, Job, Predictor, copy_source, suppress_logs
from tvit_cli.errors import ModelError
from tvit_cli.files import write_json
from tvit_cli.model.families import EXPORTED
from tvit_cli.model.folder import CONFIG_FILE, WEIGHTS_FILE, save_tensors
from tvit_cli.settings.card import ModelCard

PREFIX = "network."  # TvitForVideoClassification.network is the TemporalViT
MIN_TRANSFORMERS = 5  # major version; the pipelines of earlier ones sample frames themselves


def check(job: Job) -> None:
    """Raises ModelError where transformers is too old for the parity check."""
    version = metadata.version("transformers")
    if int(version.split(".")[0]) < MIN_TRANSFORMERS:
        raise ModelError(
            f"--format {job.settings.format} needs transformers {MIN_TRANSFORMERS} or newer, and {version} is "
            "installed. Upgrade it: python -m pip install --upgrade transformers"
        )


def write(job: Job, folder: Path) -> None:
    """Writes weights, configuration, processor, card.json and the network's source files, side by side."""
    write_model(folder, job.trained.model.state_dict(), job.trained.card)
    job.write_card(folder)


def write_model(folder: Path, state: Mapping[str, Tensor], card: ModelCard) -> None:
    """Writes the files from which transformers loads a network with these weights."""
    weights = {PREFIX + name: tensor.detach().contiguous() for name, tensor in state.items()}
    save_tensors(weights, folder / WEIGHTS_FILE, {"format": "pt"})
    config = {
        "architectures": ["TvitForVideoClassification"],
        "auto_map": {
            "AutoConfig": "modeling_tvit.TvitConfig",
            "AutoModel": "modeling_tvit.TvitModel",
            "AutoModelForVideoClassification": "modeling_tvit.TvitForVideoClassification",
        },
        "model_type": EXPORTED,
        "network": {key: value for key, value in card.model.items() if key != "num_classes"},
        "id2label": {str(index): label for index, label in enumerate(card.labels)},
        "label2id": {label: index for index, label in enumerate(card.labels)},
        "problem_type": "single_label_classification",
        "dtype": "float32",
        "tvit_version": card.tvit_version,
        "weights_sha256": card.weights_sha256,
    }
    facts = card.preprocessing
    processor = {
        "auto_map": {"AutoVideoProcessor": "processing_tvit.TvitVideoProcessor"},
        "video_processor_type": "TvitVideoProcessor",
        **{
            key: getattr(facts, key)
            for key in ("n_frames", "frame_grid", "clip_seconds", "frame_size", "resize", "scale_to")
        },
        "image_mean": facts.mean,
        "image_std": facts.std,
    }
    write_json(folder / CONFIG_FILE, config, indent=2)
    write_json(folder / "video_preprocessor_config.json", processor, indent=2)
    copy_source(folder, package=False)


@contextmanager
def load(folder: Path, change: Any = None) -> Iterator[Predictor]:
    """The folder in a pipeline of transformers, whose model `change` may replace."""
    from transformers import pipeline

    with suppress_logs():
        classify = pipeline("video-classification", model=str(folder), trust_remote_code=True, device="cpu")
        if change is not None:
            classify.model = change(classify.model)
        labels = classify.model.config.id2label

        def predict(video: Path) -> Tensor:
            found = classify(str(video), top_k=len(labels), function_to_apply="none")
            by_label = {entry["label"]: entry["score"] for entry in found}
            return torch.tensor([by_label[label] for _, label in sorted(labels.items())])

        yield predict


FORMAT = Format(write, load, packages=("torch", "transformers"), library="transformers", check=check)
