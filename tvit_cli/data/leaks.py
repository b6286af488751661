"""Videos that stand on both sides of a split: of one group, or the same file under two names."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tvit_cli.data.layout import Video
from tvit_cli.data.names import listed

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
            f"The subsets share {len(shared)} groups ({listed(shared)}), {clips} videos of val and test: "
            f"clips cut from one recording. {_WHAT_IT_DOES}"
        )
    if twins := _twins(videos):
        names = listed(f"{a.name} = {b.name}" for a, b in twins)
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
