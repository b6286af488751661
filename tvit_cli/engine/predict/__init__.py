"""`tvit predict` and the Python API: labels, embeddings and explanations of videos."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from tvit_cli.data.video import MOST_SHOWN
from tvit_cli.engine.distributed import default_worker_count
from tvit_cli.engine.evaluate.scoring import WithFeatures, score
from tvit_cli.engine.launch import pick_device
from tvit_cli.engine.predict.paths import as_video, find_video, find_videos, require_single_video
from tvit_cli.engine.predict.timeline import write_timeline
from tvit_cli.engine.trained import Trained, open_trained
from tvit_cli.errors import RunError, SettingsError, VideoError
from tvit_cli.files import Location, atomic_write, check_file, check_writable, collect_errors
from tvit_cli.model import linear
from tvit_cli.model.folder import save_tensors
from tvit_cli.results import Note, Progress, Report, Timeline, seconds_done, silent
from tvit_cli.settings.base import flag
from tvit_cli.settings.card import ModelCard
from tvit_cli.settings.predict import ENDINGS, PredictSettings
from tvit_cli.settings.types import MixedPrecision

if TYPE_CHECKING:
    from tvit_cli.engine.predict.explain import Explanation


def write_embeddings(path: Path, embeddings: Sequence[tuple[str, Tensor]], model: Path) -> None:
    """Write `features`, (V, D) float32, with the videos' `names` (a JSON list) and the model in the metadata.

    A video that was named twice has two rows. Raises RunError where the file cannot be written; then what was
    there before is as it was.
    """
    from safetensors import SafetensorError

    names, rows = zip(*embeddings, strict=True)
    metadata = {"names": json.dumps(names, ensure_ascii=False), "model": str(model)}
    try:
        with atomic_write(path) as beside:
            save_tensors({"features": torch.stack(rows)}, beside, metadata)
    except (OSError, SafetensorError) as error:
        raise RunError(f"--embeddings {path}: cannot be written ({error}).") from error


VIDEOS_PER_WORKER = 16  # fewer are decoded in this process sooner than a worker has started
BATCH_SIZE = 8  # clips in one forward pass


@dataclass(frozen=True)
class Prediction:
    """The best labels of one video with their scores, best first; or why there are none."""

    video: str
    labels: tuple[tuple[str, float], ...] = ()
    error: str = ""

    @property
    def label(self) -> str:
        """The best label; "" where the video could not be read."""
        return self.labels[0][0] if self.labels else ""


@dataclass(frozen=True)
class PredictResult:
    """One prediction per video, in the order of the paths given."""

    predictions: tuple[Prediction, ...]
    unwritten: tuple[str, ...] = ()  # why files that were asked for are not there


class Model:
    """A trained model that labels videos: what `tvit predict` uses, and what `tvit_cli.load_model` gives.

    Videos are paths or URLs, preprocessed as the model's own evaluation does it.
    """

    def __init__(self, trained: Trained) -> None:
        self._trained = trained

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, in the order of the classifier's outputs."""
        return self._trained.card.labels

    @property
    def card(self) -> ModelCard:
        """What the model folder says of its model: preprocessing, metrics, settings, where it came from."""
        return self._trained.card

    @property
    def folder(self) -> Path:
        """The model folder."""
        return self._trained.folder

    def predict(self, video: str | Path, *, top_k: int = 5) -> Prediction:
        """The `top_k` best labels of one video (all, where the model has fewer), best first.

        Raises VideoError where the video cannot be read.
        """
        (found,) = self.predict_many([find_video(video)], top_k=top_k)
        if found.error:
            raise VideoError(f"{found.video}: {found.error}")
        return found

    def predict_many(
        self,
        videos: Sequence[str | Path],
        *,
        top_k: int = 5,
        batch_size: int = BATCH_SIZE,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Prediction]:
        """One Prediction per file, URL, or video of a folder or pattern; unreadable ones say why.

        Raises DataError for a name that stands for no video.
        """
        return self.predict_and_embed(
            videos, top_k=top_k, batch_size=batch_size, progress=progress, embeds=False
        )[0]

    def predict_and_embed(
        self,
        videos: Sequence[str | Path],
        *,
        top_k: int = 5,
        batch_size: int = BATCH_SIZE,
        progress: Callable[[int, int], None] | None = None,
        embeds: bool = True,
    ) -> tuple[list[Prediction], list[Tensor | None]]:
        """`predict_many`, and from the same pass what the classifier sees of each video, (D,).

        That is None for a video that cannot be read, and for all where `embeds` is False.
        """
        places = find_videos(videos)
        model = WithFeatures(self._trained.model) if embeds else self._trained.model
        rows, errors = self._outputs(model, places, batch_size, progress)
        classes = len(self.labels)
        logits = {index: row[:classes] for index, row in rows.items()}
        predictions = [
            self._prediction(place, logits.get(i), errors.get(i, ""), top_k) for i, place in enumerate(places)
        ]
        features = [rows[i][classes:] if embeds and i in rows else None for i in range(len(places))]
        return predictions, features

    def embed(self, videos: Sequence[str | Path], *, batch_size: int = BATCH_SIZE) -> Tensor:
        """What the classifier sees of each video, (V, D) float32 on the CPU, in the order of the videos.

        Raises VideoError where one cannot be read.
        """
        places = find_videos(videos)
        rows, errors = self._outputs(WithFeatures(self._trained.model), places, batch_size, None)
        for index, reason in errors.items():
            raise VideoError(f"{places[index]}: {reason}")
        return torch.stack([rows[i] for i in range(len(places))])[:, len(self.labels) :]

    def explain(self, video: str | Path, *, label: str | None = None) -> Explanation:
        """Which patches of which frames speak for a label, the best one unless named, and a test of that.

        Raises VideoError, or ModelError for a label that the model does not have.
        """
        from tvit_cli.engine.predict.explain import explain

        return explain(self._trained, find_video(video), label)

    def write_explanation(self, path: Path, explanation: Explanation) -> None:
        """Write an explanation of this model as a film strip, a PNG."""
        from tvit_cli.engine.predict.explain import write_explanation

        write_explanation(path, explanation, self._trained)

    def draw_explanation(self, explanation: Explanation, *, dark: bool = False) -> bytes:
        """The film strip of an explanation of this model as a PNG, on light paper or on dark."""
        from tvit_cli.engine.predict.explain import explanation_png

        return explanation_png(explanation, self._trained, dark=dark)

    def timeline(
        self,
        video: str | Path,
        *,
        window: float = 2.0,
        stride: float | None = None,
        smoothing: float = 2.0,
        batch_size: int = BATCH_SIZE,
        progress: Callable[[float, float | None], None] | None = None,
    ) -> Timeline:
        """What happens when in a long video: windows of `window` seconds, every `stride`, merged to segments.

        `progress` is called with the seconds done and, where the file tells it, those there are. Memory is
        bounded by a window, however long the video is. Raises VideoError.
        """
        from tvit_cli.engine.predict.timeline import make_timeline

        place = find_video(video)
        return make_timeline(
            self._trained,
            place,
            window=window,
            stride=window / 4 if stride is None else stride,
            smoothing=smoothing,
            batch_size=batch_size,
            progress=progress,
        )

    def _outputs(
        self,
        model: nn.Module,
        places: Sequence[Location],
        batch_size: int,
        progress: Callable[[int, int], None] | None,
    ) -> tuple[dict[int, Tensor], dict[int, str]]:
        """A row of the model's output by video, and the reasons of those that cannot be read."""
        scores = score(
            model,
            [as_video(place, self.labels[0]) for place in places],
            self.labels,
            self._trained.card.preprocessing,
            device=self._trained.device,
            batch_size=batch_size,
            workers=min(default_worker_count(), len(places) // VIDEOS_PER_WORKER),
            autocast=self._trained.autocast,
            progress=progress,
        )
        return dict(zip(scores.indices.tolist(), scores.logits, strict=True)), scores.errors

    def _prediction(self, place: Location, logits: Tensor | None, error: str, top_k: int) -> Prediction:
        if logits is None:
            return Prediction(str(place), error=error)
        values, indices = logits.double().softmax(0).sort(descending=True, stable=True)
        best = zip(indices[:top_k].tolist(), values[:top_k].tolist(), strict=True)
        return Prediction(str(place), tuple((self.labels[i], value) for i, value in best))


def load_model(path: str | Path, *, device: str = "auto", mixed_precision: MixedPrecision = "auto") -> Model:
    """Open a model folder, or the folder of its run, on a device: auto, cpu, cuda or mps.

    `mixed_precision` auto computes in bf16 on GPUs with the hardware for it.

    Raises ModelError when it is not whole or the machine has no such device.
    """
    runs = PredictSettings.model_fields["working_directory"].default
    return Model(
        open_trained(
            Path(path), working_directory=runs, device=pick_device(device), mixed_precision=mixed_precision
        )
    )


def predict(settings: PredictSettings, report: Report = silent) -> PredictResult:
    """Label videos, preprocessed as the model's own evaluation does it.

    A video that cannot be read gets a Prediction with the reason, and a file that could not be written is named in
    the result. Raises DataError for a path that does not exist, a folder without videos, or a file that has no
    place, ModelError for the model.
    """
    places = find_videos(settings.paths)
    require_single_video("explain", settings.explain, places)
    require_single_video("annotate", settings.annotate, places)
    for name in ENDINGS:
        check_file(flag(name), getattr(settings, name), places)
    model = open_model(settings, report)
    top_k = min(settings.top_k, len(model.labels))
    if top_k < settings.top_k and "top_k" in settings.model_fields_set:
        report(
            Note(
                f"--top-k {settings.top_k}: the model has {len(model.labels)} classes, so {top_k} are shown.",
                "warning",
            )
        )
    predictions, features = model.predict_and_embed(
        places,
        top_k=top_k,
        batch_size=settings.per_gpu_batch_size,
        progress=lambda done, total: report(Progress("reading videos", done, total)),
        embeds=settings.embeddings is not None,
    )
    unwritten: list[str] = []
    embeddings = [(p.video, row) for p, row in zip(predictions, features, strict=True) if row is not None]
    if settings.embeddings is not None and embeddings:
        with collect_errors(unwritten):
            write_embeddings(settings.embeddings, embeddings, model.folder)
            report(Note(f"{len(embeddings)} embeddings written to {settings.embeddings}"))
    if settings.explain is not None and not predictions[0].error:
        from tvit_cli.engine.predict.explain import verdict

        with collect_errors(unwritten):
            explanation = model.explain(places[0])
            model.write_explanation(settings.explain, explanation)
            report(Note(f"{settings.explain}: {explanation.label}: {verdict(explanation.deletion)}."))
    if settings.annotate is not None and not predictions[0].error:
        from tvit_cli.engine.predict.timeline import WHOLE, annotate
        from tvit_cli.results import Segment

        label, value = predictions[0].labels[0]
        with collect_errors(unwritten):
            annotate(settings.annotate, places[0], [Segment(0.0, WHOLE, label, value)], report)
            report(Note(f"The video with its label is in {settings.annotate}"))
    return PredictResult(tuple(predictions), tuple(unwritten))


def open_model(settings: PredictSettings, report: Report) -> Model:
    """The model that the settings name, or the newest; in 8 bits if that is asked for, and faster here.

    Raises ModelError where there is none, SettingsError for 8 bits on anything but a CPU.
    """
    device = pick_device(settings.device)
    if settings.int8 and device.type != "cpu":
        raise SettingsError(
            f"--int8: is for CPUs, and the model would run on {device.type}. Leave it out, or take --device cpu."
        )
    trained = open_trained(
        settings.model,
        working_directory=settings.working_directory,
        device=device,
        mixed_precision=settings.mixed_precision,
    )
    report(Note(f"Model: {trained.folder}"))
    if settings.int8 and linear.is_fast():
        layers = linear.to_int8(trained.model, but="classifier")
        report(Note(f"{layers} layers compute in 8 bits.", "detail"))
    elif settings.int8:
        report(
            Note("--int8: this processor multiplies bytes slower than floats, so floats it is.", "warning")
        )
    for note in trained.notes:
        report(Note(note, "warning"))
    return Model(trained)


@dataclass(frozen=True)
class TimelineResult:
    """The timeline of one video, or why there is none; and why files of it that were asked for are not there."""

    video: str
    timeline: Timeline | None = None
    error: str = ""
    unwritten: tuple[str, ...] = ()


def predict_timelines(settings: PredictSettings, report: Report = silent) -> tuple[TimelineResult, ...]:
    """A timeline of each video in turn, written to the output folder where one is given.

    Raises DataError for a name that stands for no video or a file that has no place, ModelError for the model.
    """
    assert settings.window is not None
    places = find_videos(settings.paths)
    require_single_video("annotate", settings.annotate, places)
    check_file("--annotate", settings.annotate, places)
    names = tuple(folder_names(places))
    if settings.output is not None:
        for name in names:
            check_writable("--output", settings.output, settings.output / name)
    model = open_model(settings, report)
    told = []
    for place, name in zip(places, names, strict=True):
        what = f"seconds of {place}" if len(places) > 1 else "seconds of the video"

        def progress(done: float, total: float | None, what: str = what) -> None:
            report(seconds_done(what, done, total))

        try:
            timeline = model.timeline(
                place,
                window=settings.window,
                stride=settings.stride,
                smoothing=settings.smoothing,
                batch_size=settings.per_gpu_batch_size,
                progress=progress,
            )
        except VideoError as error:
            told.append(TimelineResult(str(place), error=str(error).removeprefix(f"{place}: ")))
            continue
        if timeline.window < settings.window:
            report(
                Note(
                    f"{place}: lasts {timeline.seconds:.2f} s, less than the window of {settings.window:g} s: "
                    "it is one clip.",
                    "warning",
                )
            )
        if len(timeline.stretches) > 1:
            report(
                Note(
                    f"{place}: time stamps have gaps of more than {MOST_SHOWN:g} s without a frame; windows and "
                    "segments leave them out.",
                    "warning",
                )
            )
        unwritten: list[str] = []
        if settings.output is not None:
            with collect_errors(unwritten):
                write_timeline(settings.output / name, timeline)
        if settings.annotate is not None:
            from tvit_cli.engine.predict.timeline import annotate

            with collect_errors(unwritten):
                annotate(settings.annotate, place, timeline.segments, report)
                report(Note(f"The video with its labels is in {settings.annotate}"))
        told.append(TimelineResult(str(place), timeline, unwritten=tuple(unwritten)))
    if settings.output is not None and not any(t.unwritten for t in told):
        report(Note(f"Written to {settings.output}"))
    return tuple(told)


def folder_names(places: Sequence[Location]) -> Iterator[str]:
    """A folder's name for each video: its own without suffix, numbered where it comes again."""
    given: set[str] = set()
    for place in places:
        path = PurePosixPath(urlsplit(place).path) if isinstance(place, str) else Path(place)
        stem = path.stem.strip(".") or "video"  # a URL may end in ..
        numbered = (f"{stem}-{number}" for number in count(2))
        name = next(name for name in chain([stem], numbered) if name not in given)
        given.add(name)
        yield name
