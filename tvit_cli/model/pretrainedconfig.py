"""What pretrained weights say about themselves, and what became of them in a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvit_cli.errors import ModelError
from tvit_cli.model.families import Channels
from tvit_cli.model.vit import ViTConfig

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
