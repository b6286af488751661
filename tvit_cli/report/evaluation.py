"""What an evaluation shows: report.html in its folder, and its drawings as PNGs beside it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tvit_cli.report import html
from tvit_cli.report.charts import (
    MOST_CLASSES,
    class_chart,
    confidence_chart,
    confusion_chart,
    coverage_chart,
    reliability_chart,
    shown_classes,
)
from tvit_cli.report.drawing import Drawing
from tvit_cli.report.film import film_strip
from tvit_cli.report.html import hardware, number, percent, plural, software, write_pages
from tvit_cli.results import Bin, ClassScore, Counts
from tvit_cli.settings.card import Preprocessing

MOST_BESIDE = 720  # a wider matrix has the page for itself
FEW_GROUPS = 10  # fewer make an interval a rough guide
CONFIDENCE = ("reliability", "confidence", "coverage")


@dataclass(frozen=True)
class ShownVideo:
    """A video on the page: its clip (T, C, S, S) as the model was given it, and its labels with scores.

    `scores` holds the best labels, the video’s own among them.
    """

    name: str
    label: str
    predicted: str
    scores: Sequence[tuple[str, float]]
    clip: Tensor


@dataclass(frozen=True)
class EvaluationFacts:
    """All that the page of an evaluation says, beside what it finds out about the machine.

    `metrics` and `intervals` have the names of metrics.json; `groups` is how many groups the videos come from;
    `counts` maps (true label, said label) to videos; `answers` are (confidence, whether right) of each video;
    `draws` is how many resamples the intervals come from, `bins` how many of confidence the calibration error has;
    `warnings` are sentences on what the numbers do not mean.
    """

    folder: Path
    model: str
    subset: str
    labels: Sequence[str]
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    draws: int
    bins: int
    groups: int
    seconds: float
    per_class: Mapping[str, ClassScore]
    counts: Counts
    confused: Sequence[tuple[str, str, int]]
    calibration: Sequence[Bin]
    answers: Sequence[tuple[float, bool]]
    surely_wrong: Sequence[ShownVideo]
    hardest: Sequence[ShownVideo]
    preprocessing: Preprocessing
    measured: Mapping[str, str]
    unreadable: Mapping[str, str]
    warnings: Sequence[str]
    commands: Sequence[tuple[str, str]]
    device: torch.device


def write_evaluation_report(facts: EvaluationFacts) -> Path:
    """Write report.html and plots/*.png into the evaluation’s folder; returns the page’s path."""
    drawings = evaluation_drawings(facts)
    return write_pages(facts.folder, evaluation_page(facts, drawings), drawings)


def evaluation_drawings(facts: EvaluationFacts) -> dict[str, Drawing]:
    """The drawings of an evaluation by file name."""
    shown = shown_classes(facts.labels, facts.counts)
    rows = [(label, row.videos, row.right) for label, row in facts.per_class.items()]
    found = {
        "confusion": confusion_chart(shown, facts.counts),
        "per_class": class_chart(rows, title="Top-1 by class, the worst first"),
        "reliability": reliability_chart(facts.calibration),
        "confidence": confidence_chart(facts.calibration),
        "coverage": coverage_chart(facts.answers),
    }
    return {name: drawing for name, drawing in found.items() if drawing is not None}


def evaluation_page(facts: EvaluationFacts, drawings: Mapping[str, Drawing]) -> str:
    """The page of an evaluation, as HTML."""
    size = f"{plural(round(facts.metrics['videos']), 'video')} of {plural(len(facts.per_class), 'class')}"
    return html.page(
        f"{facts.model} · {facts.subset}",
        f"tvit eval · {size} · {time.strftime('%Y-%m-%d %H:%M')}",
        [
            *(html.notice(warning) for warning in facts.warnings),
            html.tiles(_headline(facts)),
            html.paragraph(_in_words(facts)),
            confusion_section(facts.labels, facts.counts, facts.confused, drawings["confusion"]),
            classes_section(facts.per_class),
            _confidence(facts, [drawings[name] for name in CONFIDENCE if name in drawings]),
            _videos(
                "Wrong, and sure of it",
                "The wrong answers that the model gives with the highest score. A label may be wrong as well.",
                facts.surely_wrong,
                facts.preprocessing,
            ),
            _videos(
                "Hardest",
                "The videos whose own class gets the lowest score, but for those above.",
                facts.hardest,
                facts.preprocessing,
            ),
            html.section("What was measured", html.facts(facts.measured)),
            html.section("Videos left out", html.left_out(facts.unreadable)),
            html.section("What to do next", html.commands(facts.commands)),
            html.section("Software", html.facts(software(Path.cwd()))),
            html.section("Hardware", html.facts(hardware(facts.device))),
        ],
        footer=f"{facts.folder.absolute()}: metrics.json, scores.csv, confusion.csv, plots/*.png",
    )


def metric_name(name: str) -> str:
    """A metric’s name in words. video_top1 -> top-1"""
    words = {"calibration_error": "calibration error", "macro_f1": "macro F1"}
    plain = name.removeprefix("video_").replace("top", "top-")
    return words.get(name, plain.replace("_", " "))


def _headline(facts: EvaluationFacts) -> list[html.Tile]:
    top_k = [name for name in facts.metrics if name.startswith("video_top")]
    trivial = f"video_top{len(facts.labels)}"
    names = [
        *(name for name in top_k if name != trivial),
        "mean_class_accuracy",
        "macro_f1",
        "calibration_error",
    ]
    found = []
    for name in names:
        value = facts.metrics[name]
        if name in facts.intervals:
            low, high = facts.intervals[name]
            remark, span = f"95 % within {_ends(low, high)}", (low, value, high)
        else:
            remark, span = "", None
        title = {"video_top1": "top-1", "calibration_error": "calibration error"}
        found.append(html.Tile(title.get(name, metric_name(name)), percent(value), remark, span))
    speed = f"{number(facts.metrics['videos'] / facts.seconds)} per second"
    left = round(facts.metrics["unreadable"])
    remark = f"{speed}; {left} cannot be read" if left else speed
    found.append(html.Tile("videos", f"{facts.metrics['videos']:,.0f}", remark))
    return found


def _ends(low: float, high: float) -> str:
    """0.123, 0.456 -> 12.3 to 45.6 %, never broken into two lines."""
    return f"{percent(low).removesuffix(' %')} to {percent(high)}".replace(" ", "\u00a0")


def _in_words(facts: EvaluationFacts) -> str:
    """What the numbers are to be held against, and where their intervals come from."""
    videos = sum(row.videos for row in facts.per_class.values())
    most = max(row.videos for row in facts.per_class.values())
    words = (
        f"Guessing gives a top-1 of {percent(1 / len(facts.labels))}, and always naming the commonest class "
        f"{percent(most / videos)}. "
    )
    if not facts.intervals:
        return words + "All videos are of one group: how far the numbers would move with others is not known."
    if facts.groups == videos:
        why = "No two videos are known to come from one recording."
    else:
        why = "Groups are drawn whole: clips cut from one recording stand and fall together."
    drawn = f"{facts.groups:,} {'videos' if facts.groups == videos else 'groups'}"
    words += (
        f"The intervals are those of {facts.draws:,} draws of {drawn}, with replacement, out of the {drawn} there "
        f"are: 95 of 100 draws lie within. {why}"
    )
    few = f" {plural(facts.groups, 'group')} are few, so take the intervals as a rough guide."
    return words + (few if facts.groups < FEW_GROUPS else "")


def confusion_section(
    labels: Sequence[str],
    counts: Counts,
    confused: Sequence[tuple[str, str, int]],
    drawing: Drawing,
    remark: str = "",
) -> html.Html:
    """The confusion matrix beside the commonest mistakes; `remark`, a sentence, says whose answers these are."""
    shown = len(shown_classes(labels, counts))
    text = (
        f"{remark}A row is a class, a column an answer: the diagonal is right, all else is wrong, and a cell is "
        "the stronger the larger its share of the row."
    )
    if shown < len(labels):
        which = "the most mistakes" if shown == MOST_CLASSES else "a video or an answer"
        text += f" {shown} of {len(labels)} classes are shown, those with {which}."
    pairs = html.table(("class", "taken for", "videos"), confused)
    none = html.paragraph("There is no mistake.")
    few = html.Html(html.paragraph("The commonest mistakes:") + pairs) if pairs else none
    matrix = html.wide(drawing, min(900, round(0.8 * drawing.width)))
    side_by_side = [html.columns(matrix, few)] if drawing.width < MOST_BESIDE else [matrix, few]
    return html.section("What is taken for what", html.paragraph(text), *side_by_side)


def classes_section(per_class: Mapping[str, ClassScore]) -> html.Html:
    """A bar for each class, and a table with precision and F1."""
    ordered = sorted(per_class.items(), key=lambda item: (item[1].right / item[1].videos, item[0]))
    bars = [
        (label, row.right / row.videos, f"{row.right} of {row.videos} · {percent(row.right / row.videos)}")
        for label, row in ordered
    ]
    rows = [
        (label, row.videos, f"{row.right / row.videos:.3f}", f"{row.precision:.3f}", f"{row.f1:.3f}")
        for label, row in sorted(per_class.items())
    ]
    return html.section(
        "Classes",
        html.paragraph("Top-1, the worst class first."),
        html.bars(bars),
        html.folded(
            f"Precision and F1 of {plural(len(rows), 'class')}",
            html.table(("class", "videos", "top-1", "precision", "F1"), rows),
        ),
    )


def _confidence(facts: EvaluationFacts, drawings: Sequence[Drawing]) -> html.Html:
    mean = sum(confidence for confidence, _ in facts.answers) / len(facts.answers)
    right = sum(is_right for _, is_right in facts.answers) / len(facts.answers)
    verdict = "surer than it is right" if mean > right else "less sure than it could be"
    text = (
        f"The model is {percent(mean)} sure on average and {percent(right)} of its answers are right: {verdict}. "
        f"The calibration error, {percent(facts.metrics['calibration_error'])}, is the mean gap between the two "
        f"over {facts.bins} equal bins of confidence; of few videos it comes out too large."
    )
    return html.section("Confidence", html.paragraph(text), html.charts(drawings))


def _videos(title: str, text: str, videos: Sequence[ShownVideo], preprocessing: Preprocessing) -> html.Html:
    strips = [video_strip(video, preprocessing) for video in videos]
    return html.section(title, html.paragraph(text) if strips else html.Html(""), html.strips(strips))


def video_strip(video: ShownVideo, preprocessing: Preprocessing) -> html.Strip:
    """The frames of a video as the model saw them, its name, and the scores of a few labels."""
    said = (
        f"is {video.label}"
        if video.predicted == video.label
        else f"is {video.label}, taken for {video.predicted}"
    )
    return html.Strip(
        film_strip(video.clip, preprocessing),
        f"Frames of {video.name}, which {said}",
        html.Html(
            html.answer(video.label, [video.predicted], video.name)
            + label_scores(video.scores, video.label, video.predicted)
        ),
    )


def label_scores(scores: Sequence[tuple[str, float]], label: str, predicted: str) -> html.Html:
    """Bars of labels: the true one, the one that was said in its place, and others."""
    return html.scores(
        (name, score, "good" if name == label else "bad" if name == predicted else "dim")
        for name, score in scores
    )
