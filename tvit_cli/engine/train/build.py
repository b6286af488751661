"""The model at the start of a training: built from settings and weights, compiled."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import nn

from tvit_cli.data.layout import Video, matching_label
from tvit_cli.errors import ModelError, RunError, SettingsError
from tvit_cli.model import lora
from tvit_cli.model.families import VIDEO
from tvit_cli.model.folder import load_card
from tvit_cli.model.pretrained import SCHEME, load_pretrained, resolve_weights
from tvit_cli.model.pretrained_config import NETWORK, read_config
from tvit_cli.model.weights import WeightsSource
from tvit_cli.portable.vit import TemporalViT, ViTConfig, build_model
from tvit_cli.results import Note, Report
from tvit_cli.settings.base import flag
from tvit_cli.settings.card import BaseWeights, Preprocessing
from tvit_cli.settings.train import SCRATCH_SHAPE, TrainSettings

# torch.compile's default compilers, unless CXX names another (torch/_inductor/config.py, cpp.cxx).
COMPILERS = {"darwin": "clang++", "win32": "cl"}
CHOSEN_SHAPE = ("n_frames", "tubelet_size", "attention", "pool", "temporal_depth", "feature_norm")
MOST_CLIPS = 256

# Note [Compiled shapes]
# ~~~~~~~~~~~~~~~~~~~~~~
# Passes have at most three sizes: the micro-batch, the remainder at an epoch's end, and one clip on a rank without
# a share of it. Each is compiled once (`dynamic=False`); a graph for any size would slow down every pass.
# Validation runs the plain model, which shares its parameters with the compiled one.


@dataclass(frozen=True)
class Built:
    """A model ready to be trained, its preprocessing and its base weights."""

    model: TemporalViT
    config: ViTConfig
    preprocessing: Preprocessing
    base: BaseWeights | None
    origin: WeightsSource | None = None  # the model of --from

    def network(self) -> dict[str, Any]:
        """Network and normalisation from the files of pretrained weights, as JSON values; empty from scratch."""
        if self.base is None:
            return {}
        normalisation = self.preprocessing.model_dump(mode="json", include={"mean", "std"})
        new = {
            name for name in VIDEO if getattr(self.config, name) == getattr(ViTConfig, name)
        }  # in older runs, too
        return {name: getattr(self.config, name) for name in NETWORK if name not in new} | normalisation


def build(
    settings: TrainSettings, *, labels: Sequence[str], report: Report, origin: WeightsSource | None = None
) -> Built:
    """Builds the model, loads its pretrained weights, and attaches its adapters.

    `origin`, the model of --from, also gives the classifier's rows of its classes. The result does not depend on
    the global random generator. Raises ModelError.
    """
    source = origin
    if source is None and settings.hf_model_name is not None:
        source = resolve_weights(settings.hf_model_name)
    own = {name: getattr(settings, name) for name in ("n_frames", "frame_grid", "clip_seconds", "resize")}
    preprocessing = Preprocessing(frame_size=settings.img_size, **own)
    shape: dict[str, Any] = {"num_classes": len(labels), "frame_size": settings.img_size}
    shape |= {key: getattr(settings, key) for key in CHOSEN_SHAPE}
    if settings.train == "probe" and origin is None:
        shape["pool_depth"] = 0  # one cross-attention block, unless the weights bring a pooler
    try:
        if source is None:
            shape |= {key: getattr(settings, key) or value for key, value in SCRATCH_SHAPE.items()}
            config = ViTConfig(**shape)
        else:
            pretrained = read_config(source)
            preprocessing = preprocessing.model_copy(update={"mean": pretrained.mean, "std": pretrained.std})
            config = pretrained.vit_config(**shape)
    except ValueError as error:
        # Numbers that the pretrained weights determine have no flag.
        settable = TrainSettings.model_fields.keys() - (SCRATCH_SHAPE if source is not None else ())
        flags = {field.name: flag(field.name) for field in fields(ViTConfig) if field.name in settable}
        flags["frame_size"] = "--img-size"
        sentence = re.sub(r"\b\w+\b", lambda word: flags.get(word[0], word[0]), str(error))
        raise ModelError(f"{settings.pretrained or 'model from scratch'}: {sentence}") from error
    if settings.drop_path and config.depth == 1:
        reason = "it rises from 0 in the first block, and this model has no other"
        advice = "Leave it out, or take a deeper model."
        raise ModelError(f"--drop-path {settings.drop_path:g}: {reason}. {advice}")
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
        base = BaseWeights(**{key: getattr(pretrained, key) for key in BaseWeights.model_fields})
        if pretrained.clip:
            own, side = pretrained.clip, pretrained.image_size
            clip = f"{own['n_frames']} frames of {side} px in tubelets of {own['tubelet_size']}"
            clip += f", {seconds:.3g} s" if (seconds := pretrained.clip_seconds) else ""
            report(Note(f"{settings.pretrained}: a video ViT for clips of {clip}."))
        if base.terms:
            report(Note(f"{settings.pretrained}: {base.terms}.", "warning"))
        new, unused = ", ".join(loaded.new) or "none", ", ".join(loaded.unused) or "none"
        counts = f"{loaded.matched} tensors loaded; new: {new}; unused: {unused}"
        report(Note(f"{settings.pretrained}: {counts}", "detail"))
        for note in loaded.notes:
            report(Note(note, "warning" if note in pretrained.notes else "detail"))
    if origin is not None:
        _check_fixed(settings, origin)
        _load_classifier(model, origin, labels)
    renamed = {"targets": "target_modules", "exclude": "exclude_modules"}
    names = {field.name: f"lora_{renamed.get(field.name, field.name)}" for field in fields(lora.LoraSpec)}
    spec = lora.LoraSpec(**{name: getattr(settings, setting) for name, setting in names.items()})
    lora.set_trainable(model, settings.train, spec, seed=settings.seed)
    for warning in _warnings(settings, model, source):
        report(Note(warning, "warning"))
    trainable, total = lora.trainable_report(model)
    report(Note(f"{total:,} parameters, {trainable:,} of them trainable ({trainable / total:.1%})."))
    return Built(model, config, preprocessing, base, origin)


def _check_fixed(settings: TrainSettings, origin: WeightsSource) -> None:
    """Raises ModelError for a setting that the weights of --from or its classifier's features do not allow."""
    theirs = ViTConfig.from_dict(load_card(origin.folder).model)
    for name in (*SCRATCH_SHAPE, "pool", "feature_norm"):
        value, given = getattr(theirs, name), getattr(settings, name)
        if given not in (None, value):
            advice = (
                ""
                if name in SCRATCH_SHAPE
                else f", or train a new classifier: --hf-model-name {origin.folder}"
            )
            text = f"{flag(name)} {given}: the model of --from {origin.name} was trained with {value}"
            raise ModelError(f"{text}. Leave it out{advice}.")


@torch.no_grad()
def _load_classifier(model: TemporalViT, origin: WeightsSource, labels: Sequence[str]) -> None:
    """Copies the classifier's rows of known labels; rows of new labels stay as they were drawn."""
    rows = class_rows(origin.labels, labels)
    for name in ("weight", "bias"):
        parameter, saved = model.classifier.get_parameter(name), origin.tensors[f"classifier.{name}"]
        parameter[list(rows)] = saved[list(rows.values())].to(parameter.dtype)


def class_rows(theirs: Sequence[str], ours: Sequence[str]) -> dict[int, int]:
    """The classifier's rows of classes that both have: number in `ours` -> number in `theirs`."""
    spell, numbers = matching_label(theirs), {label: n for n, label in enumerate(theirs)}
    return {n: numbers[spell(label)] for n, label in enumerate(ours) if spell(label) in numbers}


def _warnings(settings: TrainSettings, model: TemporalViT, source: WeightsSource | None) -> Iterator[str]:
    if source is None and settings.train != "all":
        yield f"--train {settings.train}: the frozen weights of a model from scratch stay random."
    if source is not None and not source.is_ours:
        temporal = [weight for part in model.added_modules().values() for weight in part.parameters()]
        if not all(weight.requires_grad for weight in temporal):
            text = "temporal modules stay at zero, so the model cannot know the order of frames"
            yield f"--train {settings.train}: {text}. Train them with --train lora or last-1."
        patches = model.patch_embed.named_parameters()
        is_frozen = not any(p.requires_grad for name, p in patches if not name.endswith("bias"))
        if model.config.tubelet_size > 1 and not model.config.is_video and is_frozen:
            text = f"The model uses one frame of each tubelet of {settings.tubelet_size}"
            advice = "Leave --tubelet-size out, or take --train lora with a rank and --lora-init default."
            yield f"{text}: the weights of the others stay at zero. {advice}"
    if source is not None and source.is_ours:
        theirs = ViTConfig.from_dict(load_card(source.folder).model)
        differing = [name for name in SCHEME if getattr(theirs, name) != getattr(model.config, name)]
        if differing:
            flags = ", ".join(f"{flag(name)} {getattr(theirs, name)}" for name in differing)
            yield f"{settings.pretrained}: was trained with {flags}. Its temporal weights are left out."
    magnitude = settings.randaugment_magnitude
    if magnitude != TrainSettings.model_fields["randaugment_magnitude"].default and not settings.randaugment:
        yield f"--randaugment-magnitude {magnitude:g}: no effect without --randaugment."
    if settings.compile and settings.lora_use_dora:
        yield "--compile: PEFT's DoRA layers break the graph into pieces; little speed is gained."
    if ignored := settings.without_effect():
        yield f"No adapter is attached: no effect of {', '.join(map(flag, ignored))}."
    if settings.train == "lora" and settings.lora_rank and lora.own_layer() is None:
        yield "The installed PEFT rejects tvit's LoRA layers: its own compute the same, slower."


def compile_model(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, compiled at its first call with each size. See Note [Compiled shapes].

    Raises SettingsError without a compiler.
    """
    compiler = os.environ.get("CXX") or COMPILERS.get(sys.platform, "g++")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise SettingsError("--compile: PyTorch needs Triton on GPUs. Install it, or leave --compile out.")
    if device.type == "cpu" and shutil.which(compiler) is None:
        advice = "Install one, set CXX, or leave --compile out."
        raise SettingsError(f"--compile: PyTorch needs a C++ compiler; {compiler} is missing. {advice}")
    torch.compiler.reset()  # graphs of an earlier run of a series count towards a limit of eight
    return cast(nn.Module, torch.compile(model, dynamic=False))


@contextmanager
def compile_errors(is_compiled: bool) -> Iterator[None]:
    """Turns errors of torch.compile into a RunError; does nothing unless `is_compiled`."""
    if not is_compiled:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        yield
    except (TorchDynamoException, InductorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(error).__name__  # origin and message
        text = f"--compile: PyTorch could not compile the model: {reason}. Leave --compile out."
        raise RunError(text) from error


def clips_to_standardise(videos: Sequence[Video]) -> list[Video]:
    """At most MOST_CLIPS videos, evenly spaced over the list."""
    count = min(len(videos), MOST_CLIPS)
    return [videos[(2 * i + 1) * len(videos) // (2 * count)] for i in range(count)]
