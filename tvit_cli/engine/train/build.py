"""The model at the start of a training: built, standardised, compiled."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from tvit_cli.data.layout import Video
from tvit_cli.engine.dataset import DataSource
from tvit_cli.engine.evaluate.scoring import WithFeatures, merge_scores, score
from tvit_cli.errors import DataError, ModelError, RunError, SettingsError
from tvit_cli.model import lora
from tvit_cli.model.folder import load_card
from tvit_cli.model.lora import set_trainable, trainable_report
from tvit_cli.model.pretrained import NETWORK, SCHEME, load_pretrained, read_config, resolve_weights
from tvit_cli.model.weights import WeightsSource
from tvit_cli.portable.layers import FeatureNorm
from tvit_cli.portable.vit import TemporalViT, ViTConfig, build_model
from tvit_cli.results import Note, Progress, Report
from tvit_cli.settings.base import flag
from tvit_cli.settings.card import BaseWeights, Preprocessing
from tvit_cli.settings.train import SCRATCH_SHAPE, TrainSettings

# What torch.compile looks for where CXX names no other (torch/_inductor/config.py, cpp.cxx).
COMPILERS = {"darwin": "clang++", "win32": "cl"}

# Note [Compiled shapes]
# ~~~~~~~~~~~~~~~~~~~~~~
# Passes have three sizes at most: the micro-batch, what is left over at an epoch's end, and one clip, in a process
# that has none of those left. Each is compiled once, with its sizes as constants (`dynamic=False`); a graph for any
# size would be slower for every pass. Validation is not compiled: it runs the plain model, whose parameters the
# compiled one shares, so names in checkpoints and in the model folder are the plain ones.


def compile_model(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, compiled when it is first called for a size. See Note [Compiled shapes].

    Raises SettingsError where PyTorch has nothing to compile with.
    """
    if missing := _missing(device):
        raise SettingsError(f"--compile: {missing}, or leave --compile out.")
    torch.compiler.reset()  # what was compiled for the run before, of a series, counts towards a limit of eight
    return cast(nn.Module, torch.compile(model, dynamic=False))


@contextmanager
def compile_errors(is_asked: bool) -> Iterator[None]:
    """Within, where a model is compiled at all, one that cannot be becomes a RunError."""
    if not is_asked:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        yield
    except (TorchDynamoException, InductorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(error).__name__  # who says it, and what
        raise RunError(
            f"--compile: PyTorch could not compile the model: {reason}. Leave --compile out."
        ) from error


def _missing(device: torch.device) -> str:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "PyTorch writes code for GPUs with Triton, which is not installed. Install triton"
    name = os.environ.get("CXX") or COMPILERS.get(sys.platform, "g++")
    if device.type == "cpu" and shutil.which(name) is None:
        return f"PyTorch wants a C++ compiler, and there is no {name}. Install one, name another in CXX"
    return ""


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
    additions = [weight for part in model.added_modules().values() for weight in part.parameters()]
    if is_image_vit and not all(weight.requires_grad for weight in additions):
        yield (
            f"--train {settings.train}: what an image ViT lacks stays as it starts, at nothing, and so the model "
            "cannot know the order of frames. --train lora or last-1 lets it learn that."
        )
    patches = model.patch_embed.named_parameters()
    patches_learn = any(p.requires_grad for name, p in patches if not name.endswith("bias"))
    if is_image_vit and model.config.tubelet_size > 1 and not patches_learn:
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


# Note [What all clips share]
# The clips of one data set look alike to a pretrained network: on Weizmann, of a feature of DINOv2-S, what all
# clips have in common is 2.0 and what they differ by 1.1 (both as root mean squares). The classifier's gradient
# is mostly of the common part, so that each step raises and lowers the score of a class for all clips at once,
# and the adapters learn from that noise. Without it they learn faster and better: docs/negative-results.md.

MOST_CLIPS = 256
BATCH_SIZE = 8  # always, so that the last bits depend neither on the micro-batch nor on the processes


def standardise_features(
    built: Built, source: DataSource, accelerator: Accelerator, *, workers: int, report: Report
) -> None:
    """Fit the model's `feature_norm` to training clips, each seen as evaluation sees it.

    All processes read their share and get the same numbers. Raises DataError when no clip can be read.
    """
    norm = built.model.feature_norm
    assert isinstance(norm, FeatureNorm)
    chosen = clips_to_standardise(source)
    own = score(
        WithFeatures(built.model),
        chosen,
        source.layout.labels,
        built.preprocessing,
        device=accelerator.device,
        batch_size=BATCH_SIZE,
        workers=workers,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        autocast=accelerator.autocast,
        store=source.store,
        progress=lambda done, total: report(Progress("standardising features", done, total)),
    )
    scores = merge_scores(gather_object([own]))
    if not len(scores.indices):
        raise DataError(f"{source.layout.root}: none of {len(chosen)} training videos can be read.")
    norm.fit(scores.logits[:, built.config.num_classes :].double())
    report(Note(f"Features standardised over {len(scores.indices)} training clips.", "detail"))


def clips_to_standardise(source: DataSource) -> list[Video]:
    """The training videos whose features are standardised."""
    return _evenly(source.readable("train"))


def _evenly(videos: Sequence[Video]) -> list[Video]:
    """At most MOST_CLIPS of them, from all places of the list."""
    count = min(len(videos), MOST_CLIPS)
    return [videos[(2 * i + 1) * len(videos) // (2 * count)] for i in range(count)]
