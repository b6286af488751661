"""The families of pretrained ViTs: how each writes its config and names its tensors.

A family maps its tensors to our parameters, or to one of these, which `pretrained` takes apart:

positions      one table: the positions of the tokens before the patches, then those of the patches
<layer>.scale  a LayerScale, folded into the layer before it: the numbers are the same, and it is one thing less
<layer>.qkv    queries, keys and values in one layer
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tvit_cli.settings.card import IMAGENET_MEAN, IMAGENET_STD

POSITIONS = "positions"
TIMM = "timm"  # no model_type of any config: its weights are told by their names
REFERENCE = (
    "temporal-vit"  # the reference implementation's model_type: a classifier of clips, see reference.py
)
EXPORTED = "tvit"  # the model_type of a Hugging Face export of tvit's own
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # arXiv:2103.00020's code, clip/clip.py
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# timm's configs do not say the number of attention heads: they are 64 wide, in these models 80, 88, 104.
TIMM_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}

Config = dict[str, Any]
Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Family:
    """How one family writes its config and its weights.

    `defaults` are the config's values where the file leaves them out; `network` turns a config, with the
    tensors, into one with the keys of Hugging Face's ViT and `extra_tokens`, `pre_norm`. `names` maps tensor
    names, less a prefix, to ours. `unused` are tensors, or with a dot at the end groups of them, that may lie
    beside the backbone. `leading` counts the rows of the position table before the patches' own.
    """

    defaults: Mapping[str, Any]
    network: Callable[[Config, Mapping[str, Tensor]], Config]
    names: Callable[[int, Collection[str]], dict[str, str]]
    prefix: str
    unused: tuple[str, ...]
    section: str | None = None
    leading: tuple[int, ...] = (1,)
    antialias: bool = False
    zeros: tuple[str, ...] = ()
    mean: Channels = IMAGENET_MEAN
    std: Channels = IMAGENET_STD

    def is_unused(self, name: str) -> bool:
        """Whether a tensor may lie beside the backbone and is not read."""
        return any(name == entry or (entry.endswith(".") and name.startswith(entry)) for entry in self.unused)


def find_family(config: Config, tensors: Collection[str]) -> Family | None:
    """The family of a config, or without one of tensors that have timm's names."""
    if config.get("model_type", TIMM) != TIMM:
        return FAMILIES.get(str(config["model_type"]))
    is_timm = {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= set(tensors)
    return FAMILIES[TIMM] if is_timm else None


def _as_written(config: Config, tensors: Mapping[str, Tensor]) -> Config:
    return config


def _deit(config: Config, tensors: Mapping[str, Tensor]) -> Config:
    return {**config, "extra_tokens": 1}  # the distillation token


def _dinov2(config: Config, tensors: Mapping[str, Tensor]) -> Config:
    width, ratio = config["hidden_size"], config["mlp_ratio"]
    is_number = isinstance(ratio, int | float) and math.isfinite(ratio)
    hidden = int(width * ratio) if type(width) is int and is_number else None
    changes: Config = {"intermediate_size": hidden, "extra_tokens": config["num_register_tokens"]}
    if config["use_swiglu_ffn"]:
        # Two thirds, rounded up to a multiple of 8: two layers in stead of one weigh as much as before.
        rounded = None if hidden is None else (int(hidden * 2 / 3) + 7) // 8 * 8
        changes |= {"intermediate_size": rounded, "hidden_act": "swiglu"}
    return {**config, **changes}


def _clip(config: Config, tensors: Mapping[str, Tensor]) -> Config:
    return {**config, "pre_norm": True, "qkv_bias": True}


def _timm(config: Config, tensors: Mapping[str, Tensor]) -> Config:
    """timm's config says how pictures are prepared; the shape is that of the tensors."""
    patch, positions = tensors["patch_embed.proj.weight"], tensors["pos_embed"]
    width, patch_size = int(patch.shape[0]), int(patch.shape[-1])
    extra = sum(tensors[name].numel() // width for name in ("reg_token", "dist_token") if name in tensors)
    fc1, fc2 = (tensors.get(f"blocks.0.mlp.{layer}.weight", patch) for layer in ("fc1", "fc2"))
    swiglu = fc1.shape[0] == 2 * fc2.shape[-1]
    architecture = str(config.get("architecture", ""))
    pre_norm = "norm_pre.weight" in tensors  # CLIP's, which has torch's own epsilon
    arguments = config.get("model_args")
    heads = arguments.get("num_heads") if isinstance(arguments, dict) else None
    depth = sum(name.startswith("blocks.") and name.endswith(".norm1.weight") for name in tensors)
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads or TIMM_HEADS.get(width),
        "intermediate_size": int(fc2.shape[-1]),
        "patch_size": patch_size,
        "image_size": patch_size * math.isqrt(positions.shape[-2]),  # a few rows more make no square more
        "num_channels": int(patch.shape[1]),
        "hidden_act": "swiglu" if swiglu else "quick_gelu" if "quickgelu" in architecture else "gelu",
        "layer_norm_eps": 1e-5 if pre_norm else 1e-6,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "extra_tokens": extra,
        "pre_norm": pre_norm,
    }


def _hugging_face_names(depth: int, stored: Collection[str]) -> dict[str, str]:
    return _encoder_names(depth, "layernorm_before", "layernorm_after", "intermediate.dense", "output.dense")


def _deit_names(depth: int, stored: Collection[str]) -> dict[str, str]:
    names = _hugging_face_names(depth, stored)
    return {**names, "embeddings.distillation_token": "positions.extra"}


def _dinov2_names(depth: int, stored: Collection[str]) -> dict[str, str]:
    swiglu = "encoder.layer.0.mlp.weights_in.weight" in stored
    layers = ("mlp.weights_in", "mlp.weights_out") if swiglu else ("mlp.fc1", "mlp.fc2")
    names = _encoder_names(depth, "norm1", "norm2", *layers)
    names["embeddings.register_tokens"] = "positions.extra"
    for index in range(depth):
        names[f"encoder.layer.{index}.layer_scale1.lambda1"] = f"blocks.{index}.attention.proj.scale"
        names[f"encoder.layer.{index}.layer_scale2.lambda1"] = f"blocks.{index}.mlp.fc2.scale"
    return names


def _encoder_names(depth: int, norm1: str, norm2: str, fc1: str, fc2: str) -> dict[str, str]:
    """Names that Hugging Face gives to a ViT's tensors, where those in a layer are called so."""
    modules = {"embeddings.patch_embeddings.projection": "patch_embed", "layernorm": "norm"}
    for index in range(depth):
        layer, block = f"encoder.layer.{index}", f"blocks.{index}"
        modules |= {
            f"{layer}.{norm1}": f"{block}.norm1",
            f"{layer}.attention.attention.query": f"{block}.attention.q",
            f"{layer}.attention.attention.key": f"{block}.attention.k",
            f"{layer}.attention.attention.value": f"{block}.attention.v",
            f"{layer}.attention.output.dense": f"{block}.attention.proj",
            f"{layer}.{norm2}": f"{block}.norm2",
            f"{layer}.{fc1}": f"{block}.mlp.fc1",
            f"{layer}.{fc2}": f"{block}.mlp.fc2",
        }
    return {
        "embeddings.cls_token": "positions.class_token",
        "embeddings.position_embeddings": POSITIONS,
        **_with_leaves(modules),
    }


def _clip_names(depth: int, stored: Collection[str]) -> dict[str, str]:
    modules = {"pre_layrnorm": "pre_norm", "post_layernorm": "norm"}
    for index in range(depth):
        layer, block = f"encoder.layers.{index}", f"blocks.{index}"
        modules |= {f"{layer}.layer_norm{n}": f"{block}.norm{n}" for n in (1, 2)}
        modules |= {f"{layer}.self_attn.{n}_proj": f"{block}.attention.{n}" for n in ("q", "k", "v")}
        modules[f"{layer}.self_attn.out_proj"] = f"{block}.attention.proj"
        modules |= {f"{layer}.mlp.fc{n}": f"{block}.mlp.fc{n}" for n in (1, 2)}
    return {
        "embeddings.class_embedding": "positions.class_token",
        "embeddings.position_embedding.weight": POSITIONS,
        "embeddings.patch_embedding.weight": "patch_embed.weight",
        **_with_leaves(modules),
    }


def _timm_names(depth: int, stored: Collection[str]) -> dict[str, str]:
    modules = {"patch_embed.proj": "patch_embed", "norm_pre": "pre_norm", "norm": "norm"}
    names = {"cls_token": "positions.class_token", "pos_embed": POSITIONS}
    names |= {name: "positions.extra" for name in ("reg_token", "dist_token") if name in stored}
    for index in range(depth):
        block = f"blocks.{index}"
        modules |= {f"{block}.{norm}": f"{block}.{norm}" for norm in ("norm1", "norm2")}
        modules |= {f"{block}.attn.{layer}": f"{block}.attention.{layer}" for layer in ("qkv", "proj")}
        modules |= {f"{block}.mlp.{layer}": f"{block}.mlp.{layer}" for layer in ("fc1", "fc2")}
        if f"{block}.ls1.gamma" in stored:
            names[f"{block}.ls1.gamma"] = f"{block}.attention.proj.scale"
            names[f"{block}.ls2.gamma"] = f"{block}.mlp.fc2.scale"
    names |= _with_leaves(modules)
    return {k: v for k, v in names.items() if k != "patch_embed.proj.bias" or k in stored}


def _with_leaves(modules: Mapping[str, str]) -> dict[str, str]:
    return {
        f"{theirs}.{leaf}": f"{ours}.{leaf}"
        for theirs, ours in modules.items()
        for leaf in ("weight", "bias")
    }


def _layers(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{leaf}" for name in names for leaf in ("weight", "bias"))


_VIT: dict[str, Any] = {  # transformers.ViTConfig
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
    "extra_tokens": 0,
    "pre_norm": False,
}
_DINOV2 = _VIT | {  # transformers.Dinov2Config
    "layer_norm_eps": 1e-6,
    "mlp_ratio": 4,
    "use_swiglu_ffn": False,
    "num_register_tokens": 0,
}
_CLIP = _VIT | {  # transformers.CLIPVisionConfig
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "patch_size": 32,
}
_BESIDE_VIT = ("embeddings.mask_token", *_layers("pooler.dense", "classifier", "decoder.0", "lm_head"))
_BESIDE_CLIP = (
    "embeddings.position_ids",
    "visual_projection.weight",
    "text_projection.weight",
    "logit_scale",
    *_layers("classifier"),
)
FAMILIES: dict[str, Family] = {  # by the model_type in config.json
    "vit": Family(_VIT, _as_written, _hugging_face_names, "vit.", _BESIDE_VIT),
    "deit": Family(
        _VIT, _deit, _deit_names, "deit.",
        (*_BESIDE_VIT, *_layers("cls_classifier", "distillation_classifier")),
        leading=(2,),
    ),
    "dinov2": Family(_DINOV2, _dinov2, _dinov2_names, "dinov2.", _BESIDE_VIT),
    "dinov2_with_registers": Family(
        _DINOV2 | {"num_register_tokens": 4}, _dinov2, _dinov2_names, "dinov2_with_registers.", _BESIDE_VIT,
        antialias=True,
    ),
    "clip_vision_model": Family(
        _CLIP, _clip, _clip_names, "vision_model.", _BESIDE_CLIP,
        zeros=("patch_embed.bias",), mean=CLIP_MEAN, std=CLIP_STD,
    ),
    "clip": Family(
        _CLIP, _clip, _clip_names, "vision_model.", (*_BESIDE_CLIP, "text_model."), section="vision_config",
        zeros=("patch_embed.bias",), mean=CLIP_MEAN, std=CLIP_STD,
    ),
    TIMM: Family(
        {}, _timm, _timm_names, "", _layers("head", "head_dist"),
        leading=(1, 2, 0), zeros=("patch_embed.bias",), antialias=True,
    ),
}  # fmt: skip
