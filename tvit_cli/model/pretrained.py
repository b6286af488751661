"""Pretrained weights, of an image or video ViT or of a model that tvit trained, loaded into the temporal ViT."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from tvit_cli.model import families
from tvit_cli.model.families import POSITIONS, Family
from tvit_cli.model.folder import CONFIG_FILE, load_config
from tvit_cli.model.pretrained_config import QUERY, PretrainedConfig, read_config, read_family
from tvit_cli.model.weights import WeightsSource, check_match, check_tensor, resolve_weights
from tvit_cli.portable.layers import resize_temporal
from tvit_cli.portable.vit import TemporalViT, ViTConfig, resize_grid, resize_joint
from tvit_cli.settings.base import flag

__all__ = ["LoadReport", "PretrainedConfig", "load_pretrained", "read_config", "resolve_weights"]

SCHEME = ("attention", "temporal_depth", "temporal_index")  # fields that fix the temporal modules

Notes = dict[str, None]  # an ordered set of notes for the user
EXTRA_POSITIONS = "positions.extra_positions"  # added to positions.extra


@dataclass(frozen=True)
class LoadReport:
    """Number of matched tensors, names of new (ours alone) and unused (theirs alone) ones, notes for the user."""

    matched: int
    new: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]


@torch.no_grad()
def load_pretrained(
    model: TemporalViT, source: WeightsSource, *, classifier: str | None = None
) -> LoadReport:
    """Copies weights into the model, which at step 0 then equals the ViT, or the model that tvit trained.

    Positions are interpolated bicubically to the model's grid (align_corners False, as in transformers), those of
    a video ViT linearly to the model's times. A LayerScale is folded into the layer before it. On image weights,
    tubelets start by ViViT's central-frame initialisation (arXiv:2103.15691). Of a model that tvit trained, all
    but the classifier is copied; between different attention schemes, only the counterparts of an image ViT. An
    attentive pooler is copied where the model has one, and the classifier that is stored as `classifier`. Raises
    ModelError for tensors that are missing, unexpected, stored twice, of the wrong shape or not finite.
    """
    config = read_config(source)
    for key, expected in config.network.items():
        if (ours := getattr(model.config, key)) != expected:
            raise source.error(f"{key} is {expected}, and {ours} in the model. Make them equal.")
    if source.is_ours:
        return _load_trained(model, source)
    parameters = dict(model.named_parameters())
    family, stored = read_family(source)
    names = families.expand_names(family.tensors, family.modules, config.network["depth"], stored)
    # Without qkv_bias, q, k and v have weights alone.
    own = {POSITIONS, *parameters}
    names = {
        theirs: ours
        for theirs, ours in names.items()
        if ours.replace(".scale", ".weight").replace(".qkv.", ".q.") in own
    }
    if model.config.pool_depth is not None and config.pool_depth is not None:
        query = {QUERY: "pool.query"}
        names |= families.expand_names(query, family.pooler, config.pool_depth, stored)
    if classifier is not None:
        names |= {f"{classifier}.{leaf}": f"classifier.{leaf}" for leaf in ("weight", "bias")}
    unused = tuple(name for name in stored if name.startswith(family.unused) and name not in names)
    check_match(source, {n: stored[n] for n in stored if n not in unused}, dict.fromkeys(names))

    depths = map(str, range(config.network["depth"]))
    filled = {zero.replace("#", number) for number in depths for zero in family.zeros} & parameters.keys()
    for name in filled:
        parameters[name].zero_()
    notes = dict.fromkeys(config.notes)
    if family.sinusoid:
        table = families.sinusoids(config.n_tokens, model.config.width)
        parameters["positions.joint"].copy_(_joint_table(config, table, model.config, notes))
        filled.add("positions.joint")
    later: dict[str, Tensor] = {}
    for theirs, name in names.items():
        tensor = check_tensor(source, theirs, stored[theirs])
        tensor = _converted(tensor, model.norm.weight.dtype, notes)
        for ours, value in _convert(source, family, config, name, tensor, model.config, notes).items():
            parameter = parameters.get(ours)
            shape: tuple[int, ...] = (model.config.width,) if parameter is None else tuple(parameter.shape)
            if ours == EXTRA_POSITIONS:
                shape = (1, model.config.extra_tokens, model.config.width)
            if value.shape != shape:
                actual = f"{theirs} has the shape {tuple(tensor.shape)}"
                raise source.error(f"{actual}, not {shape} as in its {CONFIG_FILE}. Fetch both again.")
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
    new = _copy_parameters(parameters, model.copied_parameters(), filled, notes)
    return LoadReport(len(names), new, unused, tuple(notes))


def _load_trained(model: TemporalViT, source: WeightsSource) -> LoadReport:
    (_, theirs), ours = load_config(source.folder), model.config
    stored = dict(TemporalViT(theirs, initialise=False).named_parameters())
    check_match(source, source.tensors, stored)
    parameters, copies = dict(model.named_parameters()), model.copied_parameters()
    excluded = ["classifier"]
    if any(getattr(theirs, key) != getattr(ours, key) for key in SCHEME):
        excluded += model.added_modules().keys() - {"pool", "feature_norm"}  # independent of the scheme
    else:
        copies = {}  # temporal attention was trained, too
    prefixes = tuple(f"{module}." for module in excluded)
    filled = [n for n in stored if n in parameters and n not in copies and not n.startswith(prefixes)]
    notes: Notes = {}
    for name in stored:
        tensor = check_tensor(source, name, source.tensors[name])
        if name in filled:
            tensor = _converted(tensor, parameters[name].dtype, notes)
            parameters[name].copy_(_resize(source, name, tensor, theirs, ours, notes))
    new = _copy_parameters(parameters, copies, set(filled), notes)
    unused = tuple(name for name in stored if name not in filled)
    return LoadReport(len(filled), new, unused, tuple(notes))


def _converted(tensor: Tensor, dtype: torch.dtype, notes: Notes) -> Tensor:
    if tensor.dtype != dtype:
        notes[f"weights converted from {tensor.dtype} to {dtype}"] = None
    return tensor.to(dtype)


def _copy_parameters(
    parameters: Mapping[str, Tensor], copies: Mapping[str, str], filled: Set[str], notes: Notes
) -> tuple[str, ...]:
    """Copies parameters within a model (copy -> original); returns names of those neither filled nor copies."""
    for copy, original in copies.items():
        parameters[copy].copy_(parameters[original])
    if copies:
        notes["temporal attention starts as a copy of spatial attention"] = None
    return tuple(name for name in parameters if name not in filled and name not in copies)


def _inflate(patches: Tensor, tubelet_size: int, notes: Notes) -> Tensor:
    """Central-frame initialisation, zeros for other frames: (D, C, p, p) -> (D, t*C, p, p)."""
    centre = tubelet_size // 2
    notes[f"patch embedding: on frame {centre + 1} of each tubelet of {tubelet_size}"] = None
    frames = [torch.zeros_like(patches)] * tubelet_size
    frames[centre] = patches
    return torch.cat(frames, dim=1)


def _resize(
    source: WeightsSource, name: str, tensor: Tensor, theirs: ViTConfig, ours: ViTConfig, notes: Notes
) -> Tensor:
    if name == "patch_embed.weight" and theirs.tubelet_size != ours.tubelet_size:
        if theirs.tubelet_size > 1:
            size, ours_too = theirs.tubelet_size, f"those of the model of {ours.tubelet_size}"
            raise source.error(
                f"its tubelets are of {size} frames, {ours_too}. Give {flag('tubelet_size')} {size}."
            )
        return _inflate(tensor, ours.tubelet_size, notes)
    times = ours.n_frames // ours.tubelet_size
    if name == "positions.joint":
        return resize_joint(tensor, times, (ours.grid, ours.grid))
    if name == "positions.spatial" and theirs.grid != ours.grid:
        before, after = (f"{config.grid} x {config.grid}" for config in (theirs, ours))
        notes[f"positions interpolated from {before} to {after} patches"] = None
        return resize_grid(tensor, (ours.grid, ours.grid))  # (1, P, D)
    if name in ("temporal.embedding", "summary.times.embedding") and tensor.shape[1] != times:
        notes[f"temporal embedding interpolated from {tensor.shape[1]} to {times} times"] = None
        return resize_temporal(tensor, times)
    return tensor


def _convert(
    source: WeightsSource,
    family: Family,
    pretrained: PretrainedConfig,
    name: str,
    tensor: Tensor,
    config: ViTConfig,
    notes: Notes,
) -> dict[str, Tensor]:
    """Our parameters from one stored tensor: positions and fused layers are split, patch weights inflated."""
    if name == "patch_embed.weight" and pretrained.clip:
        if tensor.dim() == 5:  # (D, C, t, p, p) -> (D, t*C, p, p)
            tensor = tensor.transpose(1, 2).flatten(1, 2)
        return {name: tensor}
    if name == "patch_embed.weight" and config.tubelet_size > 1:
        return {name: _inflate(tensor, config.tubelet_size, notes)}
    if name == POSITIONS and config.positions == "joint":
        if tensor.shape != (shape := (1, pretrained.n_tokens + 1, config.width)):
            problem = f"positions of the shape {tuple(tensor.shape)}, not {shape} as in its {CONFIG_FILE}"
            raise source.error(f"{problem}. Fetch both again.")
        joint = _joint_table(pretrained, tensor[0, 1:], config, notes)
        return {"positions.class_position": tensor[:, :1], "positions.joint": joint}
    if name == POSITIONS:
        return _split_positions(source, family, tensor, config, notes)
    layer, fused, leaf = name.partition(".qkv.")
    parts = {name: tensor}
    if fused and tensor.shape[0] % 3 == 0:
        parts = {f"{layer}.{n}.{leaf}": part for n, part in zip("qkv", tensor.chunk(3), strict=True)}
    if family.half_split:
        turned = {n: rows for n, rows in parts.items() if ".attention.q." in n or ".attention.k." in n}
        parts |= {n: _adjacent(rows, config) for n, rows in turned.items()}
    if name == "positions.class_token" and tensor.shape == (config.width,):  # CLIP's
        return {name: tensor.view(1, 1, -1)}
    return parts


def _adjacent(rows: Tensor, config: ViTConfig) -> Tensor:
    """Rows of a query or key layer, so that the rotated pairs (i, i + half) of each head are adjacent channels.

    Scores stay the same: queries and keys are reordered alike.
    """
    if len(rows) != config.width:
        return rows
    heads = rows.reshape(config.num_heads, 2, -1, *rows.shape[1:])  # (A, 2, D/2A, …)
    return heads.transpose(1, 2).reshape(rows.shape)


def _joint_table(own: PretrainedConfig, table: Tensor, config: ViTConfig, notes: Notes) -> Tensor:
    """Positions of a video ViT's own clips on those of the model, (T'*P, D) -> (1, T', P, D)."""
    times, side = (
        own.clip["n_frames"] // own.clip["tubelet_size"],
        own.image_size // own.network["patch_size"],
    )
    ours = config.n_frames // config.tubelet_size
    if (times, side) != (ours, config.grid):
        before, after = f"{times} x {side} x {side}", f"{ours} x {config.grid} x {config.grid}"
        notes[f"positions interpolated from {before} to {after} patches"] = None
    return resize_joint(table.view(1, times, side**2, -1), ours, (config.grid, config.grid))


def _split_positions(
    source: WeightsSource, family: Family, table: Tensor, config: ViTConfig, notes: Notes
) -> dict[str, Tensor]:
    """Positions of the class token, of the extra tokens, and of the patches, on the model's grid."""
    rows = table.shape[-2] if table.dim() > 1 and table.shape[-1] == config.width else 0
    for leading in family.leading:
        grid = math.isqrt(max(rows - leading, 0))
        if grid and table.numel() == (leading + grid**2) * config.width:
            break
    else:
        problem = f"positions of the shape {tuple(table.shape)} are no square grid"
        raise source.error(f"{problem}. Use a ViT of square pictures.")
    table = table.reshape(1, rows, config.width)
    own, spatial = table[:, :leading], table[:, leading:]  # (1, tokens before the patches, D), (1, P, D)
    if grid != config.grid:
        notes[f"positions interpolated from {grid} x {grid} to {config.grid} x {config.grid} patches"] = None
        spatial = resize_grid(spatial, (config.grid, config.grid), antialias=family.antialias)  # (1, P, D)
    split = {"positions.spatial": spatial}
    if config.class_token:
        split["positions.class_position"] = own[:, :1] if leading else torch.zeros_like(table[:, :1])
    return split | ({EXTRA_POSITIONS: own[:, 1:]} if leading > 1 else {})
