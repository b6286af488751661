"""Fingerprints of settings and data: compared on resume, before a finished run is skipped, and across ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tvit_cli.engine.train.memory import reuse_batch_settings
from tvit_cli.engine.train.run_folder import choices_beside
from tvit_cli.engine.trained import is_series_run
from tvit_cli.errors import CheckpointError, RunError, SettingsError
from tvit_cli.model.folder import SETTINGS_FILE
from tvit_cli.settings.base import extra, flag
from tvit_cli.settings.card import BaseWeights
from tvit_cli.settings.train import TrainSettings

BASE = "base"  # what an identity calls that which pretrained weights and the files beside them decide
_DEFAULTS = TrainSettings().model_dump(mode="json")


def fingerprint(
    settings: TrainSettings,
    *,
    labels: tuple[str, ...],
    training: Iterable[str],
    validation: Iterable[str],
    base: BaseWeights | None,
    network: Mapping[str, Any],
    frames: str,
    device: str,
    processes: int,
) -> dict[str, Any]:
    """What has to be the same for a resumed run to end as one that was never stopped.

    `network` holds what the files of the base weights decide beside the weights themselves.
    """
    return {
        **result_settings(settings),
        "classes": list(labels),
        "training videos": digest(training),
        "validation videos": digest(validation),
        f"{BASE} weights": None if base is None else base.sha256,
        **{f"{BASE} {name}": value for name, value in network.items()},
        "frames": frames,
        "device type": device,
        "processes": processes,
    }


def check_fingerprint(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise CheckpointError that lists every setting that differs and would change the result.

    A setting that did not exist yet when the checkpoint was written had what is its default now. Weights may have
    moved: where they and the network are the same, so is what they are called.
    """
    before = {**_DEFAULTS, **before}
    if all(before.get(key) == now[key] for key in now if key.startswith(f"{BASE} ")):
        before["hf_model_name"] = now["hf_model_name"]
    lines = _differences(before, now)
    if lines:
        raise CheckpointError(
            "The checkpoint was written with other settings, and going on would mix two runs:\n"
            + "\n".join(lines)
            + f"\nGo on with the run's own settings, or start a new run.{_hint(before, now)}"
        )


def check_finished_settings(folder: Path, settings: TrainSettings, processes: int) -> TrainSettings:
    """The settings as a finished run has them, who found values of its own for `auto`.

    Raises SettingsError that lists what it was told otherwise, if that changed its result.
    """
    try:
        before = {**_DEFAULTS, **json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))}
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{folder / SETTINGS_FILE}: cannot be read ({error}). Remove {folder}."
        ) from error
    settings = reuse_batch_settings(settings, before, processes)
    lines = _differences(before, result_settings(settings))
    if lines:
        raise SettingsError(
            f"{folder} is finished and was trained with other settings:\n"
            + "\n".join(lines)
            + f"\n{choices_beside(*(path for path in folder.parent.iterdir() if is_series_run(path.name)))}"
        )
    return settings


def result_settings(settings: TrainSettings) -> dict[str, Any]:
    """The settings that change a result, as JSON has them."""
    values = settings.model_dump(mode="json")
    return {k: v for k, v in values.items() if not extra(TrainSettings.model_fields[k]).get("resume_safe")}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"  {_name(key)}: {_shown(before.get(key))} -> {_shown(value)}"
        for key, value in now.items()
        if before.get(key) != value
    ]


def _hint(before: dict[str, Any], now: dict[str, Any]) -> str:
    """How to come back to what is no setting."""
    hints = []
    if before.get("frames") != now["frames"]:
        hints.append(
            "A run that began with videos goes on with them: move its frame store away until it has ended."
            if before.get("frames") == "videos"
            else "A run that began with a frame store goes on with it: make it as it was with `tvit extract`."
        )
    if before.get("processes") != now["processes"]:
        hints.append(f"It takes {before.get('processes')} processes (--num-processes, or what started them).")
    return "".join(f"\n{hint}" for hint in hints)


def check_ranks_agree(identities: Sequence[Mapping[str, object]]) -> None:
    """Raise RunError where a process has other settings than the first, or sees other files: plans would differ."""
    first = identities[0]
    for rank, own in enumerate(identities):
        if differing := [name for name in first if own[name] != first[name]]:
            raise RunError(
                f"Process {rank} has not what process 0 has ({', '.join(differing)}). Start all with the same "
                "settings, once they see the same files; a `tvit extract` that is under way has to end first.",
                by_all=True,
            )


def digest(names: Iterable[str]) -> str:
    """How many names there are, and a hash of them in their order."""
    every = list(names)
    return f"{len(every)} ({hashlib.sha256(chr(10).join(every).encode()).hexdigest()[:12]})"


def _name(key: str) -> str:
    return flag(key) if key in TrainSettings.model_fields else key


def _shown(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"
