"""The Python API: labels of videos, and the timeline of a long one.

python examples/python_api.py MODEL VIDEO [VIDEO …]
"""

from __future__ import annotations

import sys

import tvit_cli


def main(folder: str, *videos: str) -> None:
    model = tvit_cli.load_model(folder)  # a model folder, or a run's; device="cuda" for a GPU
    print(f"{len(model.labels)} classes: {', '.join(model.labels)}")

    for answer in model.predict_many(videos, top_k=3):  # files, folders, patterns, URLs
        print(answer.video, answer.error or answer.labels)

    timeline = model.timeline(videos[0], window=1.0, stride=0.25)
    for segment in timeline.segments:
        print(f"{segment.start:7.2f} s to {segment.end:7.2f} s  {segment.label}  {segment.score:.3f}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python examples/python_api.py MODEL VIDEO [VIDEO …]")
    main(*sys.argv[1:])
