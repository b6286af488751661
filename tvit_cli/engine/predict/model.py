"""A trained model in Python: labels, embeddings, explanations, timelines and streams of videos."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from tvit_cli.data.video import Frames
from tvit_cli.engine.distributed import default_worker_count
from tvit_cli.engine.evaluate.scoring import score_location_batches
from tvit_cli.engine.launch import pick_device
from tvit_cli.engine.predict import explain as explanations
from tvit_cli.engine.predict import timeline as timelines
from tvit_cli.engine.predict.explain import Explanation
from tvit_cli.engine.predict.paths import Video, find_source, find_sources
from tvit_cli.engine.predict.stream import stream_windows, timed_frames
from tvit_cli.engine.trained import Trained, open_trained
from tvit_cli.errors import SettingsError, VideoError
from tvit_cli.files import FrameArray, Source
from tvit_cli.model import linear
from tvit_cli.results import (
    Event,
    Note,
    Prediction,
    Progress,
    Report,
    Segment,
    Timeline,
    WindowPrediction,
    silent,
)
from tvit_cli.settings.base import check_arguments
from tvit_cli.settings.card import ModelCard
from tvit_cli.settings.predict import PredictSettings
from tvit_cli.settings.types import MixedPrecision

VIDEOS_PER_WORKER = 16  # for fewer, starting a worker takes longer than decoding them in this process
BATCH_SIZE = 8  # clips in one forward pass
ANY_VIDEO = {"paths": ("video",)}  # where the settings are checked without their videos


class Model:
    """A trained model for `tvit predict`, also returned by `tvit_cli.load_model`.

    A video is a path, a URL, or a NumPy array of RGB frames, uint8 (T, H, W, 3). All are preprocessed as in the
    model's evaluation. An array of another form, and a name of no video or of several, is a DataError.
    """

    def __init__(self, trained: Trained) -> None:
        self._trained = trained

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, in the order of the classifier's outputs."""
        return self._trained.card.labels

    @property
    def card(self) -> ModelCard:
        """The model card: labels, preprocessing, metrics, settings, provenance."""
        return self._trained.card

    @property
    def folder(self) -> Path:
        """The model folder."""
        return self._trained.folder

    def predict(self, video: Video, *, top_k: int = 5, fps: float = 25.0) -> Prediction:
        """Returns the `top_k` best labels of one video (at most all), best first.

        `fps` is the rate of an array; frames are chosen by their number, so it changes nothing here. Raises
        VideoError for an unreadable video.
        """
        (found,) = self.predict_many([find_source(video, fps)], top_k=top_k)
        if found.error:
            raise VideoError(f"{found.video}: {found.error}")
        return found

    def predict_many(
        self,
        videos: Video | Sequence[Video],
        *,
        top_k: int = 5,
        batch_size: int = BATCH_SIZE,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Prediction]:
        """Returns a Prediction per array, file, URL, and video of a folder or pattern, or its error.

        One video may be given without a list. Raises SettingsError for a bad argument.
        """
        found: list[Prediction] = []
        locations = find_sources(videos)
        for answers in self._answers(locations, top_k=top_k, batch_size=batch_size):
            found += (answer for answer, _ in answers)
            if progress is not None:
                progress(len(found), len(locations))
        return found

    def _answers(
        self,
        locations: Sequence[Source],
        *,
        top_k: int = 5,
        batch_size: int = BATCH_SIZE,
        embeds: bool = False,
        time_limit: float | None = None,
        report: Report = silent,
    ) -> Generator[list[tuple[Prediction, Tensor | None]], None, None]:
        """Yields the predictions of each batch as soon as it is done, with `embeds` each video's embedding (D,).

        Of more videos than `batch_size`, the first batches are smaller: the first answer comes as soon as for one.
        """
        check_arguments(PredictSettings, ANY_VIDEO, top_k=top_k, batch_size=batch_size)
        videos = range(len(locations))
        batches, done, size = [], 0, batch_size if len(videos) <= batch_size else 1
        while done < len(videos):
            batches.append(videos[done : done + size])
            done, size = done + size, min(2 * size, batch_size)
        has_arrays = any(isinstance(location, FrameArray) for location in locations)  # not sent to workers
        workers = 0 if has_arrays else min(default_worker_count(), len(videos) // VIDEOS_PER_WORKER)
        made = score_location_batches(
            self._trained, locations, batches, features=embeds, workers=workers, time_limit=time_limit
        )
        classes = len(self.labels)
        with closing(made):
            for scores in made:
                rows = dict(zip(scores.indices.tolist(), scores.logits, strict=True))
                answers: list[tuple[Prediction, Tensor | None]] = []
                for index in sorted({*rows, *scores.errors}):
                    video, row = str(locations[index]), rows.get(index)
                    best: list[tuple[str, float]] = []
                    if row is not None:
                        values, order = row[:classes].double().softmax(0).sort(descending=True, stable=True)
                        best = [
                            (self.labels[i], v) for i, v in zip(order.tolist(), values.tolist(), strict=True)
                        ]
                    answer = Prediction(video, tuple(best[:top_k]), scores.errors.get(index, ""))
                    answers.append((answer, row[classes:] if embeds and row is not None else None))
                    if note := scores.notes.get(index):
                        report(Note(f"{video}: {note}.", "warning"))
                yield answers

    def embed(self, videos: Video | Sequence[Video], *, batch_size: int = BATCH_SIZE) -> Tensor:
        """Returns the features before the classifier, (V, D) float32 on the CPU, in the order of the videos.

        Raises VideoError for an unreadable video.
        """
        rows: list[Tensor] = []
        with closing(self._answers(find_sources(videos), batch_size=batch_size, embeds=True)) as batches:
            for found, row in chain.from_iterable(batches):
                if row is None:
                    raise VideoError(f"{found.video}: {found.error}")
                rows.append(row)
        return torch.stack(rows)

    def explain(
        self,
        video: Video,
        *,
        label: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Explanation:
        """Returns the relevance of each patch for a label (default: the best), and a deletion test of it.

        Raises VideoError, or ModelError for a label that the model does not have.
        """
        return explanations.explain(self._trained, find_source(video), label, progress)

    def write_explanation(self, path: str | Path, explanation: Explanation) -> None:
        """Writes an explanation of this model as a film strip, a PNG. Raises RunError."""
        explanations.write_explanation(Path(path), explanation, self._trained)

    def draw_explanation(self, explanation: Explanation, *, dark: bool = False) -> bytes:
        """Returns the film strip of an explanation of this model as a PNG, in light or dark colours."""
        return explanations.explanation_png(explanation, self._trained, dark=dark)

    def input_frames(self, explanation: Explanation) -> Frames:
        """Returns the frames of an explanation as the model received them, RGB uint8 (T, S, S, 3)."""
        from tvit_cli.report.film import to_pixels  # imports PIL

        return to_pixels(explanation.clip, self.card.preprocessing).permute(0, 2, 3, 1).contiguous().numpy()

    def timeline(
        self,
        video: Video,
        *,
        fps: float = 25.0,
        window: float | None = None,
        stride: float | None = None,
        smoothing: float = 2.0,
        batch_size: int = BATCH_SIZE,
        progress: Callable[[float, float | None], None] | None = None,
    ) -> Timeline:
        """Returns segments of a long video, from windows of `window` seconds every `stride` (default: a quarter).

        The default `window` is the model's clip, 2 s for a model of whole videos. `fps` is the rate of an array.
        `progress` gets the seconds done and, where the file names it, the length. Memory is bounded by a window.
        Raises VideoError for an unreadable video, SettingsError for a bad argument.
        """
        window = self._window(window)
        check_arguments(
            PredictSettings,
            ANY_VIDEO,
            window=window,
            stride=stride,
            smoothing=smoothing,
            batch_size=batch_size,
        )
        return timelines.make_timeline(
            self._trained,
            find_source(video, fps),
            window=window,
            stride=window / 4 if stride is None else stride,
            smoothing=smoothing,
            batch_size=batch_size,
            progress=progress,
        )

    def stream(
        self,
        frames: Iterable[tuple[Frames, float]],
        *,
        window: float | None = None,
        stride: float | None = None,
        live: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> Iterator[WindowPrediction]:
        """Yields the windows of `timeline`, each as it ends, from (RGB frame uint8 (H, W, 3), seconds) in order.

        A thread takes the frames. A `live` source does not wait for the model: windows that it has no time for are
        dropped after 5 s, and counted. Windows that wait are scored together; with `batch_size` 1, scores do not
        depend on the speed, not even in the last bits.

        Raises SettingsError for a bad argument, DataError for a bad frame or a time that does not increase.
        """
        window = self._window(window)
        check_arguments(PredictSettings, ANY_VIDEO, window=window, stride=stride, batch_size=batch_size)
        return stream_windows(
            self._trained,
            timed_frames(frames, short_side=self.card.preprocessing.scale_to),
            window=window,
            stride=window / 4 if stride is None else stride,
            batch_size=batch_size,
            drops=lambda: live,
        )

    def _window(self, window: float | None) -> float:
        return (self.card.preprocessing.clip_seconds or 2.0) if window is None else window

    def draw_timeline(self, timeline: Timeline, *, dark: bool = False) -> bytes:
        """Returns the chart of a timeline as a PNG, in light or dark colours."""
        from tvit_cli.report.film import timeline_png  # imports PIL

        return timeline_png(timeline, dark=dark)

    def annotate(
        self,
        path: str | Path,
        video: Video,
        segments: Sequence[Segment],
        *,
        fps: float = 25.0,
        progress: Callable[[float, float | None], None] | None = None,
    ) -> None:
        """Writes a copy of a video, without sound, with labels of segments drawn in, to .mp4, .mov or .mkv.

        `fps` and `progress` are those of `timeline`. Raises VideoError for an unreadable video, RunError where the
        file cannot be written, DataError where it is the video, SettingsError for another ending.
        """
        check_arguments(PredictSettings, ANY_VIDEO, annotate=str(path))

        def report(event: Event) -> None:
            if progress is not None and isinstance(event, Progress):
                progress(event.done, event.total)

        timelines.annotate(Path(path), find_source(video, fps), segments, report)


def load_model(
    path: str | Path | None = None, *, device: str = "auto", mixed_precision: MixedPrecision = "auto"
) -> Model:
    """Opens a model folder, or the folder of its run, on a device: auto, cpu, cuda (cuda:1 is the second) or mps.

    Without `path`, the newest model below working_directory/ is opened.
    `mixed_precision` auto computes in bf16 where that is fast. Raises ModelError for an incomplete folder, or
    a device that the machine does not have, SettingsError for a bad argument.
    """
    kind = str(device).partition(":")[0]
    check_arguments(PredictSettings, ANY_VIDEO, device=kind, mixed_precision=mixed_precision)
    runs = PredictSettings.model_fields["working_directory"].default
    trained = open_trained(
        None if path is None else Path(path),
        working_directory=runs,
        device=pick_device(str(device)),
        mixed_precision=mixed_precision,
    )
    return Model(trained)


def open_model(settings: PredictSettings, report: Report) -> Model:
    """Opens the model of the settings, or the newest; with int8 where that is set and faster.

    Raises ModelError where there is none, SettingsError for int8 on a device other than the CPU.
    """
    device = pick_device(settings.device)
    if settings.int8 and device.type != "cpu":
        raise SettingsError(f"--int8: runs on CPUs only, the device is {device.type}. Choose --device cpu.")
    trained = open_trained(
        settings.model,
        working_directory=settings.working_directory,
        device=device,
        mixed_precision="no" if settings.int8 else settings.mixed_precision,
    )
    report(Note(f"Model: {trained.folder}"))
    if settings.int8 and linear.is_fast():
        layers = linear.to_int8(trained.model, exclude="classifier")
        report(Note(f"{layers} layers compute in int8.", "detail"))
    elif settings.int8:
        report(Note("--int8: int8 matmul is slower than float32 on this CPU; using float32.", "warning"))
    for note in trained.notes:
        report(Note(note, "warning"))
    return Model(trained)
