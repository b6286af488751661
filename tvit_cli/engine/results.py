"""What an evaluation finds, and the files it leaves."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tvit_cli.data.layout import Video
from tvit_cli.engine.resampling import Interval
from tvit_cli.engine.seen import Seen
from tvit_cli.errors import DataError, RunError
from tvit_cli.report.calibration import Bin
from tvit_cli.report.matrix import ClassScore

METRICS_FILE = "metrics.json"
SCORES_FILE = "scores.csv"
CONFUSION_FILE = "confusion.csv"


@dataclass(frozen=True)
class Answer:
    """What a model says of one video, or why it could not be read (then `predicted` is empty)."""

    video: Video
    predicted: str = ""
    scores: tuple[float, ...] = ()  # in the order of the model's labels
    error: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the best class is the video's."""
        return self.predicted == self.video.label


@dataclass(frozen=True)
class EvalResult:
    """Metrics of a subset, and where they were written.

    `intervals` are 95 % bootstrap intervals over groups; `per_class` and `confused` (true label, said label,
    videos) tell where the mistakes are; `answers` has every video that counts, in the order of their names, with
    scores in the order of `labels`. `name` is what the model is called.
    `calibration` sets confidence against accuracy; `warnings` are sentences on what was assumed and what the
    numbers do not mean, among them the `leaks`, which make the numbers too good; `seen` reads what the model saw
    once more; `report` is the page, where this process wrote one.
    """

    metrics: dict[str, float]
    intervals: dict[str, Interval]
    per_class: dict[str, ClassScore]
    confused: tuple[tuple[str, str, int], ...]
    answers: tuple[Answer, ...]
    labels: tuple[str, ...]
    unreadable: dict[str, str]
    seconds: float
    subset: str
    model: Path
    name: str
    output: Path
    notes: tuple[str, ...]
    calibration: tuple[Bin, ...] = ()
    warnings: tuple[str, ...] = ()
    leaks: tuple[str, ...] = ()
    seen: Seen | None = None
    report: Path | None = None


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
    with results_in(result.output) as folder:
        write_json(folder / METRICS_FILE, content)
        _write_rows(folder / SCORES_FILE, _score_rows(result.answers, result.labels))
        _write_rows(folder / CONFUSION_FILE, _confusion_rows(result.answers, result.labels))


@contextmanager
def results_in(folder: Path) -> Iterator[Path]:
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


def _score_rows(answers: Iterable[Answer], labels: tuple[str, ...]) -> Iterable[list[str]]:
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


def confusions(answers: Iterable[Answer]) -> Counter[tuple[str, str]]:
    """How often each (true label, said label) occurs; a video without an answer says \"\"."""
    return Counter((answer.video.label, answer.predicted) for answer in answers)


def _confusion_rows(answers: Iterable[Answer], labels: tuple[str, ...]) -> Iterable[list[str]]:
    """Counts: a row per true class, a column per predicted one."""
    counts = confusions(answers)
    yield ["label", *labels]
    for true in labels:
        yield [true, *(str(counts[true, said]) for said in labels)]


def _write_rows(path: Path, rows: Iterable[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
