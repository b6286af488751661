"""`tvit predict --annotate`: a video with its labels written into the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tvit_cli.data.container import Place
from tvit_cli.data.video import play
from tvit_cli.data.writer import video_writer
from tvit_cli.engine.events import Report, seconds_done, silent
from tvit_cli.errors import DataError
from tvit_cli.report.caption import captioned
from tvit_cli.report.segments import Segment

WHOLE = float("inf")  # the end of a segment that is the whole video


def annotate(path: Path, place: Place, segments: Sequence[Segment], report: Report = silent) -> None:
    """Write the video, without its sound, each frame captioned with the segment that it lies in.

    Frames keep their times and size (an odd last row or column is left out), turned as they are shown; one is in
    memory at a time. Raises VideoError, DataError where the video would replace itself, RunError where it cannot
    be written.
    """
    if isinstance(place, Path) and path.exists() and path.samefile(place):
        raise DataError(f"--annotate {path}: is the video itself. Name another file.")
    with video_writer(path) as writer:
        number = 0
        for frame in play(place):
            while number < len(segments) - 1 and frame.start >= segments[number].end - 1e-6:
                number += 1
            segment = segments[number]
            picture = frame.picture()
            if segment.start - 1e-6 <= frame.start < segment.end:  # else it lies by itself between two gaps
                picture = captioned(picture, f"{segment.label}  {segment.score:.2f}")
            writer.write(picture, frame.start, frame.end)
            if round(frame.end) > round(frame.start):
                report(seconds_done("seconds written", frame.end, frame.length))
