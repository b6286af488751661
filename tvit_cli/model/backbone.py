"""Pretrained backbones: their config and load report, and tvit's own model folders as backbones."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tvit_cli.errors import ModelError
from tvit_cli.model.families import Channels
from tvit_cli.model.folder import load_config
from tvit_cli.model.weights import WeightsSource, check_match, check_tensor
from tvit_cli.portable.layers import resize_temporal
from tvit_cli.portable.vit import TemporalViT, ViTConfig, resize_grid
from tvit_cli.settings.base import flag

NETWORK = (  # fields of ViTConfig that the weights fix
    "width", "depth", "num_heads", "mlp_width", "patch_size", "norm_eps", "activation", "qkv_bias",
    "extra_tokens", "pre_norm",
)  # fmt: skip
SCHEME = ("attention", "temporal_depth", "temporal_index")  # fields that fix the temporal modules


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

    def vit_config(self, *, frame_size: int | None = None, **shape: Any) -> ViTConfig:
        """Config of a temporal ViT for these weights, by default at their own frame size.

        `shape` holds the other fields of ViTConfig. Raises ValueError for values that contradict each other.
        """
        return ViTConfig(frame_size=frame_size or self.image_size, **shape, **self.network)

    def check_network(self, config: ViTConfig) -> None:
        """Raises ModelError if a model has another network."""
        for key, theirs in self.network.items():
            if (ours := getattr(config, key)) != theirs:
                raise ModelError(f"{self.name}: {key} is {theirs}, and {ours} in the model. Make them equal.")


@dataclass(frozen=True)
class LoadReport:
    """Number of matched tensors, names of new (ours alone) and unused (theirs alone) ones, notes for the user."""

    matched: int
    new: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]


def backbone_config(source: WeightsSource) -> PretrainedConfig:
    """Network and normalisation of a model folder, from its card.

    Raises ModelError for an unreadable card, and for weights with another hash than the card's.
    """
    card, config = load_config(source.folder)
    if source.sha256 != card.weights_sha256:
        raise ModelError(
            f"{source.name}: the weights are not those of the card beside them. Copy both again."
        )
    network = {key: getattr(config, key) for key in NETWORK}
    mean, std = card.preprocessing.mean, card.preprocessing.std
    return PretrainedConfig(
        source.name, source.revision, source.sha256, config.frame_size, network, mean, std
    )


@torch.no_grad()
def load_backbone(model: TemporalViT, source: WeightsSource) -> LoadReport:
    """Copies all but the classifier; between different attention schemes, only the counterparts of an image ViT.

    Positions are interpolated to another frame size, a temporal embedding to another number of times. Raises
    ModelError for tubelets of another size, unless those of the weights are single frames, and for tensors that
    are missing, unexpected, of the wrong shape or not finite.
    """
    (_, theirs), ours = load_config(source.folder), model.config
    stored = dict(TemporalViT(theirs, initialise=False).named_parameters())
    check_match(source, source.tensors, stored)
    parameters, copies = dict(model.named_parameters()), model.copied_parameters()
    excluded = ["classifier"]
    if any(getattr(theirs, key) != getattr(ours, key) for key in SCHEME):
        excluded += model.added_modules()
    else:
        copies = {}  # temporal attention was trained, too
    prefixes = tuple(f"{module}." for module in excluded)
    filled = [n for n in stored if n in parameters and n not in copies and not n.startswith(prefixes)]
    notes: dict[str, None] = {}  # an ordered set
    for name in stored:
        tensor = check_tensor(source, name, source.tensors[name])
        if name in filled:
            parameter = parameters[name]
            if tensor.dtype != parameter.dtype:
                notes[f"weights converted from {tensor.dtype} to {parameter.dtype}"] = None
            parameter.copy_(_resize(source, name, tensor.to(parameter.dtype), theirs, ours, notes))
    new = copy_parameters(parameters, copies, set(filled), notes)
    unused = tuple(name for name in stored if name not in filled)
    return LoadReport(len(filled), new, unused, tuple(notes))


def copy_parameters(
    parameters: Mapping[str, Tensor], copies: Mapping[str, str], filled: Set[str], notes: dict[str, None]
) -> tuple[str, ...]:
    """Copies parameters within a model (copy -> original); returns names of those neither filled nor copies."""
    for copy, original in copies.items():
        parameters[copy].copy_(parameters[original])
    if copies:
        notes["temporal attention starts as a copy of spatial attention"] = None
    return tuple(name for name in parameters if name not in filled and name not in copies)


def inflate_central(patches: Tensor, tubelet_size: int, notes: dict[str, None]) -> Tensor:
    """Patch weights of single frames for tubelets of several, (D, C, p, p) -> (D, t*C, p, p).

    ViViT's central-frame initialisation (arXiv:2103.15691): zeros for all frames but one.
    """
    centre = tubelet_size // 2
    notes[f"patch embedding: on frame {centre + 1} of each tubelet of {tubelet_size}"] = None
    frames = [torch.zeros_like(patches)] * tubelet_size
    frames[centre] = patches
    return torch.cat(frames, dim=1)


def _resize(
    source: WeightsSource,
    name: str,
    tensor: Tensor,
    theirs: ViTConfig,
    ours: ViTConfig,
    notes: dict[str, None],
) -> Tensor:
    """A tensor for a model of another frame size, number of times, or tubelet size."""
    if name == "patch_embed.weight" and theirs.tubelet_size != ours.tubelet_size:
        if theirs.tubelet_size > 1:
            raise ModelError(
                f"{source.name}: its tubelets are of {theirs.tubelet_size} frames, those of the model of "
                f"{ours.tubelet_size}. Give {flag('tubelet_size')} {theirs.tubelet_size}."
            )
        return inflate_central(tensor, ours.tubelet_size, notes)
    if name == "positions.spatial" and theirs.grid != ours.grid:
        before, after = (f"{config.grid} x {config.grid}" for config in (theirs, ours))
        notes[f"positions interpolated from {before} to {after} patches"] = None
        return resize_grid(tensor, (ours.grid, ours.grid))  # (1, P, D)
    times = ours.n_frames // ours.tubelet_size
    if name in ("temporal.embedding", "summary.times.embedding") and tensor.shape[1] != times:
        notes[f"temporal embedding interpolated from {tensor.shape[1]} to {times} times"] = None
        return resize_temporal(tensor, times)
    return tensor
