"""Reports of several models: a comparison of two, and a series of runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tvit_cli.report import html
from tvit_cli.report.charts import Row, confusion_chart, rows_chart, shown_classes
from tvit_cli.report.drawing import Drawing, Role
from tvit_cli.report.evaluation import classes_section, confusion_section, metric_name
from tvit_cli.report.film import film_strip
from tvit_cli.report.html import hardware, number, percent, plural, software, write_pages
from tvit_cli.results import ClassScore, Counts
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
    return html.page(
        f"{facts.second} against {facts.first}",
        f"tvit eval --compare · {plural(facts.videos, 'video')} · {facts.subset} · "
        f"{time.strftime('%Y-%m-%d %H:%M')}",
        [
            *(html.notice(warning) for warning in facts.warnings),
            html.tiles(_headline(facts)),
            html.paragraph(_verdict(facts)),
            html.section(
                "Side by side",
                html.columns(
                    html.table(("metric", "first", "second", "difference"), rows),
                    html.table(("videos", "second right", "second wrong"), agreement),
                ),
            ),
            html.section(
                "Classes",
                html.paragraph("No class changed.") if changed is None else html.wide(changed, 480),
                html.folded(
                    f"All {plural(len(every), 'class')}",
                    html.table(("class", "videos", "first", "second"), every),
                ),
            ),
            _flips(
                "Gained", "Videos that only the second model knows", facts.only_second, facts.gained, facts
            ),
            _flips("Lost", "Videos that only the first model knows", facts.only_first, facts.lost, facts),
            html.section("What was measured", html.facts(facts.measured)),
            html.section("What to do next", html.commands(facts.commands)),
            html.section("Software", html.facts(software(Path.cwd()))),
            html.section("Hardware", html.facts(hardware(facts.device))),
        ],
        footer=f"{facts.folder.absolute()}: comparison.json, plots/*.png",
    )


def _headline(facts: ComparisonFacts) -> list[html.Tile]:
    first = (facts.both + facts.only_first) / facts.videos
    second = (facts.both + facts.only_second) / facts.videos
    remark = "one group: no interval"
    if facts.interval is not None:
        low, high = facts.interval
        remark = f"95 % within {100 * low:+.1f} to {100 * high:+.1f}"
    return [
        html.Tile("first, top-1", percent(first), facts.first),
        html.Tile("second, top-1", percent(second), facts.second),
        html.Tile("difference, points", f"{100 * facts.difference:+.1f}", remark),
        html.Tile(
            "gained, lost", f"{facts.only_second}, {facts.only_first}", f"of {plural(facts.videos, 'video')}"
        ),
        html.Tile("McNemar’s test, p", number(facts.p_value), "exact, two-sided"),
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


def _flips(title: str, text: str, count: int, flips: Sequence[Flip], facts: ComparisonFacts) -> html.Html:
    strips = [_strip(flip, facts.preprocessing) for flip in flips]
    shown = (
        f"{text}: {count}." if len(strips) == count else f"{text}: {count}, of which {len(strips)} are shown."
    )
    return html.section(title, html.paragraph(shown), html.strips(strips))


def _strip(flip: Flip, preprocessing: Preprocessing) -> html.Strip:
    def row(which: str, said: tuple[str, float]) -> tuple[str, float, Role]:
        return f"{which}: {said[0]}", said[1], "good" if said[0] == flip.label else "bad"

    said = [flip.first[0], flip.second[0]]
    return html.Strip(
        film_strip(flip.clip, preprocessing),
        f"Frames of {flip.name}, which is {flip.label}; the first model says {said[0]}, the second {said[1]}",
        html.Html(
            html.answer(flip.label, said, flip.name)
            + html.scores([row("first", flip.first), row("second", flip.second)])
        ),
    )


def _shown(name: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.0f}" if name in ("videos", "unreadable") else f"{value:{sign}.4f}"


HEADLINE = ("video_top1", "mean_class_accuracy", "macro_f1", "calibration_error")
COUNTED = ("videos", "unreadable")  # not shares of 1, nor in nats


@dataclass(frozen=True)
class SeriesFacts:
    """What the page of a series says.

    `runs` and `intervals` map a run to its metrics and their 95 % intervals; `summary` holds (mean, sample
    deviation) of each metric; `counts`, `confused` and `per_class` are sums over all runs; `outputs` says where
    the results of each run lie.
    """

    folder: Path
    name: str
    subset: str
    labels: Sequence[str]
    runs: Mapping[str, Mapping[str, float]]
    intervals: Mapping[str, Mapping[str, tuple[float, float]]]
    summary: Mapping[str, tuple[float, float]]
    counts: Counts
    confused: Sequence[tuple[str, str, int]]
    per_class: Mapping[str, ClassScore]
    outputs: Mapping[str, str]
    warnings: Sequence[str]
    commands: Sequence[tuple[str, str]]
    device: torch.device


def write_series_report(facts: SeriesFacts) -> Path:
    """Write report.html and plots/*.png into the series’ folder; returns the page’s path."""
    drawings = series_drawings(facts)
    return write_pages(facts.folder, series_page(facts, drawings), drawings)


def series_drawings(facts: SeriesFacts) -> dict[str, Drawing]:
    """The drawings of a series by file name."""
    rows = []
    for run, metrics in facts.runs.items():
        value = metrics["video_top1"]
        low, high = facts.intervals[run].get("video_top1", (value, value))
        rows.append(Row(run, [(value, "one", percent(value))], (low, high), percent(value)))
    mean, _ = facts.summary["video_top1"]
    return {
        "runs": rows_chart("Top-1 of each run with its 95 % interval, and the mean", rows, mark=mean),
        "confusion": confusion_chart(shown_classes(facts.labels, facts.counts), facts.counts),
    }


def series_page(facts: SeriesFacts, drawings: Mapping[str, Drawing]) -> str:
    """The page of a series, as HTML."""
    names = list(facts.summary)
    rows: list[Sequence[object]] = [
        (run, *(_shown_runs(name, metrics[name]) for name in names)) for run, metrics in facts.runs.items()
    ]
    spread = (" ± ".join(_shown_runs(name, value) for value in facts.summary[name]) for name in names)
    rows.append(("mean ± sd", *spread))
    return html.page(
        f"{facts.name} · {facts.subset}",
        f"tvit eval · {plural(len(facts.runs), 'run')} · {time.strftime('%Y-%m-%d %H:%M')}",
        [
            *(html.notice(warning) for warning in facts.warnings),
            html.tiles(_series_headline(facts)),
            html.paragraph(
                "Mean ± sample deviation over the runs: how far a training of another seed or split would lie off. "
                "The interval of a single run says how far it would move with other videos."
            ),
            html.section(
                "Runs",
                html.wide(drawings["runs"], 460),
                html.table(("run", *map(metric_name, names)), rows),
            ),
            confusion_section(
                facts.labels,
                facts.counts,
                facts.confused,
                drawings["confusion"],
                "The answers of all runs together. ",
            ),
            classes_section(facts.per_class),
            html.section("The results of each run", html.facts(facts.outputs)),
            html.section("What to do next", html.commands(facts.commands)),
            html.section("Software", html.facts(software(Path.cwd()))),
            html.section("Hardware", html.facts(hardware(facts.device))),
        ],
        footer=f"{facts.folder.absolute()}: summary.json, plots/*.png",
    )


def _series_headline(facts: SeriesFacts) -> list[html.Tile]:
    found = []
    for name in HEADLINE:
        mean, deviation = facts.summary[name]
        values = [metrics[name] for metrics in facts.runs.values()]
        remark = f"from {percent(min(values))} to {percent(max(values))}"
        span = (min(values), mean, max(values))
        found.append(
            html.Tile(metric_name(name), f"{percent(mean)[:-2]} ± {percent(deviation)}", remark, span)
        )
    videos = sum(metrics["videos"] for metrics in facts.runs.values())
    return [*found, html.Tile("videos scored", f"{videos:,.0f}", f"in {plural(len(facts.runs), 'run')}")]


def _shown_runs(name: str, value: float) -> str:
    return f"{value:.0f}" if name in COUNTED and value == round(value) else f"{value:.3f}"
