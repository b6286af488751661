"""`tvit predict --window`: the timelines of videos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from tvit_cli.data.container import Place
from tvit_cli.data.video import MOST_SHOWN
from tvit_cli.engine.events import Note, Report, seconds_done, silent
from tvit_cli.engine.outputs import check_file, check_writable, noted
from tvit_cli.engine.places import check_one, find_videos
from tvit_cli.engine.predict import open_model
from tvit_cli.engine.timeline import write_timeline
from tvit_cli.errors import VideoError
from tvit_cli.report.segments import Timeline
from tvit_cli.settings.predict import PredictSettings


@dataclass(frozen=True)
class Told:
    """The timeline of one video, or why there is none; and why files of it that were asked for are not there."""

    video: str
    timeline: Timeline | None = None
    error: str = ""
    unwritten: tuple[str, ...] = ()


def tell(settings: PredictSettings, report: Report = silent) -> tuple[Told, ...]:
    """A timeline of each video in turn, written to the output folder where one is given.

    Raises DataError for a name that stands for no video or a file that has no place, ModelError for the model.
    """
    assert settings.window is not None
    places = find_videos(settings.paths)
    check_one("annotate", settings.annotate, places)
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
            told.append(Told(str(place), error=str(error).removeprefix(f"{place}: ")))
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
            with noted(unwritten):
                write_timeline(settings.output / name, timeline)
        if settings.annotate is not None:
            from tvit_cli.engine.annotate import annotate

            with noted(unwritten):
                annotate(settings.annotate, place, timeline.segments, report)
                report(Note(f"The video with its labels is in {settings.annotate}"))
        told.append(Told(str(place), timeline, unwritten=tuple(unwritten)))
    if settings.output is not None and not any(t.unwritten for t in told):
        report(Note(f"Written to {settings.output}"))
    return tuple(told)


def folder_names(places: Sequence[Place]) -> Iterator[str]:
    """A folder's name for each video: its own without suffix, numbered where it comes again."""
    given: set[str] = set()
    for place in places:
        path = PurePosixPath(urlsplit(place).path) if isinstance(place, str) else Path(place)
        stem = path.stem.strip(".") or "video"  # a URL may end in ..
        numbered = (f"{stem}-{number}" for number in count(2))
        name = next(name for name in chain([stem], numbered) if name not in given)
        given.add(name)
        yield name
