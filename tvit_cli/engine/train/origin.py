"""The model of `tvit train --from`: its settings, its copy in the new run, its classes and held-out groups."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from socket import gethostname

from tvit_cli.data.layout import HeldOut, SplitChoice, matching_label, read_layout, same_class, split_choice
from tvit_cli.engine.dataset import DataSource, find_data, video_root
from tvit_cli.engine.evaluate.selection import choose_split, is_training_data
from tvit_cli.engine.train.build import CHOSEN_SHAPE, class_rows
from tvit_cli.engine.train.checkpoint import list_checkpoints
from tvit_cli.engine.train.run_folder import Run, find_run, named_paths, saved_settings
from tvit_cli.engine.trained import series_models
from tvit_cli.errors import CheckpointError, DataError, ModelError, RunError, plural, shorten
from tvit_cli.files import sha256
from tvit_cli.model.folder import (
    BASE_FOLDER,
    CARD_FILE,
    MODEL_FOLDER,
    SETTINGS_FILE,
    WEIGHTS_FILE,
    load_card,
    load_config,
    replace_folder,
)
from tvit_cli.model.pretrained_config import own_clips
from tvit_cli.model.weights import WeightsSource, resolve_weights
from tvit_cli.settings.base import Layer, Loaded, extra, read_config, suggestion
from tvit_cli.settings.card import ModelCard
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.train import SCRATCH_SHAPE, TrainSettings

# Note [Going on from merged weights]
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# --from starts from the weights of the model folder, in which the adapters of the earlier run are merged, and
# attaches new ones. Continuing the earlier adapters would need that run's checkpoints, which may be gone, and its
# base weights; --lora-rank and --train could not change, and layers trained in full would be merged anyway. New
# adapters start at zero (pissa and olora up to rounding), so the first logits are those of the earlier model, bit
# for bit. The model is copied into the new run, as the base of its checkpoints and of its exported adapter.

# Not taken over: choices of the run and of the machine, and numbers that the weights determine.
_OWN = {"from_", "hf_model_name", "seed", "mixed_precision", "compile", "warmup_epochs", *SCRATCH_SHAPE}
_SUBSETS = ("val", "test")


def settings_beneath(named: Loaded[TrainSettings]) -> Layer | None:
    """Settings of the run that is resumed, of the model of --from, or of a video ViT's weights.

    Raises CheckpointError or ModelError for a run or a model that cannot be used.
    """
    settings = named.settings
    if settings.resume_from_checkpoint is not None and len(named.series) == 1:
        try:
            return read_config(saved_settings(find_run(settings)))
        except CheckpointError as error:
            if (rank := os.environ.get("RANK", "0")) == "0":
                raise
            advice = "All processes read checkpoints: name a --working-directory that all machines share."
            raise CheckpointError(f"Process {rank}, on {gethostname()}: {error} {advice}") from error
    if (origin := find_origin(settings)) is None:
        given = settings.n_frames if "n_frames" in settings.model_fields_set else None
        values = own_clips(settings.hf_model_name, given) if settings.hf_model_name else {}
        if settings.train == "probe":  # whose pooling is its own
            values.pop("pool", None)
        return (
            Layer(f"weights {settings.hf_model_name}", values, "--hf-model-name, {key}") if values else None
        )
    card, config = load_config(origin.folder)
    own = _OWN | {name for name, f in TrainSettings.model_fields.items() if extra(f).get("resume_safe")}
    if settings.path_to_data is not None and not _is_known(card, settings.path_to_data):
        own |= {"split", "val_groups", "test_groups"}
    kept = {k: v for k, v in card.settings.items() if k in TrainSettings.model_fields and k not in own}
    values = {**kept, "path_to_data": card.settings.get("path_to_data")}
    values |= {key: getattr(config, key) for key in CHOSEN_SHAPE}
    values |= card.preprocessing.model_dump(include={"frame_grid", "clip_seconds", "resize"})
    return Layer(f"from {settings.from_}", {**values, "img_size": config.frame_size}, "--from, {key}")


def find_origin(settings: TrainSettings) -> WeightsSource | None:
    """The model of --from, None without one; of a run that is resumed, its own copy.

    Raises ModelError where the name is that of no model, or of several.
    """
    if settings.from_ is None:
        return None
    folder = settings.working_directory / (settings.experiment_name or "")
    if settings.resume_from_checkpoint is not None:
        folder = find_run(settings).folder
    elif settings.overwrite or not list_checkpoints(folder / settings.checkpoint_dir):
        return _resolve(settings, settings.from_)
    return origin_copy(folder, settings) or _resolve(settings, settings.from_)


def origin_copy(run: Path, settings: TrainSettings) -> WeightsSource | None:
    """A run's copy of the model of --from, None without one."""
    if settings.from_ is None or not (run / BASE_FOLDER / CARD_FILE).is_file():
        return None
    return replace(resolve_weights(str(run / BASE_FOLDER)), name=settings.from_)


def _resolve(settings: TrainSettings, name: str) -> WeightsSource:
    given, in_root = named_paths(settings, name)
    path = next((path for path in (given, in_root) if path.exists()), given)
    if models := series_models(path):
        scores = {run: load_card(folder).metrics.get("val_video_top1", 0.0) for run, folder in models.items()}
        best = path / max(scores, key=lambda run: scores[run])
        runs = ", ".join(f"{run} {score:.3f}" for run, score in scores.items())
        raise ModelError(f"--from {name}: a series (validation top-1 {runs}). Name one run, such as {best}.")
    if not path.exists() and path.absolute().parent.is_dir():
        folder = path.parent if path.parent.name else in_root.parent
        names = sorted(p.name for p in folder.glob("*/")) if folder.is_dir() else []
        hint = suggestion(path.name, names) or f" Runs there: {shorten(names, 12) or 'none'}."
        raise ModelError(f"--from {name}: no such run in {folder}.{hint}")
    if (path / SETTINGS_FILE).is_file() and not (path / MODEL_FOLDER).is_dir():
        advice = f"Resume it first: tvit train --resume-from-checkpoint {path}"
        raise ModelError(f"--from {name}: a run that has not ended, so it has no model. {advice}")
    source = resolve_weights(str(path))
    if not source.is_ours:
        advice = f"To train a new classifier on these weights: --hf-model-name {name}"
        raise ModelError(f"--from {name}: no model that tvit trained. {advice}")
    return replace(source, name=name, revision=None)


def keep_copy(origin: WeightsSource, run: Run) -> None:
    """Copies the model of --from into the run, which can then do without it.

    Raises RunError if the disk is full, or if the model has changed since it was loaded.
    """
    target = run.folder / BASE_FOLDER
    try:
        with replace_folder(target) as folder:
            for name in (CARD_FILE, WEIGHTS_FILE):
                shutil.copyfile(origin.folder / name, folder / name)
            if sha256(folder / WEIGHTS_FILE) != origin.sha256:
                raise RunError(f"--from {origin.name}: has just changed. Start again with the same command.")
    except OSError as error:
        advice = "Free some space, or set --working-directory."
        raise RunError(f"{target}: cannot be written ({error.strerror}). {advice}") from error


def taken_over(settings: TrainSettings, theirs: Sequence[str], ours: Sequence[str]) -> str:
    """The model of --from and its part in a training, in one line."""
    rows = class_rows(theirs, ours)
    grid = "" if settings.frame_grid is None else f", of {settings.frame_grid} evenly spaced ones"
    dense = "" if settings.clip_seconds is None else f" in {settings.clip_seconds:g} s"
    frames = f"{settings.n_frames} frames of {settings.img_size} px{grid}{dense}"
    text = f"{settings.from_}: weights, {frames}; {len(rows)} of {len(ours)} classes"
    changes = {
        "new": [label for n, label in enumerate(ours) if n not in rows],
        "left out": [label for n, label in enumerate(theirs) if n not in rows.values()],
    }
    return "; ".join([text, *(f"{name}: {shorten(labels, 8)}" for name, labels in changes.items() if labels)])


def split_after(settings: TrainSettings, card: ModelCard) -> SplitChoice:
    """The split settings, with the groups that the earlier training held out, unless others are given.

    Videos of groups that it trained on must not move into the val or test subset.
    """
    choice = split_choice(settings)
    known = frozenset(map(same_class, card.labels))
    for key in ("val_groups", "test_groups"):
        given = getattr(settings, key)
        names = card.held_out.get(key.removesuffix("_groups"))
        if names and given in ("auto", card.settings.get(key)):
            choice[key] = HeldOut(names, known, given)
    return choice


def find_reuse(card: ModelCard, source: DataSource) -> tuple[str, ...]:
    """A warning on val and test videos of the same data that the earlier training may have learnt from."""
    videos = video_root(source.root)
    if videos is None or not is_training_data(card, source.root):
        return ()
    with suppress(DataError):
        layout = read_layout(videos, need_training=False, **choose_split(EvalSettings(), card))
        spell = matching_label(card.labels)
        train = {v.name for v in layout.subset("train") if spell(v.label) in card.labels}
        if used := [v.name for v in source.layout.videos if v.subset in _SUBSETS and v.name in train]:
            count = plural(len(used), "val or test video")
            text = f"--from: that model may have been trained on {count} (such as {used[0]})"
            advice = (
                "Keep its --split, --group-pattern, --val-groups and --test-groups, unless these are new."
            )
            return (f"Data leakage: {text}. {advice}",)
    return ()


def _is_known(card: ModelCard, path_to_data: str) -> bool:
    with suppress(DataError):
        return is_training_data(card, find_data(path_to_data))
    return False
