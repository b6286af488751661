"""Which videos are scored, and which of them the model knows from its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from tvit_cli.data.holdout import Groups
from tvit_cli.data.layout import Video, read_layout
from tvit_cli.data.leaks import find_leaks
from tvit_cli.engine.source import Source, find_data, videos_of
from tvit_cli.engine.trained import Trained
from tvit_cli.errors import DataError
from tvit_cli.settings.card import ModelCard
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.train import TrainSettings


class Choice(TypedDict):
    """How the subsets of a data set are made, as `read_layout` takes it."""

    group_pattern: str
    val_groups: Groups
    test_groups: Groups
    split: int


def choose_videos(settings: EvalSettings, card: ModelCard) -> Choice:
    """How the subsets are made: as was given, else as in training.

    On the data that the model was trained on, the groups that were held out then are meant by name: videos that
    came later must not move what was trained on into the test subset.
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

    return Choice(
        group_pattern=chosen("group_pattern"),
        val_groups=chosen("val_groups"),
        test_groups=chosen("test_groups"),
        split=chosen("split"),
    )


def training_subsets(settings: EvalSettings, card: ModelCard, source: Source) -> dict[str, str] | None:
    """The subset that each video was in when the model was trained, by name.

    None where that is not known: on other data than the training's.
    """
    if not source.root.exists() or not is_training_data(card, source.root):
        return None
    before = choose_videos(EvalSettings(), card)
    if choose_videos(settings, card) == before:
        return {video.name: video.subset for video in source.layout.videos}
    videos = videos_of(source.root)
    if videos is None:
        return None
    try:
        own = read_layout(videos, **before)
    except DataError:
        return None
    return {video.name: video.subset for video in own.videos}


def is_training_data(card: ModelCard, root: Path) -> bool:
    """Whether data is what a model was trained on: the same path or name, or a frame store of the same videos."""
    path = card.settings.get("path_to_data")
    if path is None:
        return False
    try:
        own = find_data(path)
    except DataError:
        return False
    places = [(videos_of(path) or path).resolve() for path in (own, root)]
    return places[0] == places[1]


def leaks_of(settings: EvalSettings, source: Source, before: Mapping[str, str] | None) -> tuple[str, ...]:
    """What makes the numbers too good: videos that were trained on, or that the subsets share.

    `before` are the `training_subsets`. Where training videos are asked for, they are none.
    """
    if settings.subset in ("train", "all"):
        return ()
    leaks = find_leaks(source.layout.videos)
    videos = source.layout.subset(settings.subset)
    names = _were("train", videos, before)
    if not names:
        return leaks
    trained_on = (
        f"{len(names)} of the {len(videos)} {settings.subset} videos were trained on (such as {names[0]}): in "
        "training, the subsets were chosen otherwise. Leave --split, --val-groups, --test-groups and "
        "--group-pattern as they were."
    )
    return (trained_on, *leaks)


def what_to_know(
    settings: EvalSettings, trained: Trained, source: Source, before: Mapping[str, str] | None
) -> tuple[str, ...]:
    """Sentences on what the numbers do not mean, but for leaks; `before` are the `training_subsets`."""
    videos = source.layout.subset(settings.subset)
    found = []
    names = _were("train", videos, before) if settings.subset in ("train", "all") else []
    if names:
        found.append(
            f"The model was trained on {_part(names, videos)}: the numbers say how well it knows them, not what "
            "it is worth."
        )
    if names := _were("val", videos, before):
        these = _part(names, videos)
        found.append(
            f"{these[0].upper()}{these[1:]} chose the epoch that was kept: the numbers lean to the good side."
        )
    if before is None and trained.results is not None:
        found.append("Which videos the model was trained on is not known: some that are scored may be.")
    elif before is None and settings.subset != "test":
        path = trained.card.settings.get("path_to_data")
        where = "" if path is None else f", on {path},"
        found.append(f"Whether the model knows these videos from its training{where} is not known.")
    if settings.shuffle_frames:
        found.append(
            "The frames of each clip were put in a random order: the numbers say what single frames tell."
        )
    if trained.labels_are_guessed and trained.card.labels == source.layout.labels:
        found.append(
            f"The model's classes are taken to be the {len(trained.card.labels)} of the data, sorted."
        )
    return tuple(found)


def _were(subset: str, videos: Sequence[Video], before: Mapping[str, str] | None) -> list[str]:
    """Names of the videos that were in a subset in training."""
    return [video.name for video in videos if before is not None and before.get(video.name) == subset]


def _part(names: Sequence[str], videos: Sequence[Video]) -> str:
    return "these videos" if len(names) == len(videos) else f"{len(names)} of the {len(videos)} videos"
