"""What the evaluations of a series of runs show together: mean and spread, and what all runs confuse."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tvit_cli.report import page
from tvit_cli.report.drawing import Drawing
from tvit_cli.report.evaluation import classes_section, confusion_section, metric_name
from tvit_cli.report.machine import hardware, software
from tvit_cli.report.matrix import ClassScore, Counts, confusion_chart, shown_classes
from tvit_cli.report.rows import Row, rows_chart
from tvit_cli.report.words import percent, plural
from tvit_cli.report.writing import write_pages

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
        (run, *(_shown(name, metrics[name]) for name in names)) for run, metrics in facts.runs.items()
    ]
    spread = (" ± ".join(_shown(name, value) for value in facts.summary[name]) for name in names)
    rows.append(("mean ± sd", *spread))
    return page.page(
        f"{facts.name} · {facts.subset}",
        f"tvit eval · {plural(len(facts.runs), 'run')} · {time.strftime('%Y-%m-%d %H:%M')}",
        [
            *(page.notice(warning) for warning in facts.warnings),
            page.tiles(_headline(facts)),
            page.paragraph(
                "Mean ± sample deviation over the runs: how far a training of another seed or split would lie off. "
                "The interval of a single run says how far it would move with other videos."
            ),
            page.section(
                "Runs",
                page.wide(drawings["runs"], 460),
                page.table(("run", *map(metric_name, names)), rows),
            ),
            confusion_section(
                facts.labels,
                facts.counts,
                facts.confused,
                drawings["confusion"],
                "The answers of all runs together. ",
            ),
            classes_section(facts.per_class),
            page.section("The results of each run", page.facts(facts.outputs)),
            page.section("What to do next", page.commands(facts.commands)),
            page.section("Software", page.facts(software(Path.cwd()))),
            page.section("Hardware", page.facts(hardware(facts.device))),
        ],
        footer=f"{facts.folder.absolute()}: summary.json, plots/*.png",
    )


def _headline(facts: SeriesFacts) -> list[page.Tile]:
    found = []
    for name in HEADLINE:
        mean, deviation = facts.summary[name]
        values = [metrics[name] for metrics in facts.runs.values()]
        remark = f"from {percent(min(values))} to {percent(max(values))}"
        span = (min(values), mean, max(values))
        found.append(
            page.Tile(metric_name(name), f"{percent(mean)[:-2]} ± {percent(deviation)}", remark, span)
        )
    videos = sum(metrics["videos"] for metrics in facts.runs.values())
    return [*found, page.Tile("videos scored", f"{videos:,.0f}", f"in {plural(len(facts.runs), 'run')}")]


def _shown(name: str, value: float) -> str:
    return f"{value:.0f}" if name in COUNTED and value == round(value) else f"{value:.3f}"
