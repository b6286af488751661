"""What a video file holds and what is wrong with it, found by decoding all of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tvit_cli.data.video import COUNT_SLACK, count_frames, probe, promised_frames
from tvit_cli.errors import VideoError


@dataclass(frozen=True, slots=True)
class Scan:
    """One file: width and height as shown, frames as decoded, and in `problem` what is wrong."""

    path: Path
    codec: str = ""
    width: int = 0
    height: int = 0
    frames: int = 0
    seconds: float = 0.0
    rate: float | None = None  # frames per second; None: the file names no time
    rotation: int = 0  # degrees counter-clockwise
    problem: str = ""
    is_readable: bool = True


def scan_video(path: Path) -> Scan:
    """Decodes a video to its end and says what it is; one that gives no frame is not readable."""
    try:
        info = probe(path)
        frames = count_frames(path)
        promised = promised_frames(path)
    except VideoError as error:
        return Scan(path, problem=str(error).removeprefix(f"{path}: "), is_readable=False)
    problem = ""
    if frames < promised - COUNT_SLACK:  # up to that many are missing from sound XviD files too
        problem = f"truncated or damaged: {frames} frames decode of {promised} that the file promises"
    return Scan(
        path=path,
        codec=info.codec,
        width=info.width,
        height=info.height,
        frames=frames,
        seconds=info.seconds,
        rate=info.rate,
        rotation=info.rotation,
        problem=problem,
    )
