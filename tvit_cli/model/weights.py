"""Where pretrained weights lie: a file, a local folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import Tensor

from tvit_cli.errors import ModelError
from tvit_cli.model.folder import (
    CARD_FILE,
    CONFIG_FILE,
    MODEL_FOLDER,
    PARITY_FILE,
    SETTINGS_FILE,
    WEIGHTS_FILE,
    export_not_loadable,
    is_finite,
    read_tensors,
    sha256,
)

PREPROCESSOR_FILE = "preprocessor_config.json"
INDEX_FILE = "model.safetensors.index.json"
SUFFIX = ".safetensors"
MERGED_FILE = "checkpoint_merged.safetensors"  # what the reference implementation's training script leaves
HUB_FILES = (CARD_FILE, CONFIG_FILE, PREPROCESSOR_FILE, WEIGHTS_FILE, INDEX_FILE, "model-*-of-*.safetensors")


@dataclass(frozen=True)
class WeightsSource:
    """Safetensors, the folder that they and perhaps their `config.json` lie in, and where they came from."""

    name: str
    folder: Path
    files: tuple[Path, ...]
    revision: str | None = None

    @property
    def is_model_folder(self) -> bool:
        """Whether they are those that a card of tvit lies beside."""
        return (self.folder / CARD_FILE).is_file() and self.files == (self.folder / WEIGHTS_FILE,)

    @property
    def is_ours(self) -> bool:
        """Whether tvit reads them by their card: no config beside it says that they are another library's."""
        return self.is_model_folder and "model_type" not in self.read_json(CONFIG_FILE)

    @property
    def config_file(self) -> str:
        """The file that says what the network is."""
        return CARD_FILE if self.is_ours else CONFIG_FILE

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights file; of several, that of their hashes, one a line, in the order of names."""
        digests = [sha256(path) for path in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def read_json(self, file_name: str) -> dict[str, Any]:
        """The JSON object in a file of the folder, empty where there is no file. Raises ModelError."""
        if not (self.folder / file_name).is_file():
            return {}
        try:
            values = json.loads((self.folder / file_name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:  # the last: JSON nested too deep
            raise ModelError(f"{self.name}: {file_name} cannot be read ({error}). Fetch it again.") from error
        if not isinstance(values, dict):
            raise ModelError(f"{self.name}: {file_name} holds no JSON object. Fetch it again.")
        return values

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All stored tensors by name; they are mapped from the files, not read. Raises ModelError."""
        tensors: dict[str, Tensor] = {}
        for path in self.files:
            found = read_tensors(path)
            if twice := found.keys() & tensors.keys():
                raise ModelError(f"{self.name}: {min(twice)} is stored twice. Fetch the weights again.")
            tensors |= found
        return tensors


def resolve_weights(name: str) -> WeightsSource:
    """The weights called `name`: a safetensors file, a local folder, or a Hugging Face repository.

    A local folder may be a model folder of tvit, or the folder of a run that holds one. A repository is taken from
    the cache or the hub; a name that ends in .safetensors is never one. Raises ModelError when there is neither,
    when there is no network and nothing cached, when a folder holds no config or no safetensors, and for a pickle.
    """
    path = Path(name).expanduser()
    if _is_there(path):
        if path.is_dir():
            is_run = (path / MODEL_FOLDER / CARD_FILE).is_file() and not (path / CONFIG_FILE).is_file()
            path = path / MODEL_FOLDER if is_run else path
            return WeightsSource(name, path, _weights_files(name, path))
        if path.suffix != SUFFIX:
            raise ModelError(
                f"{name}: this is a file, and no .safetensors. Name one, or the folder that holds it. "
                f"{_how_to_convert(str(path.parent))}"
            )
        return WeightsSource(name, path.parent, (path,))
    if path.suffix == SUFFIX:
        raise ModelError(f"{name}: no such file. Check the path.")
    folder = _fetch(name)
    return WeightsSource(name, folder, _weights_files(name, folder), revision=folder.name)


def find_weights(path: Path, working_directory: Path) -> WeightsSource | None:
    """The weights that a path or a name on the hub stands for; None where nothing speaks for weights.

    A file is taken for weights, a folder by its config.json or its checkpoint_merged.safetensors, and OWNER/NAME
    for a name on the hub where there is no folder OWNER, and the working directory would not be one. Raises
    ModelError as `resolve_weights` does.
    """
    if path.is_dir():
        published = (path / WEIGHTS_FILE).is_file() or (path / INDEX_FILE).is_file()
        if (path / MERGED_FILE).is_file() and not published:
            return resolve_weights(str(path / MERGED_FILE))
        return resolve_weights(str(path)) if (path / CONFIG_FILE).is_file() else None
    is_name = not path.is_absolute() and len(path.parts) == 2 and not path.parent.exists()
    is_local = path.is_file() or path.suffix == SUFFIX
    is_run = working_directory.absolute().is_relative_to(path.parent.absolute())
    return resolve_weights(path.as_posix()) if is_local or (is_name and not is_run) else None


def weights_name(given: Path, source: WeightsSource) -> str:
    """What weights are called: OWNER--NAME on the hub, a folder or a file by its name.

    Merged weights all bear one name, and lie in <experiment>/<checkpoints>/: they are called by both.
    """
    if source.revision is not None:
        return source.name.replace("/", "--")
    folder = source.folder.resolve()
    if source.files[0].name == MERGED_FILE:
        return "--".join(folder.parts[1:][-2:])
    return folder.name if given.is_dir() or given.name == WEIGHTS_FILE else given.stem


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for a file
        return False


def _fetch(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except HFValidationError as error:
        raise ModelError(f"{name}: no such folder, and no name that a hub repository can have.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name}: no such folder, and no such public repository on the Hugging Face hub. Check the "
            "spelling; for a private or gated one log in: hf auth login"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{name}: no such folder, not in the Hugging Face cache, and the hub cannot be reached. Connect "
            f"once to fetch it, or copy its {CONFIG_FILE}, {PREPROCESSOR_FILE} and {WEIGHTS_FILE} into a folder "
            f"and name that. "
            f"{_what_is_cached()}"
        ) from error
    except Exception as error:  # the hub's HTTP client, and so its errors, differ between hub versions
        raise ModelError(
            f"{name}: cannot be fetched from the Hugging Face hub ({error}). Try again."
        ) from error


def _what_is_cached() -> str:
    repositories = Path(constants.HF_HUB_CACHE).glob("models--*")
    names = sorted(path.name for path in repositories if any(path.glob("snapshots/*")))
    shown = listed([name.removeprefix("models--").replace("--", "/", 1) for name in names])
    return f"The cache holds {shown}." if shown else f"The cache, {constants.HF_HUB_CACHE}, holds no models."


def _weights_files(name: str, folder: Path) -> tuple[Path, ...]:
    if (folder / SETTINGS_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(f"{name}: a run without a model; it is written when a training ends. Name another.")
    if not any((folder / file_name).is_file() for file_name in (CONFIG_FILE, CARD_FILE)):
        if runs := sorted(path.parent.parent.name for path in folder.glob(f"*/{MODEL_FOLDER}/{CARD_FILE}")):
            raise ModelError(f"{name}: a folder of runs ({listed(runs)}). Name one of them.")
        raise ModelError(
            f"{name}: {CONFIG_FILE} is missing (and {CARD_FILE}, which a model folder of tvit has). Copy it from "
            "where the weights came from."
        )
    files = _shards(name, folder) if (folder / INDEX_FILE).is_file() else (folder / WEIGHTS_FILE,)
    absent = [path.name for path in files if not path.is_file()]
    if absent and (folder / PARITY_FILE).is_file():
        raise export_not_loadable(name)
    if absent and (folder / INDEX_FILE).is_file():
        raise ModelError(
            f"{name}: {listed(absent)} missing, of the files that {INDEX_FILE} names. Fetch them."
        )
    if absent:
        raise ModelError(f"{name}: {listed(absent)} missing. {_how_to_convert(name)}")
    return files


def _shards(name: str, folder: Path) -> tuple[Path, ...]:
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        shards = sorted({str(shard) for shard in index["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{name}: {INDEX_FILE} is no index of safetensors. Fetch it again.") from error
    for shard in shards:
        if PurePath(shard).name != shard or "\\" in shard:
            raise ModelError(f"{name}: {INDEX_FILE} names {shard!r}, which is no file of this folder.")
    return tuple(folder / shard for shard in shards)


def _how_to_convert(name: str) -> str:
    return (
        "If the weights are a pickle (.bin), which can run code when opened, convert them once, in Python: from "
        f"transformers import AutoModel; AutoModel.from_pretrained({name!r}).save_pretrained("
        f"{PurePath(name).name + '-safetensors'!r})"
    )


def listed(names: list[str]) -> str:
    """The first four names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def check_names(source: WeightsSource, stored: Iterable[str], expected: Iterable[str]) -> None:
    """Raises ModelError for tensors that are left over or missing."""
    left_over, missing = sorted(set(stored) - set(expected)), sorted(set(expected) - set(stored))
    if left_over:
        raise ModelError(
            f"{source.name}: no place for {listed(left_over)}. The weights are of another network than "
            f"their {source.config_file} says; use a plain ViT."
        )
    if missing:
        raise ModelError(
            f"{source.name}: {listed(missing)} missing from the weights. They are incomplete, or of another "
            f"network than their {source.config_file} says; fetch both again."
        )


def check_tensor(source: WeightsSource, name: str, tensor: Tensor) -> Tensor:
    """The tensor. Raises ModelError where it is quantised or not finite."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ModelError(
            f"{source.name}: {name} is {tensor.dtype}. Quantised weights are not read; use floats."
        )
    if not is_finite(tensor):
        raise ModelError(f"{source.name}: {name} holds NaN or infinite numbers. Fetch the weights again.")
    return tensor
