"""Pretrained backbones: their config and load report, and tvit's own model folders as backbones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tvit_cli.errors import ModelError
from tvit_cli.model.families import Channels
from tvit_cli.model.folder import load_card
from tvit_cli.model.weights import WeightsSource, check_names, check_tensor
from tvit_cli.portable.layers import resize_temporal
from tvit_cli.portable.vit import TemporalViT, ViTConfig, resize_grid
from tvit_cli.settings.base import flag

# What the weights decide of a ViTConfig.
NETWORK = (
    "width", "depth", "num_heads", "mlp_width", "patch_size", "norm_eps", "activation", "qkv_bias",
    "extra_tokens", "pre_norm",
)  # fmt: skip


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
    extra_tokens: int
    pre_norm: bool
    mean: Channels
    std: Channels
    notes: tuple[str, ...] = ()

    def vit_config(self, *, frame_size: int | None = None, **shape: Any) -> ViTConfig:
        """The temporal ViT that takes these weights, at their own frame size when none is given.

        `shape` holds the rest of ViTConfig's fields. Raises ValueError where the numbers do not fit each other.
        """
        network = {key: getattr(self, key) for key in NETWORK}
        return ViTConfig(frame_size=frame_size or self.image_size, **shape, **network)

    def check_network(self, config: ViTConfig) -> None:
        """Raises ModelError where a model is of another network."""
        for key in NETWORK:
            theirs, ours = getattr(self, key), getattr(config, key)
            if theirs != ours:
                raise ModelError(
                    f"{self.name}: {key} is {theirs}, and {ours} in the model. Give both the same."
                )


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors: how many matched, which are new (ours alone) or unused (theirs alone)."""

    matched: int
    new: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]


CLASSIFIER = "classifier"
SCHEME = ("attention", "temporal_depth", "temporal_index")  # what the parts that see time are made for
SPATIAL, PATCHES = "positions.spatial", "patch_embed.weight"
TIMES = ("temporal.embedding", "summary.times.embedding")


def backbone_config(source: WeightsSource) -> PretrainedConfig:
    """The network and the normalisation on the card of a model folder.

    Raises ModelError for a card that cannot be read, and for weights that are not the card's.
    """
    card = load_card(source.folder)
    config = _shape(source)
    if source.sha256 != card.weights_sha256:
        raise ModelError(
            f"{source.name}: the weights are not those of the card beside them. Copy both again."
        )
    return PretrainedConfig(
        name=source.name,
        revision=source.revision,
        sha256=source.sha256,
        image_size=config.frame_size,
        mean=card.preprocessing.mean,
        std=card.preprocessing.std,
        **{key: getattr(config, key) for key in NETWORK},
    )


@torch.no_grad()
def load_backbone(model: TemporalViT, source: WeightsSource) -> LoadReport:
    """Copies all but the classifier into a model of the same attention; into another, what an image ViT has.

    Positions are interpolated to another frame size, a temporal embedding to another number of times. Raises
    ModelError for tubelets of another size, unless those of the weights are single frames, and for tensors that
    are missing, left over, of the wrong shape or not finite.
    """
    theirs, ours = _shape(source), model.config
    stored = dict(TemporalViT(theirs, initialise=False).named_parameters())
    check_names(source, source.tensors, stored)
    parameters, copies = dict(model.named_parameters()), model.copied_parameters()
    own = [CLASSIFIER]
    if any(getattr(theirs, key) != getattr(ours, key) for key in SCHEME):
        own += model.added_modules()
    else:
        copies = {}  # temporal attention was trained, too
    filled = [
        name
        for name in stored
        if name in parameters
        and name not in copies
        and not name.startswith(tuple(f"{part}." for part in own))
    ]
    notes: dict[str, None] = {}  # a set that keeps its order
    for name, expected in stored.items():
        tensor = check_tensor(source, name, source.tensors[name])
        if tensor.shape != expected.shape:
            raise ModelError(
                f"{source.name}: {name} has the shape {tuple(tensor.shape)}, not {tuple(expected.shape)} as its "
                f"{source.config_file} says. Copy both again."
            )
        if name in filled:
            place = parameters[name]
            if tensor.dtype != place.dtype:
                notes[f"weights converted from {tensor.dtype} to {place.dtype}"] = None
            place.copy_(_fitted(source, name, tensor.to(place.dtype), theirs, ours, notes))
    for copy, original in copies.items():
        parameters[copy].copy_(parameters[original])
    if copies:
        notes["temporal attention starts as a copy of spatial attention"] = None
    return LoadReport(
        matched=len(filled),
        new=tuple(name for name in parameters if name not in filled and name not in copies),
        unused=tuple(name for name in stored if name not in filled),
        notes=tuple(notes),
    )


def inflate_central(patches: Tensor, tubelet_size: int, notes: dict[str, None]) -> Tensor:
    """Patch weights of single frames for tubelets of several, (D, C, p, p) -> (D, t*C, p, p).

    ViViT's central-frame initialisation (arXiv:2103.15691): zeros for all frames but one.
    """
    centre = tubelet_size // 2
    notes[f"patch embedding: on frame {centre + 1} of each tubelet of {tubelet_size}"] = None
    frames = [torch.zeros_like(patches)] * tubelet_size
    frames[centre] = patches
    return torch.cat(frames, dim=1)


def _shape(source: WeightsSource) -> ViTConfig:
    try:
        return ViTConfig.from_dict(load_card(source.folder).model)
    except ValueError as error:
        raise ModelError(
            f"{source.name}: {source.config_file}: model: {error}. Copy the folder again."
        ) from error


def _fitted(
    source: WeightsSource,
    name: str,
    tensor: Tensor,
    theirs: ViTConfig,
    ours: ViTConfig,
    notes: dict[str, None],
) -> Tensor:
    """A tensor for a model of another frame size, number of times, or tubelet."""
    if name == PATCHES and theirs.tubelet_size != ours.tubelet_size:
        if theirs.tubelet_size > 1:
            raise ModelError(
                f"{source.name}: its tubelets are of {theirs.tubelet_size} frames, those of the model of "
                f"{ours.tubelet_size}. Give {flag('tubelet_size')} {theirs.tubelet_size}."
            )
        return inflate_central(tensor, ours.tubelet_size, notes)
    if name == SPATIAL and theirs.grid != ours.grid:
        before, after = (f"{config.grid} x {config.grid}" for config in (theirs, ours))
        notes[f"positions interpolated from {before} to {after} patches"] = None
        return resize_grid(tensor, (ours.grid, ours.grid))  # (1, P, D)
    times = ours.n_frames // ours.tubelet_size
    if name in TIMES and tensor.shape[1] != times:
        notes[f"temporal embedding interpolated from {tensor.shape[1]} to {times} times"] = None
        return resize_temporal(tensor, times)
    return tensor
