"""Fingerprints of settings and data: compared on resume, before a finished run is skipped, and across ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tvit_cli.engine.dataset import DataSource
from tvit_cli.engine.train.memory import reuse_batch_settings
from tvit_cli.engine.train.run_folder import choices_beside, train_further
from tvit_cli.engine.trained import is_series_run
from tvit_cli.errors import CheckpointError, RunError, SettingsError
from tvit_cli.model.folder import SETTINGS_FILE
from tvit_cli.settings.base import extra, flag
from tvit_cli.settings.train import TrainSettings

BASE = "base"  # prefix of the keys that pretrained weights and the files beside them decide
_DEFAULTS = TrainSettings().model_dump(mode="json")


def result_settings(settings: TrainSettings) -> dict[str, Any]:
    """The settings that change a result, as JSON values."""
    values = settings.model_dump(mode="json")
    return {k: v for k, v in values.items() if not extra(TrainSettings.model_fields[k]).get("resume_safe")}


def data_fingerprint(source: DataSource) -> dict[str, object]:
    """Classes, videos and frame store that a training learns from."""
    return {
        "classes": list(source.layout.labels),
        "training videos": digest(video.name for video in source.readable("train")),
        "validation videos": digest(video.name for video in source.readable("val")),
        "frames": "videos" if source.store is None else f"store, {source.store.parameters}",
    }


def digest(names: Iterable[str]) -> str:
    """The number of names, and a hash of them in their order."""
    every = list(names)
    return f"{len(every)} ({hashlib.sha256(chr(10).join(every).encode()).hexdigest()[:12]})"


def check_fingerprint(before: dict[str, Any], now: dict[str, Any], *, more_epochs: str = "") -> None:
    """Raises CheckpointError that lists every difference that would change the result.

    `more_epochs` is the advice where the epochs differ (`train_further`).
    A setting that is newer than the checkpoint counts with its default. The name of base weights may differ if the
    weights and the network are the same: they may have moved.
    """
    before = {**_DEFAULTS, **before, "processes": now["processes"]}
    if all(before.get(key) == now[key] for key in now if key.startswith(f"{BASE} ")):
        before["hf_model_name"] = now["hf_model_name"]
    if not (lines := _differences(before, now)):
        return
    lines.append("Resume with the run's own settings, or start a new run.")
    frames = before.get("frames")
    if frames == "videos" and now["frames"] != "videos":
        lines.append("The run was trained on videos: move the frame store away until it has ended.")
    elif frames != now["frames"]:
        lines.append("The run was trained on a frame store: make the store as it was with `tvit extract`.")
    if before.get("epochs") != now["epochs"] and more_epochs:
        lines.append(more_epochs.strip())
    heading = "The checkpoint was written with other settings, and resuming would mix two runs:"
    raise CheckpointError("\n".join([heading, *lines]))


def check_finished_settings(folder: Path, settings: TrainSettings, processes: int) -> TrainSettings:
    """The settings with the values that a finished run has found for `auto`.

    Raises SettingsError that lists every other setting that would have changed its result.
    """
    path = folder / SETTINGS_FILE
    try:
        before = {**_DEFAULTS, **json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: cannot be read ({error}). Remove {folder}.") from error
    settings = reuse_batch_settings(settings, before, processes)
    if lines := _differences(before, result_settings(settings)):
        runs = [path for path in folder.parent.iterdir() if is_series_run(path.name)]
        heading = f"{folder} is finished and was trained with other settings:"
        further = train_further(folder, settings) if before["epochs"] != settings.epochs else ""
        raise SettingsError("\n".join([heading, *lines, choices_beside(*runs) + further]))
    return settings


def check_ranks_agree(fingerprints: Sequence[Mapping[str, object]]) -> None:
    """Raises RunError if a rank has other settings or other files than rank 0: their plans would differ."""
    for rank, own in enumerate(fingerprints):
        if differing := [name for name, value in fingerprints[0].items() if own[name] != value]:
            text = f"Process {rank} differs from process 0 ({', '.join(differing)})."
            advice = "Start all with the same settings and files, and let a running `tvit extract` end first."
            raise RunError(f"{text} {advice}", by_all=True)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    def short(value: Any) -> str:
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        return text if len(text) <= 60 else text[:57] + "…"

    names = {key: flag(key) if key in TrainSettings.model_fields else key for key in now}
    changed = {key: value for key, value in now.items() if before.get(key) != value}
    return [f"  {names[key]}: {short(before.get(key))} -> {short(value)}" for key, value in changed.items()]
