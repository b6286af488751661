"""Shape of a temporal ViT: names and numbers, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

ATTENTIONS = ("joint", "divided", "factorized", "space")
POOLS = ("class", "mean", "attentive")
FIRST = "first"  # pool of VideoMAE classifiers that transformers trained without use_mean_pooling
POSITIONS = ("grid", "joint", "rotary", "rotary_2d", "grid_rotary_2d")
NORMS = ("tokens", "pooled")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "swiglu")
DIVISORS = {"frame_size": "patch_size", "n_frames": "tubelet_size", "width": "num_heads"}
TEMPORAL_DEPTH = 2


@dataclass(frozen=True)
class ViTConfig:
    """Shape of a temporal ViT. Raises ValueError for invalid values and for values that contradict each other.

    `mlp_width` None becomes four times the width, `temporal_depth` None TEMPORAL_DEPTH with factorized attention.
    `n_frames` and `frame_size` set the sizes of the temporal and spatial embeddings, which are interpolated for
    other clips. `extra_tokens` follow the class token. `pre_norm` is a LayerNorm before the first block.
    `temporal_index` numbers the rows of the temporal embedding by frame, or by token as the reference does.
    `feature_norm` standardises features before the classifier. `pool_depth` is the number of self-attention blocks
    in an attentive pooler (see `AttentivePooler`); None is a mean with learned weights (`AttentivePool`). `pool`
    first takes the first token, as if it were a class token.

    `class_token`: video ViTs and SigLIP have none. `positions`: a spatial embedding (grid) or rotary positions of
    rows and columns in every block (rotary_2d) or both (grid_rotary_2d), beside a temporal embedding; of video ViTs
    one table over space and time (joint) or rotary positions of times, rows and columns (rotary). `rotary_grid`:
    patches along a side that the rotary positions of grid_rotary_2d were trained for. `norm`: the last LayerNorm is
    applied to the tokens or to the pooled vector; `last_norm_eps` None is `norm_eps`.
    """

    num_classes: int
    frame_size: int = 224
    patch_size: int = 16
    n_frames: int = 8
    tubelet_size: int = 1
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int | None = None
    norm_eps: float = 1e-6
    activation: str = "gelu"
    qkv_bias: bool = True
    attention: str = "joint"
    num_channels: int = 3
    pool: str = "class"
    temporal_depth: int | None = None
    extra_tokens: int = 0
    pre_norm: bool = False
    temporal_index: str = "frame"
    feature_norm: bool = False
    class_token: bool = True
    positions: str = "grid"
    norm: str = "tokens"
    last_norm_eps: float | None = None
    pool_depth: int | None = None
    rotary_grid: int | None = None

    def __post_init__(self) -> None:
        if self.mlp_width is None:
            object.__setattr__(self, "mlp_width", 4 * self.width)
        if self.temporal_depth is None and self.attention == "factorized":
            object.__setattr__(self, "temporal_depth", TEMPORAL_DEPTH)
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), str(field.type))
        for name, divisor_name in DIVISORS.items():
            value, divisor = getattr(self, name), getattr(self, divisor_name)
            if value % divisor:
                below = value // divisor * divisor
                nearest = f"{below} or {below + divisor}" if below else f"{divisor}"
                problem = f"{name} {value} is not a multiple of {divisor_name} {divisor}"
                raise ValueError(f"{problem}; use {nearest}")
        indices = ("frame", "token")
        known = {
            "activation": ACTIVATIONS,
            "attention": ATTENTIONS,
            "pool": (*POOLS, FIRST),
            "temporal_index": indices,
        }
        known |= {"positions": POSITIONS, "norm": NORMS}
        for name, choices in known.items():
            if (choice := getattr(self, name)) not in choices:
                raise ValueError(f"{name} {choice!r} is not known; use one of {', '.join(choices)}")
        if self.temporal_index == "token" and self.attention != "joint":
            raise ValueError(f"temporal_index token needs attention joint, not {self.attention}")
        if self.attention == "space" and self.tubelet_size > 1:
            problem = f"tubelet_size {self.tubelet_size} depends on the order of frames"
            raise ValueError(f"{problem}, attention space does not; use tubelet_size 1, or another attention")
        if self.temporal_depth is not None and self.attention != "factorized":
            problem = f"{self.temporal_depth}: attention {self.attention} has no temporal blocks"
            raise ValueError(f"temporal_depth {problem}; leave it out, or use attention factorized")
        if self.pool_depth is not None and self.pool != "attentive":
            problem = f"{self.pool_depth}: pool {self.pool} has no blocks"
            raise ValueError(f"pool_depth {problem}; leave it out, or use pool attentive")
        if self.pool == "class" and not self.class_token:
            raise ValueError("pool class needs a class token, and this network has none; use pool mean")
        if self.is_video and self.attention != "joint":
            problem = f"attention {self.attention}: a network with {self.positions} positions"
            raise ValueError(f"{problem} attends over all tokens; use attention joint")
        if not self.class_token and self.extra_tokens:
            raise ValueError(
                f"extra_tokens {self.extra_tokens}: they follow a class token; use extra_tokens 0"
            )
        head_width = self.width // self.num_heads
        if self.positions == "rotary" and head_width < 6:
            raise ValueError(f"rotary positions need heads of 6 or more channels, not {head_width}")
        if (self.positions == "grid_rotary_2d") != (self.rotary_grid is not None):
            raise ValueError(
                f"rotary_grid {self.rotary_grid} with positions {self.positions}; give both or none"
            )
        if self.positions.endswith("rotary_2d") and head_width % 4:
            problem = f"heads of a multiple of 4 channels, not {head_width}"
            raise ValueError(f"rotary positions of rows and columns need {problem}")

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.frame_size // self.patch_size

    @property
    def is_video(self) -> bool:
        """Whether positions cover time, as those of a video ViT do; others get a temporal embedding."""
        return self.positions in ("joint", "rotary")

    @property
    def patches_per_frame(self) -> int:
        """P."""
        return self.grid**2

    @property
    def hidden_width(self) -> int:
        """Width inside the MLP of a block: `mlp_width` with its default resolved."""
        assert self.mlp_width is not None
        return self.mlp_width

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `card.json` stores them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ViTConfig:
        """The inverse of `to_dict`. Raises ValueError for unknown or missing keys and for invalid values."""
        known = [field.name for field in fields(cls)]
        if unknown := [key for key in values if key not in known]:
            raise ValueError(f"unknown keys {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
        if "num_classes" not in values:
            raise ValueError("the key 'num_classes' is missing")
        return cls(**values)


def _check_type(name: str, value: object, annotation: str) -> None:
    kind = annotation.removesuffix(" | None")
    if value is None and kind != annotation:
        return
    least = int(name not in ("extra_tokens", "pool_depth"))
    is_valid, wanted = {
        "int": (type(value) is int and value >= least, f"a whole number, {least} or more"),
        "float": (isinstance(value, int | float) and value > 0, "a number above 0"),
        "bool": (isinstance(value, bool), "true or false"),
        "str": (isinstance(value, str), "a name"),
    }[kind]
    if not is_valid:
        raise ValueError(f"{name} is {value!r}; it must be {wanted}")
