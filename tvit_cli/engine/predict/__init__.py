"""`tvit predict` and the Python API: labels, embeddings, explanations and timelines of videos."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import torch
from torch import Tensor

from tvit_cli.data.clips import hold_signals
from tvit_cli.data.live import LiveSource, find_live
from tvit_cli.data.video import MOST_SHOWN, Frames
from tvit_cli.engine.distributed import default_worker_count
from tvit_cli.engine.evaluate.scoring import score_location_batches
from tvit_cli.engine.launch import pick_device
from tvit_cli.engine.predict import explain as explanations
from tvit_cli.engine.predict import timeline as timelines
from tvit_cli.engine.predict.explain import Explanation
from tvit_cli.engine.predict.paths import (
    Video,
    find_source,
    find_sources,
    find_videos,
    output_file,
    require_single_video,
)
from tvit_cli.engine.predict.stream import WindowTable, stream_windows, timed_frames
from tvit_cli.engine.trained import Trained, open_trained
from tvit_cli.errors import DataError, Interrupted, RunError, SettingsError, VideoError, plural
from tvit_cli.files import FrameArray, Location, Source, check_file, check_writable, collect_errors
from tvit_cli.model import linear
from tvit_cli.model.folder import save_tensors
from tvit_cli.results import (
    AnswersStart,
    Event,
    Note,
    Prediction,
    Progress,
    Report,
    Segment,
    SegmentFound,
    SegmentsEnd,
    StreamResult,
    Timeline,
    WindowPrediction,
    seconds_done,
    silent,
)
from tvit_cli.settings.base import check_arguments, flag
from tvit_cli.settings.card import ModelCard
from tvit_cli.settings.predict import ENDINGS, PredictSettings
from tvit_cli.settings.types import MixedPrecision

VIDEOS_PER_WORKER = 16  # for fewer, starting a worker takes longer than decoding them in this process
BATCH_SIZE = 8  # clips in one forward pass
ANY_VIDEO = {"paths": ("video",)}  # where the settings are checked without their videos


@dataclass(frozen=True)
class PredictResult:
    """One prediction per video, in the given order, and the errors of output files."""

    predictions: tuple[Prediction, ...]
    unwritten: tuple[str, ...] = ()


@dataclass(frozen=True)
class TimelineResult:
    """The timeline of one video, or the error that prevented it, and the errors of output files."""

    video: str
    timeline: Timeline | None = None
    error: str = ""
    unwritten: Sequence[str] = ()
    is_whole: bool = True  # else a stop signal ended it early


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
        window: float = 2.0,
        stride: float | None = None,
        smoothing: float = 2.0,
        batch_size: int = BATCH_SIZE,
        progress: Callable[[float, float | None], None] | None = None,
    ) -> Timeline:
        """Returns segments of a long video, from windows of `window` seconds every `stride` (default: a quarter).

        `fps` is the rate of an array. `progress` gets the seconds done and, where the file names it, the length.
        Memory is bounded by a window. Raises VideoError for an unreadable video, SettingsError for a bad argument.
        """
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
        window: float = 2.0,
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
        check_arguments(PredictSettings, ANY_VIDEO, window=window, stride=stride, batch_size=batch_size)
        return stream_windows(
            self._trained,
            timed_frames(frames, short_side=self.card.preprocessing.scale_to),
            window=window,
            stride=window / 4 if stride is None else stride,
            batch_size=batch_size,
            drops=lambda: live,
        )

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
    `mixed_precision` auto computes in bf16 on GPUs that support it. Raises ModelError for an incomplete folder, or
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


def predict(settings: PredictSettings, report: Report = silent) -> PredictResult:
    """Labels videos, preprocessed as in the model's evaluation, and reports each answer as soon as it is there.

    Unreadable videos and output files that cannot be written are in the result. Raises DataError for a path that
    does not exist, a folder without videos, or an output file without a valid location, ModelError for the model,
    Interrupted with the result so far after a stop signal.
    """
    locations = find_videos(settings.paths)
    require_single_video("explain", settings.explain, locations)
    require_single_video("annotate", settings.annotate, locations)
    for name in ENDINGS:
        check_file(flag(name), getattr(settings, name), locations)
    predictions: list[Prediction] = []
    embedded: list[tuple[str, Tensor]] = []
    errors: list[str] = []
    with _stops(locations, predictions, lambda: PredictResult(tuple(predictions), tuple(errors))):
        model = open_model(settings, report)
        top_k = min(settings.top_k, len(model.labels))
        if top_k < settings.top_k and "top_k" in settings.model_fields_set:
            text = (
                f"--top-k {settings.top_k}: the model has {len(model.labels)} classes, so {top_k} are shown."
            )
            report(Note(text, "warning"))
        report(AnswersStart(tuple(map(str, locations)), model.labels))
        answers = model._answers(
            locations,
            top_k=top_k,
            batch_size=settings.per_gpu_batch_size,
            embeds=settings.embeddings is not None,
            time_limit=settings.time_limit,
            report=report,
        )
        try:
            with closing(answers):
                for batch in answers:
                    with hold_signals():
                        for answer, row in batch:
                            report(answer)
                            predictions.append(answer)
                            embedded += [] if row is None else [(answer.video, row)]
                        report(Progress("reading videos", len(predictions), len(locations)))
        finally:  # also after a stop signal
            if settings.embeddings is not None and embedded:
                with collect_errors(errors):
                    write_embeddings(settings.embeddings, embedded, model.folder)
                    report(Note(f"{len(embedded)} embeddings written to {settings.embeddings}"))
        if settings.explain is not None and not predictions[0].error:
            with collect_errors(errors):
                explanation = model.explain(
                    locations[0], progress=lambda done, total: report(Progress("explaining", done, total))
                )
                model.write_explanation(settings.explain, explanation)
                verdict = explanation.deletion.verdict
                report(Note(f"{settings.explain}: {explanation.label}: {verdict}."))
        if settings.annotate is not None and not predictions[0].error:
            whole = Segment(0.0, timelines.WHOLE, *predictions[0].labels[0])
            with collect_errors(errors):
                timelines.annotate(settings.annotate, locations[0], [whole], report)
                report(Note(f"Annotated video written to {settings.annotate}"))
    return PredictResult(tuple(predictions), tuple(errors))


def predict_timelines(settings: PredictSettings, report: Report = silent) -> tuple[TimelineResult, ...]:
    """Makes a timeline of each video in turn and writes it to the output folder where one is given.

    Reports each segment when it is certain. Raises DataError for a name of no video or an output file without a
    valid location, ModelError for the model, Interrupted with the results so far after a stop signal.
    """
    assert settings.window is not None
    locations = find_videos(settings.paths)
    require_single_video("annotate", settings.annotate, locations)
    check_file("--annotate", settings.annotate, locations)
    output, names = settings.output, tuple(folder_names(locations))
    if output is not None and output.suffix.lower() in timelines.SUBTITLES:
        advice = f"Name a folder: each video gets files of its own, such as {Path(names[0], 'timeline.srt')}."
        require_single_video("output", output, locations, advice)
        check_file("--output", output, locations)
    elif output is not None:
        for name in names:
            check_writable("--output", output, output / name)
    results: list[TimelineResult] = []
    with _stops(locations, results, lambda: tuple(results)):
        model = open_model(settings, report)
        report(AnswersStart(tuple(map(str, locations)), model.labels))
        for location, name in zip(locations, names, strict=True):
            _add_timeline(results, model, location, name, settings, report, is_only=len(locations) == 1)
    if settings.output is not None and not any(result.unwritten for result in results):
        report(Note(f"Written to {settings.output}"))
    return tuple(results)


def _add_timeline(
    results: list[TimelineResult],
    model: Model,
    location: Location,
    name: str,
    settings: PredictSettings,
    report: Report,
    *,
    is_only: bool,
) -> None:
    """Adds the timeline of a video; raises what a stop signal raised, after the part before it was added."""
    assert settings.window is not None
    video = str(location)
    stops: list[BaseException] = []
    errors: list[str] = []
    try:
        timeline = timelines.make_timeline(
            model._trained,
            location,
            window=settings.window,
            stride=settings.window / 4 if settings.stride is None else settings.stride,
            smoothing=settings.smoothing,
            batch_size=settings.per_gpu_batch_size,
            progress=lambda done, total: report(
                seconds_done(f"seconds of {'the video' if is_only else video}", done, total)
            ),
            found=lambda segment: report(SegmentFound(video, segment)),
            stops=stops,
        )
    except VideoError as error:
        results.append(TimelineResult(video, error=str(error).removeprefix(f"{video}: ")))
        report(SegmentsEnd(video, error=results[-1].error))
        return
    with hold_signals():
        report(SegmentsEnd(video, timeline.seconds))
        results.append(TimelineResult(video, timeline, unwritten=errors, is_whole=not stops))
    if timeline.window < settings.window:
        text = f"lasts {timeline.seconds:.2f} s, less than the window of {settings.window:g} s"
        report(Note(f"{video}: {text}, so it is one clip.", "warning"))
    if timeline.note:
        report(Note(f"{video}: {timeline.note}.", "warning"))
    if len(timeline.spans) > 1:
        text = f"gaps of more than {MOST_SHOWN:g} s in the time stamps are in no window or segment"
        report(Note(f"{video}: {text}.", "warning"))
    if (output := settings.output) is not None:
        with collect_errors(errors):
            is_file = output.suffix.lower() in timelines.SUBTITLES
            timelines.write_timeline(output if is_file else output / name, timeline)
    if stops:
        raise stops[0]
    if settings.annotate is not None:
        with collect_errors(errors):
            timelines.annotate(settings.annotate, location, timeline.segments, report)
            report(Note(f"Annotated video written to {settings.annotate}"))


@contextmanager
def _stops(
    videos: Sequence[Location], done: Sequence[Prediction | TimelineResult], result: Callable[[], object]
) -> Iterator[None]:
    """Turns a stop signal within the block into Interrupted with the results so far."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as stop:
        name, code = ("SIGTERM", stop.exit_code) if isinstance(stop, Interrupted) else ("Ctrl-C", 130)
        count, where = len(done), ""
        if done and isinstance(last := done[-1], TimelineResult) and not last.is_whole and last.timeline:
            count, where = count - 1, f", at {last.timeline.seconds:.2f} s of {last.video}"
        text = f"Stopped by {name} after {count:,} of {plural(len(videos), 'video')}{where}."
        raise Interrupted(text, exit_code=code, result=result()) from None


def find_stream(settings: PredictSettings) -> LiveSource | None:
    """The live source that the settings name, or None for videos; see Note [Live sources].

    Raises SettingsError for what does not apply to a live source, VideoError for one that cannot be opened.
    """
    found = [s for name in settings.paths if (s := find_live(name, follow=settings.follow))]
    certain = next((source for source in found if source.certain), None)
    if certain is not None and settings.window is None:
        text = "is read as it comes, as a live source. Add --window, for example --window 2s."
        raise SettingsError(f"{certain.name}: {text}")
    if certain is not None and (count := len(settings.paths)) > 1:
        raise SettingsError(
            f"{certain.name}: a live source is read alone; {count} videos are named. Name one."
        )
    if not found or settings.window is None or len(settings.paths) > 1:
        return None
    (source,) = found
    try:
        if not source.is_live():
            return None
    except VideoError:
        if not source.certain:  # reported as that of a file
            return None
        raise
    for name in ("annotate", "smoothing"):
        if name in settings.model_fields_set and getattr(settings, name) is not None:
            raise SettingsError(f"{flag(name)} applies to files, and {source.name} is live. Leave it out.")
    return source


def predict_stream(settings: PredictSettings, source: LiveSource, report: Report = silent) -> StreamResult:
    """Reports each window of a live source as it ends, and adds it to the CSV of the output folder.

    Raises RunError for a source that is lost, Interrupted with the result so far after a signal, and otherwise as
    `predict_timelines`.
    """
    assert settings.window is not None
    folder = None
    if settings.output is not None:
        if settings.output.suffix.lower() in timelines.SUBTITLES:
            raise DataError(
                f"--output {settings.output}: a live source writes a CSV only. Name a folder for it."
            )
        folder = settings.output / next(folder_names(["stdin" if source.name == "-" else source.name]))
        check_writable("--output", settings.output, folder)
    model = open_model(settings, report)
    table = WindowTable(folder, model.labels, report)
    windows, dropped, end = 0, 0, 0.0

    def result() -> StreamResult:
        return StreamResult(source.name, windows, dropped, end, source.cuts, table.problems)

    def summary() -> str:
        if not windows:
            return f"{source.name}: no window of {settings.window:g} s was complete."
        text = f"{source.name}: {plural(windows, 'window')} in {end:.1f} s"
        text += f", {dropped} dropped because the model could not follow" if dropped else ""
        return text + (f", {plural(source.cuts, 'cut')}" if source.cuts else "") + "."

    try:
        for found in stream_windows(
            model._trained,
            source.frames(short_side=model.card.preprocessing.scale_to, report=report),
            window=settings.window,
            stride=settings.window / 4 if settings.stride is None else settings.stride,
            batch_size=settings.per_gpu_batch_size,
            drops=lambda: source.drops,
        ):
            if found.dropped and not dropped:
                report(Note(f"{source.name}: the model cannot follow; windows are dropped.", "warning"))
            with hold_signals():
                windows, dropped, end = windows + 1, dropped + found.dropped, found.end
                table.add(found)
                report(replace(found, video=source.name))
    except (KeyboardInterrupt, Interrupted) as stop:
        code = stop.exit_code if isinstance(stop, Interrupted) else 130
        signal = "Ctrl-C" if code == 130 else "SIGTERM"
        raise Interrupted(f"Stopped by {signal}. {summary()}", exit_code=code, result=result()) from None
    except RunError as error:
        raise RunError(f"{error} {summary()}") from error
    report(Note(summary(), "info" if windows and not dropped else "warning"))
    return result()


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
        mixed_precision=settings.mixed_precision,
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


def write_embeddings(path: Path, embeddings: Sequence[tuple[str, Tensor]], model: Path) -> None:
    """Writes `features`, (V, D) float32, with the videos' `names` (a JSON list) and the model in the metadata.

    A video that was named twice has two rows. Raises RunError where the file cannot be written; an older one stays.
    """
    names, rows = zip(*embeddings, strict=True)
    metadata = {"names": json.dumps(names, ensure_ascii=False), "model": str(model)}
    with output_file("--embeddings", path) as temporary:
        save_tensors({"features": torch.stack(rows)}, temporary, metadata)


def folder_names(locations: Sequence[Location]) -> Iterator[str]:
    """Folder name of each video: its name without suffix, numbered if it is taken."""
    taken: set[str] = set()
    for location in locations:
        path = PurePosixPath(urlsplit(location).path) if isinstance(location, str) else Path(location)
        name = stem = path.stem.strip(".") or "video"  # a URL may end in ..
        numbers = count(2)
        while name in taken:
            name = f"{stem}-{next(numbers)}"
        taken.add(name)
        yield name
