"""Classes drawn: the confusion matrix, and a bar for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvit_cli.report.drawing import Box, Drawing, Line, Role, Shape, Text, text_width
from tvit_cli.report.words import percent, plural

MOST_CLASSES = 120  # of a drawing; of more, those with the most mistakes are shown
ROOM = (300.0, 12.0, 900.0)  # for all cells: of no class, more for each, at most
CELLS = (9.0, 64.0)  # a cell's side, least and most
LONGEST_NAME = 26  # letters
LEAST_NUMBERED = 17.0  # a smaller cell has no room for its count
STRONG = 0.6  # a cell of this opacity or more has light letters

Counts = Mapping[tuple[str, str], int]  # (true label, said label) -> videos


@dataclass(frozen=True)
class ClassScore:
    """How one class fared: its videos, how many were known, and how often its name was said."""

    videos: int
    right: int
    said: int

    @property
    def recall(self) -> float:
        """The share of the class's videos that were known: its accuracy."""
        return self.right / self.videos if self.videos else 0.0

    @property
    def precision(self) -> float:
        """The share of right answers among those that name the class; 0 where none does."""
        return self.right / self.said if self.said else 0.0

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        named = self.videos + self.said
        return 2 * self.right / named if named else 0.0


def shown_classes(labels: Sequence[str], counts: Counts) -> list[str]:
    """The classes that a matrix shows, in the model's order: all that occur, or those with the most mistakes."""
    mistakes = dict.fromkeys(labels, 0)
    seen = set()
    for (true, said), videos in counts.items():
        seen |= {true, said}
        if true != said:
            for label in (true, said):
                if label in mistakes:
                    mistakes[label] += videos
    found = [label for label in labels if label in seen]
    if len(found) > MOST_CLASSES:
        kept = set(sorted(found, key=lambda label: -mistakes[label])[:MOST_CLASSES])
        found = [label for label in found if label in kept]
    return found


def confusion_chart(labels: Sequence[str], counts: Counts) -> Drawing:
    """A row for each true class, a column for each answer; a cell is as strong as its share of the row.

    `labels` are the classes to show; a row's share is of all its answers, those in other columns included.
    """
    least, more, most = ROOM
    cell = min(CELLS[1], max(CELLS[0], min(most, least + more * len(labels)) / len(labels)))
    size = min(13.0, max(7.5, cell * 0.8))
    names = {label: _short(label) for label in labels}
    margin = 34 + max(text_width(name, size) for name in names.values())
    side = cell * len(labels)
    totals = dict.fromkeys(labels, 0)
    for (true, _), videos in counts.items():
        if true in totals:
            totals[true] += videos
    shapes: list[Shape] = [
        Text((14, margin + side / 2), "true class", "dim", 12, "middle", turned=True),
        Text((margin + side / 2, 13), "the model’s answer", "dim", 12, "middle"),
        Box((margin, margin), side, side, "grid", 0.35),
    ]
    if cell >= LEAST_NUMBERED:
        for n in range(1, len(labels)):
            at = margin + n * cell
            shapes += [
                Line([(margin, at), (margin + side, at)], "paper", 1.5),
                Line([(at, margin), (at, margin + side)], "paper", 1.5),
            ]
    inset = 1.0 if cell >= LEAST_NUMBERED else 0.25
    for row, true in enumerate(labels):
        y = margin + row * cell
        base = y + cell / 2 + 0.36 * size
        shapes.append(Text((margin - 7, base), names[true], "ink", size, "end"))
        shapes.append(
            Text(
                (margin + row * cell + cell / 2 + 0.36 * size, margin - 7),
                names[true],
                "ink",
                size,
                turned=True,
            )
        )
        for column, said in enumerate(labels):
            videos = counts.get((true, said), 0)
            if not videos:
                continue
            share = videos / totals[true]
            role: Role = "one" if row == column else "bad"
            opacity = round(0.18 + 0.82 * share**0.7, 2)
            x = margin + column * cell
            words = (
                f"{true}: {videos} of {totals[true]} taken for {said}"
                if row != column
                else f"{true}: {videos} of {totals[true]} right"
            )
            shapes.append(
                Box((x + inset, y + inset), cell - 2 * inset, cell - 2 * inset, role, opacity, words)
            )
            if cell >= LEAST_NUMBERED:
                letters: Role = "paper" if opacity >= STRONG else "ink"
                shapes.append(Text((x + cell / 2, base), str(videos), letters, size, "middle"))
    edge = margin + side + 6
    return Drawing("Confusion matrix: true classes in rows, answers in columns", edge, edge, shapes)


def class_chart(rows: Sequence[tuple[str, int, int]], *, title: str) -> Drawing:
    """A bar for each class, the worst first: (label, videos, right answers); at most MOST_CLASSES."""
    worst = sorted(rows, key=lambda row: (row[2] / row[1], row[0]))[:MOST_CLASSES]
    names = {label: _short(label) for label, _, _ in worst}
    left = 14 + max(text_width(name, 12) for name in names.values())
    line, top, width = 19.0, 40.0, 300.0
    shapes: list[Shape] = [Text((4, 20), title, size=15, bold=True)]
    for number, (label, videos, right) in enumerate(worst):
        y = top + number * line
        shapes += [
            Text((left - 8, y + 10), names[label], "ink", 12, "end"),
            Box((left, y), width, 12, "grid"),
            Box((left, y), width * right / videos, 12, "one", title=f"{label}: {right} of {videos}"),
            Text(
                (left + width + 8, y + 10),
                f"{right} of {plural(videos, 'video')} · {percent(right / videos)}",
                "dim",
                12,
            ),
        ]
    return Drawing(title, left + width + 190, top + len(worst) * line + 8, shapes)


def _short(label: str) -> str:
    return label if len(label) <= LONGEST_NAME else label[: LONGEST_NAME - 1] + "…"
