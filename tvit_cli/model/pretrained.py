"""Pretrained image weights, read into the temporal ViT under our names."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tvit_cli.errors import ModelError
from tvit_cli.model.vit import TemporalViT, ViTConfig
from tvit_cli.settings.card import IMAGENET_MEAN, IMAGENET_STD

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HUB_FILES = (CONFIG_FILE, PREPROCESSOR_FILE, WEIGHTS_FILE, INDEX_FILE, "model-*-of-*.safetensors")
POSITIONS = "positions"  # one (1, 1 + P, D) tensor: the class token's position, then those of the patches
NETWORK = ("width", "depth", "num_heads", "mlp_width", "patch_size", "norm_eps", "activation", "qkv_bias")

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class WeightsSource:
    """A folder that holds `config.json` and safetensors, and where it came from."""

    name: str
    folder: Path
    files: tuple[Path, ...]
    revision: str | None = None

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights file; of several, that of their hashes, one a line, in the order of names."""
        digests = []
        for path in self.files:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


@dataclass(frozen=True)
class PretrainedConfig:
    """What the files of the weights say about their network and the pictures it expects."""

    name: str
    revision: str | None
    sha256: str
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    patch_size: int
    image_size: int
    norm_eps: float
    activation: str
    qkv_bias: bool
    mean: Channels
    std: Channels
    notes: tuple[str, ...] = ()

    def vit_config(
        self, *, num_classes: int, n_frames: int, frame_size: int | None = None, tubelet_size: int = 1
    ) -> ViTConfig:
        """The temporal ViT that takes these weights, at their own frame size when none is given.

        Raises ValueError where the numbers do not fit each other.
        """
        return ViTConfig(
            num_classes=num_classes,
            frame_size=frame_size or self.image_size,
            n_frames=n_frames,
            tubelet_size=tubelet_size,
            **{key: getattr(self, key) for key in NETWORK},
        )


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors: how many matched, which are new (ours alone) or unused (theirs alone)."""

    matched: int
    new: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Reader:
    """How one family writes its config and its weights.

    `defaults` are the config's values where the file leaves them out. `names(depth)` maps the family's tensor
    names, less `prefix`, to ours. `unused` are tensors that the family may hold beside its backbone.
    """

    defaults: Mapping[str, Any]
    prefix: str
    names: Callable[[int], dict[str, str]]
    unused: frozenset[str]


def resolve_weights(name: str) -> WeightsSource:
    """The weights called `name`: a local folder, or a Hugging Face repository, from the cache or the hub.

    Raises ModelError when there is neither, when there is no network and nothing cached, and when the folder
    holds no config or no safetensors.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return WeightsSource(name, folder, _weights_files(name, folder))
    if folder.exists():
        raise ModelError(f"{name}: this is a file. Name the folder that holds it beside its {CONFIG_FILE}.")
    folder = _fetch(name)
    return WeightsSource(name, folder, _weights_files(name, folder), revision=folder.name)


def read_config(source: WeightsSource) -> PretrainedConfig:
    """The network and the normalisation that the weights were trained with.

    Raises ModelError for a family that tvit does not read and for a value that it cannot use.
    """
    raw = {**_reader(source).defaults, **_read_json(source, CONFIG_FILE)}
    if raw["num_channels"] != 3:
        raise ModelError(f"{source.name}: num_channels is {raw['num_channels']!r}; frames of a video have 3.")
    activation = ACTIVATIONS.get(str(raw["hidden_act"]))
    if activation is None:
        known = ", ".join(ACTIVATIONS)
        raise ModelError(f"{source.name}: hidden_act is {raw['hidden_act']!r}; tvit knows {known}.")
    norm_eps = raw["layer_norm_eps"]
    if not isinstance(norm_eps, float | int) or norm_eps <= 0:
        raise ModelError(f"{source.name}: layer_norm_eps is {norm_eps!r}; it must be a number above 0.")
    mean, std, notes = _normalisation(source)
    return PretrainedConfig(
        name=source.name,
        revision=source.revision,
        sha256=source.sha256,
        width=_whole_number(source, raw, "hidden_size"),
        depth=_whole_number(source, raw, "num_hidden_layers"),
        num_heads=_whole_number(source, raw, "num_attention_heads"),
        mlp_width=_whole_number(source, raw, "intermediate_size"),
        patch_size=_whole_number(source, raw, "patch_size"),
        image_size=_whole_number(source, raw, "image_size"),
        norm_eps=float(norm_eps),
        activation=activation,
        qkv_bias=bool(raw["qkv_bias"]),
        mean=mean,
        std=std,
        notes=notes,
    )


@torch.no_grad()
def load_pretrained(model: TemporalViT, source: WeightsSource) -> LoadReport:
    """Copies the weights into the model, which at step 0 is then the image ViT.

    Positions are interpolated bicubically to the model's grid (align_corners False, as transformers does). A
    tubelet of several frames starts with the weights on its central frame and zeros on the others (ViViT's
    central-frame initialisation, arXiv:2103.15691). Raises ModelError for tensors that are missing, left
    over, stored twice, of the wrong shape or not finite.
    """
    config = read_config(source)
    for key in NETWORK:
        theirs, ours = getattr(config, key), getattr(model.config, key)
        if theirs != ours:
            raise ModelError(
                f"{source.name}: {key} is {theirs}, and {ours} in the model. Give both the same."
            )
    parameters = dict(model.named_parameters())
    reader = _reader(source)
    names = {
        theirs: ours
        for theirs, ours in reader.names(config.depth).items()
        if ours in parameters or ours == POSITIONS  # without qkv_bias, q, k and v have weights alone
    }
    stored = _read_tensors(source, reader.prefix)
    unused = tuple(name for name in stored if name in reader.unused)
    _check_names(source, set(stored) - reader.unused, names)

    filled = set()
    notes = dict.fromkeys(config.notes)  # a set that keeps its order
    for theirs, name in names.items():
        tensor = _checked(source, theirs, stored[theirs])
        if tensor.dtype != model.norm.weight.dtype:
            notes[f"weights converted from {tensor.dtype} to {model.norm.weight.dtype}"] = None
            tensor = tensor.to(model.norm.weight.dtype)
        for ours, value in _converted(source, name, tensor, model.config, notes).items():
            if value.shape != parameters[ours].shape:
                raise ModelError(
                    f"{source.name}: {theirs} has the shape {tuple(value.shape)}, not "
                    f"{tuple(parameters[ours].shape)} as its {CONFIG_FILE} says. Fetch both files again."
                )
            parameters[ours].copy_(value)
            filled.add(ours)
    new = tuple(name for name in parameters if name not in filled)
    return LoadReport(len(names), new, unused, tuple(notes))


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
            f"once to fetch it, or copy its {CONFIG_FILE} and {WEIGHTS_FILE} into a folder and name that."
        ) from error
    except Exception as error:  # the hub's HTTP client, and so its errors, differ between hub versions
        raise ModelError(
            f"{name}: cannot be fetched from the Hugging Face hub ({error}). Try again."
        ) from error


def _weights_files(name: str, folder: Path) -> tuple[Path, ...]:
    if not (folder / CONFIG_FILE).is_file():
        raise ModelError(f"{name}: {CONFIG_FILE} is missing. Copy it from where the weights came from.")
    files = _shards(name, folder) if (folder / INDEX_FILE).is_file() else (folder / WEIGHTS_FILE,)
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise ModelError(
            f"{name}: {_listed(absent)} missing. If the weights are a pickle (.bin), which can run code when "
            "opened, convert them once, in Python: from transformers import AutoModel; "
            f"AutoModel.from_pretrained({name!r}).save_pretrained({PurePath(name).name + '-safetensors'!r})"
        )
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


def _read_json(source: WeightsSource, file_name: str) -> dict[str, Any]:
    try:
        values = json.loads((source.folder / file_name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last: JSON nested too deep
        raise ModelError(f"{source.name}: {file_name} cannot be read ({error}). Fetch it again.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{source.name}: {file_name} holds no JSON object. Fetch it again.")
    return values


def _reader(source: WeightsSource) -> Reader:
    model_type = _read_json(source, CONFIG_FILE).get("model_type")
    reader = READERS.get(str(model_type))
    if reader is None:
        known = ", ".join(READERS)
        raise ModelError(f"{source.name}: its model_type is {model_type!r}; tvit reads {known}.")
    return reader


def _whole_number(source: WeightsSource, raw: Mapping[str, Any], key: str) -> int:
    value = raw[key]
    if isinstance(value, list) and value and value.count(value[0]) == len(value):  # [224, 224]
        value = value[0]
    if type(value) is not int or value < 1:
        raise ModelError(f"{source.name}: {key} is {value!r}; it must be a whole number, 1 or more.")
    return value


def _normalisation(source: WeightsSource) -> tuple[Channels, Channels, tuple[str, ...]]:
    """Mean and std of the channels, in [0, 1], and what there is to say about them."""
    if not (source.folder / PREPROCESSOR_FILE).is_file():
        note = f"no {PREPROCESSOR_FILE}: frames are normalised with ImageNet's mean and std"
        return IMAGENET_MEAN, IMAGENET_STD, (note,)
    raw = _read_json(source, PREPROCESSOR_FILE)
    if raw.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), ()
    mean, std = raw.get("image_mean", IMAGENET_MEAN), raw.get("image_std", IMAGENET_STD)
    try:
        (red, green, blue), (red_std, green_std, blue_std) = map(float, mean), map(float, std)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{source.name}: image_mean {mean} and image_std {std} in {PREPROCESSOR_FILE} must be three "
            "numbers each. Fetch the file again."
        ) from error
    return (red, green, blue), (red_std, green_std, blue_std), ()


def _read_tensors(source: WeightsSource, prefix: str) -> dict[str, Tensor]:
    """All stored tensors by name, less the prefix; they are mapped from the files, not read."""
    tensors: dict[str, Tensor] = {}
    for path in source.files:
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path}: cannot be read ({error}). The file may be truncated; fetch it again."
            ) from error
        for stored_name, tensor in found.items():
            name = stored_name.removeprefix(prefix)
            if name in tensors:
                raise ModelError(f"{source.name}: {name} is stored twice. Fetch the weights again.")
            tensors[name] = tensor
    return tensors


def _check_names(source: WeightsSource, stored: Iterable[str], expected: Iterable[str]) -> None:
    left_over, missing = sorted(set(stored) - set(expected)), sorted(set(expected) - set(stored))
    if left_over:
        raise ModelError(
            f"{source.name}: no place for {_listed(left_over)}. The weights are of another network than "
            f"their {CONFIG_FILE} says; use a plain ViT."
        )
    if missing:
        raise ModelError(
            f"{source.name}: {_listed(missing)} missing from the weights. They are incomplete, or of another "
            f"network than their {CONFIG_FILE} says; fetch both again."
        )


def _checked(source: WeightsSource, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ModelError(
            f"{source.name}: {name} is {tensor.dtype}. Quantised weights are not read; use floats."
        )
    if not tensor.isfinite().all():
        raise ModelError(f"{source.name}: {name} holds NaN or infinite numbers. Fetch the weights again.")
    return tensor


def _converted(
    source: WeightsSource, name: str, tensor: Tensor, config: ViTConfig, notes: dict[str, None]
) -> dict[str, Tensor]:
    """One of their tensors as ours, by our names: positions are parted, patch weights put on one frame."""
    if name == "patch_embed.weight" and config.tubelet_size > 1:
        centre = config.tubelet_size // 2
        notes[f"patch embedding: on frame {centre + 1} of each tubelet of {config.tubelet_size}"] = None
        frames = [torch.zeros_like(tensor)] * config.tubelet_size
        frames[centre] = tensor
        return {name: torch.cat(frames, dim=1)}  # (D, t*C, p, p)
    if name != POSITIONS:
        return {name: tensor}
    grid = math.isqrt(max(tensor.numel() // config.width - 1, 0))
    if grid == 0 or tensor.shape != (1, 1 + grid**2, config.width):
        raise ModelError(
            f"{source.name}: positions of the shape {tuple(tensor.shape)} are no square grid. "
            "Use a ViT of square pictures with a class token."
        )
    class_position, spatial = tensor[:, :1], tensor[:, 1:]  # (1, 1, D), (1, P of the weights, D)
    if grid != config.grid:
        notes[f"positions interpolated from {grid} x {grid} to {config.grid} x {config.grid} patches"] = None
        picture = spatial.transpose(1, 2).reshape(1, config.width, grid, grid)
        picture = F.interpolate(picture, size=(config.grid, config.grid), mode="bicubic", align_corners=False)
        spatial = picture.flatten(2).transpose(1, 2)  # (1, P, D)
    return {"positions.class_position": class_position, "positions.spatial": spatial}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _hugging_face_vit_names(depth: int) -> dict[str, str]:
    modules = {"embeddings.patch_embeddings.projection": "patch_embed", "layernorm": "norm"}
    for index in range(depth):
        layer, block = f"encoder.layer.{index}", f"blocks.{index}"
        modules |= {
            f"{layer}.layernorm_before": f"{block}.norm1",
            f"{layer}.attention.attention.query": f"{block}.attention.q",
            f"{layer}.attention.attention.key": f"{block}.attention.k",
            f"{layer}.attention.attention.value": f"{block}.attention.v",
            f"{layer}.attention.output.dense": f"{block}.attention.proj",
            f"{layer}.layernorm_after": f"{block}.norm2",
            f"{layer}.intermediate.dense": f"{block}.mlp.fc1",
            f"{layer}.output.dense": f"{block}.mlp.fc2",
        }
    names = {"embeddings.cls_token": "positions.class_token", "embeddings.position_embeddings": POSITIONS}
    for theirs, ours in modules.items():
        names |= {f"{theirs}.weight": f"{ours}.weight", f"{theirs}.bias": f"{ours}.bias"}
    return names


ACTIVATIONS = {  # Hugging Face's name -> ours
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
READERS: dict[str, Reader] = {  # by the model_type in config.json
    "vit": Reader(
        defaults={  # those of transformers.ViTConfig
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "image_size": 224,
            "patch_size": 16,
            "num_channels": 3,
            "qkv_bias": True,
        },
        prefix="vit.",
        names=_hugging_face_vit_names,
        unused=frozenset(
            {
                "embeddings.mask_token",
                *(f"{module}.weight" for module in ("pooler.dense", "classifier", "decoder.0", "lm_head")),
                *(f"{module}.bias" for module in ("pooler.dense", "classifier", "decoder.0", "lm_head")),
            }
        ),
    ),
}
