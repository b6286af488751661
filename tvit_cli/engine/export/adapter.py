"""`--format adapter`: the LoRA adapter in PEFT's format, beside the backbone without it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from tvit_cli.engine.export import huggingface
from tvit_cli.engine.export.formats import Format, Job, Predictor
from tvit_cli.engine.train.build import build
from tvit_cli.engine.train.checkpoint import list_checkpoints, load_checkpoint
from tvit_cli.engine.train.origin import origin_copy
from tvit_cli.errors import ModelError
from tvit_cli.model import lora
from tvit_cli.model.folder import SETTINGS_FILE
from tvit_cli.results import silent
from tvit_cli.settings.base import load as load_settings
from tvit_cli.settings.train import TrainSettings

BACKBONE = "backbone"
OTHERWISE = "The adapter is in the checkpoints of its run. Name the run's folder, or choose another --format."


def check(job: Job) -> None:
    """Raises ModelError without an adapter or a checkpoint, SettingsError for settings of another tvit version."""
    huggingface.check(job)
    settings = _settings(job)
    if settings.train != "lora" or settings.lora_rank == 0:
        how = f"--train {settings.train}" if settings.train != "lora" else "--lora-rank 0"
        raise ModelError(
            f"{job.trained.folder}: trained with {how}, so there is no adapter. Export it with another --format."
        )
    folder = job.trained.run / settings.checkpoint_dir
    if not list_checkpoints(folder):
        raise ModelError(f"{folder}: no checkpoint there. {OTHERWISE}")


def write(job: Job, folder: Path) -> None:
    """Writes PEFT's two files, card.json, and the folder `backbone` for transformers."""
    settings, card = _settings(job), job.trained.card
    origin = origin_copy(job.trained.run, settings)
    built = build(settings, labels=card.labels, report=silent, origin=origin)
    if built.base is not None and card.base is not None and built.base.sha256 != card.base.sha256:
        raise ModelError(
            f"{built.base.name}: these are not the weights that the model was trained on (sha256 "
            f"{str(built.base.sha256)[:12]}…, not {str(card.base.sha256)[:12]}…). Export with another --format."
        )
    checkpoint = load_checkpoint(list_checkpoints(job.trained.run / settings.checkpoint_dir)[-1])
    best = checkpoint.best or checkpoint.ema or checkpoint.trainable  # as in the model folder
    untrained = {name: tensor.clone() for name, tensor in lora.trainable_tensors(built.model).items()}
    lora.load_trainable(built.model, checkpoint.trainable)  # includes the adapters' initial values
    lora.load_trainable(built.model, best)
    backbone = lora.bare_state_dict(built.model)
    backbone |= {plain: v for name, v in untrained.items() if (plain := lora.plain_name(name)) in backbone}
    (folder / BACKBONE).mkdir()
    huggingface.write_model(folder / BACKBONE, backbone, card)
    lora.save_adapter(built.model, folder, prefix=huggingface.PREFIX, backbone=BACKBONE)
    job.write_card(folder)


def load(folder: Path) -> AbstractContextManager[Predictor]:
    """The adapter, attached by PEFT to the backbone that transformers loads."""
    from peft import PeftModel

    return huggingface.load(folder / BACKBONE, lambda model: PeftModel.from_pretrained(model, folder).eval())


def _settings(job: Job) -> TrainSettings:
    path = job.trained.run / SETTINGS_FILE
    if not path.is_file():
        raise ModelError(f"{path}: missing. {OTHERWISE}")
    return load_settings(TrainSettings, flags={}, config=path, environ={}).settings


FORMAT = Format(write, load, packages=("torch", "transformers", "peft"), library="peft", check=check)
