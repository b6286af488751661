"""What every format is made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tvit_cli.engine.events import Report
from tvit_cli.engine.trained import Trained
from tvit_cli.model.folder import CARD_FILE
from tvit_cli.settings.card import ModelCard
from tvit_cli.settings.export import ExportSettings

Answerer = Callable[[Sequence[Path]], Tensor]  # videos -> logits, or the logarithms of scores, (videos, K)


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
        """The model's card for others to read: folders of this machine are reduced to their names."""
        card = self.trained.card
        settings = {key: value for key, value in card.settings.items() if key != "working_directory"}
        for key in ("path_to_data", "hf_model_name"):
            if settings.get(key) and Path(settings[key]).exists():
                settings[key] = Path(settings[key]).resolve().name
        base = card.base
        if base is not None and Path(base.name).exists():
            base = base.model_copy(update={"name": Path(base.name).resolve().name})
        return card.model_copy(update={"settings": settings, "base": base})

    def write_card(self, folder: Path) -> None:
        """Write card.json into an export."""
        (folder / CARD_FILE).write_text(self.card.model_dump_json(indent=2) + "\n", encoding="utf-8")
