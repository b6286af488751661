"""Models trained by the reference implementation, loaded as a TemporalViT.

Its code: https://github.com/detker/Temporal-Vision-Transformer-LoRA. Differences of its network:

- The class token is the last one. Attention does not depend on the order of tokens, so here it is the first.
- Positions are sinusoids whose frequencies fall by 1e-4 per channel pair instead of over all pairs. The `pos_embed`
  in its files is unused.
- The temporal sinusoid is indexed by the token's number modulo the frames (`temporal_index` token).
- Without its fused attention it scales the logits by the whole width, not by a head's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import tvit_cli
from tvit_cli.model.families import EXPORTED, REFERENCE, Config, block_names, expand_names
from tvit_cli.model.folder import CARD_FILE, CONFIG_FILE, export_not_loadable
from tvit_cli.model.pretrained_config import whole_number
from tvit_cli.model.weights import MERGED_FILE, WeightsSource, check_match, check_tensor
from tvit_cli.portable.vit import TemporalViT, ViTConfig
from tvit_cli.settings.card import BaseWeights, ModelCard, Preprocessing

# UCF101's class folders, sorted as the reference sorts them: capitals first.
_UCF101 = """
ApplyEyeMakeup ApplyLipstick Archery BabyCrawling BalanceBeam BandMarching BaseballPitch Basketball BasketballDunk
BenchPress Biking Billiards BlowDryHair BlowingCandles BodyWeightSquats Bowling BoxingPunchingBag BoxingSpeedBag
BreastStroke BrushingTeeth CleanAndJerk CliffDiving CricketBowling CricketShot CuttingInKitchen Diving Drumming
Fencing FieldHockeyPenalty FloorGymnastics FrisbeeCatch FrontCrawl GolfSwing Haircut HammerThrow Hammering
HandstandPushups HandstandWalking HeadMassage HighJump HorseRace HorseRiding HulaHoop IceDancing JavelinThrow
JugglingBalls JumpRope JumpingJack Kayaking Knitting LongJump Lunges MilitaryParade Mixing MoppingFloor Nunchucks
ParallelBars PizzaTossing PlayingCello PlayingDaf PlayingDhol PlayingFlute PlayingGuitar PlayingPiano PlayingSitar
PlayingTabla PlayingViolin PoleVault PommelHorse PullUps Punch PushUps Rafting RockClimbingIndoor RopeClimbing
Rowing SalsaSpin ShavingBeard Shotput SkateBoarding Skiing Skijet SkyDiving SoccerJuggling SoccerPenalty
StillRings SumoWrestling Surfing Swing TableTennisShot TaiChi TennisSwing ThrowDiscus TrampolineJumping Typing
UnevenBars VolleyballSpiking WalkingWithDog WallPushups WritingOnBoard YoYo
"""
UCF101 = tuple(_UCF101.split())
PREFIX = "model."  # of the published weights; those of the training script have none
UNUSED = "pos_embed"
SCALE_TO = 256  # for every frame size
SIZES = {  # field of ViTConfig -> key of the reference's config
    "num_classes": "num_classes",
    "frame_size": "img_wh",
    "patch_size": "patch_size",
    "n_frames": "n_frames",
    "width": "embd_dim",
    "depth": "num_blocks",
    "num_heads": "num_heads",
}
DEFAULTS: Config = {  # of its config
    "img_wh": 224, "in_channels": 3, "patch_size": 16, "embd_dim": 768, "patch_embd_bias": True, "n_frames": 8,
    "num_heads": 12, "use_flash_attention": True, "mlp_factor": 4, "num_blocks": 12, "num_classes": 1000,
    "pooling": "cls",
}  # fmt: skip


@dataclass(frozen=True)
class ReferenceModel:
    """A model with a card as if tvit had trained it, and notes on assumptions.

    `labels_are_guessed` if the files do not name the classes: the card then has UCF101's or numbers.
    """

    model: TemporalViT
    card: ModelCard
    labels_are_guessed: bool
    notes: tuple[str, ...]


def load_reference(source: WeightsSource) -> ReferenceModel:
    """The model, ready to predict (`eval()`), in float32 on the CPU.

    Raises ModelError for other weights, for tensors that are missing, unexpected, of the wrong shape or not finite,
    and for a config that no network can have.
    """
    written = source.read_json(CONFIG_FILE)
    stored = _stored(source, written)
    given = {**_config_from_shapes(stored), **written}
    raw = {**DEFAULTS, **given}
    config = _config(source, raw)
    model = TemporalViT(config, initialise=False)
    model.load_state_dict(_state(source, raw, stored, model), assign=True)
    labels, notes = named_labels(source, written, config.num_classes), []
    labels_are_guessed = labels is None
    if labels is None:
        labels, assumption = UCF101, "UCF101's are assumed, in sorted order."
        if config.num_classes != len(UCF101):
            labels = tuple(f"class {n}" for n in range(config.num_classes))
            assumption = (
                "they are numbered in the sorted order of their training folders. "
                f'"id2label" in a {CONFIG_FILE} beside the weights names them.'
            )
        notes.append(f"The weights do not name their {config.num_classes} classes: {assumption}")
    if assumed := [f'"{key}": {json.dumps(value)}' for key, value in DEFAULTS.items() if key not in given]:
        notes.append(
            f"The weights leave values open, and the reference's defaults are assumed: {', '.join(assumed)}. A "
            f"{CONFIG_FILE} beside the weights can give others."
        )
    card = ModelCard(
        tvit_version=tvit_cli.__version__,
        labels=labels,
        model=config.to_dict(),
        preprocessing=Preprocessing(
            n_frames=config.n_frames, frame_size=config.frame_size, resize="squash", scale_to=SCALE_TO
        ),
        base=BaseWeights(name=source.name, revision=source.revision, sha256=source.sha256),
        weights_sha256=source.sha256,
    )
    return ReferenceModel(model.eval(), card, labels_are_guessed, tuple(notes))


def named_labels(source: WeightsSource, written: Config, count: int) -> tuple[str, ...] | None:
    """The config's class names; None without names or with transformers' placeholders, LABEL_0 …"""
    named = written.get("id2label", {})
    names = {str(name) for name in named.values()} if isinstance(named, dict) else set()
    if named is None or (isinstance(named, dict) and all(re.fullmatch(r"LABEL_\d+", n) for n in names)):
        return None
    keys = [str(number) for number in range(count)]
    if not isinstance(named, dict) or set(named) != set(keys) or len(names) < count:
        rule = f"must have a different name for each class, 0 to {count - 1}"
        raise source.error(f"id2label in {CONFIG_FILE} {rule}. Correct it, or remove it.")
    return tuple(str(named[key]) for key in keys)


def _stored(source: WeightsSource, written: Config) -> dict[str, Tensor]:
    stored = {name.removeprefix(PREFIX): tensor for name, tensor in source.tensors.items()}
    kind = written.get("model_type", REFERENCE if "patch_embd.conv.weight" in stored else None)
    if kind == EXPORTED:
        raise export_not_loadable(source.name)
    if kind != REFERENCE:
        problem = f"no trained video model: its model_type is {kind!r}, and it has no {CARD_FILE} of tvit"
        raise source.error(f"{problem}. Train an image ViT: tvit train --hf-model-name {source.name}")
    if len(stored) < len(source.tensors):
        raise source.error("a tensor is stored twice. Fetch the weights again.")
    if any(".lora_" in name for name in stored):
        problem = "a checkpoint with unmerged adapters, whose alpha is unknown"
        raise source.error(f"{problem}. Use the {MERGED_FILE} of the same training.")
    return stored


def _config_from_shapes(stored: Mapping[str, Tensor]) -> Config:
    """Values that follow from the tensors, for weights without a config: all but heads and frames."""
    found: Config = {
        "num_blocks": sum(re.fullmatch(r"blocks\.\d+\.norm1\.weight", name) is not None for name in stored),
        "patch_embd_bias": "patch_embd.conv.bias" in stored,
    }
    patch, head, table = (stored.get(n) for n in ("patch_embd.conv.weight", "head.weight", UNUSED))
    if patch is not None and patch.dim() == 4:
        found |= dict(zip(("embd_dim", "in_channels", "patch_size"), patch.shape[:3], strict=True))
        if table is not None and table.dim() == 3:
            found["img_wh"] = found["patch_size"] * math.isqrt(max(table.shape[1] - 1, 0))
        hidden = stored.get("blocks.0.mlp.linear1.weight")
        if hidden is not None and hidden.dim() == 2:
            found["mlp_factor"] = hidden.shape[0] // max(found["embd_dim"], 1)
    if head is not None and head.dim() == 2:
        found["num_classes"] = head.shape[0]
    return found


def _config(source: WeightsSource, raw: Config) -> ViTConfig:
    for key, supported in (("pooling", "cls"), ("in_channels", 3)):
        if raw[key] != supported:
            raise source.error(f"{key} is {raw[key]!r}; tvit supports {supported!r} alone.")
    sizes: Config = {ours: whole_number(source, raw, theirs) for ours, theirs in SIZES.items()}
    if sizes["width"] % 2:
        raise source.error(f"embd_dim is {sizes['width']}; sinusoids need an even one.")
    if sizes["frame_size"] > SCALE_TO:
        limit = f"tvit supports up to {SCALE_TO}, above which the reference pads frames with black"
        raise source.error(f"img_wh is {sizes['frame_size']}; {limit}.")
    mlp_width = whole_number(source, raw, "mlp_factor") * sizes["width"]
    try:
        return ViTConfig(**sizes, mlp_width=mlp_width, norm_eps=1e-5, temporal_index="token")
    except ValueError as error:
        raise source.error(f"{error}. Correct the {CONFIG_FILE} beside the weights.") from error


def _state(
    source: WeightsSource, raw: Config, stored: Mapping[str, Tensor], model: TemporalViT
) -> dict[str, Tensor]:
    config, expected = model.config, model.state_dict()
    tensors = {"cls_token": "positions.class_token", "patch_embd.conv.weight": "patch_embed.weight"}
    if raw["patch_embd_bias"]:
        tensors["patch_embd.conv.bias"] = "patch_embed.bias"
    modules = {"norm": "norm", "head": "classifier"} | block_names(
        "blocks.#", "norm1 attn.q attn.k attn.v attn.proj norm2 mlp.linear1 mlp.linear2"
    )
    names = expand_names(tensors, modules, config.depth, stored)
    used = {name: tensor for name, tensor in stored.items() if name != UNUSED}
    check_match(source, used, {theirs: expected[ours] for theirs, ours in names.items()})
    state = {ours: check_tensor(source, theirs, stored[theirs]).float() for theirs, ours in names.items()}
    state.setdefault("patch_embed.bias", torch.zeros(config.width))
    if not raw["use_flash_attention"]:
        # Logits over sqrt(D) instead of sqrt(D / heads), by smaller queries.
        for name in [name for name in state if ".attention.q." in name]:
            state[name] = state[name] / config.num_heads**0.5
    positions, times = (_sinusoid(n, config.width) for n in (config.patches_per_frame, config.n_frames))
    state["positions.spatial"] = positions.unsqueeze(0)  # (1, P, D)
    state["temporal.embedding"] = times.view(1, -1, 1, config.width)  # (1, T, 1, D)
    # The class token's number, T*P, is 0 modulo both.
    state["positions.class_position"] = (positions[0] + times[0]).view(1, 1, -1)
    return state


def _sinusoid(count: int, width: int) -> Tensor:
    """(count, D): alternating sine and cosine. All channels but the first two are nearly constant."""
    frequencies = torch.exp(torch.arange(0, width, 2) * -math.log(1e4))  # (D/2,)
    angles = torch.arange(count).unsqueeze(1) * frequencies  # (count, D/2)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
