"""Timelines of 60 s videos cut from the demo motions: boundaries found; memory of an hour.

    python tests/bench/timeline.py [--model MODEL --data data/motions] [--videos 5] [--first 0] [--hour]

Without a model, the quickstart's is trained first, in a temporary folder. Each video is 30 clips of groups that
training never saw, in 8 segments of 3 or 4 clips (6 or 8 s) of one class, no two neighbours of the same. A
boundary is found where the timeline has one between the right two labels; its error is told in seconds. One line
of JSON per video. `--hour` then plays one such video 60 times over, and tells time and peak memory beside those
of the video alone, each in a process of its own.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import numpy as np

import tvit_cli
from tvit_cli.data.motions import CLASSES, RATE
from tvit_cli.data.video import Frames, read_clip
from tvit_cli.data.video_writer import write_video

ROOT = Path(__file__).parents[2]
CLIPS = (3, 4, 4, 4, 3, 4, 4, 4)  # of each segment
SECONDS_PER_CLIP = 2.0
CODE = """
import json, sys, time, tvit_cli
from pathlib import Path
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: a new process has its parent's
model = tvit_cli.load_model(sys.argv[1], device="cpu")
started = time.perf_counter()
timeline = model.timeline(sys.argv[2], window=2.0, stride=0.5)
print(json.dumps({"seconds": timeline.seconds, "windows": len(timeline.scores),
    "segments": len(timeline.segments), "wall": round(time.perf_counter() - started, 1),
    "megabytes": round(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)}))
"""


def quickstart(folder: Path) -> tuple[Path, Path]:
    """The quickstart's model and its data, made in a folder."""
    command = [sys.executable, "-m", "tvit_cli", "train", "--preset", "quickstart", "--experiment-name", "q"]
    subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    return folder / "working_directory" / "q", folder / "data" / "motions"


def cut_video(data: Path, path: Path, seed: int) -> list[tuple[float, str]]:
    """Write a video and return where its segments begin, and their labels."""
    generator = random.Random(seed)
    labels: list[str] = []
    for _ in CLIPS:
        labels.append(generator.choice([c for c in CLASSES if labels[-1:] != [c]]))
    pieces: list[Frames] = []
    starts, now = [], 0.0
    for label, count in zip(labels, CLIPS, strict=True):
        starts.append((now, label))
        clips = sorted((data / "test" / label).glob("*.avi"))
        for clip in generator.sample(clips, count):
            pieces.append(read_clip(clip, lambda count: range(count)).frames)
            now += SECONDS_PER_CLIP
    write_video(path, np.concatenate(pieces), rate=RATE)
    return starts


def errors(truth: list[tuple[float, str]], found: list[tuple[float, str]]) -> list[float | None]:
    """For each true boundary, how far off the nearest found one between the same labels is; None: there is none."""
    answers: list[float | None] = []
    boundaries = [(b[0], a[1], b[1]) for a, b in pairwise(found)]
    for before, after in pairwise(truth):
        near = [abs(time - after[0]) for time, a, b in boundaries if (a, b) == (before[1], after[1])]
        answers.append(min(near, default=None))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data/motions"))
    parser.add_argument("--videos", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the seed of the first video")
    parser.add_argument("--window", type=float, default=2.0)
    parser.add_argument("--stride", type=float, default=0.5)
    parser.add_argument("--smoothing", type=float, default=2.0)
    parser.add_argument("--hour", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_folder, data = (options.model, options.data) if options.model else quickstart(folder)
        model = tvit_cli.load_model(model_folder, device="cpu")
        everything: list[float | None] = []
        for seed in range(options.first, options.first + options.videos):
            truth = cut_video(data, folder / f"{seed}.mp4", seed)
            timeline = model.timeline(
                folder / f"{seed}.mp4",
                window=options.window,
                stride=options.stride,
                smoothing=options.smoothing,
            )
            found = [(s.start, s.label) for s in timeline.segments]
            off = errors(truth, found)
            everything += off
            print(json.dumps({"seed": seed, "segments": len(found), "of": len(truth), "errors": off}))
        good = sum(e is not None and e <= 0.5 for e in everything)
        print(f"{good} of {len(everything)} boundaries are found within 0.5 s")
        if options.hour:
            frames = read_clip(folder / f"{options.first}.mp4", lambda count: range(count)).frames
            write_video(
                folder / "hour.mp4",
                np.broadcast_to(frames, (60, *frames.shape)).reshape(-1, *frames.shape[1:]),
                rate=RATE,
            )
            for video in (f"{options.first}.mp4", "hour.mp4"):
                command = [sys.executable, "-c", CODE, str(model_folder), str(folder / video)]
                subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


if __name__ == "__main__":
    main()
