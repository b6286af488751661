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
    copy_parameters,
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
    expand_names,
    find_family,
)
from tvit_cli.model.folder import CONFIG_FILE, export_not_loadable
from tvit_cli.model.weights import (
    PREPROCESSOR_FILE,
    WeightsSource,
    check_match,
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
SIZES = {  # field of ViTConfig -> key of Hugging Face's config
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "patch_size": "patch_size",
    "extra_tokens": "extra_tokens",
}
EXTRA_POSITIONS = "positions.extra_positions"  # added to positions.extra


def read_config(source: WeightsSource) -> PretrainedConfig:
    """Network and normalisation that the weights were trained with.

    Raises ModelError for an unsupported family and for invalid values.
    """
    if source.is_ours:
        return backbone_config(source)
    family, stored = _family(source)
    raw = family.config(source.read_json(CONFIG_FILE), stored)
    if family is FAMILIES[TIMM] and raw["num_attention_heads"] is None:
        raise ModelError(
            f"{source.name}: the number of attention heads is not known for width {raw['hidden_size']}. Give it in "
            f'{CONFIG_FILE} beside the weights, as in "model_args": {{"num_heads": 8}}.'
        )
    if raw["num_channels"] != 3:
        raise ModelError(f"{source.name}: num_channels is {raw['num_channels']!r}; frames of a video have 3.")
    activation = ACTIVATIONS.get(str(raw["hidden_act"]))
    if activation is None:
        known = ", ".join(ACTIVATIONS)
        raise ModelError(f"{source.name}: hidden_act is {raw['hidden_act']!r}; tvit supports {known}.")
    norm_eps = raw["layer_norm_eps"]
    if not isinstance(norm_eps, float | int) or norm_eps <= 0:
        raise ModelError(f"{source.name}: layer_norm_eps is {norm_eps!r}; it must be a number above 0.")
    mean, std, notes = _normalisation(source, family)
    network = {
        **{k: whole_number(source, raw, key, least=int(k != "extra_tokens")) for k, key in SIZES.items()},
        "norm_eps": float(norm_eps),
        "activation": activation,
        **{key: bool(raw[key]) for key in ("qkv_bias", "pre_norm")},
    }
    image_size = whole_number(source, raw, "image_size")
    return PretrainedConfig(
        source.name, source.revision, source.sha256, image_size, network, mean, std, notes
    )


@torch.no_grad()
def load_pretrained(model: TemporalViT, source: WeightsSource) -> LoadReport:
    """Copies weights into the model, which at step 0 then equals the image ViT, or the model that tvit trained.

    Positions are interpolated bicubically to the model's grid (align_corners False, as in transformers). A
    LayerScale is folded into the layer before it. Tubelets start by ViViT's central-frame initialisation
    (arXiv:2103.15691). Raises ModelError for tensors that are missing, unexpected, stored twice, of the wrong shape
    or not finite.
    """
    config = read_config(source)
    config.check_network(model.config)
    if source.is_ours:
        return load_backbone(model, source)
    parameters = dict(model.named_parameters())
    family, stored = _family(source)
    names = expand_names(family.tensors, family.modules, config.network["depth"], stored)
    names = {theirs: ours for theirs, ours in names.items() if _has_parameter(ours, parameters)}
    unused = tuple(name for name in stored if name.startswith(family.unused))
    check_match(source, {n: stored[n] for n in stored if n not in unused}, dict.fromkeys(names))

    filled: set[str] = set()
    later: dict[str, Tensor] = {}
    notes = dict.fromkeys(config.notes)  # an ordered set
    for theirs, name in names.items():
        tensor = check_tensor(source, theirs, stored[theirs])
        if tensor.dtype != model.norm.weight.dtype:
            notes[f"weights converted from {tensor.dtype} to {model.norm.weight.dtype}"] = None
            tensor = tensor.to(model.norm.weight.dtype)
        for ours, value in _convert(source, family, name, tensor, model.config, notes).items():
            parameter = parameters.get(ours)
            shape: tuple[int, ...] = (model.config.width,) if parameter is None else tuple(parameter.shape)
            if ours == EXTRA_POSITIONS:
                shape = (1, model.config.extra_tokens, model.config.width)
            if value.shape != shape:
                raise ModelError(
                    f"{source.name}: {theirs} has the shape {tuple(tensor.shape)}, not {shape} as its "
                    f"{CONFIG_FILE} implies. Fetch both files again."
                )
            if parameter is None:
                later[ours] = value
            else:
                parameter.copy_(value)
                filled.add(ours)
    for name, value in later.items():
        if name == EXTRA_POSITIONS:
            parameters["positions.extra"].add_(value)
        else:
            layer = name.removesuffix(".scale")
            parameters[f"{layer}.weight"].mul_(value.unsqueeze(1))
            parameters[f"{layer}.bias"].mul_(value)
    for name in set(family.zeros) - filled:
        parameters[name].zero_()
        filled.add(name)
    new = copy_parameters(parameters, model.copied_parameters(), filled, notes)
    return LoadReport(len(names), new, unused, tuple(notes))


def _family(source: WeightsSource) -> tuple[Family, dict[str, Tensor]]:
    """The family of the weights, and its tensors less the family's prefix."""
    config = source.read_json(CONFIG_FILE)
    family = find_family(config, source.tensors)
    if config.get("model_type") == REFERENCE:
        raise ModelError(
            f"{source.name}: a trained video classifier, not an image ViT. Evaluate it with tvit eval --model "
            f"{source.name}, or train from an image ViT such as google/vit-base-patch16-224."
        )
    if config.get("model_type") == EXPORTED:
        raise export_not_loadable(source.name)
    if family is None:
        known = ", ".join(name for name in FAMILIES if name != TIMM)
        problem = f"no {CONFIG_FILE} beside it names a model_type"
        if "model_type" in config:
            problem = f"its model_type is {config['model_type']!r}"
        raise ModelError(f"{source.name}: {problem}; tvit reads {known}, and weights with timm's names.")
    stored: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        short = name.removeprefix(family.prefix)
        if short in stored:
            raise ModelError(f"{source.name}: {short} is stored twice. Fetch the weights again.")
        stored[short] = tensor
    return family, stored


def _has_parameter(name: str, parameters: Mapping[str, Tensor]) -> bool:
    """Whether the model has the parameters of a name; without qkv_bias, q, k and v have weights alone."""
    layer, _, leaf = name.rpartition(".")
    if leaf == "scale":
        return f"{layer}.weight" in parameters
    return name == POSITIONS or name in parameters or name.replace(".qkv.", ".q.") in parameters


def whole_number(source: WeightsSource, raw: Config, key: str, *, least: int = 1) -> int:
    """A value of the config; of a list of equal values, the first. Raises ModelError."""
    value = raw[key]
    if isinstance(value, list) and value and value.count(value[0]) == len(value):  # [224, 224]
        value = value[0]
    if type(value) is not int or value < least:
        raise ModelError(f"{source.name}: {key} is {value!r}; it must be a whole number, {least} or more.")
    return value


def _normalisation(source: WeightsSource, family: Family) -> tuple[Channels, Channels, tuple[str, ...]]:
    """Mean and std of the channels, in [0, 1], and notes for the user."""
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
        levels, deviations = (red, green, blue), (red_std, green_std, blue_std)
        is_valid = all(map(math.isfinite, (*levels, *deviations))) and min(deviations) > 0
    except (TypeError, ValueError, OverflowError):
        is_valid = False
    if not is_valid:
        raise ModelError(
            f"{source.name}: image_mean {mean} and image_std {std} in {file_name} must be three finite numbers "
            "each, the second above 0. Fetch the file again."
        )
    return levels, deviations, ()


def _convert(
    source: WeightsSource,
    family: Family,
    name: str,
    tensor: Tensor,
    config: ViTConfig,
    notes: dict[str, None],
) -> dict[str, Tensor]:
    """Our parameters from one stored tensor: positions and fused layers are split, patch weights inflated."""
    if name == "patch_embed.weight" and config.tubelet_size > 1:
        return {name: inflate_central(tensor, config.tubelet_size, notes)}
    if name == POSITIONS:
        return _split_positions(source, family, tensor, config, notes)
    layer, fused, leaf = name.partition(".qkv.")
    if fused and tensor.shape[0] % 3 == 0:
        return {f"{layer}.{n}.{leaf}": part for n, part in zip("qkv", tensor.chunk(3), strict=True)}
    if name == "positions.class_token" and tensor.shape == (config.width,):  # CLIP's
        tensor = tensor.view(1, 1, -1)
    return {name: tensor}


def _split_positions(
    source: WeightsSource, family: Family, table: Tensor, config: ViTConfig, notes: dict[str, None]
) -> dict[str, Tensor]:
    """Positions of the class token, of the extra tokens, and of the patches, on the model's grid."""
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
    split = {"positions.class_position": class_position, "positions.spatial": spatial}
    return split | ({EXTRA_POSITIONS: own[:, 1:]} if leading > 1 else {})
