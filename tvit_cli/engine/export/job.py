"""What every format is made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tvit_cli.engine.events import Report
from tvit_cli.engine.trained import Trained
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
        folder = self.trained.folder
        return (folder if folder.name else folder.absolute()).parent
