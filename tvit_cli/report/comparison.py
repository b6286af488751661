"""What a comparison of two models shows: whether the second is better, and which videos they see otherwise."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tvit_cli.report import page
from tvit_cli.report.drawing import Drawing, Role
from tvit_cli.report.evaluation import metric_name
from tvit_cli.report.machine import hardware, software
from tvit_cli.report.pictures import film_strip
from tvit_cli.report.rows import Row, rows_chart
from tvit_cli.report.words import number, percent, plural
from tvit_cli.report.writing import write_pages
from tvit_cli.settings.card import Preprocessing

COMPARISON_PAGE = "comparison.html"  # the second model’s own report may lie beside it
MOST_ROWS = 40  # of the classes that changed


@dataclass(frozen=True)
class Flip:
    """A video that only one of the two models knows: what each says with which score, and its clip."""

    name: str
    label: str
    first: tuple[str, float]
    second: tuple[str, float]
    clip: Tensor


@dataclass(frozen=True)
class ComparisonFacts:
    """What the page of a comparison says.

    `both`, `only_first`, `only_second` and `neither` count the videos that the models know: what a model could
    not read, it does not know. `draws` is how many resamples the interval comes from; `per_class` maps a label to
    (videos, right answers of the first, of the second); `gained` and `lost` show some of the flips.
    """

    folder: Path
    first: str
    second: str
    subset: str
    metrics: tuple[Mapping[str, float], Mapping[str, float]]
    difference: float
    interval: tuple[float, float] | None
    draws: int
    p_value: float
    both: int
    only_first: int
    only_second: int
    neither: int
    per_class: Mapping[str, tuple[int, int, int]]
    gained: Sequence[Flip]
    lost: Sequence[Flip]
    preprocessing: Preprocessing  # of the second
    measured: Mapping[str, str]
    warnings: Sequence[str]
    commands: Sequence[tuple[str, str]]
    device: torch.device

    @property
    def videos(self) -> int:
        """The videos that count for both."""
        return self.both + self.only_first + self.only_second + self.neither


def write_comparison_report(facts: ComparisonFacts) -> Path:
    """Write comparison.html and plots/*.png into the comparison’s folder; returns the page’s path."""
    drawings = comparison_drawings(facts)
    return write_pages(facts.folder, comparison_page(facts, drawings), drawings, name=COMPARISON_PAGE)


def comparison_drawings(facts: ComparisonFacts) -> dict[str, Drawing | None]:
    """The drawing of a comparison by file name; None where no class changed."""
    changed = sorted(
        ((label, counts) for label, counts in facts.per_class.items() if counts[1] != counts[2]),
        key=lambda item: ((item[1][2] - item[1][1]) / item[1][0], item[0]),
    )
    if len(changed) > MOST_ROWS:
        changed = changed[: MOST_ROWS // 2] + changed[-MOST_ROWS // 2 :]
    rows = []
    for label, (videos, first, second) in changed:
        a, b = first / videos, second / videos
        dots: list[tuple[float, Role, str]] = [
            (a, "dim", f"first {percent(a)}"),
            (b, "good" if b > a else "bad", f"second {percent(b)}"),
        ]
        rows.append(Row(label, dots, (a, b), f"{second - first:+d} of {plural(videos, 'video')}"))
    names: list[tuple[str, Role]] = [("first", "dim"), ("second, better", "good"), ("second, worse", "bad")]
    title = "Top-1 of the classes that changed"
    return {"changed_classes": rows_chart(title, rows, names=names) if rows else None}


def comparison_page(facts: ComparisonFacts, drawings: Mapping[str, Drawing | None]) -> str:
    """The page of a comparison, as HTML."""
    changed = drawings["changed_classes"]
    a, b = facts.metrics
    rows = [
        (metric_name(n), _shown(n, a[n]), _shown(n, b[n]), _shown(n, b[n] - a[n], "+")) for n in a if n in b
    ]
    agreement = [
        ("first right", facts.both, facts.only_first),
        ("first wrong", facts.only_second, facts.neither),
    ]
    every = [
        (label, videos, percent(first / videos), percent(second / videos))
        for label, (videos, first, second) in sorted(facts.per_class.items())
    ]
    return page.page(
        f"{facts.second} against {facts.first}",
        f"tvit eval --compare · {plural(facts.videos, 'video')} · {facts.subset} · "
        f"{time.strftime('%Y-%m-%d %H:%M')}",
        [
            *(page.notice(warning) for warning in facts.warnings),
            page.tiles(_headline(facts)),
            page.paragraph(_verdict(facts)),
            page.section(
                "Side by side",
                page.columns(
                    page.table(("metric", "first", "second", "difference"), rows),
                    page.table(("videos", "second right", "second wrong"), agreement),
                ),
            ),
            page.section(
                "Classes",
                page.paragraph("No class changed.") if changed is None else page.wide(changed, 480),
                page.folded(
                    f"All {plural(len(every), 'class')}",
                    page.table(("class", "videos", "first", "second"), every),
                ),
            ),
            _flips(
                "Gained", "Videos that only the second model knows", facts.only_second, facts.gained, facts
            ),
            _flips("Lost", "Videos that only the first model knows", facts.only_first, facts.lost, facts),
            page.section("What was measured", page.facts(facts.measured)),
            page.section("What to do next", page.commands(facts.commands)),
            page.section("Software", page.facts(software(Path.cwd()))),
            page.section("Hardware", page.facts(hardware(facts.device))),
        ],
        footer=f"{facts.folder.absolute()}: comparison.json, plots/*.png",
    )


def _headline(facts: ComparisonFacts) -> list[page.Tile]:
    first = (facts.both + facts.only_first) / facts.videos
    second = (facts.both + facts.only_second) / facts.videos
    remark = "one group: no interval"
    if facts.interval is not None:
        low, high = facts.interval
        remark = f"95 % within {100 * low:+.1f} to {100 * high:+.1f}"
    return [
        page.Tile("first, top-1", percent(first), facts.first),
        page.Tile("second, top-1", percent(second), facts.second),
        page.Tile("difference, points", f"{100 * facts.difference:+.1f}", remark),
        page.Tile(
            "gained, lost", f"{facts.only_second}, {facts.only_first}", f"of {plural(facts.videos, 'video')}"
        ),
        page.Tile("McNemar’s test, p", number(facts.p_value), "exact, two-sided"),
    ]


def _verdict(facts: ComparisonFacts) -> str:
    """What the numbers allow to be said, and how they were found."""
    if facts.interval is None:
        said = "All videos are of one group, so there is no telling whether the difference would hold with others."
    elif facts.interval[0] > 0:
        said = "The second model is better: the whole interval of the difference lies above zero."
    elif facts.interval[1] < 0:
        said = "The second model is worse: the whole interval of the difference lies below zero."
    else:
        said = "These videos do not tell which model is better: the interval of the difference holds zero."
    test = (
        "McNemar’s test asks how often a fair coin would split the videos that only one of them knows as unevenly; "
        "it takes videos for independent, which clips of one recording are not"
    )
    if facts.interval is None:
        return f"{said} {test}."
    return (
        f"{said} The interval comes from {facts.draws:,} draws of whole groups, the same for both models. {test}: "
        "the interval is the more careful of the two."
    )


def _flips(title: str, text: str, count: int, flips: Sequence[Flip], facts: ComparisonFacts) -> page.Html:
    strips = [_strip(flip, facts.preprocessing) for flip in flips]
    shown = (
        f"{text}: {count}." if len(strips) == count else f"{text}: {count}, of which {len(strips)} are shown."
    )
    return page.section(title, page.paragraph(shown), page.strips(strips))


def _strip(flip: Flip, preprocessing: Preprocessing) -> page.Strip:
    def row(which: str, said: tuple[str, float]) -> tuple[str, float, Role]:
        return f"{which}: {said[0]}", said[1], "good" if said[0] == flip.label else "bad"

    said = [flip.first[0], flip.second[0]]
    return page.Strip(
        film_strip(flip.clip, preprocessing),
        f"Frames of {flip.name}, which is {flip.label}; the first model says {said[0]}, the second {said[1]}",
        page.Html(
            page.answer(flip.label, said, flip.name)
            + page.scores([row("first", flip.first), row("second", flip.second)])
        ),
    )


def _shown(name: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.0f}" if name in ("videos", "unreadable") else f"{value:{sign}.4f}"
