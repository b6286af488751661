"""A trained model, opened for scoring."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tvit_cli.data.layout import matching_label
from tvit_cli.engine.launch import Precision, autocast, resolve_precision
from tvit_cli.model.folder import CARD_FILE, MODEL_FOLDER, find_newest_model, load_model
from tvit_cli.portable.vit import TemporalViT
from tvit_cli.settings.card import ModelCard
from tvit_cli.settings.types import MixedPrecision


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode on its device, its card, and the folder both came from.

    Of a model that tvit did not train, or that comes from the hub, `folder` is the file, the folder or the name on
    the hub that was given, `results` the folder for what is found out about it, and `notes` what had to be
    assumed, among it perhaps the labels.
    """

    model: TemporalViT
    card: ModelCard
    folder: Path
    device: torch.device
    results: Path | None = None
    labels_are_guessed: bool = False
    notes: tuple[str, ...] = ()
    precision: Precision = "no"

    def autocast(self) -> AbstractContextManager[Any]:
        """Within it, the model computes in its precision."""
        return autocast(self.precision, self.device)

    @property
    def name(self) -> str:
        """What the model is called: its run; or the folder of its results, where it comes from elsewhere."""
        return run_name(self.folder) if self.results is None else self.results.name

    @property
    def run(self) -> Path:
        """The folder that evaluations and exports go to: that which the model folder lies in."""
        if self.results is not None:
            return self.results
        return (self.folder if self.folder.name else self.folder.absolute()).parent

    def spelt_as(self, labels: Sequence[str]) -> Trained:
        """The model with its classes spelt as they are in `labels`, where they are the same classes."""
        own = tuple(map(matching_label(labels), self.card.labels))
        return replace(self, card=self.card.model_copy(update={"labels": own}))

    def named_by(self, labels: Sequence[str]) -> Trained:
        """The model with a data set's labels for guessed ones: all, or their spelling where it has fewer."""
        if not self.labels_are_guessed:
            return self
        if len(labels) != len(self.card.labels):
            return self.spelt_as(labels)
        return replace(self, card=self.card.model_copy(update={"labels": tuple(labels)}))


def open_trained(
    given: Path | None,
    *,
    working_directory: Path,
    device: torch.device,
    verify: bool = False,
    mixed_precision: MixedPrecision = "no",
) -> Trained:
    """Load a model folder (or the one of a run's folder); without one, the newest of the working directory.

    `given` may also be the name of such a model on the Hugging Face hub, or what the reference implementation
    trained: a folder, a file, or a name. `verify` compares the weights of a model folder with the hash in its
    card. Raises ModelError when there is none or it is not whole, SettingsError for a precision that the device
    does not have.
    """
    precision = resolve_precision(mixed_precision, device)
    folder = find_newest_model(working_directory) if given is None else given
    if (folder / MODEL_FOLDER / CARD_FILE).is_file():
        folder = folder / MODEL_FOLDER
    if not (folder / CARD_FILE).is_file():
        found = _open_elsewhere(folder, working_directory, device, verify=verify)
        if found is not None:
            return replace(found, precision=precision)
    model, card = load_model(folder, device=device, verify=verify)
    return Trained(model.eval(), card, folder, device, precision=precision)


def _open_elsewhere(
    given: Path, working_directory: Path, device: torch.device, *, verify: bool
) -> Trained | None:
    """What lies on the hub, or was trained by the reference; None where nothing speaks for either."""
    # It imports huggingface_hub.
    from tvit_cli.model.reference import load_reference
    from tvit_cli.model.weights import find_weights, weights_name

    source = find_weights(given, working_directory)
    if source is None:
        return None
    results = working_directory / weights_name(given, source)
    if source.is_model_folder:
        model, card = load_model(source.folder, device=device, verify=verify)
        return Trained(model.eval(), card, given, device, results=results)
    found = load_reference(source)
    return Trained(
        found.model.to(device),
        found.card,
        given,
        device,
        results=results,
        labels_are_guessed=found.labels_are_guessed,
        notes=found.notes,
    )


def run_name(model: Path) -> str:
    """What a model folder is called: its run, of a series with the series' name, or itself where it has no run."""
    folder = model.absolute()
    if folder.name != MODEL_FOLDER:
        return folder.name
    run = folder.parent
    return f"{run.parent.name}/{run.name}" if is_series_run(run.name) else run.name


def is_series_run(name: str) -> bool:
    """Whether a run's folder is called as one of several seeds and splits is."""
    return re.fullmatch(r"seed\d+-split\d+", name) is not None
