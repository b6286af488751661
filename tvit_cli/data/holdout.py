"""Whole groups held out of train: by name, by count, or by a share of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from tvit_cli.data.names import listed
from tvit_cli.errors import DataError
from tvit_cli.settings.base import suggestion

Groups = str | tuple[str, ...]  # as --val-groups is typed, or the names themselves, which may hold commas

AUTO_SHARE = {"val": 0.15, "test": 0.20}  # of the groups in train at that moment; test is taken first


def groups_to_hold_out(
    train: Mapping[str, Counter[str]], subset: str, wanted: Groups, *, automatic: bool, notes: list[str]
) -> tuple[str, ...]:
    """Sorted names of the groups that `--val-groups` or `--test-groups` moves from train to `subset`.

    `train` maps each group to its number of videos by label. What is `wanted`: `auto`, which holds none out unless
    `automatic`; `none`; a count; names with commas between; a tuple of names that were held out before, of which
    some may be gone. What was done is added to the notes.

    Raises DataError for a group that is not in train, and for a count that would take a class its last video.
    """
    wanted = wanted.strip() if isinstance(wanted, str) else wanted
    if wanted in ("none", ()) or (wanted == "auto" and not automatic):
        return ()
    groups: Sequence[str]
    if wanted == "auto":
        count = min(max(1, round(AUTO_SHARE[subset] * len(train))), len(train) - 1)
        groups = _spread(train, count)
        if not groups:
            notes.append(f"No {subset} subset: no group can be spared from train without emptying a class.")
            return ()
    elif isinstance(wanted, str) and _is_count(wanted):
        groups = _spread(train, int(wanted))
        if len(groups) < int(wanted):
            raise DataError(
                f"--{subset}-groups {wanted}: train has {len(train)} groups, of which {len(groups)} can be "
                "held out so that each class keeps a video to train on."
            )
    else:
        groups = _typed(wanted, subset) if isinstance(wanted, str) else _left(wanted, subset, train, notes)
        for group in groups:
            if group not in train:
                raise DataError(
                    f'--{subset}-groups: no group "{group}" in train.{suggestion(group, train, most=3)} '
                    f"Its groups are {listed(sorted(train))}."
                )
    held = set(groups)
    moved = sum(sum(train[group].values()) for group in held)
    if moved:
        notes.append(
            f"{len(held)} of {len(train)} groups ({moved} videos) are held out of train as {subset}: "
            f"{listed(sorted(held))}."
        )
    return tuple(sorted(held))


def _typed(wanted: str, subset: str) -> list[str]:
    """Names with commas between. Raises DataError where there is none."""
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if not names:
        raise DataError(f'--{subset}-groups "{wanted}": names no group. To hold none out, say none.')
    return names


def _left(
    before: tuple[str, ...], subset: str, train: Mapping[str, Counter[str]], notes: list[str]
) -> list[str]:
    """Of the groups that were held out before, those that are still there."""
    gone = [group for group in before if group not in train]
    if gone:
        notes.append(
            f"{len(gone)} of the {len(before)} groups that were held out as {subset} are gone: {listed(gone)}."
        )
    return [group for group in before if group in train]


def _is_count(text: str) -> bool:
    """`4` is a count, `04` a name: UCF101's groups are written with two digits."""
    return text.isdecimal() and text == str(int(text))


def _spread(train: Mapping[str, Counter[str]], count: int) -> list[str]:
    """`count` groups, evenly over the sorted names; fewer where a class would lose its last video."""
    names = sorted(train)
    left = sum(train.values(), Counter[str]())
    chosen: dict[str, None] = {}
    for turn in range(count):
        start = (2 * turn + 1) * len(names) // (2 * count)
        for name in names[start:] + names[:start]:
            if name not in chosen and all(left[label] > n for label, n in train[name].items()):
                chosen[name] = None
                left -= train[name]
                break
    return list(chosen)
