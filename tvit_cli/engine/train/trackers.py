"""Metric trackers: JSON lines, Weights & Biases, TensorBoard."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tvit_cli.errors import RunError, SettingsError
from tvit_cli.results import Note, Report

METRICS_FILE = "metrics.jsonl"
PER_CLASS_FILE = "val_per_class.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
FILES = (METRICS_FILE, PER_CLASS_FILE, TENSORBOARD_FOLDER, "wandb", "wandb-id")  # in the run's folder


class Trackers:
    """Writes records to metrics.jsonl, and to W&B and TensorBoard once they are open."""

    def __init__(self, folder: Path | None) -> None:
        """Without a folder (every rank but 0) nothing is written."""
        self._folder = folder
        self._wandb: Any = None
        self._tensorboard: Any = None

    def cut_after(self, step: int) -> None:
        """Drops the records after a step, which a resumed run writes again, and an incomplete last line."""
        for name in (METRICS_FILE, PER_CLASS_FILE):
            if self._folder is not None and (path := self._folder / name).exists():
                kept = itertools.takewhile(lambda record: record["step"] <= step, self._read(name))
                beside = path.with_suffix(".writing")
                beside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
                beside.replace(path)

    def open_wandb(self, *, name: str, config: dict[str, Any], report: Report) -> None:
        """Opens or resumes the W&B run of an experiment, offline without a login. Raises RunError."""
        if (folder := self._folder) is None:
            return
        import wandb

        mode = os.environ.get("WANDB_MODE")
        if mode is None and not wandb.api.api_key:  # type: ignore[no-untyped-call, unused-ignore]
            mode = "offline"
            text = "W&B: not logged in, so this run is recorded offline. Log in with `wandb login`, then upload it"
            report(Note(f"{text} with `wandb sync {folder / 'wandb'}/offline-run-*`.", "warning"))
        if not (id_file := folder / "wandb-id").exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        try:
            self._wandb = wandb.init(
                project=os.environ.get("WANDB_PROJECT")
                or "tvit",  # wandb itself reads entity, group and tags
                name=name,
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow",
                config=config,
                dir=str(folder),
                mode=mode,  # type: ignore[arg-type, unused-ignore]
                settings=wandb.Settings(silent=True),
            )
        except wandb.Error as error:
            advice = "Set WANDB_MODE=offline and upload later with `wandb sync`, or leave --log-wandb out."
            raise RunError(f"--log-wandb: W&B could not be reached ({error}). {advice}") from error

    def open_tensorboard(self, step: int) -> None:
        """Opens TensorBoard's log in the run; records of an earlier process after `step` are hidden."""
        if self._folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = str(self._folder / TENSORBOARD_FOLDER)
        self._tensorboard = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def log(self, record: dict[str, Any]) -> None:
        """Appends a record; JSON has no NaN or infinity, so metrics.jsonl gets null for them."""
        if self._folder is None:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._append(METRICS_FILE, clean)
        step, kind = record["step"], record["kind"]
        named = {f"{kind}/{k}": v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        if self._wandb is not None:
            self._wandb.log(named, step=step)
        if self._tensorboard is not None:
            for name, value in named.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()

    def log_per_class(self, step: int, counts: Mapping[str, tuple[int, int]]) -> None:
        """Appends (videos, correct predictions) of each class at a validation."""
        self._append(PER_CLASS_FILE, {"step": step, "classes": counts})

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The records of a kind in metrics.jsonl: "epoch" or "step"."""
        return [record for record in self._read(METRICS_FILE) if record["kind"] == kind]

    def per_class(self, step: int) -> dict[str, tuple[int, int]]:
        """The counts that `log_per_class` wrote at a step; empty without a validation at that step."""
        counts = (record["classes"] for record in self._read(PER_CLASS_FILE) if record["step"] == step)
        return {name: (videos, right) for name, (videos, right) in next(counts, {}).items()}

    def close(self) -> None:
        """Closes the W&B run and TensorBoard's log, if they are open."""
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        if self._folder is None:
            return
        path = self._folder / name
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            advice = "Free some space, then use --resume-from-checkpoint latest."
            raise RunError(f"{path}: cannot be written ({error.strerror}). {advice}") from error

    def _read(self, name: str) -> Iterator[dict[str, Any]]:
        """The records of a file up to a line that a kill or a full disk has cut off."""
        if self._folder is None or not (self._folder / name).exists():
            return
        for line in (self._folder / name).read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return


def require_tensorboard() -> None:
    """Raises SettingsError if TensorBoard's package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        install = "pip install 'tvit[tensorboard]'"
        raise SettingsError(f"--log-tensorboard: tensorboard is not installed. Install it with `{install}`.")
