"""Pretrained image weights, loaded into the temporal ViT."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tvit_cli.errors import ModelError
from tvit_cli.model.backbone import (
    LoadReport,
    PretrainedConfig,
    backbone_config,
    inflate_central,
    load_backbone,
)
from tvit_cli.model.families import (
    EXPORTED,
    FAMILIES,
    POSITIONS,
    REFERENCE,
    TIMM,
    Channels,
    Config,
    Family,
    find_family,
)
from tvit_cli.model.folder import CONFIG_FILE, export_not_loadable
from tvit_cli.model.weights import (
    PREPROCESSOR_FILE,
    WeightsSource,
    check_names,
    check_tensor,
    resolve_weights,
)
from tvit_cli.portable.vit import TemporalViT, ViTConfig, resize_grid
from tvit_cli.settings.card import IMAGENET_MEAN

__all__ = ["LoadReport", "PretrainedConfig", "load_pretrained", "read_config", "resolve_weights"]

ACTIVATIONS = {  # Hugging Face's name -> ours
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swiglu": "swiglu",
}


def read_config(source: WeightsSource) -> PretrainedConfig:
    """The network and the normalisation that the weights were trained with.

    Raises ModelError for a family that tvit does not read and for a value that it cannot use.
    """
    if source.is_ours:
        return backbone_config(source)
    family, stored = _family(source)
    written = source.read_json(CONFIG_FILE)
    if family.section is not None:
        section = written.get(family.section)
        written = section if isinstance(section, dict) else {}
    raw = family.network({**family.defaults, **written}, stored)
    if family is FAMILIES[TIMM] and raw["num_attention_heads"] is None:
        raise ModelError(
            f"{source.name}: how many attention heads share {raw['hidden_size']} numbers is not known. Say so in "
            f'{CONFIG_FILE} beside the weights, as in "model_args": {{"num_heads": 8}}.'
        )
    if raw["num_channels"] != 3:
        raise ModelError(f"{source.name}: num_channels is {raw['num_channels']!r}; frames of a video have 3.")
    activation = ACTIVATIONS.get(str(raw["hidden_act"]))
    if activation is None:
        known = ", ".join(ACTIVATIONS)
        raise ModelError(f"{source.name}: hidden_act is {raw['hidden_act']!r}; tvit knows {known}.")
    norm_eps = raw["layer_norm_eps"]
    if not isinstance(norm_eps, float | int) or norm_eps <= 0:
        raise ModelError(f"{source.name}: layer_norm_eps is {norm_eps!r}; it must be a number above 0.")
    mean, std, notes = _normalisation(source, family)
    return PretrainedConfig(
        name=source.name,
        revision=source.revision,
        sha256=source.sha256,
        width=whole_number(source, raw, "hidden_size"),
        depth=whole_number(source, raw, "num_hidden_layers"),
        num_heads=whole_number(source, raw, "num_attention_heads"),
        mlp_width=whole_number(source, raw, "intermediate_size"),
        patch_size=whole_number(source, raw, "patch_size"),
        image_size=whole_number(source, raw, "image_size"),
        norm_eps=float(norm_eps),
        activation=activation,
        qkv_bias=bool(raw["qkv_bias"]),
        extra_tokens=whole_number(source, raw, "extra_tokens", least=0),
        pre_norm=bool(raw["pre_norm"]),
        mean=mean,
        std=std,
        notes=notes,
    )


@torch.no_grad()
def load_pretrained(model: TemporalViT, source: WeightsSource) -> LoadReport:
    """Copies the weights into the model, which at step 0 is then the image ViT, or the model that tvit trained.

    Positions are interpolated bicubically to the model's grid (align_corners False, as transformers does). A
    LayerScale is folded into the layer before it. A tubelet of several frames starts with the weights on its
    central frame and zeros on the others (ViViT's central-frame initialisation, arXiv:2103.15691). Raises
    ModelError for tensors that are missing, left over, stored twice, of the wrong shape or not finite.
    """
    config = read_config(source)
    config.check_network(model.config)
    if source.is_ours:
        return load_backbone(model, source)
    parameters = dict(model.named_parameters())
    family, stored = _family(source)
    names = {
        theirs: ours
        for theirs, ours in family.names(config.depth, stored).items()
        if _has_place(ours, parameters)
    }
    unused = tuple(name for name in stored if family.is_unused(name))
    check_names(source, set(stored) - set(unused), names)

    filled: set[str] = set()
    later: dict[str, Tensor] = {}
    notes = dict.fromkeys(config.notes)  # a set that keeps its order
    for theirs, name in names.items():
        tensor = check_tensor(source, theirs, stored[theirs])
        if tensor.dtype != model.norm.weight.dtype:
            notes[f"weights converted from {tensor.dtype} to {model.norm.weight.dtype}"] = None
            tensor = tensor.to(model.norm.weight.dtype)
        for ours, value in _converted(source, family, name, tensor, model.config, notes).items():
            place = parameters.get(ours)
            shape: tuple[int, ...] = (config.width,) if place is None else tuple(place.shape)
            if ours == "positions.extra_positions":
                shape = (1, config.extra_tokens, config.width)
            if value.shape != shape:
                raise ModelError(
                    f"{source.name}: {theirs} has the shape {tuple(tensor.shape)}, not {shape} as its "
                    f"{CONFIG_FILE} says. Fetch both files again."
                )
            if place is None:
                later[ours] = value
            else:
                place.copy_(value)
                filled.add(ours)
    for name, value in later.items():
        if name == "positions.extra_positions":
            parameters["positions.extra"].add_(value)
        else:
            _fold_scale(parameters, name.removesuffix(".scale"), value)
    for name in family.zeros:
        if name not in filled:
            parameters[name].zero_()
            filled.add(name)
    copies = model.copied_parameters()
    for ours, original in copies.items():
        parameters[ours].copy_(parameters[original])
    if copies:
        notes["temporal attention starts as a copy of spatial attention"] = None
    new = tuple(name for name in parameters if name not in filled and name not in copies)
    return LoadReport(len(names), new, unused, tuple(notes))


def _family(source: WeightsSource) -> tuple[Family, dict[str, Tensor]]:
    """The family that the weights belong to, and its tensors less the family's prefix."""
    config = source.read_json(CONFIG_FILE)
    family = find_family(config, source.tensors)
    if config.get("model_type") == REFERENCE:
        raise ModelError(
            f"{source.name}: a trained classifier of clips, no image ViT to train from. Score it with tvit eval "
            f"--model {source.name}, or train from an image ViT such as google/vit-base-patch16-224."
        )
    if config.get("model_type") == EXPORTED:
        raise export_not_loadable(source.name)
    if family is None:
        known = ", ".join(name for name in FAMILIES if name != TIMM)
        what = (
            f"its model_type is {config['model_type']!r}"
            if "model_type" in config
            else f"no {CONFIG_FILE} beside it names a model_type"
        )
        raise ModelError(f"{source.name}: {what}; tvit reads {known}, and weights with timm's names.")
    stored: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        short = name.removeprefix(family.prefix)
        if short in stored:
            raise ModelError(f"{source.name}: {short} is stored twice. Fetch the weights again.")
        stored[short] = tensor
    return family, stored


def _has_place(name: str, parameters: Mapping[str, Tensor]) -> bool:
    """Whether the model has what a tensor is for; without qkv_bias, q, k and v have weights alone."""
    layer, _, leaf = name.rpartition(".")
    if leaf == "scale":
        return f"{layer}.weight" in parameters
    return name == POSITIONS or name in parameters or name.replace(".qkv.", ".q.") in parameters


def _fold_scale(parameters: Mapping[str, Tensor], layer: str, scale: Tensor) -> None:
    parameters[f"{layer}.weight"].mul_(scale.unsqueeze(1))
    parameters[f"{layer}.bias"].mul_(scale)


def whole_number(source: WeightsSource, raw: Config, key: str, *, least: int = 1) -> int:
    """A value of the config; of a list of equal ones, the first. Raises ModelError."""
    value = raw[key]
    if isinstance(value, list) and value and value.count(value[0]) == len(value):  # [224, 224]
        value = value[0]
    if type(value) is not int or value < least:
        raise ModelError(f"{source.name}: {key} is {value!r}; it must be a whole number, {least} or more.")
    return value


def _normalisation(source: WeightsSource, family: Family) -> tuple[Channels, Channels, tuple[str, ...]]:
    """Mean and std of the channels, in [0, 1], and what there is to say about them."""
    written, file_name = source.read_json(PREPROCESSOR_FILE), PREPROCESSOR_FILE
    mean, std = written.get("image_mean", family.mean), written.get("image_std", family.std)
    if not written and isinstance(timm := source.read_json(CONFIG_FILE).get("pretrained_cfg"), dict):
        mean, std, file_name = timm.get("mean", family.mean), timm.get("std", family.std), CONFIG_FILE
    elif not written:
        whose = "ImageNet" if family.mean == IMAGENET_MEAN else "CLIP"
        note = (
            f"no {PREPROCESSOR_FILE}: frames are normalised with {whose}'s mean and std; put it beside "
            "weights that have others"
        )
        return family.mean, family.std, (note,)
    if written.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), ()
    try:
        (red, green, blue), (red_std, green_std, blue_std) = map(float, mean), map(float, std)
        levels, spreads = (red, green, blue), (red_std, green_std, blue_std)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{source.name}: image_mean {mean} and image_std {std} in {file_name} must be three "
            "numbers each. Fetch the file again."
        ) from error
    if not all(map(math.isfinite, (*levels, *spreads))) or min(spreads) <= 0:
        raise ModelError(
            f"{source.name}: image_mean {mean} and image_std {std} in {file_name} must be finite, and the second "
            "above 0. Fetch the file again."
        )
    return levels, spreads, ()


def _converted(
    source: WeightsSource,
    family: Family,
    name: str,
    tensor: Tensor,
    config: ViTConfig,
    notes: dict[str, None],
) -> dict[str, Tensor]:
    """One of their tensors as ours, by our names: tables are parted, patch weights put on one frame."""
    if name == "patch_embed.weight" and config.tubelet_size > 1:
        return {name: inflate_central(tensor, config.tubelet_size, notes)}
    if name == POSITIONS:
        return _parted_positions(source, family, tensor, config, notes)
    layer, fused, leaf = name.partition(".qkv.")
    if fused and tensor.shape[0] % 3 == 0:
        return {f"{layer}.{n}.{leaf}": part for n, part in zip("qkv", tensor.chunk(3), strict=True)}
    if name == "positions.class_token" and tensor.shape == (config.width,):  # CLIP's
        tensor = tensor.view(1, 1, -1)
    return {name: tensor}


def _parted_positions(
    source: WeightsSource, family: Family, table: Tensor, config: ViTConfig, notes: dict[str, None]
) -> dict[str, Tensor]:
    """Positions of the class token, of the tokens beside it, and of the patches, on the model's grid."""
    rows = table.shape[-2] if table.dim() > 1 and table.shape[-1] == config.width else 0
    for leading in family.leading:
        grid = math.isqrt(max(rows - leading, 0))
        if grid and table.numel() == (leading + grid**2) * config.width:
            break
    else:
        raise ModelError(
            f"{source.name}: positions of the shape {tuple(table.shape)} are no square grid. "
            "Use a ViT of square pictures with a class token."
        )
    table = table.reshape(1, rows, config.width)
    own, spatial = table[:, :leading], table[:, leading:]  # (1, tokens before the patches, D), (1, P, D)
    if grid != config.grid:
        notes[f"positions interpolated from {grid} x {grid} to {config.grid} x {config.grid} patches"] = None
        spatial = resize_grid(spatial, (config.grid, config.grid), antialias=family.antialias)  # (1, P, D)
    class_position = own[:, :1] if leading else torch.zeros_like(table[:, :1])
    parted = {"positions.class_position": class_position, "positions.spatial": spatial}
    return parted | ({"positions.extra_positions": own[:, 1:]} if leading > 1 else {})
