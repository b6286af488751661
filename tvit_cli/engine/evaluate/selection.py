"""The videos to score, and those among them that training has used."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tvit_cli.data.layout import SplitChoice, Video, read_layout
from tvit_cli.engine.dataset import DataSource, find_data, video_root
from tvit_cli.engine.trained import Trained
from tvit_cli.errors import DataError, shorten
from tvit_cli.settings.card import ModelCard
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.train import TrainSettings

_WHAT_IT_DOES = "A model that was trained on them knows them, and its scores on val and test are too good."


def find_leaks(videos: Sequence[Video]) -> tuple[str, ...]:
    """Sentences that tell what train, val and test share, with counts; none where they share nothing.

    A group in two subsets means clips cut from one recording. Files are compared by their bytes, and read
    only where another subset has a file of the same size.
    """
    leaks = []
    groups: dict[str, set[str]] = defaultdict(set)
    for video in videos:
        if video.group is not None:
            groups[video.group].add(video.subset)
    shared = sorted(group for group, subsets in groups.items() if len(subsets) > 1)
    if shared:
        clips = sum(video.group in shared and video.subset != "train" for video in videos)
        leaks.append(
            f"The subsets share {len(shared)} groups ({shorten(shared, most=12)}), {clips} videos of val and test: "
            f"clips cut from one recording. {_WHAT_IT_DOES}"
        )
    if twins := _twins(videos):
        names = shorten((f"{a.name} = {b.name}" for a, b in twins), most=12)
        leaks.append(f"{len(twins)} videos stand in two subsets, byte for byte ({names}). {_WHAT_IT_DOES}")
    return tuple(leaks)


def _twins(videos: Sequence[Video]) -> list[tuple[Video, Video]]:
    """Pairs of equal files in different subsets."""
    by_size: dict[int, list[Video]] = defaultdict(list)
    for video in videos:
        if video.path.is_file():
            by_size[video.path.stat().st_size].append(video)
    twins = []
    for same_size in by_size.values():
        if len({video.subset for video in same_size}) == 1:
            continue
        first: dict[str, Video] = {}
        for video in same_size:
            other = first.setdefault(_sha256(video.path), video)
            if other.subset != video.subset:
                twins.append((other, video))
    return twins


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def choose_split(settings: EvalSettings, card: ModelCard) -> SplitChoice:
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

    return SplitChoice(
        group_pattern=chosen("group_pattern"),
        val_groups=chosen("val_groups"),
        test_groups=chosen("test_groups"),
        split=chosen("split"),
    )


def training_subsets(settings: EvalSettings, card: ModelCard, source: DataSource) -> dict[str, str] | None:
    """The subset that each video was in when the model was trained, by name.

    None where that is not known: on other data than the training's.
    """
    if not source.root.exists() or not is_training_data(card, source.root):
        return None
    before = choose_split(EvalSettings(), card)
    if choose_split(settings, card) == before:
        return {video.name: video.subset for video in source.layout.videos}
    videos = video_root(source.root)
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
    places = [(video_root(path) or path).resolve() for path in (own, root)]
    return places[0] == places[1]


def describe_leakage(
    settings: EvalSettings, source: DataSource, before: Mapping[str, str] | None
) -> tuple[str, ...]:
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


def describe_bias(
    settings: EvalSettings, trained: Trained, source: DataSource, before: Mapping[str, str] | None
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
