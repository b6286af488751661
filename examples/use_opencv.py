"""A loop over the frames of OpenCV: labels of a camera or a stream, window by window.

python -m pip install opencv-python
python examples/use_opencv.py MODEL [CAMERA_OR_URL]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import numpy as np

import tvit_cli


def frames(source: str) -> Iterator[tuple[np.ndarray, float]]:
    """RGB frames, uint8 (H, W, 3), and the seconds since the first."""
    try:
        import cv2
    except ImportError:
        sys.exit("OpenCV is not installed. Run: python -m pip install opencv-python")
    capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
    if not capture.isOpened():
        sys.exit(f"{source}: OpenCV cannot open it.")
    start = time.monotonic()
    while True:
        is_read, picture = capture.read()
        if not is_read:
            return
        yield picture[:, :, ::-1], time.monotonic() - start  # OpenCV's order is BGR


def main(folder: str, source: str = "0") -> None:
    model = tvit_cli.load_model(folder)
    for window in model.stream(frames(source), window=2.0, live=True):
        note = f"  ({window.dropped} dropped)" if window.dropped else ""
        print(f"{window.time:%H:%M:%S}  {window.label}  {window.score:.3f}{note}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python examples/use_opencv.py MODEL [CAMERA_OR_URL]")
    main(*sys.argv[1:])
