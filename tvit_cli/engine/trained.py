"""A trained model, opened for scoring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tvit_cli.errors import ModelError
from tvit_cli.model.folder import CARD_FILE, find_newest_model, load_model
from tvit_cli.model.vit import TemporalViT
from tvit_cli.settings.card import ModelCard


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode on its device, its card, and the folder both came from."""

    model: TemporalViT
    card: ModelCard
    folder: Path
    device: torch.device


def open_trained(
    given: Path | None, *, working_directory: Path, device: torch.device, verify: bool = False
) -> Trained:
    """Load a model folder (or the one of a run's folder); without one, the newest of the working directory.

    `verify` compares the weights with the hash in the card. Raises ModelError when there is none or it is not
    whole.
    """
    folder = find_newest_model(working_directory) if given is None else given
    if (folder / "model" / CARD_FILE).is_file():
        folder = folder / "model"
    model, card = load_model(folder, device=device, verify=verify)
    return Trained(model.eval(), card, folder, device)


def pick_device(name: str) -> torch.device:
    """The device that a name means; auto is CUDA, then MPS, then CPU.

    Raises ModelError when a device was asked for that this machine does not have.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not has_mps):
        raise ModelError(
            f"--device {name}: this machine has none that PyTorch {torch.__version__} can use. "
            "Take --device cpu, or install a PyTorch build for your GPU."
        )
    return torch.device(name)
