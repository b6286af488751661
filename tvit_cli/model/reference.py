"""Models trained by the reference implementation, loaded as a TemporalViT.

Its code: https://github.com/detker/Temporal-Vision-Transformer-LoRA. What its network does otherwise:

- The class token is the last one. Attention does not see the order of tokens, so here it is the first.
- Sinusoids stand for positions, and their frequencies fall by 1e-4 per channel pair instead of over all of them.
  The `pos_embed` that lies in its files is not used.
- The sinusoid of time is that of the token's number modulo the frames (`temporal_index` token).
- Without its fused attention it scales the logits by the whole width, not by that of a head.
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
from tvit_cli.errors import ModelError
from tvit_cli.model.families import EXPORTED, REFERENCE, Config
from tvit_cli.model.folder import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, export_not_loadable
from tvit_cli.model.pretrained import whole_number
from tvit_cli.model.weights import MERGED_FILE, WeightsSource, check_tensor, listed
from tvit_cli.portable.vit import TemporalViT, ViTConfig
from tvit_cli.settings.card import BaseWeights, ModelCard, Preprocessing

# UCF101's class folders, sorted as the reference sorts them: capitals first.
_UCF101 = """
ApplyEyeMakeup ApplyLipstick Archery BabyCrawling BalanceBeam BandMarching BaseballPitch Basketball
BasketballDunk BenchPress Biking Billiards BlowDryHair BlowingCandles BodyWeightSquats Bowling
BoxingPunchingBag BoxingSpeedBag BreastStroke BrushingTeeth CleanAndJerk CliffDiving CricketBowling CricketShot
CuttingInKitchen Diving Drumming Fencing FieldHockeyPenalty FloorGymnastics FrisbeeCatch FrontCrawl GolfSwing
Haircut HammerThrow Hammering HandstandPushups HandstandWalking HeadMassage HighJump HorseRace HorseRiding
HulaHoop IceDancing JavelinThrow JugglingBalls JumpRope JumpingJack Kayaking Knitting LongJump Lunges
MilitaryParade Mixing MoppingFloor Nunchucks ParallelBars PizzaTossing PlayingCello PlayingDaf PlayingDhol
PlayingFlute PlayingGuitar PlayingPiano PlayingSitar PlayingTabla PlayingViolin PoleVault PommelHorse PullUps
Punch PushUps Rafting RockClimbingIndoor RopeClimbing Rowing SalsaSpin ShavingBeard Shotput SkateBoarding
Skiing Skijet SkyDiving SoccerJuggling SoccerPenalty StillRings SumoWrestling Surfing Swing TableTennisShot
TaiChi TennisSwing ThrowDiscus TrampolineJumping Typing UnevenBars VolleyballSpiking WalkingWithDog
WallPushups WritingOnBoard YoYo
"""
UCF101 = tuple(_UCF101.split())


def named_labels(source: WeightsSource, written: Config, count: int) -> tuple[str, ...] | None:
    """The classes that the config names; None where it has no names but transformers' own, LABEL_0 …"""
    named = written.get("id2label")
    if named is None:
        return None
    if isinstance(named, dict) and all(re.fullmatch(r"LABEL_\d+", str(name)) for name in named.values()):
        return None
    keys = [str(number) for number in range(count)]
    if not isinstance(named, dict) or set(named) != set(keys) or len(set(map(str, named.values()))) < count:
        raise ModelError(
            f"{source.name}: id2label in {CONFIG_FILE} must have a name of its own for each class, 0 to "
            f"{count - 1}. Mend it, or remove it."
        )
    return tuple(str(named[key]) for key in keys)


def guessed_labels(count: int) -> tuple[tuple[str, ...], list[str]]:
    """Labels for so many classes without names, and a sentence on what was taken."""
    if count == len(UCF101):
        return UCF101, [
            f"The weights do not name their {count} classes: UCF101's are taken, in sorted order."
        ]
    note = (
        f"The weights do not name their {count} classes: they are numbered, in the sorted order of the folders "
        f'that they were trained on. "id2label" in a {CONFIG_FILE} beside the weights names them.'
    )
    return tuple(f"class {n}" for n in range(count)), [note]


PREFIX = "model."  # of the published weights; the training script's have none
UNUSED = "pos_embed"
SCALE_TO = 256  # whatever the frame size
NORM_EPS = 1e-5
DEFAULTS: Config = {  # of its configuration
    "img_wh": 224,
    "in_channels": 3,
    "patch_size": 16,
    "embd_dim": 768,
    "patch_embd_bias": True,
    "n_frames": 8,
    "num_heads": 12,
    "use_flash_attention": True,
    "mlp_factor": 4,
    "num_blocks": 12,
    "num_classes": 1000,
    "pooling": "cls",
}


@dataclass(frozen=True)
class ReferenceModel:
    """The model with a card as if tvit had trained it, and what had to be assumed.

    `labels_are_guessed` where the files do not name the classes: then the card's are UCF101's or numbers.
    """

    model: TemporalViT
    card: ModelCard
    labels_are_guessed: bool
    notes: tuple[str, ...]


def load_reference(source: WeightsSource) -> ReferenceModel:
    """The model, ready to predict (`eval()`), in float32 on the CPU.

    Raises ModelError for other weights, for tensors that are missing, left over, of the wrong shape or not finite,
    and for a config that the network cannot be built from.
    """
    written = source.read_json(CONFIG_FILE)
    stored = _stored(source, written)
    told = {**_told_by_shapes(stored), **written}
    raw = {**DEFAULTS, **told}
    config = _config(source, raw)
    model = TemporalViT(config, initialise=False)
    model.load_state_dict(_state(source, raw, stored, model), assign=True)
    named = named_labels(source, written, config.num_classes)
    labels, notes = (named, []) if named else guessed_labels(config.num_classes)
    if assumed := [f'"{key}": {json.dumps(value)}' for key, value in DEFAULTS.items() if key not in told]:
        notes.append(
            f"The weights do not tell everything: {', '.join(assumed)}, the reference's defaults, are taken. A "
            f"{CONFIG_FILE} beside the weights can say otherwise."
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
    return ReferenceModel(model.eval(), card, named is None, tuple(notes))


def _stored(source: WeightsSource, written: Config) -> dict[str, Tensor]:
    """The tensors less their prefix, once they are found to be the reference's."""
    stored = {name.removeprefix(PREFIX): tensor for name, tensor in source.tensors.items()}
    kind = written.get("model_type", REFERENCE if "patch_embd.conv.weight" in stored else None)
    if kind == EXPORTED:
        raise export_not_loadable(source.name)
    if kind != REFERENCE:
        raise ModelError(
            f"{source.name}: its model_type is {kind!r}, and it is no model folder of tvit ({CARD_FILE} beside "
            f"{WEIGHTS_FILE}): this is no trained model of videos. An image ViT becomes one with "
            f"tvit train --hf-model-name {source.name}."
        )
    if len(stored) < len(source.tensors):
        raise ModelError(f"{source.name}: a tensor is stored twice. Fetch the weights again.")
    if any(".lora_" in name for name in stored):
        raise ModelError(
            f"{source.name}: a checkpoint whose adapters are not merged, and their alpha is not in it. Take the "
            f"{MERGED_FILE} that the training leaves at its end."
        )
    return stored


def _told_by_shapes(stored: Mapping[str, Tensor]) -> Config:
    """What the tensors say of the network, for weights without a config: all but heads and frames."""
    told: Config = {
        "num_blocks": sum(re.fullmatch(r"blocks\.\d+\.norm1\.weight", name) is not None for name in stored),
        "patch_embd_bias": "patch_embd.conv.bias" in stored,
    }
    patch, head, table = (stored.get(n) for n in ("patch_embd.conv.weight", "head.weight", UNUSED))
    if patch is not None and patch.dim() == 4:
        told |= dict(zip(("embd_dim", "in_channels", "patch_size"), patch.shape[:3], strict=True))
        if table is not None and table.dim() == 3:
            told["img_wh"] = told["patch_size"] * math.isqrt(max(table.shape[1] - 1, 0))
        hidden = stored.get("blocks.0.mlp.linear1.weight")
        if hidden is not None and hidden.dim() == 2:
            told["mlp_factor"] = hidden.shape[0] // max(told["embd_dim"], 1)
    if head is not None and head.dim() == 2:
        told["num_classes"] = head.shape[0]
    return told


def _config(source: WeightsSource, raw: Config) -> ViTConfig:
    if raw["pooling"] != "cls":
        raise ModelError(
            f"{source.name}: pooling is {raw['pooling']!r}; tvit reads models with pooling 'cls'."
        )
    if raw["in_channels"] != 3:
        raise ModelError(f"{source.name}: in_channels is {raw['in_channels']!r}; frames of a video have 3.")
    sizes = (
        "img_wh",
        "patch_size",
        "embd_dim",
        "n_frames",
        "num_heads",
        "mlp_factor",
        "num_blocks",
        "num_classes",
    )
    number = {key: whole_number(source, raw, key) for key in sizes}
    if number["embd_dim"] % 2:
        raise ModelError(f"{source.name}: embd_dim is {number['embd_dim']}; sinusoids need an even one.")
    if number["img_wh"] > SCALE_TO:
        raise ModelError(
            f"{source.name}: img_wh is {number['img_wh']}; the reference cuts frames out of {SCALE_TO} x "
            f"{SCALE_TO} pixels and fills larger ones up with black, which tvit does not."
        )
    try:
        return ViTConfig(
            num_classes=number["num_classes"],
            frame_size=number["img_wh"],
            patch_size=number["patch_size"],
            n_frames=number["n_frames"],
            width=number["embd_dim"],
            depth=number["num_blocks"],
            num_heads=number["num_heads"],
            mlp_width=number["mlp_factor"] * number["embd_dim"],
            norm_eps=NORM_EPS,
            temporal_index="token",
        )
    except ValueError as error:
        raise ModelError(f"{source.name}: {error}. Mend the {CONFIG_FILE} beside the weights.") from error


def _state(
    source: WeightsSource, raw: Config, stored: Mapping[str, Tensor], model: TemporalViT
) -> dict[str, Tensor]:
    """All of the model's tensors: the stored ones under our names, and the sinusoids."""
    config, expected = model.config, model.state_dict()
    names = _names(config.depth, has_patch_bias=bool(raw["patch_embd_bias"]))
    missing, left_over = sorted(names.keys() - stored.keys()), sorted(stored.keys() - names.keys() - {UNUSED})
    if missing or left_over:
        what = f"{listed(missing)} missing" if missing else f"no place for {listed(left_over)}"
        raise ModelError(
            f"{source.name}: {what}. The weights are incomplete, or of another network than the reference's "
            f"{config.depth} blocks; fetch them again."
        )
    state = {}
    for theirs, ours in names.items():
        tensor = check_tensor(source, theirs, stored[theirs])
        if tensor.shape != expected[ours].shape:
            raise ModelError(
                f"{source.name}: {theirs} has the shape {tuple(tensor.shape)}, not {tuple(expected[ours].shape)} "
                f"as the {CONFIG_FILE} or the other tensors say. Fetch all again."
            )
        state[ours] = tensor.float()
    state.setdefault("patch_embed.bias", torch.zeros(config.width))
    if not raw["use_flash_attention"]:
        # Logits over sqrt(D) instead of sqrt(D / heads), from queries that are as much smaller.
        for name in [name for name in state if ".attention.q." in name]:
            state[name] = state[name] / config.num_heads**0.5
    positions, times = (_sinusoid(n, config.width) for n in (config.patches_per_frame, config.n_frames))
    state["positions.spatial"] = positions.unsqueeze(0)  # (1, P, D)
    state["temporal.embedding"] = times.view(1, -1, 1, config.width)  # (1, T, 1, D)
    # The class token's number, T*P, is 0 modulo both.
    state["positions.class_position"] = (positions[0] + times[0]).view(1, 1, -1)
    return state


def _names(depth: int, *, has_patch_bias: bool) -> dict[str, str]:
    """Its names -> ours."""
    modules = {"norm": "norm", "head": "classifier"}
    for number in range(depth):
        block = f"blocks.{number}"
        modules |= {f"{block}.{name}": f"{block}.{name}" for name in ("norm1", "norm2")}
        modules |= {f"{block}.attn.{name}": f"{block}.attention.{name}" for name in ("q", "k", "v", "proj")}
        modules |= {f"{block}.mlp.linear{n}": f"{block}.mlp.fc{n}" for n in (1, 2)}
    names = {
        f"{theirs}.{leaf}": f"{ours}.{leaf}"
        for theirs, ours in modules.items()
        for leaf in ("weight", "bias")
    }
    names |= {"cls_token": "positions.class_token", "patch_embd.conv.weight": "patch_embed.weight"}
    return names | ({"patch_embd.conv.bias": "patch_embed.bias"} if has_patch_bias else {})


def _sinusoid(count: int, width: int) -> Tensor:
    """(count, D): sine and cosine in turns. All channels but the first two hardly change with the row."""
    frequencies = torch.exp(torch.arange(0, width, 2) * -math.log(1e4))  # (D/2,)
    angles = torch.arange(count).unsqueeze(1) * frequencies  # (count, D/2)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
