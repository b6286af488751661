"""Report of an evaluation: report.html in its folder, and its drawings as PNGs beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tvit_cli.data.layout import Video
from tvit_cli.report import charts
from tvit_cli.report.drawing import Drawing, Role
from tvit_cli.report.film import film_strip
from tvit_cli.report.html import Context, Tile, number, percent, render, write_pages
from tvit_cli.results import BINS, RESAMPLES, ClassScore, Counts, EvalResult, VideoPrediction

MOST_BESIDE = 720  # width of the widest matrix with text beside it
MOST_STRIPS = 12  # in each section: bounds the size of a page
MOST_LABELS = 3  # whose scores are shown below a strip, besides the true one

Strip = tuple[Video, list[str], list[tuple[str, float, Role]]]  # predictions; (name, score, colour) of bars


def write_evaluation_report(result: EvalResult, context: Context) -> Path:
    """Writes report.html and plots/*.png into the evaluation's folder; returns the page's path."""
    drawings = evaluation_drawings(result)
    return write_pages(result.output, evaluation_page(result, context, drawings), drawings)


def evaluation_drawings(result: EvalResult) -> dict[str, Drawing]:
    """Drawings of an evaluation by file name."""
    found = {
        "confusion": charts.confusion_chart(result.labels, result.counts),
        "per_class": charts.class_chart(dict(class_bars(result.per_class))),
        "reliability": charts.reliability_chart(result.calibration),
        "confidence": charts.confidence_chart(result.calibration),
        "coverage": charts.coverage_chart([(max(a.scores), a.is_right) for a in result.answers if a.scores]),
    }
    return {name: drawing for name, drawing in found.items() if drawing is not None}


def evaluation_page(result: EvalResult, context: Context, drawings: Mapping[str, Drawing]) -> str:
    """HTML page of an evaluation."""
    answers = [answer for answer in result.answers if answer.scores]
    per_class = result.per_class.values()
    wrong = sorted((a for a in answers if not a.is_right), key=lambda a: (-max(a.scores), a.video.name))
    wrong = wrong[:MOST_STRIPS]
    others = (a for a in answers if a not in wrong)
    hard = sorted(others, key=lambda a: (a.scores[result.labels.index(a.video.label)], a.video.name))
    about_wrong = "Wrong predictions with the highest score. The label may be wrong as well."
    about_hard = "Videos with the lowest score of their true class, other than those above."
    return render(
        "evaluation.html.j2",
        context,
        result=result,
        tiles=_headline(result),
        videos=sum(score.videos for score in per_class),
        most_videos=max(score.videos for score in per_class),
        groups=len({answer.video.unit for answer in result.answers}),
        draws=RESAMPLES,
        bins=BINS,
        matrix=matrix(result.labels, result.counts, result.confused, drawings["confusion"]),
        class_bars=class_bars(result.per_class),
        confidence=sum(max(answer.scores) for answer in answers) / len(answers),
        accuracy=sum(answer.is_right for answer in answers) / len(answers),
        drawings=[drawings[name] for name in ("reliability", "confidence", "coverage") if name in drawings],
        videos_shown=[
            ("Most confident mistakes", about_wrong, _answer_strips(result, wrong)),
            ("Hardest videos", about_hard, _answer_strips(result, hard[:MOST_STRIPS])),
        ],
    )


def metric_name(name: str) -> str:
    """A metric's name in words. video_top1 -> top-1"""
    plain = name.removeprefix("video_").replace("top", "top-")
    return {"macro_f1": "macro F1"}.get(name, plain.replace("_", " "))


def _headline(result: EvalResult) -> list[Tile]:
    trivial = f"video_top{len(result.labels)}"
    top_k = [name for name in result.metrics if name.startswith("video_top") and name != trivial]
    found = []
    for name in (*top_k, "mean_class_accuracy", "macro_f1", "calibration_error"):
        value = result.metrics[name]
        tile = Tile(metric_name(name), percent(value))
        if name in result.intervals:
            low, high = result.intervals[name]
            ends = f"{percent(low).removesuffix(' %')} to {percent(high)}".replace(" ", "\u00a0")
            tile = tile._replace(remark=f"95 % within {ends}", span=(low, value, high))
        found.append(tile)
    remark = f"{number(result.metrics['videos'] / result.seconds)} per second"
    if unreadable := round(result.metrics["unreadable"]):
        remark += f"; {unreadable} cannot be read"
    return [*found, Tile("videos", f"{result.metrics['videos']:,.0f}", remark)]


def matrix(
    labels: Sequence[str], counts: Counts, confused: Sequence[tuple[str, str, int]], drawing: Drawing
) -> dict[str, Any]:
    """Values of the template's confusion matrix: its drawing, and the most frequent mistakes."""
    shown = len(charts.shown_classes(labels, counts))
    return {
        "drawing": drawing,
        "is_narrow": drawing.width < MOST_BESIDE,
        "shown": shown,
        "classes": len(labels),
        "which": "the most mistakes" if shown == charts.MOST_CLASSES else "a video or a prediction",
        "confused": confused,
    }


def class_bars(per_class: Mapping[str, ClassScore]) -> list[tuple[str, tuple[int, int]]]:
    """(Label, (videos, correct)) of each class, the worst first."""
    return charts.worst_first({label: (score.videos, score.right) for label, score in per_class.items()})


def _answer_strips(result: EvalResult, answers: Sequence[VideoPrediction]) -> list[dict[str, Any]]:
    """Strips with the best scores and the true label's."""
    rows: list[Strip] = []
    for answer in answers:
        label = answer.video.label
        best = sorted(zip(result.labels, answer.scores, strict=True), key=lambda pair: -pair[1])
        best = best[:MOST_LABELS] + [pair for pair in best[MOST_LABELS:] if pair[0] == label]
        roles: dict[str, Role] = {answer.predicted: "bad", label: "good"}
        scores = [(name, score, roles.get(name, "dim")) for name, score in best]
        rows.append((answer.video, [answer.predicted], scores))
    return strips(result, rows)


def strips(result: EvalResult, rows: Sequence[Strip]) -> list[dict[str, Any]]:
    """Values of the template's film strips, without videos that are no longer readable."""
    assert result.clips is not None
    found = []
    for video, predictions, scores in rows:
        clip = result.clips.clip(video.name)
        if clip is not None:
            uri = film_strip(clip, result.clips.preprocessing)
            found.append({"uri": uri, "video": video, "predictions": predictions, "scores": scores})
    return found
