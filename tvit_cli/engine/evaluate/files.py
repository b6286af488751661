"""Files and report of an evaluation."""

from __future__ import annotations

import csv
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tvit_cli.engine.launch import ProcessGroup
from tvit_cli.engine.trained import Trained
from tvit_cli.errors import DataError, RunError
from tvit_cli.report.evaluation import EvaluationFacts, ShownVideo, write_evaluation_report
from tvit_cli.report.html import plural
from tvit_cli.results import (
    BINS,
    RESAMPLES,
    ClassScore,
    EvalResult,
    Note,
    Report,
    VideoPrediction,
)
from tvit_cli.settings.base import flag
from tvit_cli.settings.eval import EvalSettings

METRICS_FILE = "metrics.json"
SCORES_FILE = "scores.csv"
CONFUSION_FILE = "confusion.csv"


def write_result(result: EvalResult, facts: Mapping[str, object]) -> None:
    """Write metrics.json, scores.csv (a row per video) and confusion.csv to the result's folder.

    Raises RunError where they cannot be written.
    """
    content = {
        "subset": result.subset,
        **facts,
        "model": str(result.model),
        "metrics": result.metrics,
        "intervals": {name: list(interval) for name, interval in result.intervals.items()},
        "per_class": {label: _row(score) for label, score in result.per_class.items()},
        "confused": [{"label": true, "said": said, "videos": n} for true, said, n in result.confused],
        "calibration": [asdict(bin) for bin in result.calibration],
        "unreadable": result.unreadable,
        "seconds": round(result.seconds, 3),
        "videos_per_second": round(result.metrics["videos"] / result.seconds, 3),
    }
    with output_folder(result.output) as folder:
        write_json(folder / METRICS_FILE, content)
        _write_rows(folder / SCORES_FILE, _score_rows(result.answers, result.labels))
        _write_rows(folder / CONFUSION_FILE, _confusion_rows(result.answers, result.labels))


@contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """A folder, made where it is missing, for the files written meanwhile. Raises RunError where they cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be written ({error.strerror}). Make room, or choose another --output."
        ) from error


def write_json(path: Path, content: object) -> None:
    """Write a value as JSON that a person can read."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_metrics(output: Path) -> dict[str, float]:
    """The metrics that an evaluation wrote to its folder. Raises DataError where they cannot be read."""
    path = output / METRICS_FILE
    try:
        return {
            str(name): float(value) for name, value in json.loads(path.read_text("utf-8"))["metrics"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: holds no metrics ({type(error).__name__}: {error}). Evaluate again, or remove {output}."
        ) from error


def _row(score: ClassScore) -> dict[str, float]:
    return {
        "videos": score.videos,
        "right": score.right,
        "precision": score.precision,
        "recall": score.recall,
        "f1": score.f1,
    }


def _score_rows(answers: Iterable[VideoPrediction], labels: tuple[str, ...]) -> Iterable[list[str]]:
    """Name, group, true and predicted label, then the score of every class."""
    yield ["video", "group", "label", "predicted", *labels]
    for answer in answers:
        video = answer.video
        yield [
            video.name,
            video.group or "",
            video.label,
            answer.predicted,
            *(f"{score:.6f}" for score in answer.scores),
        ]


def confusion_counts(answers: Iterable[VideoPrediction]) -> Counter[tuple[str, str]]:
    """How often each (true label, said label) occurs; a video without an answer says \"\"."""
    return Counter((answer.video.label, answer.predicted) for answer in answers)


def _confusion_rows(answers: Iterable[VideoPrediction], labels: tuple[str, ...]) -> Iterable[list[str]]:
    """Counts: a row per true class, a column per predicted one."""
    counts = confusion_counts(answers)
    yield ["label", *labels]
    for true in labels:
        yield [true, *(str(counts[true, said]) for said in labels)]


def _write_rows(path: Path, rows: Iterable[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


class Facts(Protocol):
    """What a page says, and the folder that it goes to."""

    @property
    def folder(self) -> Path:
        """The folder of the page."""


F = TypeVar("F", bound=Facts)


def write_page(write: Callable[[F], Path], facts: F, report: Report) -> Path | None:
    """Write a page of the facts and return its path; None, with a warning, where it cannot be written."""
    try:
        return write(facts)
    except OSError as error:
        report(Note(f"{facts.folder}: the report could not be written ({error.strerror}).", "warning"))
        return None


MOST_STRIPS = 12  # in each section: what a page weighs does not grow with the videos
MOST_LABELS = 3  # whose scores are told below a strip, and the video’s own


def write_report(
    result: EvalResult,
    settings: EvalSettings,
    trained: Trained,
    facts: Mapping[str, Any],
    place: ProcessGroup,
    report: Report,
) -> Path | None:
    """Write report.html and plots/ beside metrics.json; returns the page’s path.

    `facts` are those of metrics.json. A page that cannot be written is a warning: the numbers are there.
    """
    labels = trained.card.labels
    wrong = sorted(
        (a for a in result.answers if a.scores and not a.is_right),
        key=lambda a: (-max(a.scores), a.video.name),
    )[:MOST_STRIPS]
    shown = {answer.video.name for answer in wrong}
    hard = sorted(
        (a for a in result.answers if a.scores and a.video.name not in shown),
        key=lambda a: (a.scores[labels.index(a.video.label)], a.video.name),
    )[:MOST_STRIPS]
    read = [answer for answer in result.answers if answer.scores]
    page = EvaluationFacts(
        folder=result.output,
        model=trained.name,
        subset=result.subset,
        labels=labels,
        metrics=result.metrics,
        intervals=result.intervals,
        draws=RESAMPLES,
        bins=BINS,
        groups=len({answer.video.unit for answer in result.answers}),
        seconds=result.seconds,
        per_class=result.per_class,
        counts=confusion_counts(read),
        confused=result.confused,
        calibration=result.calibration,
        answers=[(max(answer.scores), answer.is_right) for answer in read],
        surely_wrong=shown_videos(result, wrong),
        hardest=shown_videos(result, hard),
        preprocessing=trained.card.preprocessing,
        measured=_measured(result, settings, trained, facts, place),
        unreadable=result.unreadable,
        warnings=result.warnings,
        commands=_commands(settings, result),
        device=trained.device,
    )
    return write_page(write_evaluation_report, page, report)


def shown_videos(result: EvalResult, answers: Sequence[VideoPrediction]) -> list[ShownVideo]:
    """Videos with their frames, those that can still be read."""
    assert result.clips is not None
    found = []
    for answer in answers:
        clip = result.clips.clip(answer.video.name)
        if clip is not None:
            own = answer.video.label
            found.append(
                ShownVideo(answer.video.name, own, answer.predicted, best_scores(answer, result.labels), clip)
            )
    return found


def best_scores(answer: VideoPrediction, labels: Sequence[str]) -> list[tuple[str, float]]:
    """The best labels with their scores, and the video’s own where it is not among them."""
    ordered = sorted(zip(labels, answer.scores, strict=True), key=lambda pair: -pair[1])
    return ordered[:MOST_LABELS] + [pair for pair in ordered[MOST_LABELS:] if pair[0] == answer.video.label]


def _measured(
    result: EvalResult,
    settings: EvalSettings,
    trained: Trained,
    facts: Mapping[str, Any],
    place: ProcessGroup,
) -> dict[str, str]:
    card, views = trained.card, facts["views"]
    size = card.preprocessing.frame_size
    base = "" if card.base is None else f", from {card.base.name}"
    looked = (
        f"{views['clips_per_video']} clips in time × {views['crops_per_clip']} crops"
        + (" × mirrored or not" if views["flip"] else "")
        + " of each video, scores averaged"
    )
    are_wrong = result.unreadable and settings.unreadable == "wrong"
    one = views == {"clips_per_video": 1, "crops_per_clip": 1, "flip": False}
    return {
        "model": f"{trained.folder}{base}",
        "weights": f"sha256 {card.weights_sha256[:16]}…, written by tvit {card.tvit_version}",
        "network": f"{sum(p.numel() for p in trained.model.parameters()):,} parameters, "
        f"{card.model.get('attention', '')} attention",
        "data": f"{facts['data']}, split {facts['split']}",
        "subset": f"{result.subset}: {result.metrics['videos']:.0f} videos, "
        f"{len({a.video.unit for a in result.answers})} groups",
        "left out": plural(len(result.unreadable), "video") + (", counted as wrong" if are_wrong else ""),
        "clip": f"{card.preprocessing.n_frames} frames of {size}×{size} pixels, one of each equal share of a video",
        "views": "one clip, the centre crop" if one else looked,
        "frames": f"from the {facts['frames']}",
        "order": "frames shuffled" if settings.shuffle_frames else "as filmed",
        "speed": f"{result.metrics['videos'] / result.seconds:.1f} videos/s, decoding included: {trained.device} × "
        f"{place.processes}, {settings.per_gpu_batch_size} clips at once",
    }


def _commands(settings: EvalSettings, result: EvalResult) -> list[tuple[str, str]]:
    model = shlex.quote(str(result.model))
    return [
        ("The same again", reproduce_command(settings, ["--model", str(result.model)])),
        ("Label videos", f"tvit predict VIDEO --model {model}"),
        ("Where a label is seen", f"tvit predict VIDEO --model {model} --explain why.png"),
        ("Take the model elsewhere", f"tvit export {model} --format onnx"),
    ]


def reproduce_command(settings: EvalSettings, models: Sequence[str]) -> str:
    """The command that gives the same evaluation of models, which are given as they are typed."""
    given = settings.model_dump(mode="json", exclude_defaults=True, exclude={"model", "compare"})
    words = ["tvit", "eval", *models]
    for name, value in given.items():
        words += [flag(name)] if value is True else [flag(name), str(value)]
    return shlex.join(words)
