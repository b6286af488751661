"""What every format is made from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from torch import Tensor

from tvit_cli.engine.events import Report
from tvit_cli.engine.trained import Trained
from tvit_cli.model.folder import CARD_FILE
from tvit_cli.settings.card import ModelCard
from tvit_cli.settings.export import ExportSettings

Answerer = Callable[[Sequence[Path]], Tensor]  # videos -> logits, or the logarithms of scores, (videos, K)
PRIVATE = ("working_directory", "resume_from_checkpoint")  # settings that say where, not what
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # NAME or OWNER/NAME


@dataclass(frozen=True)
class Job:
    """An opened model, what was asked for, and whom to tell."""

    trained: Trained
    settings: ExportSettings
    report: Report

    @property
    def run(self) -> Path:
        """The folder that the model folder lies in."""
        return self.trained.run

    @property
    def card(self) -> ModelCard:
        """The model's card for others to read: folders of this machine are left out or reduced to their names."""
        card = self.trained.card
        settings = {key: value for key, value in card.settings.items() if key not in PRIVATE}
        if settings.get("path_to_data"):
            settings["path_to_data"] = _last(settings["path_to_data"])
        if settings.get("hf_model_name"):
            settings["hf_model_name"] = _public(settings["hf_model_name"])
        base = card.base
        if base is not None:
            base = base.model_copy(update={"name": _public(base.name)})
        return card.model_copy(update={"settings": settings, "base": base})

    def write_card(self, folder: Path, *, weights_sha256: str | None = None) -> None:
        """Write card.json into an export, with the hash of weights that lie beside it."""
        card = self.card
        if weights_sha256 is not None:
            card = card.model_copy(update={"weights_sha256": weights_sha256})
        (folder / CARD_FILE).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Format:
    """How one format is written, how an export of it answers on its own, and what its README says of that.

    `check` finds what is missing before anything is computed. The rest of the README is `use/<format>.md`.
    """

    write: Callable[[Job, Path], None]
    opened: Callable[[Path], AbstractContextManager[Answerer]]
    packages: tuple[str, ...]  # whose versions the proof is for
    library: str  # what opens it, as the Hugging Face hub calls that
    check: Callable[[Job], None] = lambda job: None
    suffix: str = ""  # of the files of its graphs, for a format that has graphs
    preprocess: str = ""  # in Python, what goes before the model where it is not inside


def _public(name: str) -> str:
    """A name on the hub as it is; of a folder or file, here or elsewhere, its own name."""
    return name if HUB_NAME.fullmatch(name) and not Path(name).exists() else _last(name)


def _last(path: str) -> str:
    return PureWindowsPath(Path(path).resolve()).name  # which takes either slash for one
