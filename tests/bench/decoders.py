"""Chosen frames of a video as RGB, by tvit and by other decoders; one thread each, in turn, by processor time.

    python tests/bench/decoders.py [--rounds 5] [--only xvid,h264]

Every frame carries its number as dark and light blocks in its upper left corner, so a wrong frame, or one that is
not turned as the file says, is counted whatever its colours. tvit is timed twice: at the first reading, and at a
later one, as in the second epoch of a training. The others open the file anew, take its number of frames from it, and
read frames at the centres of equal segments. Those that are not installed are left out:

    pip install opencv-python-headless eva-decord torchcodec   # torchcodec needs FFmpeg's libraries
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import av
import numpy as np
from videos import set_rotation

from tvit_cli.data.video import read_clip
from tvit_cli.data.video_writer import write_video
from tvit_cli.portable.reading import segment_indices

BITS, BLOCK = 8, 16  # of a frame's number; pixels of a block
CASES = {  # name: file, codec, height, width, frames, FFmpeg's options
    "xvid": ("clip.avi", "mpeg4", 240, 320, 180, {"bf": "2", "g": "250", "qmin": "2", "qmax": "2"}),
    "h264, long GOP": ("long.mp4", "libx264", 1080, 1920, 120, {"g": "250", "crf": "23", "preset": "fast"}),
    "h264, short GOP": ("short.mp4", "libx264", 1080, 1920, 120, {"g": "12", "crf": "23", "preset": "fast"}),
    "vp9": ("clip.webm", "libvpx-vp9", 720, 1280, 120, {"b": "2M", "cpu-used": "8", "deadline": "realtime"}),
    "hevc, turned": ("turned.mp4", "libx265", 720, 1280, 120, {"crf": "28", "preset": "ultrafast"}),
}
Reader = Callable[[str, int], np.ndarray]


def make(folder: Path, case: str) -> Path:
    """A drifting scene with grain, each frame with its number."""
    name, codec, height, width, count, options = CASES[case]
    generator = np.random.default_rng(0)
    coarse = generator.integers(60, 190, ((height + 255) // 16, (width + 255) // 16, 3), dtype=np.uint8)
    scene = coarse.repeat(16, 0).repeat(16, 1)
    grain = generator.integers(0, 8, (8, height, width, 1), dtype=np.uint8)
    frames = np.empty((count, height, width, 3), np.uint8)
    for index in range(count):
        frames[index] = scene[index // 4 :, index:][:height, :width] + grain[index % 8]
        for bit in range(BITS):
            light = 230 if index >> bit & 1 else 20
            frames[index, :BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = light
        frames[index, BLOCK : 2 * BLOCK, : BITS * BLOCK] = np.where(np.arange(BITS * BLOCK) < BLOCK, 230, 20)[
            :, None
        ]
    path = folder / name
    write_video(path, frames, codec=codec, options={**options, "threads": "1"})
    if case == "hevc, turned":
        set_rotation(path, 90)
    return path


def number_of(picture: np.ndarray, turned: bool) -> int:
    """The number that a frame carries; -1 for one that is not as shown."""
    if turned:  # shown turned clockwise: the corner is the upper right one
        picture = np.rot90(picture)
    centres = [(BLOCK // 2, bit * BLOCK + BLOCK // 2) for bit in range(BITS)]
    light = [picture[y - 3 : y + 3, x - 3 : x + 3].mean() > 128 for y, x in centres]
    mark = [picture[y + BLOCK - 3 : y + BLOCK + 3, x - 3 : x + 3].mean() > 128 for y, x in centres]
    if picture.shape[0] > picture.shape[1] or mark != [True] + [False] * (BITS - 1):
        return -1
    return sum(bit << n for n, bit in enumerate(light))


def tvit_first(path: str, n: int) -> np.ndarray:
    return read_clip(Path(path), lambda count: segment_indices(count, n)).frames


def tvit_later() -> Reader:
    known: dict[str, object] = {}

    def read(path: str, n: int) -> np.ndarray:
        clip = read_clip(Path(path), lambda count: segment_indices(count, n), known=known.get(path))
        known[path] = clip.order or clip.frame_count
        return clip.frames

    return read


def plain_pyav(path: str, n: int) -> np.ndarray:
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        count = stream.frames or sum(1 for p in container.demux(stream) if p.size)
        container.seek(0)
        chosen = segment_indices(count, n)
        frames = {}
        for index, frame in enumerate(container.decode(stream)):
            if index in chosen:
                frames[index] = frame.to_ndarray(format="rgb24")
            if index == chosen[-1]:
                break
        return np.stack([frames[min(index, max(frames))] for index in chosen])


def torchcodec(mode: str) -> Reader:
    from torchcodec.decoders import VideoDecoder

    def read(path: str, n: int) -> np.ndarray:
        decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=mode)
        return decoder.get_frames_at(segment_indices(len(decoder), n)).data.numpy()

    return read


def opencv(seek: bool) -> Reader:
    import cv2

    cv2.setNumThreads(1)

    def read(path: str, n: int) -> np.ndarray:
        capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        pictures, at = [], 0
        for index in segment_indices(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), n):
            if seek:
                capture.set(cv2.CAP_PROP_POS_FRAMES, index)
            else:
                for _ in range(index - at):
                    capture.grab()
            found, picture = capture.read()
            at = index + 1
            if found:
                pictures.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
        return np.stack(pictures)

    return read


def decord(path: str, n: int) -> np.ndarray:
    from decord import VideoReader

    reader = VideoReader(path, num_threads=1)
    return reader.get_batch(segment_indices(len(reader), n)).asnumpy()


def readers() -> dict[str, Reader]:
    found: dict[str, Reader] = {"tvit, first": tvit_first, "tvit, later": tvit_later(), "PyAV": plain_pyav}
    if importlib.util.find_spec("torchcodec"):
        found |= {"torchcodec": torchcodec("exact"), "torchcodec, approximate": torchcodec("approximate")}
    if importlib.util.find_spec("cv2"):
        found |= {"OpenCV": opencv(seek=False), "OpenCV, seeking": opencv(seek=True)}
    if importlib.util.find_spec("decord"):
        found["decord"] = decord
    return found


def wrong_frames(read: Reader, path: Path, n: int, count: int) -> str:
    """How many frames are not the wanted ones, in words; "" for none."""
    try:
        pictures = read(str(path), n)
    except (OSError, RuntimeError, LookupError, ValueError) as error:
        return f"fails ({type(error).__name__})"
    turned = path.stem == "turned"
    numbers = [number_of(picture, turned) for picture in pictures]
    if turned and all(number == -1 for number in numbers):
        return "not turned"
    wanted: Sequence[int] = segment_indices(count, n)
    wrong = sum(a != b for a, b in zip(numbers, wanted, strict=False)) + abs(len(numbers) - n)
    return f"{wrong} of {n} wrong" if wrong else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases that begin with one of these, by commas")
    options = parser.parse_args()
    results: dict[str, float] = {}
    faults: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if not case.startswith(tuple(options.only.split(","))):
                continue
            path = make(Path(folder), case)
            for n in (8, 18):
                ways = readers()
                wrong = {name: wrong_frames(read, path, n, CASES[case][4]) for name, read in ways.items()}
                times: dict[str, list[float]] = {name: [] for name in ways}
                for _ in range(options.rounds):
                    for name, read in ways.items():
                        if not wrong[name].startswith("fails"):
                            began = time.process_time()
                            read(str(path), n)
                            times[name].append(time.process_time() - began)
                median = {name: statistics.median(values) for name, values in times.items() if values}
                for name in ways:
                    key = f"{case}, {n} frames, {name}"
                    if wrong[name]:
                        faults[key] = wrong[name]
                    if name in median:
                        results[key] = median[name] / median["tvit, later"]
                        print(
                            f"{key:52} {median[name] * 1e3:7.1f} ms  x {results[key]:.2f}  {wrong[name]}",
                            flush=True,
                        )
                    else:
                        print(f"{key:52} {wrong[name]}", flush=True)
    print(
        json.dumps(
            {
                "benchmark": "decoders",
                "cores": os.cpu_count(),
                "av": av.__version__,
                "ratios": results,
                "faults": faults,
            }
        )
    )


if __name__ == "__main__":
    main()
