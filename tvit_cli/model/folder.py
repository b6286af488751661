"""Model folders: `card.json` beside `model.safetensors`, written atomically and checked on loading.

The weights are merged and have the plain names of `TemporalViT`: loading them needs no PEFT.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tvit_cli.errors import ModelError, RunError, shorten, validation_text
from tvit_cli.files import foreign_files, move_files, remove_own, sha256, sync, sync_folder
from tvit_cli.portable.config import DIVISORS
from tvit_cli.portable.vit import TemporalViT, ViTConfig
from tvit_cli.settings.card import CARD_VERSION, ModelCard, Preprocessing

MODEL_FOLDER = "model"  # of a run
BASE_FOLDER = "base"  # of a run: its copy of the model of --from
SETTINGS_FILE = "settings.json"  # of a run
CARD_FILE = "card.json"
CONFIG_FILE = "config.json"  # beside weights in transformers' format, tvit's exports among them
WEIGHTS_FILE = "model.safetensors"
PARITY_FILE = "parity.json"  # the comparison of an export with its model
# Limits of a clip; 128 frames of 518 x 518 pixels in patches of 14 are below them.
MOST_VALUES = 2**27  # before the crop, in all channels
MOST_TOKENS = 2**18


def save_model(folder: Path, state: Mapping[str, Tensor], card: ModelCard) -> None:
    """Writes a model folder, complete or not at all; an older one is replaced only by a complete new one.

    Sets the card's `weights_sha256`. Raises ModelError if the folder exists and is no model folder, RunError if the
    disk is full or cannot be written.
    """
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_empty and not (folder / CARD_FILE).is_file():
        raise ModelError(f"{folder}: exists and is no model folder. Name another one, or move it away.")
    try:
        with replace_folder(folder) as new:
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
            save_tensors(weights, new / WEIGHTS_FILE, {"format": "pt"})
            card = card.model_copy(update={"weights_sha256": sha256(new / WEIGHTS_FILE)})
            (new / CARD_FILE).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        problem = f"{folder}: the model cannot be written ({error})"
        raise RunError(f"{problem}. Free some space, or choose another disk.") from error


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with the user's default permissions. Raises OSError or SafetensorError."""
    path.touch()  # safetensors itself writes private files
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name, memory-mapped. Raises ModelError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (SafetensorError, OSError) as error:
        problem = f"{path}: cannot be read ({error})"
        raise ModelError(f"{problem}. The file may be truncated; copy or fetch it again.") from error


def tensor_mismatches(saved: Mapping[str, Tensor], own: Mapping[str, Tensor | None]) -> str:
    """Missing and unexpected names and other shapes (None in `own`: any shape), the first four; empty if none."""
    problems = [f"{name} is missing" for name in own if name not in saved]
    problems += [f"{name} is unexpected" for name in saved if name not in own]
    problems += [
        f"{name} has the shape {tuple(saved[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in saved and tensor is not None and saved[name].shape != tensor.shape
    ]
    return shorten(problems, 4, "; ")


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; a finite sum proves it ten times as fast."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def load_card(folder: Path) -> ModelCard:
    """The card of a model folder. Raises ModelError if it is missing, damaged, or newer than this tvit."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder. Name the folder that holds {CARD_FILE}.")
    path = folder / CARD_FILE
    if not path.is_file():
        if (folder / WEIGHTS_FILE).is_file():
            raise _missing_file(path)
        if runs := sorted(card.parents[1] for card in folder.glob(f"*/{MODEL_FOLDER}/{CARD_FILE}")):
            names = shorten([run.name for run in runs])
            raise ModelError(f"{folder}: a folder of runs ({names}). Name one, such as {runs[-1]}.")
        problem = f"{folder}: no model folder, nor a finished run: {CARD_FILE} is missing"
        raise ModelError(f"{problem}. Name a run, or its folder {MODEL_FOLDER}.")
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:  # the last: JSON nested too deep
        raise ModelError(f"{path}: cannot be read ({error}). Copy the folder again.") from error
    version = raw.get("card_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > CARD_VERSION:
        writer = f"tvit {raw.get('tvit_version', '?')}"
        raise ModelError(
            f"{path}: card version {version}, written by {writer}; this tvit reads up to version {CARD_VERSION}. "
            "Upgrade it: python -m pip install --upgrade tvit"
        )
    try:
        return ModelCard.model_validate_json(text)
    except ValidationError as error:
        raise ModelError(f"{path}: {validation_text(error, 'card')}. Copy the folder again.") from error


def load_config(folder: Path) -> tuple[ModelCard, ViTConfig]:
    """The card of a model folder and its network.

    Raises ModelError as `load_card`, for an invalid network, and for clips that do not fit it or are too large.
    """
    card = load_card(folder)
    try:
        config = ViTConfig.from_dict(card.model)
        check_clips(card.preprocessing, config)
        return card, config
    except ValueError as error:
        raise ModelError(f"{folder / CARD_FILE}: model: {error}. Copy the folder again.") from error


def check_clips(preprocessing: Preprocessing, config: ViTConfig) -> None:
    """Raises ValueError if the network cannot take the clips, or if they exceed MOST_VALUES or MOST_TOKENS."""
    for name in ("n_frames", "frame_size"):
        value, divisor = getattr(preprocessing, name), getattr(config, DIVISORS[name])
        if value % divisor:
            raise ValueError(
                f"{DIVISORS[name]} {divisor} does not divide {name} {value} of the preprocessing"
            )
    if config.num_channels != 3:
        raise ValueError(f"num_channels is {config.num_channels}; frames of a video have 3")
    frames, side = preprocessing.n_frames, preprocessing.scale_to
    tokens = frames // config.tubelet_size * (preprocessing.frame_size // config.patch_size) ** 2
    if 3 * frames * side**2 > MOST_VALUES or tokens > MOST_TOKENS:
        limits = f"at most {MOST_VALUES:,} values and {MOST_TOKENS:,} patches"
        raise ValueError(
            f"a clip of {frames} frames of {side} x {side} pixels has {tokens} patches; {limits}"
        )


def empty_model(card: Path, config: ViTConfig, weights: Mapping[str, Tensor]) -> TemporalViT:
    """The network on the meta device, which takes no memory.

    Raises ModelError for a network with more blocks than there are weights, or with sizes that overflow.
    """
    blocks = config.depth + (config.temporal_depth or 0) + (config.pool_depth or 0)
    if blocks > len(weights):
        raise ModelError(f"{card}: model: {blocks} blocks for {len(weights)} tensors. Copy the folder again.")
    try:
        with torch.device("meta"):
            return TemporalViT(config, initialise=False)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ModelError(f"{card}: model: its sizes are too large. Copy the folder again.") from error


def load_model(folder: Path, *, device: torch.device | str = "cpu") -> tuple[TemporalViT, ModelCard]:
    """The model, ready to predict (`eval()`), with its card.

    On the CPU the weights are memory-mapped. Raises ModelError for a folder that is incomplete, damaged or
    inconsistent, for weights that are not finite, and for another hash than the card's.
    """
    card, config = load_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise export_not_loadable(str(folder)) if (folder / PARITY_FILE).is_file() else _missing_file(path)
    state = read_tensors(path)
    model = empty_model(folder / CARD_FILE, config, state)
    if problems := tensor_mismatches(state, model.state_dict()):
        if (folder / CONFIG_FILE).is_file():
            raise export_not_loadable(str(folder))
        raise ModelError(f"{path}: {problems}. The weights do not belong to {CARD_FILE}; copy both again.")
    for name, tensor in state.items():
        if tensor.dtype != torch.float32:
            raise ModelError(f"{path}: {name} is {tensor.dtype}, not torch.float32. Copy the file again.")
        if not is_finite(tensor):
            raise ModelError(f"{path}: {name} holds NaN or infinite numbers. Copy the file or train again.")
    if sha256(path) != card.weights_sha256:
        raise ModelError(f"{path}: its hash is not the one in {CARD_FILE}. Copy the file again.")
    model.load_state_dict(state, assign=True)
    return model.to(device).eval(), card


def export_not_loadable(name: str) -> ModelError:
    """The error for an export in a format that tvit does not read."""
    problem = f"{name}: an export of a tvit model for other programs"
    return ModelError(f"{problem}. Name its model folder, or export that with --format safetensors.")


def find_newest_model(working_directory: Path) -> Path:
    """The newest model folder `<experiment>/model` or `<experiment>/<any>/model`. Raises ModelError without one."""
    written = []
    for depth in ("*", "*/*"):
        for card in working_directory.glob(f"{depth}/{MODEL_FOLDER}/{CARD_FILE}"):
            with suppress(FileNotFoundError):  # replaced after it was listed
                written.append((card.stat().st_mtime_ns, card.parent))
    if not written:
        next_step = "Train one (tvit train --preset quickstart), or name a model folder with --model."
        raise ModelError(f"{working_directory}: no trained model in it. {next_step}")
    return max(written)[1]


def own_files(folder: Path) -> re.Pattern[str]:
    """Pattern of the relative paths that tvit wrote into a model folder or export, and of compiled modules."""
    names = {CARD_FILE, WEIGHTS_FILE}
    if (folder / PARITY_FILE).is_file():
        try:
            names = {PARITY_FILE, *json.loads((folder / PARITY_FILE).read_text(encoding="utf-8"))["files"]}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            names = set()  # not tvit's
    return re.compile("|".join([r"(.+/)?__pycache__/[^/]+\.pyc", *map(re.escape, sorted(names))]))


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that, once synced, replaces `folder` if the block succeeds, and else is removed.

    Files of the old folder that tvit did not write are moved to the new one. Remains of a killed process are first
    removed; an old folder that it had moved aside is restored.
    """
    work = folder.parent / f".{folder.name}.writing"
    new, old = work / "new", work / "old"
    if old.exists() and not folder.exists():
        old.rename(folder)
    _clean_up(work, folder)
    try:
        new.mkdir(parents=True)
        yield new
        for path in (*new.rglob("*"), new):
            if path.is_dir():
                sync_folder(path)
            else:
                with path.open("rb+") as file:
                    sync(file.fileno())
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        sync_folder(folder.parent)
    finally:
        _clean_up(work, folder)


def _clean_up(work: Path, folder: Path) -> None:
    """Removes the working folder of `replace_folder`; files that tvit did not write move to `folder` or stay."""
    if work.is_symlink():
        return
    new, old = work / "new", work / "old"
    if not new.is_symlink():
        shutil.rmtree(new, ignore_errors=True)
    with suppress(OSError):
        if old.is_symlink():
            old.unlink()
        elif old.exists() and folder.is_dir():
            own = own_files(old)
            move_files(old, folder, [n for n in foreign_files(old, own) if not os.path.lexists(folder / n)])
            remove_own(old, own)
        work.rmdir()


def _missing_file(path: Path) -> ModelError:
    return ModelError(f"{path}: this file of the model is missing. Copy the folder again, or train again.")
