"""Subsets of an evaluation, and warnings on data leakage and optimistic bias."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from tvit_cli.data.layout import SplitChoice, Video, read_layout
from tvit_cli.engine.dataset import DataSource, find_data, video_root
from tvit_cli.engine.trained import Trained
from tvit_cli.errors import DataError, shorten
from tvit_cli.files import sha256
from tvit_cli.settings.card import ModelCard
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.train import TrainSettings

_EFFECT = "Metrics on val and test are optimistically biased."


def find_leaks(videos: Sequence[Video]) -> tuple[str, ...]:
    """Warnings on data leakage between train, val and test: shared groups, and equal files.

    A group is one recording. Files are read only where another subset has a file of the same size.
    """
    leaks = []
    subsets: dict[str, set[str]] = defaultdict(set)
    by_size: dict[int, list[Video]] = defaultdict(list)
    for video in videos:
        if video.group is not None:
            subsets[video.group].add(video.subset)
        if video.path.is_file():
            by_size[video.path.stat().st_size].append(video)
    if shared := sorted(group for group, own in subsets.items() if len(own) > 1):
        clips = sum(video.group in shared and video.subset != "train" for video in videos)
        leaks.append(
            f"Data leakage: train, val and test share {len(shared)} groups ({shorten(shared, most=12)}), {clips} "
            f"videos of val and test. {_EFFECT}"
        )
    first: dict[str, Video] = {}
    candidates = [v for same in by_size.values() if len({v.subset for v in same}) > 1 for v in same]
    pairs = [(first.setdefault(sha256(video.path), video), video) for video in candidates]
    if twins := [f"{a.name} = {b.name}" for a, b in pairs if a.subset != b.subset]:
        text = f"{len(twins)} videos are in two subsets, byte for byte ({shorten(twins, most=12)})"
        leaks.append(f"Data leakage: {text}. {_EFFECT}")
    return tuple(leaks)


def choose_split(settings: EvalSettings, card: ModelCard) -> SplitChoice:
    """Split settings of an evaluation: its own, else those of the training.

    On the training data, groups that were held out then are named one by one: videos added since must not move
    training videos into the test subset.
    """

    def chosen(name: str) -> Any:
        given = getattr(settings, name)
        if given is not None:
            return given
        if settings.subset == "all" and name.endswith("_groups"):
            return "none"
        groups = card.held_out.get(name.removesuffix("_groups"))
        if settings.path_to_data is None and groups is not None:
            return groups
        return card.settings.get(name, TrainSettings.model_fields[name].default)

    names = ("group_pattern", "val_groups", "test_groups", "split")
    return cast(SplitChoice, {name: chosen(name) for name in names})


def is_training_data(card: ModelCard, root: Path) -> bool:
    """Whether data is the model's training data: the same path or name, or a frame store of the same videos."""
    path = card.settings.get("path_to_data")
    if path is None:
        return False
    try:
        own = find_data(path)
    except DataError:
        return False
    return (video_root(own) or own).resolve() == (video_root(root) or root).resolve()


def find_bias(
    settings: EvalSettings, trained: Trained, source: DataSource
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Warnings on optimistic bias and assumptions, and on data leakage (none for subsets train and all)."""
    videos = source.layout.subset(settings.subset)
    before = _training_subsets(settings, trained.card, source)
    subsets = before or {}
    train, val = ([v.name for v in videos if subsets.get(v.name) == name] for name in ("train", "val"))
    bias: list[str] = []
    leaks: tuple[str, ...] = ()
    biased = "the metrics are optimistically biased"
    if settings.subset in ("train", "all"):
        if train:
            bias.append(f"The model was trained on {_count(train, videos)}: {biased} (training accuracy).")
    else:
        leaks = find_leaks(source.layout.videos)
        if train:
            trained_on = (
                f"Data leakage: {len(train)} of the {len(videos)} {settings.subset} videos were trained on (such "
                f"as {train[0]}). Keep --split, --val-groups, --test-groups and --group-pattern as in training."
            )
            leaks = (trained_on, *leaks)
    if val:
        text = f"{_count(val, videos)} were used for model selection: {biased}."
        bias.append(text[0].upper() + text[1:])
    if before is None and trained.results is not None:
        bias.append("The model's training videos are unknown: scored videos may be among them.")
    elif before is None and settings.subset != "test":
        path = trained.card.settings.get("path_to_data")
        where = "" if path is None else f" ({path})"
        bias.append(f"It is unknown whether scored videos are in the model's training data{where}.")
    if settings.shuffle_frames:
        bias.append("The frames of each clip were shuffled (ablation): accuracy without temporal order.")
    if trained.labels_are_guessed and trained.card.labels == source.layout.labels:
        count = len(trained.card.labels)
        bias.append(f"The model's classes are assumed to be the {count} of the data, sorted.")
    return tuple(bias), leaks


def _training_subsets(settings: EvalSettings, card: ModelCard, source: DataSource) -> dict[str, str] | None:
    """Subset of each video in the model's training, by name; None where the data is not the training data."""
    if not source.root.exists() or not is_training_data(card, source.root):
        return None
    before = choose_split(EvalSettings(), card)
    layout = source.layout
    if choose_split(settings, card) != before:
        if (videos := video_root(source.root)) is None:
            return None
        try:
            layout = read_layout(videos, **before)
        except DataError:
            return None
    return {video.name: video.subset for video in layout.videos}


def _count(names: Sequence[str], videos: Sequence[Video]) -> str:
    return "these videos" if len(names) == len(videos) else f"{len(names)} of the {len(videos)} videos"
