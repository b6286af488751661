"""Report of an evaluation: report.html in its folder, and its drawings as PNGs beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tvit_cli.data.layout import Video
from tvit_cli.report import charts
from tvit_cli.report.drawing import Drawing, Role
from tvit_cli.report.film import clip_pictures
from tvit_cli.report.html import Context, Tile, href, number, percent, render, write_pages
from tvit_cli.results import BINS, RESAMPLES, ClassScore, EvalResult, VideoPrediction

MOST_LISTED, MOST_IN_CELL = 2000, 20  # videos of the confusion matrix's cells
MOST_STRIPS = 12  # in each section: bounds the size of a page
MOST_LABELS = 3  # whose scores are shown below a strip, besides the true one

Strip = tuple[Video, list[str], list[tuple[str, float, Role]]]  # predictions; (name, score, colour) of bars


def write_evaluation_report(result: EvalResult, context: Context) -> Path:
    """Writes report.html and plots/*.png into the evaluation's folder; returns the page's path."""
    drawings = evaluation_drawings(result)
    page = evaluation_page(result, context, drawings)
    links = {run_page(result): f"Training: {result.name}"}
    return write_pages(result.output, page, drawings, title=page_title(result), links=links)


def page_title(result: EvalResult) -> str:
    """The name of an evaluation's page on other pages."""
    folder = result.output
    own = folder.name if result.subset in folder.name else f"{folder.parent.name}/{folder.name}"
    return f"Evaluation: {result.name} · {own}"


def run_page(result: EvalResult) -> Path:
    """The page of the training of an evaluated model, which may be missing."""
    return result.model.parent / "report.html"


def evaluation_drawings(result: EvalResult) -> dict[str, Drawing]:
    """Drawings of an evaluation by file name."""
    found = {
        "confusion": charts.confusion_chart(result.labels, result.counts),
        "per_class": charts.class_chart({n: (c.videos, c.right) for n, c in result.per_class.items()}),
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
    about_hard = (
        "Videos with the lowest score of their true class, other than those above: label_score in scores.csv."
    )
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
        matrix=matrix(result.labels, [("", a) for a in answers], result.confused, result.output),
        classes=class_rows(result.per_class),
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
    labels: Sequence[str],
    answers: Iterable[tuple[str, VideoPrediction]],
    confused: Iterable[tuple[str, str, int]],
    folder: Path,
) -> dict[str, Any]:
    """Values of the template's confusion matrix of (prefix of the video's name, prediction).

    Cells list their videos, the most confident first: at most MOST_IN_CELL, and MOST_LISTED on the page, mistakes
    before others. `confused` are the most frequent mistakes; `folder` is that of the page.
    """
    videos: defaultdict[tuple[str, str], list[tuple[str, VideoPrediction]]] = defaultdict(list)
    for prefix, answer in sorted(answers, key=lambda pair: -max(pair[1].scores)):
        videos[answer.video.label, answer.predicted].append((prefix, answer))
    counts = {pair: len(found) for pair, found in videos.items()}
    totals = charts.row_totals(counts)
    shown = charts.shown_classes(labels, counts)
    index, left, cells = {label: n for n, label in enumerate(shown)}, MOST_LISTED, {}
    drawn = [pair for pair in counts if index.keys() >= set(pair)]
    for n, (true, predicted) in enumerate(sorted(drawn, key=lambda pair: pair[0] == pair[1])):
        share = left if true != predicted else left // (len(drawn) - n)  # what mistakes leave is divided
        listed = videos[true, predicted][: min(MOST_IN_CELL, share)]
        left -= len(listed)
        cells[true, predicted] = {
            "id": f"c{index[true]}-{index[predicted]}",
            "true": true,
            "predicted": predicted,
            "count": counts[true, predicted],
            "share": round(100 * charts.strength(counts[true, predicted] / totals[true])),
            "title": charts.cell_title(true, predicted, counts[true, predicted], totals[true]),
            "videos": [(p + a.video.name, file_link(a.video, folder), max(a.scores)) for p, a in listed],
        }
    return {
        "labels": shown,
        "classes": len(labels),
        "which": "the most mistakes" if len(shown) == charts.MOST_CLASSES else "a video or a prediction",
        "side": 44 if len(shown) <= 12 else 30 if len(shown) <= 30 else 21,  # of a cell, in pixels
        "rows": [(true, [cells.get((true, predicted)) for predicted in shown]) for true in shown],
        "cells": cells.values(),
        "confused": [
            (true, predicted, Markup('<a href="#{}">{}</a>').format(cells[true, predicted]["id"], n))
            for true, predicted, n in confused
            if (true, predicted) in cells
        ],
    }


def file_link(video: Video, folder: Path) -> str:
    """The URL of a video's file from a page's folder; "" without a file, as in a frame store."""
    return href(video.path, folder) if video.path.is_file() else ""


def class_rows(per_class: Mapping[str, ClassScore]) -> list[tuple[object, ...]]:
    """Rows of the table of classes, the worst first."""
    rows = charts.worst_first({label: (score.videos, score.right) for label, score in per_class.items()})
    scores = [per_class[label] for label, _ in rows]
    more = [(percent(score.precision), f"{score.f1:.3f}") for score in scores]
    return [(*row, *own) for row, own in zip(bar_rows(rows), more, strict=True)]


def bar_rows(rows: Iterable[tuple[str, tuple[int, int]]]) -> list[tuple[object, ...]]:
    """Label, correct, top-1 and its bar, from (label, (videos, correct))."""
    return [
        (n, f"{right} of {videos}", percent(right / videos), right / videos) for n, (videos, right) in rows
    ]


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
    return strips(result, rows, result.output)


def strips(result: EvalResult, rows: Sequence[Strip], folder: Path) -> list[dict[str, Any]]:
    """Values of the template's clips, without videos that are no longer readable; `folder` is the page's."""
    assert result.clips is not None
    found = []
    for video, predictions, scores in rows:
        clip = result.clips.clip(video.name)
        if clip is not None:
            pictures = clip_pictures(clip, result.clips.preprocessing) | {"href": file_link(video, folder)}
            found.append({**pictures, "video": video, "predictions": predictions, "scores": scores})
    return found
