"""`tvit predict`: labels, embeddings, explanations and timelines of videos, and windows of live sources."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import torch
from torch import Tensor

from tvit_cli.data.clips import hold_signals
from tvit_cli.data.live import LiveSource, find_live
from tvit_cli.engine.predict import timeline as timelines
from tvit_cli.engine.predict.model import Model, load_model, open_model
from tvit_cli.engine.predict.paths import find_videos, output_file, require_single_video
from tvit_cli.engine.predict.stream import StreamFiles, stream_windows
from tvit_cli.errors import DataError, Interrupted, RunError, SettingsError, VideoError, plural
from tvit_cli.files import Location, check_file, check_writable, collect_errors
from tvit_cli.model.folder import save_tensors
from tvit_cli.portable.reading import MOST_SHOWN
from tvit_cli.results import (
    AnswersStart,
    Note,
    Prediction,
    Progress,
    Report,
    Segment,
    SegmentFound,
    SegmentsEnd,
    StreamResult,
    Timeline,
    seconds_done,
    silent,
)
from tvit_cli.settings.base import flag
from tvit_cli.settings.predict import ENDINGS, PredictSettings

__all__ = [
    "Model",
    "PredictResult",
    "TimelineResult",
    "find_stream",
    "load_model",
    "predict",
    "predict_stream",
    "predict_timelines",
]


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
        name, code = _signal(stop)
        count, where = len(done), ""
        if done and isinstance(last := done[-1], TimelineResult) and not last.is_whole and last.timeline:
            count, where = count - 1, f", at {last.timeline.seconds:.2f} s of {last.video}"
        text = f"Stopped by {name} after {count:,} of {plural(len(videos), 'video')}{where}."
        raise Interrupted(text, exit_code=code, result=result()) from None


def _signal(stop: BaseException) -> tuple[str, int]:
    """Name and exit code of a stop signal."""
    return ("SIGTERM", stop.exit_code) if isinstance(stop, Interrupted) else ("Ctrl-C", 130)


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
    """Reports each window of a live source as it ends, and adds it to the files of the output folder.

    Raises RunError for a source that is lost, Interrupted with the result so far after a signal, and otherwise as
    `predict_timelines`.
    """
    assert settings.window is not None
    folder = None
    if settings.output is not None:
        if settings.output.suffix.lower() in timelines.SUBTITLES:
            raise DataError(
                f"--output {settings.output}: a live source writes several files. Name a folder for them."
            )
        folder = settings.output / next(folder_names(["stdin" if source.name == "-" else source.name]))
        check_writable("--output", settings.output, folder)
    model = open_model(settings, report)
    files = StreamFiles(folder, model.labels, report)
    windows, dropped, end = 0, 0, 0.0

    def result() -> StreamResult:
        return StreamResult(source.name, windows, dropped, end, source.cuts, files.problems)

    def summary() -> str:
        if not windows:
            return f"{source.name}: no window of {settings.window:g} s was complete."
        text = f"{source.name}: {plural(windows, 'window')} in {end:.1f} s"
        text += f", {dropped} dropped because the model could not follow" if dropped else ""
        return text + (f", {plural(source.cuts, 'cut')}" if source.cuts else "") + "."

    try:
        with closing(files):
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
                    files.add(found)
                    report(replace(found, video=source.name))
    except (KeyboardInterrupt, Interrupted) as stop:
        name, code = _signal(stop)
        raise Interrupted(f"Stopped by {name}. {summary()}", exit_code=code, result=result()) from None
    except RunError as error:
        raise RunError(f"{error} {summary()}") from error
    report(Note(summary(), "info" if windows and not dropped else "warning"))
    return result()


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
