"""Trained models, loaded for scoring."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvit_cli.data.layout import matching_label
from tvit_cli.engine.launch import Precision, resolve_precision
from tvit_cli.errors import ModelError
from tvit_cli.model.folder import CARD_FILE, MODEL_FOLDER, find_newest_model, load_model
from tvit_cli.model.linear import WORTHWHILE, bf16_speedup
from tvit_cli.portable.vit import TemporalViT
from tvit_cli.settings.card import ModelCard
from tvit_cli.settings.types import MixedPrecision


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode on its device, its card, and its folder."""

    model: TemporalViT
    card: ModelCard
    folder: (
        Path  # of a model that tvit did not train, or one from the hub: the given file, folder or hub name
    )
    device: torch.device
    results: Path | None = None  # the folder for the results of such a model
    labels_are_guessed: bool = False
    notes: tuple[str, ...] = ()  # the assumptions made
    precision: Precision = "no"

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast to the model's precision."""
        if self.precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)

    def check_scores(self, logits: Tensor) -> None:
        """Raises ModelError if the softmax of a row of logits (V, K) is NaN: the weights overflow."""
        if not bool(logits.amax(1).isfinite().all()):
            lower = "" if self.precision == "no" else "use --mixed-precision no, or "
            problem = f"{self.folder}: the weights overflow: scores are NaN or infinite"
            raise ModelError(
                f"{problem} (precision {self.precision}). To go on, {lower}train the model again."
            )

    @property
    def name(self) -> str:
        """The name of the model's run; of a model from elsewhere, the name of its folder of results."""
        return run_name(self.folder) if self.results is None else self.results.name

    @property
    def run(self) -> Path:
        """The folder of evaluations and exports: the parent of the model folder."""
        if self.results is not None:
            return self.results
        return (self.folder if self.folder.name else self.folder.absolute()).parent

    def spelt_as(self, labels: Sequence[str]) -> Trained:
        """The model with its classes spelt as the same classes in `labels`."""
        return self._with_labels(map(matching_label(labels), self.card.labels))

    def named_by(self, labels: Sequence[str]) -> Trained:
        """The model with a data set's labels in place of guessed ones; with fewer labels, only their spelling."""
        if not self.labels_are_guessed:
            return self
        return self.spelt_as(labels) if len(labels) != len(self.card.labels) else self._with_labels(labels)

    def _with_labels(self, labels: Iterable[str]) -> Trained:
        return replace(self, card=self.card.model_copy(update={"labels": tuple(labels)}))


def open_trained(
    given: Path | None,
    *,
    working_directory: Path,
    device: torch.device,
    mixed_precision: MixedPrecision = "no",
) -> Trained:
    """Loads a model folder, or that of a run's folder; without one, the newest of the working directory.

    `given` may also be a name on the Hugging Face hub, a video classifier saved by transformers, or a model of the
    reference implementation. Raises ModelError for a missing, incomplete or damaged model, SettingsError for a
    precision that the device lacks.
    """
    precision = resolve_precision(mixed_precision, device)
    is_auto = mixed_precision == "auto" and device.type == "cpu"
    folder = find_newest_model(working_directory) if given is None else given
    if (folder / MODEL_FOLDER / CARD_FILE).is_file():
        folder = folder / MODEL_FOLDER
    results, local = None, folder
    if not (folder / CARD_FILE).is_file():
        from tvit_cli.model.published import load_published  # imports huggingface_hub
        from tvit_cli.model.weights import find_weights, weights_name

        if source := find_weights(folder, working_directory):
            results = working_directory / weights_name(folder, source)
            local = source.folder
            if not source.is_model_folder:
                found = load_published(source)
                model, guessed = found.model.to(device), found.labels_are_guessed
                precision = faster_precision(found.model.config.width) if is_auto else precision
                return Trained(model, found.card, folder, device, results, guessed, found.notes, precision)
    model, card = load_model(local, device=device)
    precision = faster_precision(model.config.width) if is_auto else precision
    return Trained(model.eval(), card, folder, device, results, precision=precision)


def faster_precision(width: int) -> Precision:
    """The number format of forward passes that `auto` means on this CPU for a model of this width."""
    return "bf16" if bf16_speedup(width) >= WORTHWHILE else "no"


def run_name(model: Path) -> str:
    """The name of a model folder: its run, in a series with the series' name; without a run, its own name."""
    run = model.absolute().parent
    if model.absolute().name != MODEL_FOLDER:
        return model.absolute().name
    return f"{run.parent.name}/{run.name}" if is_series_run(run.name) else run.name


def is_series_run(name: str) -> bool:
    """Whether a folder has the name of one run in a series of seeds and splits."""
    return re.fullmatch(r"seed\d+-split\d+", name) is not None


def series_models(folder: Path | None) -> dict[str, Path]:
    """Model folders of a series by the names of its runs; empty if `folder` is no series."""
    if folder is None or (folder / CARD_FILE).is_file() or (folder / MODEL_FOLDER).is_dir():
        return {}
    cards = sorted(folder.glob(f"*/{MODEL_FOLDER}/{CARD_FILE}"))
    return {card.parents[1].name: card.parent for card in cards if is_series_run(card.parents[1].name)}
