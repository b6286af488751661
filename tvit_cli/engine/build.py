"""The model that a training starts from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvit_cli.engine.events import Note, Report
from tvit_cli.errors import ModelError
from tvit_cli.model import lora
from tvit_cli.model.backbone import SCHEME
from tvit_cli.model.folder import load_card
from tvit_cli.model.pretrained import load_pretrained, read_config, resolve_weights
from tvit_cli.model.pretrainedconfig import NETWORK
from tvit_cli.model.trainable import set_trainable, trainable_report
from tvit_cli.model.vit import TemporalViT, ViTConfig, build_model
from tvit_cli.model.weights import WeightsSource
from tvit_cli.settings.base import flag
from tvit_cli.settings.card import BaseWeights, Preprocessing
from tvit_cli.settings.train import SCRATCH_SHAPE, TrainSettings

# What a user calls the numbers that a ViTConfig refuses.
FLAGS = {
    name: flag(name)
    for name in (
        "width",
        "depth",
        "num_heads",
        "patch_size",
        "tubelet_size",
        "n_frames",
        "attention",
        "temporal_depth",
    )
} | {"frame_size": "--img-size"}
CHOSEN_SHAPE = ("n_frames", "tubelet_size", "attention", "pool", "temporal_depth", "feature_norm")


@dataclass(frozen=True)
class Built:
    """A model ready to be trained, and what travels with it."""

    model: TemporalViT
    config: ViTConfig
    preprocessing: Preprocessing
    base: BaseWeights | None

    def network(self) -> dict[str, Any]:
        """What the files of pretrained weights decide beside the weights, as JSON has it; from scratch nothing."""
        if self.base is None:
            return {}
        normalisation = self.preprocessing.model_dump(mode="json", include={"mean", "std"})
        return {name: getattr(self.config, name) for name in NETWORK} | normalisation


def build(settings: TrainSettings, *, num_classes: int, report: Report) -> Built:
    """Build the model, load its pretrained weights, attach its adapters.

    The result depends on the settings alone, never on the state of the global generator.
    """
    source = None if settings.hf_model_name is None else resolve_weights(settings.hf_model_name)
    preprocessing = Preprocessing(
        n_frames=settings.n_frames,
        frame_grid=settings.frame_grid,
        frame_size=settings.img_size,
        resize=settings.resize,
    )
    shape: dict[str, Any] = {
        "num_classes": num_classes,
        "frame_size": settings.img_size,
        **{key: getattr(settings, key) for key in CHOSEN_SHAPE},
    }
    try:
        if source is None:
            shape |= {key: getattr(settings, key) or value for key, value in SCRATCH_SHAPE.items()}
            config = ViTConfig(**shape)
        else:
            pretrained = read_config(source)
            preprocessing = preprocessing.model_copy(update={"mean": pretrained.mean, "std": pretrained.std})
            config = pretrained.vit_config(**shape)
    except ValueError as error:
        # What the weights decide is no flag.
        flags = FLAGS if source is None else {k: v for k, v in FLAGS.items() if k not in SCRATCH_SHAPE}
        sentence = re.sub(r"\b\w+\b", lambda word: flags.get(word[0], word[0]), str(error))
        raise ModelError(f"{settings.hf_model_name or 'model from scratch'}: {sentence}") from error
    if settings.drop_path and config.depth == 1:
        raise ModelError(
            f"--drop-path {settings.drop_path:g}: it rises from 0 in the first block, and this model has no other. "
            "Leave it out, or take a deeper model."
        )
    model = build_model(
        config,
        seed=settings.seed,
        truncated_normal=settings.custom_weight_init,
        from_scratch=source is None,
        drop_path=settings.drop_path,
        token_drop=settings.token_drop,
    )
    base = None
    if source is not None:
        loaded = load_pretrained(model, source)
        base = BaseWeights(name=pretrained.name, revision=pretrained.revision, sha256=pretrained.sha256)
        report(
            Note(
                f"{settings.hf_model_name}: {loaded.matched} tensors loaded; new: "
                f"{', '.join(loaded.new) or 'none'}; left over: {', '.join(loaded.unused) or 'none'}",
                "detail",
            )
        )
        for note in loaded.notes:
            report(Note(note, "warning" if note in pretrained.notes else "detail"))
    set_trainable(model, settings.train, _spec(settings), seed=settings.seed)
    theirs = _own_scheme(source, config) if source is not None and source.is_ours else None
    is_image_vit = source is not None and not source.is_ours
    for warning in _warnings(settings, model, is_image_vit=is_image_vit, theirs=theirs):
        report(Note(warning, "warning"))
    if settings.train == "lora" and settings.lora_rank and lora.own_layer() is None:
        report(
            Note("This PEFT does not take tvit's LoRA layers: its own compute the same, slower.", "warning")
        )
    _report_size(model, report)
    return Built(model, config, preprocessing, base)


def _own_scheme(source: WeightsSource, config: ViTConfig) -> str | None:
    """How a model of ours looks at time, as flags; None where the model to train does as well."""
    theirs = ViTConfig.from_dict(load_card(source.folder).model)
    differing = [name for name in SCHEME if getattr(theirs, name) != getattr(config, name)]
    return ", ".join(f"{flag(name)} {getattr(theirs, name)}" for name in differing) or None


def _warnings(
    settings: TrainSettings, model: TemporalViT, *, is_image_vit: bool, theirs: str | None
) -> Iterator[str]:
    """What a training would rather have said before it begins than found out after it.

    `theirs` is how a model of ours that it begins with looks at time, where that is another way.
    """
    if settings.hf_model_name is None and settings.train != "all":
        yield f"--train {settings.train}: what it leaves frozen of a model from scratch stays random."
    additions = [weight for part in model.additions().values() for weight in part.parameters()]
    if is_image_vit and not all(weight.requires_grad for weight in additions):
        yield (
            f"--train {settings.train}: what an image ViT lacks stays as it starts, at nothing, and so the model "
            "cannot know the order of frames. --train lora or last-1 lets it learn that."
        )
    patches = model.patch_embed.named_parameters()
    patches_learn = any(p.requires_grad for name, p in patches if not name.endswith("bias"))
    if is_image_vit and model.sees_tubelets() and not patches_learn:
        yield (
            f"Of each tubelet of {settings.tubelet_size} frames the model sees one: its weights for the others "
            "stay at nothing. Leave --tubelet-size out, or take --train lora with a rank and --lora-init default."
        )
    if theirs is not None:
        name = settings.hf_model_name
        yield f"{name}: was trained with {theirs}. With others, what it learnt of time is left out."
    magnitude = TrainSettings.model_fields["randaugment_magnitude"].default
    if settings.randaugment_magnitude != magnitude and not settings.randaugment:
        given = f"--randaugment-magnitude {settings.randaugment_magnitude:g}"
        yield f"{given}: nothing comes of it without --randaugment."
    if settings.compile and settings.lora_use_dora:
        yield "--compile: it cannot follow into PEFT's DoRA layers, so a pass falls into pieces; little is gained."
    if ignored := settings.without_effect():
        yield f"No adapter is attached: nothing comes of {', '.join(map(flag, ignored))}."


def _spec(settings: TrainSettings) -> lora.LoraSpec:
    return lora.LoraSpec(
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        use_rslora=settings.lora_use_rslora,
        bias=settings.lora_bias,
        targets=settings.lora_target_modules,
        exclude=settings.lora_exclude_modules,
        rank_pattern=settings.lora_rank_pattern,
        alpha_pattern=settings.lora_alpha_pattern,
        use_dora=settings.lora_use_dora,
        init=settings.lora_init,
    )


def _report_size(model: TemporalViT, report: Report) -> None:
    trainable, total = trainable_report(model)
    report(Note(f"{total:,} parameters, {trainable:,} of them trainable ({trainable / total:.1%})."))
