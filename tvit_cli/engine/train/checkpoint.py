"""Checkpoints: resumable state on disk, complete or absent.

    <checkpoints>/step-000120/
        state.json             position in the run, and the sha256 of itself and of the other files; written last
        trainable.safetensors  the tensors that training changes
        optimizer.safetensors  AdamW's moments, by parameter name
        best.safetensors       the trainable tensors of the best epoch so far, if there is one
        ema.safetensors        their moving average, with --ema-decay

No file is a pickle. A checkpoint is written to a temporary folder, synced, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from tvit_cli.errors import CheckpointError, RunError, validation_text
from tvit_cli.files import FULL, foreign_files, move_files, remove_own, sync_folder

STATE_FILE = "state.json"
CHECKPOINT_FILES = re.compile(r"state\.json|(trainable|optimizer|best|ema)\.safetensors")
_NAME = re.compile(r"step-(\d{6,})")
_WORK = re.compile(r"\.step-\d{6,}\.(writing|removing)")  # half written or half removed
_STATES = ("step", "exp_avg", "exp_avg_sq")  # of AdamW for each parameter
RESUME_EARLIER = "Resume from an earlier one: --resume-from-checkpoint NAME."

Count = Annotated[int, Field(ge=0, strict=True)]


@dataclass(frozen=True)
class State:
    """Position in a run after `step` optimizer updates."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: Count
    micro_batch: Count = 0  # clips per forward pass, halved when memory ran out; 0: as in the settings
    global_batch: Count = 0  # clips per update; 0: as in the settings
    tally: tuple[float, ...] = ()  # running sums of an incomplete epoch
    best_step: Count = 0  # last step of the best epoch; 0: none yet
    best: dict[str, float] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)  # fingerprint, compared on resume
    scaler: dict[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    state: State
    trainable: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor] | None
    ema: dict[str, Tensor] | None


def save_checkpoint(
    folder: Path,
    *,
    state: State,
    trainable: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    best: Mapping[str, Tensor] | None,
    ema: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes a checkpoint into the folder of checkpoints and returns its path.

    Raises RunError if it cannot be written; earlier checkpoints are unchanged then.
    """
    final = checkpoint_path(folder, state.step)
    work = folder / f".{final.name}.writing"
    files = {"trainable": trainable, "optimizer": optimizer, "best": best, "ema": ema}
    try:
        remove_own(work, CHECKPOINT_FILES)
        work.mkdir(parents=True)
        hashes = {}
        for name, tensors in files.items():
            if tensors is not None:
                data = save_tensors({key: t.detach().contiguous().cpu() for key, t in tensors.items()})
                hashes[f"{name}.safetensors"] = hashlib.sha256(data).hexdigest()
                _write(work / f"{name}.safetensors", data)
        content = {**asdict(state), "sha256": hashes}
        content["sha256"] = {**hashes, STATE_FILE: _digest(content)}
        _write(work / STATE_FILE, json.dumps(content, indent=1).encode())
        sync_folder(work)
        old = final.rename(_removal_path(final)) if final.exists() else None
        work.rename(final)
        sync_folder(folder)
        if old is not None:
            move_files(old, final, foreign_files(old, CHECKPOINT_FILES))
            remove_own(old, CHECKPOINT_FILES)
    except OSError as error:
        with suppress(OSError):
            remove_own(work, CHECKPOINT_FILES)
        reason = "the disk is full" if error.errno in FULL else str(error)
        advice = "Free some space, then start again."
        if kept := list_checkpoints(folder):
            whole = f"{kept[-1].name} is still whole"
            advice = f"{whole}; free some space, then use --resume-from-checkpoint latest."
        raise RunError(f"{final}: the checkpoint could not be written: {reason}. {advice}") from error
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint and verifies every file against its recorded sha256.

    Raises CheckpointError that names the file that is missing, damaged or cannot be read.
    """
    with _read_errors(path / STATE_FILE, f"{path}: no checkpoint ({STATE_FILE} is missing)."):
        raw = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        digest = raw["sha256"].pop(STATE_FILE)
        if _digest(raw) != digest:
            raise ValueError("another sha256")
        hashes = raw.pop("sha256")
        state = TypeAdapter(State).validate_python(raw)
    read: dict[str, dict[str, Tensor]] = {}
    for name in ("trainable", "optimizer", "best", "ema"):
        file = path / f"{name}.safetensors"
        if name in ("trainable", "optimizer") or file.name in hashes:
            with _read_errors(file, f"{file}: missing. {RESUME_EARLIER}"):
                data = file.read_bytes()
                if hashlib.sha256(data).hexdigest() != hashes.get(file.name):
                    raise ValueError(f"{len(data)} bytes, another sha256")
                read[name] = load_tensors(data)
    return Checkpoint(path, state, read["trainable"], read["optimizer"], read.get("best"), read.get("ema"))


@contextmanager
def _read_errors(file: Path, missing: str) -> Iterator[None]:
    """Turns errors of reading a file into a CheckpointError, with the message `missing` if there is none."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(missing) from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}). {RESUME_EARLIER}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        problem = validation_text(error, "state") if isinstance(error, ValidationError) else error
        raise CheckpointError(f"{file}: damaged ({problem}). {RESUME_EARLIER}") from error


def _digest(content: Mapping[str, Any]) -> str:
    """The sha256 of state.json's content, independent of white space and key order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, earliest first."""
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / STATE_FILE).is_file())
    return sorted(found, key=_step)


def checkpoint_path(folder: Path, step: int) -> Path:
    """The path of a step's checkpoint."""
    return folder / f"step-{step:06d}"


def prune_checkpoints(folder: Path, keep: int, *, newest: int) -> None:
    """Removes all checkpoints but the `keep` latest, and the work of killed processes.

    Checkpoints after step `newest` go first: a resumed run has restarted before them. A checkpoint is renamed
    before its files are removed, so a half-removed one never counts as complete. Foreign files keep their path.
    """
    every = list_checkpoints(folder)
    kept = [path for path in every if _step(path) <= newest]
    for path in [*every[len(kept) :], *kept[:-keep]]:
        with suppress(OSError):
            removed = path.rename(_removal_path(path))
            remove_own(removed, CHECKPOINT_FILES)
            if removed.exists():
                removed.rename(path)
    for work in [path for path in folder.iterdir() if _WORK.fullmatch(path.name)]:
        with suppress(OSError):
            remove_own(work, CHECKPOINT_FILES)


def find_checkpoint(folder: Path, name: str) -> Path:
    """The checkpoint of `--resume-from-checkpoint`: latest, a name in the folder, or a path.

    Raises CheckpointError if there is none.
    """
    found = list_checkpoints(folder)
    if name == "latest":
        if not found:
            text = f"{folder}: no checkpoint to resume from. Leave --resume-from-checkpoint out."
            raise CheckpointError(text)
        return found[-1]
    for path in (folder / name, Path(name)):
        if (path / STATE_FILE).is_file():
            return path
    names = ", ".join(p.name for p in found) or "none"
    raise CheckpointError(f"--resume-from-checkpoint {name}: no such checkpoint. In {folder}: {names}.")


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: "exp_avg/blocks.0…" -> tensor."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    states = optimizer.state.items()
    return {f"{kind}/{names[p]}": value for p, values in states for kind, value in values.items()}


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    file: str = "optimizer.safetensors",
) -> None:
    """Restores tensors of `optimizer_tensors`, each on its parameter's device.

    Raises CheckpointError that names the `file` and the tensor if AdamW cannot have that state of this model.
    """
    parameters = dict(model.named_parameters())
    kinds = Counter(key.partition("/")[2] for key in tensors)
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        problem = ""
        if (parameter := parameters.get(name)) is None:
            problem = f"{name or key} is no parameter of this model"
        elif kind not in _STATES or kinds[name] != len(_STATES):
            problem = f"{name} has not the states {', '.join(_STATES)}, but {kind}"
        elif value.shape != (shape := torch.Size() if kind == "step" else parameter.shape):
            problem = f"{key} has the shape {tuple(value.shape)}, not {tuple(shape)}"
        elif not value.is_floating_point() or not value.isfinite().all():
            problem = f"{key} has values that are not finite numbers"
        elif kind != "exp_avg" and (value < 0).any():
            problem = f"{key} has negative values"
        if problem or parameter is None:
            raise CheckpointError(f"{file}: damaged ({problem}). {RESUME_EARLIER}")
        optimizer.state[parameter][kind] = value.to(parameter.device)


def _removal_path(path: Path) -> Path:
    """The path that a checkpoint is renamed to before its removal; an earlier one there is removed."""
    removal = path.with_name(f".{path.name}.removing")
    remove_own(removal, CHECKPOINT_FILES)
    return removal


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
