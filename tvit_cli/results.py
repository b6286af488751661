"""Results and progress events that the engine returns to its callers; imports nothing heavy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from datetime import datetime

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from tvit_cli.data.layout import Video
    from tvit_cli.settings.card import Preprocessing

RESAMPLES = 2000  # of the bootstrap behind each interval
BINS = 15  # of confidence in the expected calibration error

Interval = tuple[float, float]
Counts = Mapping[tuple[str, str], int]  # confusion counts: (true label, predicted label) -> videos


@dataclass(frozen=True)
class Note:
    """A message for the user."""

    text: str
    level: Literal["detail", "info", "warning"] = "info"


@dataclass(frozen=True)
class Progress:
    """`done` of `total` (None: not known) units of a task."""

    task: str
    done: int
    total: int | None
    unit: Literal["", "bytes"] = ""


@dataclass(frozen=True)
class ClassTable:
    """Readable videos of a data set, and their groups where these have several videos, by class and subset."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | int, ...], ...]  # one per class, sorted by its name
    total: tuple[str | int, ...]


@dataclass(frozen=True)
class TrainingStarts:
    """The plan of a run, before its first step."""

    facts: dict[str, str]
    epochs: int
    steps_per_epoch: int
    first_step: int


@dataclass(frozen=True)
class StepDone:
    """One optimizer update; rates are means since the epoch began."""

    epoch: int
    step: int
    loss: float
    clip_top1: float
    learning_rate: float
    clips_per_second: float
    data_wait: float  # share of time spent waiting for data


@dataclass(frozen=True)
class EpochDone:
    """One pass over the data, validated; `metrics` is the epoch's line of metrics.jsonl."""

    epoch: int
    metrics: dict[str, float] = field(default_factory=dict)
    is_best: bool = False


@dataclass(frozen=True)
class AnswersStart:
    """The videos that are to be labelled, in order, and the model's labels."""

    videos: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """The best labels of one video with their scores, best first, or the error that prevented it."""

    video: str
    labels: tuple[tuple[str, float], ...] = ()
    error: str = ""

    @property
    def label(self) -> str:
        """The best label; "" for an unreadable video."""
        return self.labels[0][0] if self.labels else ""


@dataclass(frozen=True)
class Segment:
    """Part of a video with one label, in seconds; `score` is the label's mean over it."""

    start: float
    end: float
    label: str
    score: float


@dataclass(frozen=True)
class SegmentFound:
    """A segment that no later part of its video can change."""

    video: str
    segment: Segment


@dataclass(frozen=True)
class SegmentsEnd:
    """A video has no further segment: `seconds` of it are in the timeline, or an error prevented that."""

    video: str
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class WindowPrediction:
    """The best label of one window of a stream, from `start` to `end` in seconds of the stream.

    `time` is the time of day at which its last frame came, `scores` (K,) are those of all classes, and `dropped` is
    the number of windows before it that the model had no time for.
    """

    start: float
    end: float
    time: datetime
    label: str
    score: float
    scores: NDArray[np.float64]
    dropped: int = 0
    video: str = ""  # the source's name on the command line


Answer = AnswersStart | Prediction | SegmentFound | SegmentsEnd | WindowPrediction
Event = Note | Progress | ClassTable | TrainingStarts | StepDone | EpochDone | Answer
Report = Callable[[Event], None]


def seconds_done(task: str, done: float, total: float | None) -> Progress:
    """Progress through a video, in whole seconds."""
    return Progress(task, round(done), None if total is None else max(1, round(total)))


def silent(event: Event) -> None:
    """A Report that ignores all events."""


def once(report: Report) -> Report:
    """A Report that passes each Note and table on once: parts of a command that share data report the same."""
    passed: set[Event] = set()

    def forward(event: Event) -> None:
        if not isinstance(event, Note | ClassTable):
            report(event)
        elif event not in passed:
            passed.add(event)
            report(event)

    return forward


@contextmanager
def working(task: str, report: Report) -> Iterator[None]:
    """Progress of a task that cannot be counted, within the block."""
    report(Progress(task, 0, None))
    try:
        yield
    finally:
        report(Progress(task, 1, 1))


@dataclass(frozen=True)
class Scan:
    """Properties of one video file, decoded to its end; width and height are after rotation.

    `problem` names the damage, or a display matrix that is not applied as it is; "" for none.
    """

    path: Path
    codec: str = ""
    width: int = 0
    height: int = 0
    frames: int = 0
    seconds: float = 0.0
    rate: float | None = None  # frames per second; None: the file has no time stamps
    rotation: int = 0  # degrees counter-clockwise
    mirrored: bool = False  # left to right, before the rotation
    problem: str = ""
    is_readable: bool = True  # a frame decodes
    label: str = ""


@dataclass(frozen=True)
class ExtractResult:
    """Work of one extraction process; `skipped` videos were stored before, `unreadable` maps name to reason."""

    folder: Path
    videos: int
    skipped: int
    unreadable: Mapping[str, str]
    bytes: int  # written
    seconds: float


@dataclass(frozen=True)
class ClassScore:
    """Counts of one class: its videos, correct predictions, and predictions of the class (right or wrong)."""

    videos: int
    right: int
    predicted: int

    @property
    def recall(self) -> float:
        """Share of the class's videos that are predicted correctly: its accuracy."""
        return self.right / self.videos if self.videos else 0.0

    @property
    def precision(self) -> float:
        """Share of correct predictions among those of the class; 0 without any."""
        return self.right / self.predicted if self.predicted else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        total = self.videos + self.predicted
        return 2 * self.right / total if total else 0.0


@dataclass(frozen=True)
class Bin:
    """Predictions with a confidence in (low, high]: their number, mean confidence and accuracy."""

    low: float
    high: float
    videos: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class VideoPrediction:
    """Prediction for one video, or the error that prevented it (`predicted` is then empty)."""

    video: Video
    predicted: str = ""
    scores: tuple[float, ...] = ()  # in the order of the model's labels
    error: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the prediction is the video's label."""
        return self.predicted == self.video.label


class ClipReader(Protocol):
    """Reads the clips of an evaluation again, as the model received them."""

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of the model."""

    def clip(self, name: str) -> Tensor | None:
        """Normalised clip (T, C, S, S) float32 of a video by name; None for an unreadable video."""


@dataclass(frozen=True)
class EvalResult:
    """Metrics of a subset and the predictions behind them.

    `intervals` are 95 % bootstrap intervals over groups; `confused` lists the most frequent mistakes as (true
    label, predicted label, videos); `answers` are the predictions of all counted videos, sorted by name, with
    scores in the order of `labels`. `warnings` are sentences on assumptions and bias, among them the `leaks`
    (data leakage). `clips` rereads clips for the report; `report` is the page, where this process wrote one.
    """

    metrics: dict[str, float]
    intervals: dict[str, Interval]
    per_class: dict[str, ClassScore]
    confused: tuple[tuple[str, str, int], ...]
    answers: tuple[VideoPrediction, ...]
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
    clips: ClipReader | None = None
    report: Path | None = None

    @property
    def counts(self) -> Counts:
        """Confusion counts of the videos that were read."""
        return Counter((a.video.label, a.predicted) for a in self.answers if a.predicted)


Pair = tuple[VideoPrediction, VideoPrediction]  # of the first model and the second, for one video


@dataclass(frozen=True)
class Comparison:
    """Two models on the videos that count for both.

    With --unreadable wrong these include unreadable videos, as wrong predictions. `interval` is the 95 % bootstrap
    interval over groups of the accuracy difference, None with a single group; `p_value` is McNemar's; `report` is
    the page, where this process wrote one.
    """

    first: EvalResult
    second: EvalResult
    pairs: tuple[Pair, ...]
    interval: Interval | None
    p_value: float
    output: Path
    report: Path | None = None

    @property
    def videos(self) -> int:
        """Number of compared videos."""
        return len(self.pairs)

    @property
    def names(self) -> tuple[str, str]:
        """Names of both runs; their model folders where the names are equal."""
        names = self.first.name, self.second.name
        return names if names[0] != names[1] else (str(self.first.model), str(self.second.model))

    @property
    def gained(self) -> tuple[Pair, ...]:
        """Videos that only the second model predicts correctly."""
        return tuple(pair for pair in self.pairs if pair[1].is_right and not pair[0].is_right)

    @property
    def lost(self) -> tuple[Pair, ...]:
        """Videos that only the first model predicts correctly."""
        return tuple(pair for pair in self.pairs if pair[0].is_right and not pair[1].is_right)

    @property
    def difference(self) -> float:
        """Accuracy of the second model minus that of the first."""
        return (len(self.gained) - len(self.lost)) / len(self.pairs)


@dataclass(frozen=True)
class TrainResult:
    """Location and metrics of a trained model.

    `best` holds the metrics of the epoch that was kept (empty without validation), `per_class` its validation as
    label -> (videos, correct). `test` is the test result, if asked for; `report` the page, if it could be written.
    `epochs` and `steps` are the records of metrics.jsonl; `videos` counts readable videos by label and subset;
    `parameters` are (trained, all); `problem` is why the run ended early.
    """

    run: Path
    model: Path
    best_epoch: int
    best: dict[str, float]
    test: EvalResult | None
    report: Path | None = None
    epochs: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    steps: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    per_class: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    videos: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    problem: str = ""


@dataclass(frozen=True)
class SeriesResult:
    """Metrics of each run of a series (`seed0-split1` …), and (mean, sample standard deviation) of each metric.

    `results` are the evaluations by run, empty after a training; `report` is the page of an evaluation, where this
    process wrote one.
    """

    folder: Path
    runs: dict[str, dict[str, float]]
    summary: dict[str, tuple[float, float]]
    results: Mapping[str, EvalResult] = field(default_factory=dict)
    report: Path | None = None


@dataclass(frozen=True)
class MemoryModel:
    """Bytes that a training step takes, term by term; only `activations_per_clip` grows with the micro-batch."""

    weights: int
    gradients: int
    moments: int
    average: int  # of the trained weights, with --ema-decay
    workspace: int  # of the passes besides, independent of the number of clips: weights in another format
    activations_per_clip: int  # at the peak: kept for the backward pass, or in use just then

    def needed(self, clips: int) -> int:
        """Bytes at the peak of a step with this many clips per pass."""
        fixed = self.weights + self.gradients + self.moments + self.average + self.workspace
        return fixed + clips * self.activations_per_clip


@dataclass(frozen=True)
class DryRun:
    """Plan and measured cost of a training; bytes, operations and seconds are of one process and device.

    Operations are two per multiply-add, matrix products alone.
    """

    folder: Path
    model: str
    data: str
    device: str
    precision: str
    parameters: int
    trainable: int
    forward_flops: int  # of one clip
    pass_flops: int  # of one clip, forward and backward, as it is trained
    batch: str
    clips_per_step: int
    steps_per_epoch: int
    epochs: int
    memory: MemoryModel
    micro_batch: int
    available: int  # bytes for all terms of `memory` together
    seconds_per_step: float
    data_wait: float  # share of a step's time
    validation_seconds: float

    @property
    def seconds_per_epoch(self) -> float:
        """Training and validation."""
        return self.steps_per_epoch * self.seconds_per_step + self.validation_seconds


@dataclass(frozen=True)
class StreamResult:
    """Counts of a live source that ended: windows with a prediction and dropped ones, seconds, and cuts.

    `unwritten` are the errors of output files.
    """

    video: str
    windows: int
    dropped: int
    seconds: float
    cuts: int
    unwritten: tuple[str, ...] = ()


@dataclass(frozen=True)
class Span:
    """Seconds of a video without a gap in its time stamps, with the number of its windows and cells."""

    start: float
    end: float
    windows: int
    cells: int


@dataclass(frozen=True)
class Timeline:
    """Segments of one video, and the window scores behind them.

    A window begins every `stride` seconds of a span; `scores` (W, K) are the class scores of windows,
    `smoothed` (J, K) those of cells of one stride each. A video is one span, or several where its time stamps
    have gaps; spans shorter than a window are left out. `pictures` are (seconds, frame uint8 (H, W, 3)).
    """

    video: str
    labels: tuple[str, ...]
    seconds: float
    window: float
    stride: float
    scores: NDArray[np.float64]
    smoothed: NDArray[np.float64]
    segments: tuple[Segment, ...]
    pictures: tuple[tuple[float, NDArray[np.uint8]], ...]
    spans: tuple[Span, ...] = ()  # empty: the whole video is one
    note: str = ""  # on the video's orientation

    def parts(self) -> tuple[Span, ...]:
        """The spans; the whole video where it has no gaps."""
        return self.spans or (Span(0.0, self.seconds, len(self.scores), len(self.smoothed)),)

    def starts(self) -> list[float]:
        """Start of each window (W,) in seconds."""
        return [part.start + n * self.stride for part in self.parts() for n in range(part.windows)]
