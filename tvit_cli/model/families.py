"""Families of pretrained image and video ViTs: their config values and tensor names, one row each."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tvit_cli.settings.card import IMAGENET_MEAN, IMAGENET_STD

POSITIONS = "positions"
TIMM = "timm"  # not a model_type of transformers: recognised by tensor names
REFERENCE = "temporal-vit"  # model_type of the reference implementation's video classifiers, see reference.py
EXPORTED = "tvit"  # model_type of tvit's Hugging Face exports
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # arXiv:2103.00020's code, clip/clip.py
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and std
# In the architecture, or the names of arguments, of timm's networks with rotary positions.
TIMM_ROTARY_MARKS = ("rope", "rot_pos", "eva02", "_pe_")
# timm's configs omit the number of attention heads: heads are 64 wide, in these models 80, 88, 104.
TIMM_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}

VIDEO = (
    "class_token",
    "positions",
    "norm",
    "last_norm_eps",
    "rotary_grid",
)  # fields of ViTConfig, as in an image ViT if absent
BLOCK = "norm1 attention.q attention.k attention.v attention.proj norm2 mlp.fc1 mlp.fc2"

Config = dict[str, Any]
Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Family:
    """Config values and tensor names of one family.

    The network's config is `defaults`, the file's own values (or those in its `section`), then `fixed`; `network`
    derives further values from it and from the tensors. Its keys are those of Hugging Face's ViT (`keys` maps them
    to the file's), and `extra_tokens`, `pre_norm`; of a video ViT also `num_frames`, `tubelet_size` and the
    fields of ViTConfig in VIDEO. Keys in `required` must have that value. `tensors` and `modules` (each a weight
    and a bias) map stored names, less `prefix`, to parameters of TemporalViT or to one of these, which `pretrained`
    converts:

        positions      one table: positions of the tokens before the patches, then of the patches; a video ViT
                       with `sinusoid` stores none
        <layer>.scale  a LayerScale, folded into the layer before it
        <layer>.qkv    queries, keys and values in one layer

    `#` stands for a block's number. Of alternatives (`a|b`) the first that block 0 has stored is used, else the
    last; an empty last one makes the name optional, those of a block all together. Names that start with one of
    `unused` are ignored; modules of `pooler` are read by --pool attentive. `leading` lists possible numbers of rows
    before the patches' own in the position table. `zeros` are set to 0 where the model has them. `gate` is the
    layer of an MLP's gate and that of its values, which are joined. `half_split`: rotary positions turn the pairs
    (i, i + half) of a head's channels. `licence` is that of weights without a README.md.
    """

    prefix: str
    defaults: Config
    tensors: dict[str, str]
    modules: dict[str, str]
    unused: tuple[str, ...]
    fixed: Config = field(default_factory=dict)
    network: Callable[[Config, Mapping[str, Tensor]], Config] | None = None
    section: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    required: Config = field(default_factory=dict)
    sinusoid: bool = False
    leading: tuple[int, ...] = (1,)
    antialias: bool = False
    gate: tuple[str, str] | tuple[()] = ()
    half_split: bool = False
    licence: str | None = None
    pooler: dict[str, str] = field(default_factory=dict)
    zeros: tuple[str, ...] = ()
    mean: Channels = IMAGENET_MEAN
    std: Channels = IMAGENET_STD
    rate: float | None = None  # of a video ViT: frames per second in its training

    def clip_seconds(self, name: str, frames: int) -> float | None:
        """Seconds that a clip showed in the training of a video ViT; None: the whole video, or unknown.

        VideoMAE's models for Something-Something V2 take a frame of each segment of the video.
        """
        return None if self.rate is None or "ssv2" in name.lower() else frames / self.rate

    def config(self, written: Config, stored: Mapping[str, Tensor]) -> Config:
        """The network's config from that of the file."""
        if self.section is not None:
            section = written.get(self.section)
            written = section if isinstance(section, dict) else {}
        written = written | {ours: written[theirs] for ours, theirs in self.keys.items() if theirs in written}
        raw = {**self.defaults, **written, **self.fixed}
        return raw if self.network is None else self.network(raw, stored)


def expand_names(
    tensors: Mapping[str, str], modules: Mapping[str, str], depth: int, stored: Collection[str]
) -> dict[str, str]:
    """Stored name -> our name for each tensor to read, from a table like those of Family."""
    leaves = {
        "|".join(f"{name}.{leaf}" for name in theirs.split("|")): f"{ours}.{leaf}"
        for theirs, ours in modules.items()
        for leaf in ("weight", "bias")
    }
    optional = {name.removesuffix("|") for name in tensors if "#" in name and name.endswith("|")}
    if any(name.replace("#", "0") in stored for name in optional):
        tensors = {name.removesuffix("|") if "#" in name else name: ours for name, ours in tensors.items()}
    names = {}
    for theirs, ours in {**tensors, **leaves}.items():
        *choices, last = theirs.split("|")
        chosen = next((choice for choice in choices if choice.replace("#", "0") in stored), last)
        for number in map(str, range(depth if "#" in chosen else bool(chosen))):
            names[chosen.replace("#", number)] = ours.replace("#", number)
    return names


def block_names(layer: str, theirs: str, ours: str = BLOCK, *, place: str = "blocks.#") -> dict[str, str]:
    """Table of a block's modules. ("enc.#", "ln|ln_1", "norm1") -> {"enc.#.ln|enc.#.ln_1": "blocks.#.norm1"}"""
    return {
        "|".join(f"{layer}.{name}" for name in names.split("|")): f"{place}.{our}"
        for names, our in zip(theirs.split(), ours.split(), strict=True)
    }


def find_family(config: Config, tensors: Collection[str]) -> Family | None:
    """The family of a config's model_type; without one, timm's of its architecture, if the tensors fit it."""
    if config.get("model_type", TIMM) != TIMM:
        return FAMILIES.get(str(config["model_type"]))
    architecture, family = str(config.get("architecture")), FAMILIES[TIMM]
    family = next((own for name, own in TIMM_ROTARY.items() if name in architecture), family)
    needed = {"cls_token", "patch_embed.proj.weight"} | ({"pos_embed"} & family.tensors.keys())
    return family if needed <= set(tensors) else None


def _hidden_width(config: Config) -> int | None:
    width, ratio = config["hidden_size"], config["mlp_ratio"]
    is_number = type(width) is int and isinstance(ratio, int | float) and 0 < ratio < math.inf
    return int(width * ratio) if is_number else None


def _dinov2(config: Config, tensors: Mapping[str, Tensor]) -> Config:
    hidden = _hidden_width(config)
    if hidden is not None and config["use_swiglu_ffn"]:
        # Two thirds, rounded up to a multiple of 8: as many parameters as an MLP without a gate.
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    activation = {"hidden_act": "swiglu"} if config["use_swiglu_ffn"] else {}
    return config | {"intermediate_size": hidden, "extra_tokens": config["num_register_tokens"]} | activation


def _dinov3(config: Config, tensors: Mapping[str, Tensor]) -> Config:
    activation = config["hidden_act"]
    if config["use_gated_mlp"]:
        activation = "swiglu" if activation == "silu" else f"gated {activation}"
    network = {"qkv_bias": config["query_bias"], "extra_tokens": config["num_register_tokens"]}
    return config | network | {"hidden_act": activation}


def _timm(config: Config, tensors: Mapping[str, Tensor]) -> Config:
    """The network's shape from its tensors: timm's config describes the preprocessing alone."""
    patch, positions = tensors["patch_embed.proj.weight"], tensors.get("pos_embed")
    width, patch_size = int(patch.shape[0]), int(patch.shape[-1])
    fc1, fc2 = (tensors.get(f"blocks.0.mlp.{layer}.weight", patch) for layer in ("fc1", "fc2"))
    swiglu = fc1.shape[0] == 2 * fc2.shape[-1] or "blocks.0.mlp.fc1_x.weight" in tensors
    # Leading rows of the table do not reach the next square. Without a table any size is as good: timm's of DINOv3.
    grid = 256 // patch_size if positions is None else math.isqrt(positions.shape[-2])
    rotary: Config = {"positions": config["positions"]} if "positions" in config else {}
    if positions is not None and rotary:
        rotary |= {"rotary_grid": grid}
    quick_gelu = "quickgelu" in str(config.get("architecture", ""))
    pre_norm = "norm_pre.weight" in tensors  # CLIP's, which has torch's own epsilon
    arguments = config.get("model_args")
    heads = arguments.get("num_heads") if isinstance(arguments, dict) else None
    return {
        "hidden_size": width,
        "num_hidden_layers": sum(n.startswith("blocks.") and n.endswith(".norm1.weight") for n in tensors),
        "num_attention_heads": heads or (width // 64 if rotary else TIMM_HEADS.get(width)),
        "intermediate_size": int(fc2.shape[-1]),
        "patch_size": patch_size,
        "image_size": patch_size * grid,
        "num_channels": int(patch.shape[1]),
        "hidden_act": "swiglu" if swiglu else "quick_gelu" if quick_gelu else "gelu",
        "layer_norm_eps": 1e-5 if pre_norm or rotary else 1e-6,
        "qkv_bias": not tensors.keys().isdisjoint({"blocks.0.attn.qkv.bias", "blocks.0.attn.q_bias"}),
        "extra_tokens": sum(tensors[n].numel() // width for n in ("reg_token", "dist_token") if n in tensors),
        "pre_norm": pre_norm,
        **rotary,
    }


def _videomae(config: Config, tensors: Mapping[str, Tensor]) -> Config:
    """Fine-tuned models normalise the mean of the tokens, with torch's own epsilon; pretrained ones the tokens."""
    pooled = {"norm": "pooled", "last_norm_eps": config["pooled_eps"] or config["layer_norm_eps"]}
    hidden = {"intermediate_size": _hidden_width(config)} if "mlp_ratio" in config else {}
    return config | hidden | (pooled if "fc_norm.weight" in tensors else {})


def _vjepa2(config: Config, tensors: Mapping[str, Tensor]) -> Config:
    return config | {"intermediate_size": _hidden_width(config)}


def _vivit(config: Config, tensors: Mapping[str, Tensor]) -> Config:
    sizes = config["tubelet_size"]
    if isinstance(sizes, list) and len(sizes) == 3:
        config = config | {"tubelet_size": sizes[0], "patch_size": sizes[1:]}
    return config


def sinusoids(count: int, width: int) -> Tensor:
    """Fixed positions of VideoMAE's tokens, float32 (count, width): pairs of sine and cosine (arXiv:1706.03762)."""
    pairs = torch.arange(width, dtype=torch.float64) // 2 * 2
    angles = torch.arange(count, dtype=torch.float64).unsqueeze(1) / 10000 ** (pairs / width)
    return torch.where(torch.arange(width) % 2 == 0, angles.sin(), angles.cos()).float()


_VIT = Family(
    prefix="vit.",
    defaults={  # transformers.ViTConfig
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 224, "patch_size": 16, "num_channels": 3,
        "qkv_bias": True, "extra_tokens": 0, "pre_norm": False,
    },
    tensors={"embeddings.cls_token": "positions.class_token", "embeddings.position_embeddings": POSITIONS},
    modules={"embeddings.patch_embeddings.projection": "patch_embed", "layernorm": "norm"} | block_names(
        "encoder.layer.#", "layernorm_before attention.attention.query attention.attention.key "
        "attention.attention.value attention.output.dense layernorm_after intermediate.dense output.dense",
    ),
    unused=("embeddings.mask_token", "pooler.dense.", "classifier.", "decoder.0.", "lm_head."),
)  # fmt: skip
_DINOV2 = replace(
    _VIT,
    prefix="dinov2.",
    defaults=_VIT.defaults | {
        "layer_norm_eps": 1e-6, "mlp_ratio": 4, "use_swiglu_ffn": False, "num_register_tokens": 0,
    },
    network=_dinov2,
    tensors=_VIT.tensors | {
        "embeddings.register_tokens": "positions.extra",
        "encoder.layer.#.layer_scale1.lambda1": "blocks.#.attention.proj.scale",
        "encoder.layer.#.layer_scale2.lambda1": "blocks.#.mlp.fc2.scale",
    },
    modules={"embeddings.patch_embeddings.projection": "patch_embed", "layernorm": "norm"} | block_names(
        "encoder.layer.#", "norm1 attention.attention.query attention.attention.key attention.attention.value "
        "attention.output.dense norm2 mlp.weights_in|mlp.fc1 mlp.weights_out|mlp.fc2",
    ),
)  # fmt: skip
_DINOV3 = Family(
    prefix="model.", network=_dinov3, half_split=True, gate=("gate_proj", "up_proj"),
    licence="other (dinov3-license)",
    defaults=_VIT.defaults | {  # transformers.DINOv3ViTConfig
        "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "layer_norm_eps": 1e-5,
        "use_gated_mlp": False, "num_register_tokens": 0, "query_bias": True, "positions": "rotary_2d",
    },
    required={"rope_theta": 100, "proj_bias": True, "mlp_bias": True},
    tensors={
        "embeddings.cls_token": "positions.class_token", "embeddings.register_tokens": "positions.extra",
        "layer.#.attention.k_proj.weight": "blocks.#.attention.k.weight",
        "layer.#.attention.k_proj.bias|": "blocks.#.attention.k.bias",
        "layer.#.layer_scale1.lambda1": "blocks.#.attention.proj.scale",
        "layer.#.layer_scale2.lambda1": "blocks.#.mlp.fc2.scale",
    },
    modules={"embeddings.patch_embeddings": "patch_embed", "norm": "norm"} | block_names(
        "layer.#", "norm1 attention.q_proj attention.v_proj attention.o_proj norm2 mlp.up_proj mlp.down_proj",
        "norm1 attention.q attention.v attention.proj norm2 mlp.fc1 mlp.fc2",
    ),
    unused=("embeddings.mask_token",), zeros=("blocks.#.attention.k.bias", "positions.class_position"),
)  # fmt: skip
_CLIP_BLOCK = block_names(
    "encoder.layers.#", "layer_norm1 self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj "
    "layer_norm2 mlp.fc1 mlp.fc2",
)  # fmt: skip
_CLIP = Family(
    prefix="vision_model.",
    defaults=_VIT.defaults | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_size": 32},
    fixed={"pre_norm": True, "qkv_bias": True},
    tensors={
        "embeddings.class_embedding": "positions.class_token",
        "embeddings.position_embedding.weight": POSITIONS,
        "embeddings.patch_embedding.weight": "patch_embed.weight",
    },
    modules={"pre_layrnorm": "pre_norm", "post_layernorm": "norm"} | _CLIP_BLOCK,
    unused=(
        "embeddings.position_ids", "visual_projection.weight", "text_projection.weight", "logit_scale",
        "classifier.",
    ),
    zeros=("patch_embed.bias",), mean=CLIP_MEAN, std=CLIP_STD,
)  # fmt: skip
_SIGLIP = replace(  # and SigLIP 2 of a fixed size
    _CLIP,
    defaults=_VIT.defaults | {  # transformers.SiglipVisionConfig
        "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "class_token": False,
    },
    fixed={},
    tensors={"embeddings.position_embedding.weight": POSITIONS},
    modules={"embeddings.patch_embedding": "patch_embed", "post_layernorm": "norm"} | _CLIP_BLOCK,
    unused=("embeddings.position_ids", "head.", "logit_scale", "logit_bias", "classifier."),
    leading=(0,), zeros=(), mean=HALF, std=HALF,
)  # fmt: skip
_VIDEOMAE_BLOCK = "encoder.layer.#.attention.attention"
_VIDEOMAE = Family(
    prefix="videomae.",
    defaults=_VIT.defaults | {  # transformers.VideoMAEConfig
        "num_frames": 16, "tubelet_size": 2, "class_token": False, "positions": "joint", "pooled_eps": 1e-5,
    },
    keys={"qkv_bias": "qv_bias"}, network=_videomae, sinusoid=True,
    rate=7.5,  # every fourth frame of Kinetics at 30 per second (arXiv:2203.12602)
    tensors={
        f"{_VIDEOMAE_BLOCK}.query.weight": "blocks.#.attention.q.weight",
        f"{_VIDEOMAE_BLOCK}.key.weight": "blocks.#.attention.k.weight",
        f"{_VIDEOMAE_BLOCK}.value.weight": "blocks.#.attention.v.weight",
        f"{_VIDEOMAE_BLOCK}.q_bias": "blocks.#.attention.q.bias",
        f"{_VIDEOMAE_BLOCK}.v_bias": "blocks.#.attention.v.bias",
    },
    modules={"embeddings.patch_embeddings.projection": "patch_embed", "fc_norm|layernorm": "norm"} | block_names(
        "encoder.layer.#",
        "layernorm_before attention.output.dense layernorm_after intermediate.dense output.dense",
        "norm1 attention.proj norm2 mlp.fc1 mlp.fc2",
    ),
    # A key's bias adds the same to all scores of a query, which softmax ignores.
    zeros=("blocks.#.attention.k.bias",),
    unused=("decoder.", "encoder_to_decoder.", "mask_token", "classifier."),
)  # fmt: skip
_VJEPA2_POOLER = block_names(
    "pooler.self_attention_layers.#", "layer_norm1 self_attn.q_proj self_attn.k_proj self_attn.v_proj "
    "self_attn.out_proj layer_norm2 mlp.fc1 mlp.fc2", place="pool.layers.#",
) | block_names(
    "pooler.cross_attention_layer", "layer_norm1 cross_attn.q_proj cross_attn.k_proj cross_attn.v_proj layer_norm2 "
    "mlp.fc1 mlp.fc2", "norm1 cross.q cross.k cross.v norm2 mlp.fc1 mlp.fc2", place="pool",
)  # fmt: skip
FAMILIES: dict[str, Family] = {  # by the model_type in config.json
    "vit": _VIT,
    "deit": replace(
        _VIT, prefix="deit.", fixed={"extra_tokens": 1}, leading=(2,),
        tensors=_VIT.tensors | {"embeddings.distillation_token": "positions.extra"},
        unused=(*_VIT.unused, "cls_classifier.", "distillation_classifier."),
    ),
    "dinov2": _DINOV2,
    "dinov2_with_registers": replace(
        _DINOV2, prefix="dinov2_with_registers.", defaults=_DINOV2.defaults | {"num_register_tokens": 4},
        antialias=True,
    ),
    "dinov3_vit": _DINOV3,
    "clip_vision_model": _CLIP,
    "clip": replace(_CLIP, unused=(*_CLIP.unused, "text_model."), section="vision_config"),
    "siglip_vision_model": _SIGLIP,
    "siglip": replace(_SIGLIP, unused=(*_SIGLIP.unused, "text_model."), section="vision_config"),
    "videomae": _VIDEOMAE,
    "VideoMAEv2_Base": Family(  # of all sizes
        prefix="model.", section="model_config", sinusoid=True, network=_videomae, rate=_VIDEOMAE.rate,
        required={"cos_attn": False, "init_values": 0, "use_learnable_pos_emb": False},
        defaults=_VIDEOMAE.defaults | {
            "mlp_ratio": 4, "layer_norm_eps": 1e-6, "pooled_eps": None, "num_frames": 16, "num_channels": 3,
            **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size")),
        },
        keys={
            "hidden_size": "embed_dim", "num_hidden_layers": "depth", "num_attention_heads": "num_heads",
            "image_size": "img_size", "num_channels": "in_chans",
        },
        tensors={
            "blocks.#.attn.qkv.weight": "blocks.#.attention.qkv.weight",
            "blocks.#.attn.q_bias": "blocks.#.attention.q.bias",
            "blocks.#.attn.v_bias": "blocks.#.attention.v.bias",
        },
        modules={"patch_embed.proj": "patch_embed", "fc_norm|norm": "norm"} | block_names(
            "blocks.#", "norm1 attn.proj norm2 mlp.fc1 mlp.fc2", "norm1 attention.proj norm2 mlp.fc1 mlp.fc2",
        ),
        zeros=_VIDEOMAE.zeros, unused=("head.",),
    ),
    "vjepa2": Family(
        prefix="vjepa2.", network=_vjepa2,
        rate=4,  # arXiv:2506.09985
        defaults=_VIT.defaults | {  # transformers.VJEPA2Config
            "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "mlp_ratio": 4,
            "layer_norm_eps": 1e-6, "image_size": 256, "num_frames": 64, "tubelet_size": 2,
            "class_token": False, "positions": "rotary", "num_pooler_layers": 3,
        },
        keys={"image_size": "crop_size", "num_frames": "frames_per_clip", "num_channels": "in_chans"},
        tensors={},
        modules={
            "encoder.embeddings.patch_embeddings.proj": "patch_embed", "encoder.layernorm": "norm",
        } | block_names(
            "encoder.layer.#", "norm1 attention.query attention.key attention.value attention.proj norm2 mlp.fc1 "
            "mlp.fc2",
        ),
        unused=("predictor.", "pooler.", "classifier."), pooler=_VJEPA2_POOLER,
    ),
    "vivit": replace(
        _VIT, prefix="vivit.", network=_vivit,
        rate=12.5,  # every second of 25 per second (arXiv:2103.15691)
        mean=(0.75, 0.75, 0.75), std=(0.25, 0.25, 0.25),  # its processor's 0.5 and 0.5 after x / 127.5 - 1
        defaults=_VIT.defaults | {
            "hidden_act": "gelu_fast", "layer_norm_eps": 1e-6, "num_frames": 32, "tubelet_size": [2, 16, 16],
            "positions": "joint",
        },
    ),
    TIMM: Family(
        prefix="", defaults={}, network=_timm,
        tensors={
            "cls_token": "positions.class_token", "pos_embed": POSITIONS,
            "reg_token|": "positions.extra", "dist_token|": "positions.extra",
            "blocks.#.ls1.gamma|": "blocks.#.attention.proj.scale", "blocks.#.ls2.gamma|": "blocks.#.mlp.fc2.scale",
            "patch_embed.proj.weight": "patch_embed.weight", "patch_embed.proj.bias|": "patch_embed.bias",
        },
        modules={"norm_pre": "pre_norm", "norm": "norm"} | block_names(
            "blocks.#", "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2",
            "norm1 attention.qkv attention.proj norm2 mlp.fc1 mlp.fc2",
        ),
        unused=("head.", "head_dist."), leading=(1, 2, 0), zeros=("patch_embed.bias",), antialias=True,
    ),
}  # fmt: skip
TIMM_ROTARY = {  # by the name in timm's architecture
    "_dinov3": replace(
        FAMILIES[TIMM], defaults={"positions": "rotary_2d"}, half_split=True, gate=("fc1_g", "fc1_x"),
        tensors={
            "cls_token": "positions.class_token", "reg_token": "positions.extra",
            "blocks.#.attn.qkv.weight": "blocks.#.attention.qkv.weight",
            "blocks.#.attn.q_bias|": "blocks.#.attention.q.bias",
            "blocks.#.attn.v_bias|": "blocks.#.attention.v.bias",
            "blocks.#.gamma_1": "blocks.#.attention.proj.scale", "blocks.#.gamma_2": "blocks.#.mlp.fc2.scale",
        },
        modules={"patch_embed.proj": "patch_embed", "norm": "norm"} | block_names(
            "blocks.#", "norm1 attn.proj norm2 mlp.fc1_x|mlp.fc1 mlp.fc2",
            "norm1 attention.proj norm2 mlp.fc1 mlp.fc2",
        ),
        zeros=_DINOV3.zeros, licence=_DINOV3.licence,
    ),
    "vit_pe_core": replace(
        FAMILIES[TIMM], defaults={"positions": "grid_rotary_2d"}, mean=HALF, std=HALF,
        unused=(*FAMILIES[TIMM].unused, "attn_pool."),
    ),
}  # fmt: skip
NOT_READ = {  # model_type -> reason and next step
    **dict.fromkeys(
        ("siglip2", "siglip2_vision_model"),
        "SigLIP 2 NaFlex, whose pictures have any shape; take one of a fixed size, such as "
        "google/siglip2-base-patch16-224",
    ),
}
