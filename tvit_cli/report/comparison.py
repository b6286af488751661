"""Reports of several models: a comparison of two, and a series of runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tvit_cli.errors import natural_key, plural
from tvit_cli.report import evaluation
from tvit_cli.report.charts import Row, confusion_chart, rows_chart, short_name
from tvit_cli.report.drawing import Drawing, Role
from tvit_cli.report.html import Context, Tile, number, percent, render, write_pages
from tvit_cli.results import RESAMPLES, ClassScore, Comparison, EvalResult, Pair, SeriesResult


def write_comparison_report(result: Comparison, context: Context) -> Path:
    """Writes comparison.html and plots/*.png into the comparison's folder; returns the page's path."""
    drawings = comparison_drawings(result)
    page = comparison_page(result, context, drawings)
    both = (result.first, result.second)
    links = {evaluation.run_page(own): f"Training: {own.name}" for own in both}
    links |= {own.output / "report.html": evaluation.page_title(own) for own in both}
    title = "Comparison: {1} against {0}".format(*result.names)
    # The second model's report.html may lie beside it.
    return write_pages(result.output, page, drawings, name="comparison.html", title=title, links=links)


def comparison_drawings(result: Comparison) -> dict[str, Drawing | None]:
    """The drawing of a comparison by file name: at most 40 classes that changed; None if no class did."""
    changed = [(label, counts) for label, counts in _per_class(result).items() if counts[1] != counts[2]]
    changed.sort(key=lambda item: ((item[1][2] - item[1][1]) / item[1][0], natural_key(item[0])))
    one, two = map(short_name, result.names)
    if len(changed) > 40:
        changed = changed[:20] + changed[-20:]
    rows = []
    for label, (videos, first, second) in changed:
        a, b = first / videos, second / videos
        dots: list[tuple[float, Role, str]] = [
            (a, "dim", f"{one} {percent(a)}"),
            (b, "good" if b > a else "bad", f"{two} {percent(b)}"),
        ]
        rows.append(Row(label, dots, (a, b), f"{second - first:+d} of {plural(videos, 'video')}"))
    names: list[tuple[str, Role]] = [(one, "dim"), (f"{two}, better", "good"), (f"{two}, worse", "bad")]
    title = "Top-1 of the classes that changed"
    return {"changed_classes": rows_chart(title, rows, names=names) if rows else None}


def comparison_page(result: Comparison, context: Context, drawings: Mapping[str, Drawing | None]) -> str:
    """HTML page of a comparison."""
    first, second = result.first, result.second
    gained, lost = len(result.gained), len(result.lost)
    both = sum(a.is_right and b.is_right for a, b in result.pairs)
    shared = [warning for warning in first.warnings if warning in second.warnings]
    names, short = result.names, tuple(map(short_name, result.names))
    each = [(name, w) for name, own in zip(names, (first, second), strict=True) for w in own.warnings]
    return render(
        "comparison.html.j2",
        context,
        result=result,
        names=names,
        short=short,
        warnings=shared + [f"{which}: {warning}" for which, warning in each if warning not in shared],
        tiles=_headline(result, names, both),
        draws=RESAMPLES,
        metrics=[
            (evaluation.metric_name(name), *(_shown(name, v, 4) for v in (a, b)), _shown(name, b - a, 4, "+"))
            for name, a in first.metrics.items()
            if (b := second.metrics.get(name)) is not None
        ],
        agreement=[
            (f"{short[0]} correct", both, lost),
            (f"{short[0]} wrong", gained, result.videos - both - gained - lost),
        ],
        drawing=drawings["changed_classes"],
        classes=[
            (label, videos, percent(a / videos), percent(b / videos), f"{100 * (b - a) / videos:+.1f}")
            for label, (videos, a, b) in sorted(_per_class(result).items(), key=lambda c: natural_key(c[0]))
        ],
        flips=[
            ("Gained", names[1], gained, _pair_strips(result, result.gained)),
            ("Lost", names[0], lost, _pair_strips(result, result.lost)),
        ],
    )


def _per_class(result: Comparison) -> dict[str, tuple[int, int, int]]:
    """Label -> (videos, correct predictions of the first model, of the second)."""
    found: dict[str, tuple[int, int, int]] = {}
    for a, b in result.pairs:
        videos, first, second = found.get(a.video.label, (0, 0, 0))
        found[a.video.label] = videos + 1, first + a.is_right, second + b.is_right
    return found


def _headline(result: Comparison, names: tuple[str, str], both: int) -> list[Tile]:
    gained, lost = len(result.gained), len(result.lost)
    remark = "one group: no interval"
    if result.interval is not None:
        low, high = result.interval
        remark = f"95 % within {100 * low:+.1f} to {100 * high:+.1f}"
    return [
        Tile("top-1", percent((both + lost) / result.videos), names[0]),
        Tile("top-1", percent((both + gained) / result.videos), names[1]),
        Tile("difference, points", f"{100 * result.difference:+.1f}", remark),
        Tile("gained, lost", f"{gained}, {lost}", f"of {plural(result.videos, 'video')}"),
        Tile("McNemar’s test, p", number(result.p_value), "exact, two-sided"),
    ]


def _pair_strips(result: Comparison, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Strips of the most confident predictions, of clips as the second model received them."""
    rows: list[evaluation.Strip] = []
    for pair in sorted(pairs, key=lambda pair: -sum(_confidence(pair)))[: evaluation.MOST_STRIPS]:
        video, predictions = pair[1].video, [answer.predicted or "unreadable" for answer in pair]
        scores: list[tuple[str, float, Role]] = [
            (f"{short_name(run)}: {name}", score, "good" if name == video.label else "bad")
            for run, name, score in zip(result.names, predictions, _confidence(pair), strict=True)
        ]
        rows.append((video, predictions, scores))
    return evaluation.strips(result.second, rows, result.output)


def _confidence(pair: Pair) -> list[float]:
    return [max(answer.scores, default=0.0) for answer in pair]


def _shown(name: str, value: float, digits: int, sign: str = "") -> str:
    is_count = name in ("videos", "unreadable") and value == round(value)
    return f"{value:{sign}.{0 if is_count else digits}f}"


def write_series_report(result: SeriesResult, name: str, context: Context) -> Path:
    """Writes report.html and plots/*.png into the folder of a series; returns the page's path."""
    results = list(result.results.values())
    labels = list(dict.fromkeys(label for own in results for label in own.labels))
    counts: Counter[tuple[str, str]] = Counter()
    for own in results:
        counts.update(own.counts)
    mistakes = [(true, predicted, n) for (true, predicted), n in counts.items() if true != predicted]
    mistakes = sorted(mistakes, key=lambda m: (-m[2], m[:2]))[:10]
    drawings = {"runs": _runs_chart(result), "confusion": confusion_chart(labels, counts)}
    answers = [(f"{run}: ", a) for run, own in result.results.items() for a in own.answers if a.scores]
    rows = [[run, *(_shown(n, found[n], 3) for n in result.summary)] for run, found in result.runs.items()]
    spread = ["\u00a0±\u00a0".join(_shown(name, v, 3) for v in pair) for name, pair in result.summary.items()]
    page = render(
        "series.html.j2",
        context,
        result=result,
        name=name,
        subset=results[0].subset,
        warnings=list(dict.fromkeys(warning for own in results for warning in own.warnings)),
        tiles=_series_headline(result),
        runs_chart=drawings["runs"],
        columns=["run", *map(evaluation.metric_name, result.summary)],
        rows=[*rows, ["mean ± sd", *spread]],
        matrix=evaluation.matrix(labels, answers, mistakes, result.folder),
        classes=evaluation.class_rows(_class_scores(results)),
    )
    links = {own.output / "report.html": evaluation.page_title(own) for own in results}
    title = f"Series: {name} · {results[0].subset}"
    return write_pages(result.folder, page, drawings, title=title, links=links)


def _runs_chart(result: SeriesResult) -> Drawing:
    rows = []
    for run, metrics in result.runs.items():
        value = metrics["video_top1"]
        ends = result.results[run].intervals.get("video_top1", (value, value))
        rows.append(Row(run, [(value, "one", percent(value))], ends, percent(value)))
    title = "Top-1 of each run with its 95 % interval, and the mean"
    return rows_chart(title, rows, mark=result.summary["video_top1"][0])


def _class_scores(results: Sequence[EvalResult]) -> dict[str, ClassScore]:
    """Scores of the classes that have videos."""
    answers = [answer for result in results for answer in result.answers]
    videos = Counter(answer.video.label for answer in answers)
    right = Counter(answer.predicted for answer in answers if answer.is_right)
    predicted = Counter(answer.predicted for answer in answers)
    return {label: ClassScore(videos[label], right[label], predicted[label]) for label in videos}


def _series_headline(result: SeriesResult) -> list[Tile]:
    runs = result.runs.values()
    found = []
    for name in ("video_top1", "mean_class_accuracy", "macro_f1", "calibration_error"):
        mean, deviation = result.summary[name]
        low, high = (pick(metrics[name] for metrics in runs) for pick in (min, max))
        value = f"{percent(mean)[:-2]} ± {percent(deviation)}"
        remark = f"from {percent(low)} to {percent(high)}"
        found.append(Tile(evaluation.metric_name(name), value, remark, (low, mean, high)))
    videos = sum(metrics["videos"] for metrics in runs)
    return [*found, Tile("videos scored", f"{videos:,.0f}", f"in {plural(len(runs), 'run')}")]
