"""`--format adapter`: what LoRA learnt, in PEFT's format, beside the bare backbone that it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tvit_cli.engine.export import huggingface
from tvit_cli.engine.export.formats import Answerer, Format, Job, suppress_logs
from tvit_cli.engine.train.build import build
from tvit_cli.engine.train.checkpoint import list_checkpoints, load_checkpoint
from tvit_cli.errors import ModelError
from tvit_cli.model import lora
from tvit_cli.model.folder import SETTINGS_FILE
from tvit_cli.model.lora import load_trainable, trainable_tensors
from tvit_cli.results import silent
from tvit_cli.settings.base import load
from tvit_cli.settings.train import TrainSettings

BACKBONE = "backbone"


def check(job: Job) -> None:
    """Raise ModelError for a model without an adapter, or whose run has no checkpoint to take it from.

    Raises SettingsError for a run of another tvit, whose settings this one does not know.
    """
    huggingface.check(job)
    settings = _settings(job)
    if settings.train != "lora" or settings.lora_rank == 0:
        how = f"--train {settings.train}" if settings.train != "lora" else "--lora-rank 0"
        raise ModelError(
            f"{job.trained.folder}: trained with {how}, so there is no adapter. Export it with another --format."
        )
    if not list_checkpoints(job.run / settings.checkpoint_dir):
        raise ModelError(
            f"{job.run / settings.checkpoint_dir}: no checkpoint there. A model folder holds merged weights; the "
            "adapter is in the checkpoints of its run. Name the run's folder, or export with another --format."
        )


def write(job: Job, folder: Path) -> None:
    """Write PEFT's two files, card.json, and the folder `backbone` as transformers loads it."""
    settings, card = _settings(job), job.trained.card
    built = build(settings, num_classes=len(card.labels), report=silent)
    if built.base is not None and card.base is not None and built.base.sha256 != card.base.sha256:
        raise ModelError(
            f"{built.base.name}: these are not the weights that the model was trained on (sha256 "
            f"{str(built.base.sha256)[:12]}…, not {str(card.base.sha256)[:12]}…). Export with another --format."
        )
    checkpoint = load_checkpoint(list_checkpoints(job.run / settings.checkpoint_dir)[-1])
    kept = checkpoint.best or checkpoint.ema or checkpoint.trainable  # as the model folder was made from
    untrained = {name: tensor.clone() for name, tensor in trainable_tensors(built.model).items()}
    load_trainable(built.model, checkpoint.trainable)  # has where the adapters started from, too
    load_trainable(built.model, kept)
    bare = lora.bare_state_dict(built.model)
    bare |= {plain: tensor for name, tensor in untrained.items() if (plain := lora.plain_name(name)) in bare}
    (folder / BACKBONE).mkdir()
    huggingface.write_model(folder / BACKBONE, bare, card)
    lora.save_adapter(built.model, folder, prefix=huggingface.PREFIX, backbone=BACKBONE)
    job.write_card(folder)


@contextmanager
def opened(folder: Path) -> Iterator[Answerer]:
    """The adapter that PEFT puts on the backbone that transformers loads."""
    from transformers import pipeline

    with suppress_logs(), torch.inference_mode():
        classify: Any = pipeline(
            "video-classification", model=str(folder / BACKBONE), trust_remote_code=True, device="cpu"
        )
        classify.model = lora.load_adapter(classify.model, folder).eval()
        yield huggingface.answer_of(classify)


def _settings(job: Job) -> TrainSettings:
    path = job.run / SETTINGS_FILE
    if not path.is_file():
        raise ModelError(
            f"{path}: missing. A model folder holds merged weights; the adapter is in the checkpoints of its run. "
            "Name the run's folder, or export with another --format."
        )
    return load(TrainSettings, flags={}, config=path, environ={}).settings


FORMAT = Format(write, opened, packages=("torch", "transformers", "peft"), library="peft", check=check)
