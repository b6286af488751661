"""Sources of pretrained weights: a file, a local folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import Tensor

from tvit_cli.errors import ModelError, shorten
from tvit_cli.files import sha256
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
    tensor_mismatches,
)

PREPROCESSOR_FILE = "preprocessor_config.json"
INDEX_FILE = "model.safetensors.index.json"
SUFFIX = ".safetensors"
MERGED_FILE = "checkpoint_merged.safetensors"  # written by the reference implementation's training script
HUB_FILES = (CARD_FILE, CONFIG_FILE, PREPROCESSOR_FILE, WEIGHTS_FILE, INDEX_FILE, "model-*-of-*.safetensors")


@dataclass(frozen=True)
class WeightsSource:
    """Safetensors files, their folder (perhaps with a `config.json`), and the name that the user gave."""

    name: str
    folder: Path
    files: tuple[Path, ...]
    revision: str | None = None

    @property
    def is_model_folder(self) -> bool:
        """Whether a card of tvit describes them."""
        return (self.folder / CARD_FILE).is_file() and self.files == (self.folder / WEIGHTS_FILE,)

    @property
    def is_ours(self) -> bool:
        """Whether tvit reads them by their card: no config beside it describes them for another library."""
        return self.is_model_folder and "model_type" not in self.read_json(CONFIG_FILE)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weights file; of several, that of their hashes, one a line, in the order of names."""
        digests = [sha256(path) for path in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def read_json(self, file_name: str) -> dict[str, Any]:
        """The JSON object in a file of the folder, empty if the file does not exist. Raises ModelError."""
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
        """All stored tensors by name, memory-mapped. Raises ModelError."""
        tensors: dict[str, Tensor] = {}
        for path in self.files:
            found = read_tensors(path)
            if twice := found.keys() & tensors.keys():
                raise ModelError(f"{self.name}: {min(twice)} is stored twice. Fetch the weights again.")
            tensors |= found
        return tensors


def resolve_weights(name: str) -> WeightsSource:
    """The weights called `name`: a safetensors file, a local folder, or a Hugging Face repository.

    A local folder may be a model folder of tvit or a run. A repository is taken from the cache or the hub; a name
    that ends in .safetensors is always a file. Raises ModelError for a name that is none of them, for a repository
    that is neither cached nor reachable, for a folder without config or safetensors, and for a pickle.
    """
    path = Path(name).expanduser()
    try:
        exists = path.exists()
    except OSError:  # the name is too long for a file
        exists = False
    if not exists and path.suffix == SUFFIX:
        raise ModelError(f"{name}: no such file. Check the path.")
    if not exists:
        folder = _fetch(name)
        return WeightsSource(name, folder, _weights_files(name, folder), revision=folder.name)
    if path.is_dir():
        is_run = (path / MODEL_FOLDER / CARD_FILE).is_file() and not (path / CONFIG_FILE).is_file()
        path = path / MODEL_FOLDER if is_run else path
        return WeightsSource(name, path, _weights_files(name, path))
    if path.suffix != SUFFIX:
        raise ModelError(f"{name}: not a {SUFFIX} file. {_how_to_convert(str(path.parent))}")
    return WeightsSource(name, path.parent, (path,))


def find_weights(path: Path, working_directory: Path) -> WeightsSource | None:
    """The weights at a path or under a name on the hub; None if neither is likely.

    A file counts as weights, a folder by its config.json or checkpoint_merged.safetensors, and OWNER/NAME as a name
    on the hub unless a folder OWNER exists or would be the working directory. Raises ModelError as
    `resolve_weights` does.
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
    """Name of weights in results: OWNER--NAME on the hub, else that of the folder or file.

    Merged weights, whose file name is always the same, are <experiment>--<checkpoints> after their folders.
    """
    if source.revision is not None:
        return source.name.replace("/", "--")
    folder = source.folder.resolve()
    if source.files[0].name == MERGED_FILE:
        return "--".join(folder.parts[1:][-2:])
    return folder.name if given.is_dir() or given.name == WEIGHTS_FILE else given.stem


def _fetch(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except HFValidationError as error:
        raise ModelError(f"{name}: no such folder, and not a valid name of a hub repository.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name}: no such folder, and no such public repository on the Hugging Face hub. Check the "
            "spelling; for a private or gated one log in: hf auth login"
        ) from error
    except LocalEntryNotFoundError as error:
        paths = [
            path for path in Path(constants.HF_HUB_CACHE).glob("models--*") if any(path.glob("snapshots/*"))
        ]
        cached = sorted(path.name.removeprefix("models--").replace("--", "/", 1) for path in paths)
        raise ModelError(
            f"{name}: no such folder, not in the Hugging Face cache, and the hub cannot be reached. Connect once "
            f"to fetch it, or name a folder with {CONFIG_FILE}, {PREPROCESSOR_FILE} and {WEIGHTS_FILE}. The cache "
            + (f"holds {shorten(cached)}." if cached else f"({constants.HF_HUB_CACHE}) holds no models.")
        ) from error
    except Exception as error:  # the hub's HTTP client, and so its errors, differ between hub versions
        raise ModelError(
            f"{name}: cannot be fetched from the Hugging Face hub ({error}). Try again."
        ) from error


def _weights_files(name: str, folder: Path) -> tuple[Path, ...]:
    if (folder / SETTINGS_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(f"{name}: a run without a model, which is written at its end. Name another.")
    if not any((folder / file_name).is_file() for file_name in (CONFIG_FILE, CARD_FILE)):
        if runs := sorted(path.parent.parent.name for path in folder.glob(f"*/{MODEL_FOLDER}/{CARD_FILE}")):
            raise ModelError(f"{name}: a folder of runs ({shorten(runs)}). Name one of them.")
        raise ModelError(f"{name}: {CONFIG_FILE} is missing. Copy it from the source of the weights.")
    if not (folder / INDEX_FILE).is_file():
        files: tuple[Path, ...] = (folder / WEIGHTS_FILE,)
        next_step = _how_to_convert(name)
    else:
        files, next_step = _shards(name, folder), f"{INDEX_FILE} lists them; fetch them."
    if absent := [path.name for path in files if not path.is_file()]:
        if (folder / PARITY_FILE).is_file():
            raise export_not_loadable(name)
        raise ModelError(f"{name}: {shorten(absent)} missing. {next_step}")
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
    target = PurePath(name).name + "-safetensors"
    return (
        "Convert a pickle (.bin) once, in Python: from transformers import AutoModel; "
        f"AutoModel.from_pretrained({name!r}).save_pretrained({target!r})"
    )


def check_match(source: WeightsSource, saved: Mapping[str, Tensor], own: Mapping[str, Tensor | None]) -> None:
    """Raises ModelError unless names and shapes are those of `own`, where None stands for any shape."""
    if problems := tensor_mismatches(saved, own):
        config_file = CARD_FILE if source.is_ours else CONFIG_FILE
        raise ModelError(
            f"{source.name}: {problems}. The weights do not fit the network in their {config_file}: fetch both, "
            "or use a plain ViT."
        )


def check_tensor(source: WeightsSource, name: str, tensor: Tensor) -> Tensor:
    """The tensor. Raises ModelError where it is quantised or not finite."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ModelError(f"{source.name}: {name} is {tensor.dtype}. Use weights that are not quantised.")
    if not is_finite(tensor):
        raise ModelError(f"{source.name}: {name} holds NaN or infinite numbers. Fetch the weights again.")
    return tensor
