"""Where metrics go: a file of JSON lines beside the run, and Weights & Biases if asked for."""

from __future__ import annotations

import json
import math
import os
import secrets
from pathlib import Path
from typing import Any

from tvit_cli.engine.events import Note, Report
from tvit_cli.errors import RunError

METRICS_FILE = "metrics.jsonl"


class Trackers:
    """Writes each record to metrics.jsonl, and to W&B where a run is open."""

    def __init__(self, folder: Path | None) -> None:
        """Without a folder (a process that is not the main one) nothing is written."""
        self._folder = folder
        self._wandb: Any = None

    def cut_after(self, step: int) -> None:
        """Drop the records after a step: a resumed run writes them again."""
        if self._folder is not None:
            _keep_until(self._folder / METRICS_FILE, step)

    def open_wandb(self, *, name: str, config: dict[str, Any], report: Report) -> None:
        """Open, or go on with, the W&B run of an experiment; offline where nobody is logged in."""
        folder = self._folder
        if folder is None:
            return
        import wandb

        mode = os.environ.get("WANDB_MODE")
        if mode is None and not wandb.api.api_key:  # type: ignore[no-untyped-call, unused-ignore]
            mode = "offline"
            report(
                Note(
                    "W&B: not logged in, so this run is kept offline. Log in with `wandb login`, "
                    f"then send it with `wandb sync {folder / 'wandb'}/offline-run-*`.",
                    "warning",
                )
            )
        id_file = folder / "wandb-id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        self._wandb = wandb.init(
            project="tvit",
            name=name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=config,
            dir=str(folder),
            mode=mode,  # type: ignore[arg-type, unused-ignore]
            settings=wandb.Settings(silent=True),
        )

    def log(self, record: dict[str, Any]) -> None:
        """Append one record; a number that is not finite is written as null, which JSON has a word for."""
        if self._folder is None:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        path = self._folder / METRICS_FILE
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
        except OSError as error:
            raise RunError(
                f"{path}: cannot be written ({error.strerror}). Make room, then go on from the last checkpoint "
                "with --resume-from-checkpoint latest."
            ) from error
        if self._wandb is not None:
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
            self._wandb.log(numbers, step=record["step"])

    def close(self) -> None:
        """End the W&B run, if there is one."""
        if self._wandb is not None:
            self._wandb.finish()


def _keep_until(path: Path, step: int) -> None:
    """Drop the records after a step, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["step"] > step:
            break
        kept.append(line + "\n")
    beside = path.with_suffix(".writing")
    beside.write_text("".join(kept), encoding="utf-8")
    beside.replace(path)
