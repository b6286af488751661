"""Sources of pretrained weights: a file, a local folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor

from tvit_cli.errors import ModelError, shorten
from tvit_cli.files import sha256
from tvit_cli.model import folder as model_folder
from tvit_cli.model.folder import CARD_FILE, CONFIG_FILE, MODEL_FOLDER, PARITY_FILE, WEIGHTS_FILE

PREPROCESSOR_FILE = "preprocessor_config.json"
INDEX_FILE = "model.safetensors.index.json"
SUFFIX = ".safetensors"
MOST_LICENCE = 80  # characters
MOST_REQUESTS = 20  # pull requests of a repository that are searched for safetensors
MERGED_FILE = "checkpoint_merged.safetensors"  # written by the reference implementation's training script
VIDEO_PREPROCESSOR_FILE = "video_preprocessor_config.json"
PREPROCESSORS = (PREPROCESSOR_FILE, VIDEO_PREPROCESSOR_FILE)
README_FILE = "README.md"  # a hub repository's page, which begins with its licence
HUB_FILES = (
    README_FILE,
    CARD_FILE,
    CONFIG_FILE,
    *PREPROCESSORS,
    WEIGHTS_FILE,
    INDEX_FILE,
    "model-*-of-*.safetensors",
)


@dataclass(frozen=True)
class WeightsSource:
    """Safetensors files, their folder (perhaps with a `config.json`), and the name that the user gave."""

    name: str
    folder: Path
    files: tuple[Path, ...]
    revision: str | None = None

    def error(self, problem: str) -> ModelError:
        """An error about these weights, which begins with their name."""
        return ModelError(f"{self.name}: {problem}")

    @property
    def is_model_folder(self) -> bool:
        """Whether a card of tvit describes them."""
        return (self.folder / CARD_FILE).is_file() and self.files == (self.folder / WEIGHTS_FILE,)

    @property
    def is_ours(self) -> bool:
        """Whether tvit reads them by their card: no config beside it describes them for another library."""
        return self.is_model_folder and "model_type" not in self.read_json(CONFIG_FILE)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Classes on the card of a model that tvit trained. Raises ModelError."""
        return model_folder.load_card(self.folder).labels

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weights file; of several, that of their hashes, one a line, in the order of names."""
        digests = [sha256(path) for path in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    @cached_property
    def licence(self) -> str | None:
        """Licence in the metadata of the repository's README.md, None where none is given. cc-by-nc-4.0

        A licence that the hub has no name for is given by its `license_name`: other (dinov3-license)
        """
        try:
            lines = (self.folder / README_FILE).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return None
        header = itertools.takewhile(lambda line: line != "---", lines[1:] if lines[:1] == ["---"] else [])
        given = {key: value.strip() for key, _, value in (line.partition(":") for line in header)}
        licence, own = given.get("license", ""), given.get("license_name")
        return (f"other ({own})" if licence == "other" and own else licence)[:MOST_LICENCE] or None

    def read_json(self, file_name: str) -> dict[str, Any]:
        """The JSON object in a file of the folder, empty if the file does not exist. Raises ModelError."""
        if not (self.folder / file_name).is_file():
            return {}
        try:
            values = json.loads((self.folder / file_name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:  # the last: JSON nested too deep
            raise self.error(f"{file_name} cannot be read ({error}). Fetch it again.") from error
        if not isinstance(values, dict):
            raise self.error(f"{file_name} holds no JSON object. Fetch it again.")
        return values

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All stored tensors by name, memory-mapped. Raises ModelError."""
        tensors: dict[str, Tensor] = {}
        for path in self.files:
            found = model_folder.read_tensors(path)
            if twice := found.keys() & tensors.keys():
                raise self.error(f"{min(twice)} is stored twice. Fetch the weights again.")
            tensors |= found
        return tensors


def resolve_weights(name: str) -> WeightsSource:
    """The weights called `name`: a safetensors file, a local folder, or a Hugging Face repository.

    A local folder may be a model folder of tvit or a run. A repository is taken from the cache or the hub, at the
    revision of NAME@REVISION; a name that ends in .safetensors is always a file. Raises ModelError for a name that
    is none of them, for a repository that is neither cached nor reachable, for a folder without config or
    safetensors, and for a pickle.
    """
    path, exists = Path(name).expanduser(), False
    with suppress(OSError):  # the name is too long for a file
        exists = path.exists()
    if not exists:
        if path.suffix == SUFFIX:
            raise ModelError(f"{name}: no such file. Check the path.")
        folder = _fetch(name)
        try:
            return WeightsSource(name, folder, _weights_files(name, folder), revision=folder.name)
        except ModelError as error:
            raise ModelError(f"{error}{_converted_revision(name)}") from error
    if path.is_dir():
        is_run = (path / MODEL_FOLDER / CARD_FILE).is_file() and not (path / CONFIG_FILE).is_file()
        path = path / MODEL_FOLDER if is_run else path
        return WeightsSource(name, path, _weights_files(name, path))
    if path.suffix != SUFFIX:
        raise ModelError(f"{name}: not a {SUFFIX} file. {_how_to_convert(str(path.parent))}")
    return WeightsSource(name, path.parent, (path,))


def peek_config(name: str) -> dict[str, Any]:
    """The config.json of weights (of a repository without the weights), or the `model` of tvit's card.

    Empty where neither can be read.
    """
    path = Path(name).expanduser()
    try:
        if not path.exists() and path.suffix != SUFFIX:
            repository, _, revision = name.partition("@")
            path = Path(hf_hub_download(repository, CONFIG_FILE, revision=revision or None)).parent
        source = WeightsSource(name, path if path.is_dir() else path.parent, ())
        folders = (source.folder, source.folder / MODEL_FOLDER)
        cards = [folder for folder in folders if (folder / CARD_FILE).is_file()]
        config = source.read_json(CONFIG_FILE)
        return (
            dict(replace(source, folder=cards[0]).read_json(CARD_FILE)["model"])
            if cards and not config
            else config
        )
    except Exception:  # noqa: BLE001  (the hub's HTTP client, and so its errors, differ between hub versions)
        return {}


def find_weights(path: Path, working_directory: Path) -> WeightsSource | None:
    """The weights at a path or under a name on the hub; None if neither is likely.

    A file counts as weights, a folder by its config.json or checkpoint_merged.safetensors, OWNER/NAME as a hub name
    unless a folder OWNER exists or would be the working directory. Raises ModelError as `resolve_weights` does.
    """
    if path.is_dir():
        published = (path / WEIGHTS_FILE).is_file() or (path / INDEX_FILE).is_file()
        if (path / MERGED_FILE).is_file() and not published:
            return resolve_weights(str(path / MERGED_FILE))
        return resolve_weights(str(path)) if (path / CONFIG_FILE).is_file() else None
    repository = Path(path.as_posix().partition("@")[0])
    is_name = not path.is_absolute() and len(repository.parts) == 2 and not repository.parent.exists()
    is_local = path.is_file() or path.suffix == SUFFIX
    is_run = working_directory.absolute().is_relative_to(repository.parent.absolute())
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
        repository, _, revision = name.partition("@")
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(HUB_FILES)))
    except HFValidationError as error:
        raise ModelError(f"{name}: no such folder, and not a valid name of a hub repository.") from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{name}: the hub's repository has no such revision. Check what follows the @."
        ) from error
    except GatedRepoError as error:
        terms = f"https://huggingface.co/{repository}"
        raise ModelError(f"{name}: gated. Accept its terms at {terms}, then run: hf auth login") from error
    except RepositoryNotFoundError as error:
        problem = f"{name}: no such folder, and no such public repository on the Hugging Face hub"
        raise ModelError(f"{problem}. Check the name; for a private one: hf auth login") from error
    except LocalEntryNotFoundError as error:
        paths = {path.parents[1] for path in Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*")}
        cached = sorted(path.name.removeprefix("models--").replace("--", "/", 1) for path in paths)
        models = f"holds {shorten(cached)}" if cached else f"({constants.HF_HUB_CACHE}) holds no models"
        raise ModelError(
            f"{name}: no such folder, not in the Hugging Face cache, and the hub cannot be reached. Connect once "
            f"to fetch it, or name a folder with {CONFIG_FILE}, {PREPROCESSOR_FILE} and {WEIGHTS_FILE}. The cache "
            f"{models}."
        ) from error
    except Exception as error:  # the hub's HTTP client, and so its errors, differ between hub versions
        problem = f"cannot be fetched from the Hugging Face hub ({error})"
        raise ModelError(f"{name}: {problem}. Try again.") from error


def _converted_revision(name: str) -> str:
    """A sentence that names a pull request of the repository with safetensors; empty without one."""
    repository, api = name.partition("@")[0], HfApi()
    try:
        requests = api.list_repo_refs(repository, include_pull_requests=True).pull_requests or []
        for request in requests[:MOST_REQUESTS]:
            if WEIGHTS_FILE in api.list_repo_files(repository, revision=request.ref):
                return f" Or name the revision that has safetensors: {repository}@{request.ref}"
    except Exception:  # noqa: BLE001  (the advice is beside the error: without the hub it is left out)
        return ""
    return ""


def _weights_files(name: str, folder: Path) -> tuple[Path, ...]:
    if (folder / model_folder.SETTINGS_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(f"{name}: a run without a model, which is written at its end. Name another.")
    if not any((folder / file_name).is_file() for file_name in (CONFIG_FILE, CARD_FILE)):
        if runs := sorted(path.parent.parent.name for path in folder.glob(f"*/{MODEL_FOLDER}/{CARD_FILE}")):
            raise ModelError(f"{name}: a folder of runs ({shorten(runs)}). Name one of them.")
        raise ModelError(f"{name}: {CONFIG_FILE} is missing. Copy it from the source of the weights.")
    has_index = (folder / INDEX_FILE).is_file()
    files = _shards(name, folder) if has_index else (folder / WEIGHTS_FILE,)
    if absent := [path.name for path in files if not path.is_file()]:
        if (folder / PARITY_FILE).is_file():
            raise model_folder.export_not_loadable(name)
        next_step = f"{INDEX_FILE} lists them; fetch them." if has_index else _how_to_convert(name)
        if not has_index and "auto_map" in WeightsSource(name, folder, ()).read_json(CONFIG_FILE):
            reason = "The network is remote code, which tvit does not run"
            next_step = f"{reason}. Name weights that it reads (docs/training.md)."
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
    call = f"AutoModel.from_pretrained({name!r}).save_pretrained({PurePath(name).name + '-safetensors'!r})"
    return f"Convert a pickle (.bin) once, in Python: from transformers import AutoModel; {call}"


def check_match(source: WeightsSource, saved: Mapping[str, Tensor], own: Mapping[str, Tensor | None]) -> None:
    """Raises ModelError unless names and shapes are those of `own`, where None stands for any shape."""
    if problems := model_folder.tensor_mismatches(saved, own):
        config_file = CARD_FILE if source.is_ours else CONFIG_FILE
        raise source.error(
            f"{problems}. The weights do not fit their {config_file}: fetch both, or use a plain ViT."
        )


def check_tensor(source: WeightsSource, name: str, tensor: Tensor) -> Tensor:
    """The tensor. Raises ModelError where it is quantised or not finite."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise source.error(f"{name} is {tensor.dtype}. Use weights that are not quantised.")
    if not model_folder.is_finite(tensor):
        raise source.error(f"{name} holds NaN or infinite numbers. Fetch the weights again.")
    return tensor
