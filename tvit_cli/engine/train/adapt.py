"""Settings chosen from the data for --clip-passes and the preset finetune, with a reason for each."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvit_cli.data.framestore import FrameStore
from tvit_cli.data.layout import Layout, read_layout, split_choice
from tvit_cli.engine.dataset import find_or_make_data, video_root
from tvit_cli.engine.launch import pick_device
from tvit_cli.errors import plural, shorten
from tvit_cli.model.pretrained_config import own_clips
from tvit_cli.model.weights import peek_config
from tvit_cli.results import Note, Report, silent
from tvit_cli.settings.base import flag
from tvit_cli.settings.train import FROZEN, SCRATCH_SHAPE, TrainSettings

FEW_VIDEOS = 30  # of a subset, below which its top-1 has a 95 % interval of up to ±18 points
FEW_CLIPS, MANY_CLIPS = 2_000, 10_000  # training clips: batches of 6, 8 and 64
EPOCHS = (10, 32)  # bounds; the upper one is that of examples/configs/leave_people_out.toml
CROP = 0.3  # smallest share of the frame in a crop, of few clips
CPU_SIZE = 98  # pixels: a fifth of the operations of 224
SIDES, HEIGHTS = {"left", "right", "clockwise", "counterclockwise", "anticlockwise"}, {"up", "down"}
Choices = dict[str, tuple[Any, str]]  # setting -> value and reason


@dataclass(frozen=True)
class Facts:
    """Properties of data, weights and device that settings are chosen from."""

    labels: Sequence[str]
    train: int  # clips, with those that --val-groups auto holds out
    val: int
    val_is_chosen: bool  # by --val-groups auto: they can be given back
    test: int
    on_cpu: bool
    patch: int | None  # pixels; None: unknown
    is_video: bool  # weights of a video ViT
    processes: int


def fit_to_data(settings: TrainSettings, report: Report = silent) -> TrainSettings:
    """Chooses the settings that were left out, and reports value and reason of each; all without --clip-passes.

    A setting that has a value from any layer keeps it, so a resumed run keeps all of its own.
    Raises the errors of `read_layout`.
    """
    if settings.clip_passes is None:
        return settings
    root = find_or_make_data(settings.path_to_data, silent)
    videos = video_root(root)
    layout = FrameStore(root).layout() if videos is None else read_layout(videos, **split_choice(settings))
    facts = gather_facts(settings, layout)
    chosen = {k: v for k, v in choose(settings, facts).items() if k not in settings.model_fields_set}
    for name, (value, reason) in chosen.items():
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        shown = flag(name) if value is True else f"{flag(name)} {text}"
        report(Note(f"{shown}: {reason}"))
    if 0 < facts.test < FEW_VIDEOS:
        interval = min(50, round(98 / math.sqrt(facts.test)))
        doubt = f"the 95 % interval of top-1 is up to ±{interval} points"
        report(Note(f"{plural(facts.test, 'test video')}: {doubt}. Add videos or groups.", "warning"))
    return settings.model_copy(update={name: value for name, (value, _) in chosen.items()})


def gather_facts(settings: TrainSettings, layout: Layout) -> Facts:
    counts, name = layout.counts(), settings.hf_model_name
    chosen = bool(layout.held_out.get("val")) and "val_groups" not in settings.model_fields_set
    written = {} if name is None else peek_config(name)
    patch = settings.patch_size or SCRATCH_SHAPE["patch_size"] if name is None else written.get("patch_size")
    return Facts(
        labels=layout.labels,
        train=counts["train"] + (counts["val"] if chosen else 0),
        val=counts["val"],
        val_is_chosen=chosen,
        test=counts["test"],
        on_cpu=pick_device(settings.device).type == "cpu",
        patch=patch if isinstance(patch, int) and patch > 0 else None,
        is_video=name is not None and "n_frames" in own_clips(name) and "positions" not in written,
        processes=max(settings.num_processes, int(os.environ.get("WORLD_SIZE", "1"))),
    )


def choose(settings: TrainSettings, facts: Facts) -> Choices:
    """Value and reason of every setting that depends on the data, also of those that were given."""
    assert settings.clip_passes is not None
    chosen: Choices = {}
    clips, is_scratch, mode = facts.train, settings.pretrained is None, settings.train
    if facts.val_is_chosen and facts.val < FEW_VIDEOS:
        reason = (
            f"{plural(facts.val, 'validation video')} would be fewer than {FEW_VIDEOS}, too few to select by"
        )
        chosen["val_groups"] = ("none", f"{reason}; all {clips} clips are trained on, the last epoch is kept")
    elif facts.val_is_chosen:
        clips -= facts.val
    wanted = round(settings.clip_passes / clips)
    epochs = min(max(wanted, EPOCHS[0]), EPOCHS[1])
    bound = "" if epochs == wanted else f", kept between {EPOCHS[0]} and {EPOCHS[1]}"
    chosen["epochs"] = (epochs, f"{settings.clip_passes} clip passes over {plural(clips, 'clip')}{bound}")
    if facts.val and "val_groups" not in chosen:
        patience = max(5, settings.epochs // 2 if "epochs" in settings.model_fields_set else epochs // 2)
        chosen["patience"] = (
            patience,
            f"half of the epochs; {plural(facts.val, 'video')} of held-out groups decide",
        )
    if clips < FEW_CLIPS and settings.repeats == 1 and settings.global_batch_size is None:
        chosen["per_gpu_batch_size"] = (6, f"more steps for fewer than {FEW_CLIPS:,} clips")
    elif clips >= MANY_CLIPS and settings.global_batch_size is None:
        steps = max(1, 8 // facts.processes)
        chosen["gradient_accumulation_steps"] = (steps, f"batches of 64 clips from {MANY_CLIPS:,} clips on")
    if is_scratch:
        chosen["learning_rate"] = (1.5e-3, "all weights are random: three times that of adapters")
    elif mode == "classifier":
        chosen["learning_rate"] = (5e-3, "the rate of a linear probe")
    else:
        family = "video" if facts.is_video else "image"
        chosen["learning_rate"] = (5e-4, f"new adapters on weights of the {family} family")
    if mode == "all" and not is_scratch:
        chosen["layer_decay"] = (0.65, "all weights are pretrained: early blocks change least")
    if mode == "lora" and settings.lora_rank:
        # More targets help more than a higher rank (QLoRA, arXiv:2305.14314).
        chosen["lora_target_modules"] = (
            ("q", "k", "v", "fc1", "fc2"),
            "adapters on attention and MLP of all blocks",
        )
        if facts.on_cpu:
            chosen["lora_dropout"] = (0.0, "drawing its random numbers takes a third of a step on a CPU")
    if facts.on_cpu and facts.patch is not None and not facts.is_video:
        size = max(1, round(CPU_SIZE / facts.patch)) * facts.patch
        chosen["img_size"] = (
            size,
            f"a CPU trains: a fifth of the operations of 224 pixels, patches of {facts.patch}",
        )
    if not is_scratch and not facts.is_video:
        chosen["feature_norm"] = (
            True,
            "frozen image features have most in common; standardised, they learn faster",
        )
    if settings.attention == "joint" and mode not in FROZEN and not facts.is_video:
        chosen["token_drop"] = (0.5, "joint attention on half of the patches takes half of the time")
    if clips < FEW_CLIPS:
        reason = f"{plural(clips, 'clip')}: strong crops against learning the place of the camera"
        chosen["crop_scale_min"] = (CROP, reason)
    chosen |= flips(facts.labels)
    if facts.test:
        chosen["test_at_end"] = (True, f"{plural(facts.test, 'test video')} of other groups give the result")
    return chosen


def flips(labels: Sequence[str]) -> Choices:
    """No mirroring where a class name has a word for a side; up and down survive a horizontal flip."""
    words = {label: {w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", label)} for label in labels}
    if not (sided := [label for label in labels if words[label] & SIDES]):
        return {"horizontal_flip": (0.5, "no class name has a word for a side, such as left")}
    heights = any(words[label] & HEIGHTS for label in labels)
    text = f"mirrored clips would have another label: {shorten(sided)}"
    return {"horizontal_flip": (0.0, text + ("; up and down would not change" if heights else ""))}
