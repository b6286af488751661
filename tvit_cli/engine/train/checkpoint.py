"""Checkpoints: resumable state on disk, complete or absent.

    <checkpoints>/step-000120/
        state.json             where the run is, and the sha256 of itself and the files beside it; written last
        trainable.safetensors  the tensors that training changes
        optimizer.safetensors  AdamW's moments, by parameter name
        best.safetensors       the trainable tensors of the best epoch so far, if there is one
        ema.safetensors        their moving average, with --ema-decay

Nothing in it is a pickle. A checkpoint is written beside its place, synced, and renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from tvit_cli.errors import CheckpointError, RunError
from tvit_cli.files import foreign_files, move_files, remove_own

STATE_FILE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")
_WORK = re.compile(r"\.step-\d{6,}\.(writing|removing)")  # half written or half removed
CHECKPOINT_FILES = re.compile(
    r"state\.json|(trainable|optimizer|best|ema)\.safetensors"
)  # files of a checkpoint
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class State:
    """Where a run is: `step` optimizer updates are done."""

    step: int
    micro_batch: int = (
        0  # clips per forward pass, if memory ran out fewer than the settings say; 0: as they say
    )
    tally: tuple[float, ...] = ()  # the running sums of an epoch that is not over
    best_step: int = 0  # the last step of the best epoch; 0: none yet
    best: dict[str, float] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)  # what has to be the same to resume
    scaler: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

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
    """Write a checkpoint into the folder of checkpoints and return its path.

    Raises RunError when the disk is full; what was there before is untouched.
    """
    final = checkpoint_path(folder, state.step)
    beside = folder / f".{final.name}.writing"
    try:
        remove_own(beside, CHECKPOINT_FILES)
        beside.mkdir(parents=True)
        hashes = {}
        files = {"trainable": trainable, "optimizer": optimizer, "best": best, "ema": ema}
        for name, tensors in files.items():
            if tensors is not None:
                data = save_tensors(
                    {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
                )
                hashes[_file(name)] = hashlib.sha256(data).hexdigest()
                _write(beside / _file(name), data)
        content = {**asdict(state), "sha256": hashes}
        content["sha256"] = {**hashes, STATE_FILE: _digest(content)}
        _write(beside / STATE_FILE, json.dumps(content, indent=1).encode())
        sync_folder(beside)
        old = final.rename(_retired(final)) if final.exists() else None
        beside.rename(final)
        sync_folder(folder)
        if old is not None:
            move_files(old, final, foreign_files(old, CHECKPOINT_FILES))
            remove_own(old, CHECKPOINT_FILES)
    except OSError as error:
        with suppress(OSError):
            remove_own(beside, CHECKPOINT_FILES)
        kept = [path.name for path in list_checkpoints(folder)]
        reason = "the disk is full" if error.errno in _FULL else str(error)
        raise RunError(
            f"{final}: the checkpoint could not be written: {reason}. "
            + (
                f"{kept[-1]} is still whole; make room, then go on from it with "
                if kept
                else "Make room, then "
            )
            + ("--resume-from-checkpoint latest." if kept else "start again.")
        ) from error
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and verify every file against its recorded sha256.

    Raises CheckpointError that names the file that is missing, damaged or cannot be read.
    """
    try:
        raw = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        digest = raw["sha256"].pop(STATE_FILE)
        if _digest(raw) != digest:
            raise ValueError("another sha256")
        hashes = raw.pop("sha256")
        state = State(**{**raw, "tally": tuple(raw["tally"])})
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no checkpoint ({STATE_FILE} is not there).") from None
    except OSError as error:
        raise CheckpointError(f"{path / STATE_FILE}: cannot be read ({error.strerror}). {_OTHERS}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path / STATE_FILE}: damaged ({error}). {_OTHERS}") from error
    trainable, optimizer = (_read(path, name, hashes) for name in ("trainable", "optimizer"))
    best, ema = (_read(path, name, hashes) if _file(name) in hashes else None for name in ("best", "ema"))
    return Checkpoint(path, state, trainable, optimizer, best, ema)


def _read(path: Path, name: str, hashes: Mapping[str, str]) -> dict[str, Tensor]:
    file = path / _file(name)
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing. {_OTHERS}") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}). {_OTHERS}") from error
    if hashlib.sha256(data).hexdigest() != hashes.get(file.name):
        raise CheckpointError(f"{file}: damaged ({len(data)} bytes, another sha256). {_OTHERS}")
    try:
        tensors: dict[str, Tensor] = load_tensors(data)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: damaged ({error}). {_OTHERS}") from error
    return tensors


def _file(name: str) -> str:
    return f"{name}.safetensors"


def _digest(content: Mapping[str, Any]) -> str:
    """The sha256 of what state.json says, whatever its spaces and the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_OTHERS = "Go on from an earlier one: --resume-from-checkpoint NAME."


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, earliest first; what was left half written is not among them."""
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / STATE_FILE).is_file())
    return sorted(found, key=_step)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:06d}"


def prune_checkpoints(folder: Path, keep: int, *, newest: int) -> None:
    """Remove all checkpoints but the `keep` latest, and what a killed process left half written.

    Checkpoints after step `newest` go first: they are of a course that a resumed run has left. A checkpoint is
    renamed before its files go, so that one that is half removed is never taken for whole. Files that are not of
    a checkpoint stay under the name that they had.
    """
    known = list_checkpoints(folder)
    left = [path for path in known if _step(path) > newest]
    for path in [*left, *known[: len(known) - len(left)][:-keep]]:
        with suppress(OSError):
            gone = path.rename(_retired(path))
            remove_own(gone, CHECKPOINT_FILES)
            if gone.exists():
                gone.rename(path)
    for rest in [path for path in folder.iterdir() if _WORK.fullmatch(path.name)]:
        with suppress(OSError):
            remove_own(rest, CHECKPOINT_FILES)


def find_checkpoint(folder: Path, which: str) -> Path:
    """The checkpoint that `--resume-from-checkpoint` names: latest, a name in the folder, or a path."""
    known = list_checkpoints(folder)
    if which == "latest":
        if not known:
            raise CheckpointError(
                f"{folder}: no checkpoint to resume from. Leave --resume-from-checkpoint out."
            )
        return known[-1]
    for path in (folder / which, Path(which)):
        if (path / STATE_FILE).is_file():
            return path
    names = ", ".join(p.name for p in known) or "none"
    raise CheckpointError(f"--resume-from-checkpoint {which}: no such checkpoint. In {folder}: {names}.")


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: "exp_avg/blocks.0…" -> tensor."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{kind}/{names[parameter]}": value
        for parameter, values in optimizer.state.items()
        for kind, value in values.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors saved by `optimizer_tensors` back, each on its parameter's device."""
    by_name = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        parameter = by_name.get(name)
        if parameter is None:
            raise CheckpointError(f"optimizer.safetensors: {name or key} is no parameter of this model.")
        if value.ndim and value.shape != parameter.shape:
            raise CheckpointError(
                f"optimizer.safetensors: {key} has the shape {tuple(value.shape)}, not {tuple(parameter.shape)}."
            )
        optimizer.state[parameter][kind] = value.to(parameter.device)


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable; a no-op where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _retired(path: Path) -> Path:
    retired = path.with_name(f".{path.name}.removing")
    remove_own(retired, CHECKPOINT_FILES)
    return retired


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match[1])
