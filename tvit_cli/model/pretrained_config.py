"""Configs of pretrained weights: network, own clips and normalisation, read from the files beside the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from tvit_cli.model import families
from tvit_cli.model.families import FAMILIES, TIMM, VIDEO, Channels, Config, Family
from tvit_cli.model.folder import CARD_FILE, CONFIG_FILE, empty_model, export_not_loadable, load_config
from tvit_cli.model.weights import (
    PREPROCESSOR_FILE,
    VIDEO_PREPROCESSOR_FILE,
    WeightsSource,
    check_match,
    peek_config,
)
from tvit_cli.portable.config import POOLS, ViTConfig
from tvit_cli.settings.card import IMAGENET_MEAN

ACTIVATIONS = {  # Hugging Face's name -> ours
    **{name: name for name in ("gelu", "quick_gelu", "relu", "silu", "swiglu")},
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh"),
}
SIZES = {  # field of ViTConfig -> key of Hugging Face's config
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "patch_size": "patch_size",
    "extra_tokens": "extra_tokens",
}
NETWORK = (*SIZES, "norm_eps", "activation", "qkv_bias", "pre_norm", *VIDEO)  # fields that the weights fix
_DEFAULTS = {item.name: item.default for item in fields(ViTConfig)}
QUERY = "pooler.query_tokens"  # of V-JEPA 2's attentive pooler


@dataclass(frozen=True)
class PretrainedConfig:
    """Network of pretrained weights, and the size and normalisation of its input."""

    name: str
    revision: str | None
    sha256: str
    image_size: int
    network: dict[str, Any]  # the fields of NETWORK
    mean: Channels
    std: Channels
    notes: tuple[str, ...] = ()
    licence: str | None = None
    clip: dict[str, Any] = field(default_factory=dict)  # of a video ViT: its own n_frames and tubelet_size
    pool_depth: int | None = None  # of the attentive pooler that the weights bring
    clip_seconds: float | None = None  # of a video that a clip showed in the weights' training, where known

    @property
    def n_tokens(self) -> int:
        """Patches of a video ViT's own clips, T'*P."""
        times = self.clip["n_frames"] // self.clip["tubelet_size"]
        return int(times * (self.image_size // self.network["patch_size"]) ** 2)

    def vit_config(self, *, frame_size: int | None = None, **shape: Any) -> ViTConfig:
        """Config for these weights, by default at their frame size; `shape`: other fields. Raises ValueError."""
        size = self.clip.get("tubelet_size")
        if size is not None and (given := shape.get("tubelet_size", size)) != size:
            raise ValueError(f"tubelet_size {given}: the weights have tubelets of {size} frames; use {size}")
        own = {"frame_size": frame_size or self.image_size, "pool": own_pool(self.network), **self.clip}
        values = {**own, **shape, **self.network}
        if values["pool"] == "attentive" and self.pool_depth is not None:
            values["pool_depth"] = self.pool_depth
        return ViTConfig(**values)


def read_config(source: WeightsSource) -> PretrainedConfig:
    """Network and normalisation that the weights were trained with.

    Raises ModelError for an unsupported family, for invalid values, and for weights that a card does not belong to.
    """
    origin = (source.name, source.revision, source.sha256)
    if source.is_ours:
        card, config = load_config(source.folder)
        if source.sha256 != card.weights_sha256:
            raise source.error("the weights are not those of the card beside them. Copy both again.")
        own = empty_model(source.folder / CARD_FILE, config, source.tensors).state_dict()
        check_match(source, source.tensors, own)  # before a network of these sizes is built
        network = {key: getattr(config, key) for key in NETWORK}
        mean, std = card.preprocessing.mean, card.preprocessing.std
        licence = None if card.base is None else card.base.licence
        size, depth = config.frame_size, config.pool_depth
        return PretrainedConfig(*origin, size, network, mean, std, licence=licence, pool_depth=depth)
    family, stored = read_family(source)
    raw = family.config(source.read_json(CONFIG_FILE), stored)
    if family is FAMILIES[TIMM] and raw["num_attention_heads"] is None:
        raise source.error(
            f"the number of attention heads is not known for width {raw['hidden_size']}. Give it in "
            f'{CONFIG_FILE} beside the weights, as in "model_args": {{"num_heads": 8}}.'
        )
    if raw["num_channels"] != 3:
        raise source.error(f"num_channels is {raw['num_channels']!r}; frames of a video have 3.")
    if (activation := str(raw["hidden_act"])) not in ACTIVATIONS:
        raise source.error(f"hidden_act is {raw['hidden_act']!r}; tvit supports {', '.join(ACTIVATIONS)}.")
    if refused := [key for key, value in family.required.items() if raw.get(key, value) != value]:
        raise source.error(
            f"{refused[0]} is {raw[refused[0]]!r}, which tvit does not support. Use other weights."
        )
    norm_eps = raw["layer_norm_eps"]
    if not isinstance(norm_eps, float | int) or norm_eps <= 0:
        raise source.error(f"layer_norm_eps is {norm_eps!r}; it must be a number above 0.")
    mean, std, notes = _normalisation(source, family)

    def number(key: str, *, least: int = 1) -> int:
        name = family.keys.get(key, key)
        return whole_number(
            source, raw, key, name=f"{family.section}.{name}" if family.section else name, least=least
        )

    if raw["intermediate_size"] is None and type(raw["hidden_size"]) is int:
        raise source.error(f"mlp_ratio is {raw.get('mlp_ratio')!r}; it must be a number above 0.")

    network = {
        **{k: number(key, least=int(k != "extra_tokens")) for k, key in SIZES.items()},
        "norm_eps": float(norm_eps),
        "activation": ACTIVATIONS[activation],
        **{key: bool(raw[key]) for key in ("qkv_bias", "pre_norm")},
        **{key: raw.get(key, _DEFAULTS[key]) for key in VIDEO},
    }
    clip: dict[str, Any] = {}
    if "num_frames" in raw:
        clip = {"n_frames": number("num_frames"), "tubelet_size": number("tubelet_size")}
    seconds = family.clip_seconds(source.name, clip["n_frames"]) if clip else None
    size, licence = number("image_size"), source.licence or family.licence
    pool_depth = number("num_pooler_layers", least=0) if family.pooler and QUERY in stored else None
    return PretrainedConfig(*origin, size, network, mean, std, notes, licence, clip, pool_depth, seconds)


def own_pool(network: Config) -> str:
    """Pooling of a network unless another is given: its class token, or without one the mean."""
    return "class" if network.get("class_token", True) else "mean"


def own_clips(name: str, n_frames: int | None = None) -> dict[str, Any]:
    """Settings that weights decide unless others are given, such as `n_frames`.

    Of a video ViT frames and seconds of a clip, tubelets, frame size and pooling; of an image ViT without class
    token the pooling. Empty for other weights, and for a config that cannot be read: loading the weights reports
    that.
    """
    written = peek_config(name)
    if written.get("positions") in ("joint", "rotary"):  # a model that tvit trained
        pool = written.get("pool") if written.get("pool") in POOLS else own_pool(written)
        own = {k: written.get(k) for k in ("n_frames", "tubelet_size")}
        return own | {"img_size": written.get("frame_size"), "pool": pool}
    family = FAMILIES.get(str(written.get("model_type")))
    raw = written if family is None else family.defaults
    if family is None or "num_frames" not in family.defaults:
        return {} if own_pool(raw) == "class" else {"pool": raw.get("pool", "mean")}
    raw = family.config(written, {})
    values = {
        "n_frames": raw["num_frames"],
        "tubelet_size": raw["tubelet_size"],
        "img_size": raw["image_size"],
    }
    values = {key: value for key, value in values.items() if type(value) is int and value > 0}
    if "n_frames" in values:
        # Rotary positions count frames, so fewer frames last shorter; tables are interpolated over the clip.
        frames = (n_frames or values["n_frames"]) if raw.get("positions") == "rotary" else values["n_frames"]
        values["clip_seconds"] = family.clip_seconds(name, frames)
    return values | {"pool": own_pool(raw)}


def read_family(source: WeightsSource) -> tuple[Family, dict[str, Tensor]]:
    """The family of weights, and its tensors by stored name less the prefix, gates joined. Raises ModelError."""
    config = source.read_json(CONFIG_FILE)
    family = families.find_family(config, source.tensors)
    if config.get("model_type") == families.REFERENCE:
        raise source.error(
            f"a trained video classifier, not an image ViT. Evaluate it: tvit eval --model {source.name}. "
            "To train, name an image ViT such as google/vit-base-patch16-224."
        )
    if config.get("model_type") == families.EXPORTED:
        raise export_not_loadable(source.name)
    facts = f"{config.get('architecture')} {config.get('model_args')}"
    if family in (None, FAMILIES[TIMM]) and any(mark in facts for mark in families.TIMM_ROTARY_MARKS):
        kind = config.get("architecture", "the network of its model_args")
        problem = f"{kind} has rotary positions of a kind that tvit does not read"
        raise source.error(f"{problem}. Use a plain ViT, or DINOv3.")
    if family is None:
        known = ", ".join(name for name in FAMILIES if name != TIMM)
        absent = f"no {CONFIG_FILE} beside it names a model_type"
        problem = f"its model_type is {config['model_type']!r}" if "model_type" in config else absent
        if reason := families.NOT_READ.get(str(config.get("model_type"))):
            raise source.error(f"{problem}: {reason}.")
        if "auto_map" in config:
            problem += ", remote code that tvit does not run"
        raise source.error(f"{problem}; tvit reads {known}, and weights with timm's names.")
    stored: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        short = name.removeprefix(family.prefix)
        if short in stored:
            raise source.error(f"{short} is stored twice. Fetch the weights again.")
        stored[short] = tensor
    gates = [name for name in stored if family.gate and family.gate[0] in name]
    for gate in gates:
        values = gate.replace(*family.gate)
        if values in stored and stored[values].shape == stored[gate].shape:
            stored[values] = torch.cat([stored.pop(gate), stored[values]])
    return family, stored


def whole_number(
    source: WeightsSource, raw: Config, key: str, *, name: str | None = None, least: int = 1
) -> int:
    """A value of the config, in the file called `name`; of a list of equal values, the first. Raises ModelError."""
    value = raw[key]
    if isinstance(value, list) and value and value.count(value[0]) == len(value):  # [224, 224]
        value = value[0]
    if type(value) is not int or value < least:
        problem = f"{name or key} is {value!r}; it must be a whole number, {least} or more"
        raise source.error(f"{problem}. Fetch {CONFIG_FILE} again.")
    return value


def preprocessor(source: WeightsSource) -> tuple[Config, str]:
    """The config of the weights' own preprocessing, empty without one, and the name of its file."""
    has_own = (source.folder / PREPROCESSOR_FILE).is_file()
    file_name = PREPROCESSOR_FILE if has_own else VIDEO_PREPROCESSOR_FILE
    return source.read_json(file_name), file_name


def _normalisation(source: WeightsSource, family: Family) -> tuple[Channels, Channels, tuple[str, ...]]:
    """Mean and std of the channels, in [0, 1], and notes for the user.

    A `rescale_factor` other than 1 / 255 and ViViT's `offset` (1 is subtracted before the mean) are part of them.
    """
    written, file_name = preprocessor(source)
    mean, std = written.get("image_mean", family.mean), written.get("image_std", family.std)
    if not written and isinstance(timm := source.read_json(CONFIG_FILE).get("pretrained_cfg"), dict):
        mean, std, file_name = timm.get("mean", family.mean), timm.get("std", family.std), CONFIG_FILE
    elif not written:
        owners = {IMAGENET_MEAN: "ImageNet's mean and std", families.CLIP_MEAN: "CLIP's mean and std"}
        values = owners.get(family.mean, f"mean {family.mean[0]:g} and std {family.std[0]:g}")
        note = f"no {PREPROCESSOR_FILE}: frames are normalised with {values}"
        return family.mean, family.std, (f"{note}; put it beside weights that have others",)
    if written.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    factor = 1 / 255 if written.get("do_rescale") is False else written.get("rescale_factor", 1 / 255)
    if not (isinstance(factor, float | int) and 0 < factor < 1):
        raise source.error(
            f"rescale_factor {factor!r} in {file_name} must be between 0 and 1. Fetch it again."
        )
    try:
        (red, green, blue), (red_std, green_std, blue_std) = map(float, mean), map(float, std)
        levels, deviations = (red, green, blue), (red_std, green_std, blue_std)
        is_valid = all(map(math.isfinite, (*levels, *deviations))) and min(deviations) > 0
    except (TypeError, ValueError, OverflowError):
        is_valid = False
    if not is_valid:
        raise source.error(
            f"image_mean {mean} and image_std {std} in {file_name} must be three finite numbers each, the second "
            "above 0. Fetch the file again."
        )
    offset, white = float(bool(written.get("offset"))), 255 * factor
    if offset or not math.isclose(white, 1):
        red, green, blue = ((level + offset) / white for level in levels)
        red_std, green_std, blue_std = (deviation / white for deviation in deviations)
        levels, deviations = (red, green, blue), (red_std, green_std, blue_std)
    return levels, deviations, ()
