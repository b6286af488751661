"""Live sources: windows as they end, cuts, bounded memory, windows that the model cannot follow."""

import csv
import io
import json
import os
import re
import runpy
import sys
import threading
import wave
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from loopback import rtsp_serving, serving
from test_timeline import LABELS, Brightness, model_of
from tiny import make_model

from tvit_cli import commands
from tvit_cli.console import Console
from tvit_cli.data import live
from tvit_cli.data.live import find_live
from tvit_cli.engine.predict import find_stream, predict_stream, stream
from tvit_cli.errors import DataError, Interrupted, RunError, SettingsError, TvitError
from tvit_cli.results import Note, WindowPrediction
from tvit_cli.settings.base import load
from tvit_cli.settings.predict import PredictSettings

RATE = 10
HTTP = b"HTTP/1.1 200 OK\r\nContent-Type: video/mp2t\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "model", LABELS)


@pytest.fixture(scope="module")
def pieces():
    """Ten seconds of MPEG-TS, the bytes of a frame each."""
    out, found = io.BytesIO(), [0]
    with av.open(out, "w", format="mpegts", container_options={"flush_packets": "1"}) as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(10 * RATE):
            picture = np.full((32, 48, 3), 60 + number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            found.append(out.tell())
        container.mux(stream.encode(None))
    return [out.getvalue()[a:b] for a, b in zip(found, [*found[1:], None], strict=True)]


def settings(folder, name, **changes):
    flags = {"paths": [str(name)], "model": str(folder), "window": "1s", "device": "cpu", **changes}
    return load(PredictSettings, flags=flags, environ={})


def watch(loaded, seen=lambda window: None):
    """The windows of a source, the notes, and the result or the error at the end; `seen` gets each window."""
    windows, notes = [], []

    def report(event):
        if isinstance(event, WindowPrediction):
            windows.append(event)
            seen(event)
        elif isinstance(event, Note):
            notes.append(event.text)

    source = find_stream(loaded.settings)
    assert source is not None
    try:
        return windows, notes, predict_stream(loaded.settings, source, report)
    except RunError as error:
        return windows, notes, error


class Sent:
    """Answers to requests: each of `parts` in turn, and then the last; `goes_on` is waited for at the end."""

    def __init__(self, *parts, goes_on=None):
        self.parts, self.goes_on, self.has_waited_in_vain = list(parts), goes_on, False

    def __iter__(self):
        yield HTTP + b"".join(self.parts.pop(0) if len(self.parts) > 1 else self.parts[0])
        if self.goes_on is not None and not self.goes_on.wait(30):
            self.has_waited_in_vain = True


def test_a_stream_has_the_windows_and_scores_of_a_timeline():
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 255, (35, 40, 56, 3)).astype(np.uint8)
    frames[10:20] //= 4
    model = model_of(Brightness())
    expected = model.timeline(frames, fps=RATE, window=1.0, stride=0.3, batch_size=1)
    pairs = ((frame, n / RATE) for n, frame in enumerate(frames))
    found = list(model.stream(pairs, window=1.0, stride=0.3, batch_size=1))
    assert [w.start for w in found] == pytest.approx(expected.starts())
    assert len(found) == 9 and np.array_equal([w.scores for w in found], expected.scores)
    assert [w.label for w in found] == [LABELS[row.argmax()] for row in expected.scores]
    assert found[0].score == found[0].scores.max() and found[0].end == 1.0 and found[0].time.tzinfo


GREY = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(GREY[..., 0], 0)], r"frame 0: uint8 \(8, 8\)\. Give RGB"),
        ([(GREY / 255, 0)], r"frame 0: float64 \(8, 8, 3\)"),
        ([(GREY, 0), (GREY, 1.5), (GREY, 1.5)], r"frame 2: 1\.5 s is not after 1\.5 s"),
        ([(GREY, -1)], "not a time from 0 on"),
        ([(GREY, float("nan"))], "not a time"),
    ],
)
def test_frames_of_a_stream_and_their_times_are_checked(pairs, message):
    with pytest.raises(DataError, match=message):
        list(model_of(Brightness()).stream(pairs))
    with pytest.raises(SettingsError, match="window"):
        model_of(Brightness()).stream(pairs, window=0)


@pytest.mark.parametrize("is_live", [True, False])
def test_windows_that_the_model_cannot_follow_are_dropped_if_live(is_live, monkeypatch):
    monkeypatch.setattr(stream, "MOST", 8)
    all_made = threading.Event()

    class Slow(Brightness):
        def forward(self, clips):
            assert not is_live or all_made.wait(30)
            return super().forward(clips)

    def frames():
        yield from ((GREY, n / RATE) for n in range(60 * RATE))
        all_made.set()

    found = list(model_of(Slow()).stream(frames(), window=1.0, stride=1.0, live=is_live))
    dropped = sum(w.dropped for w in found)
    assert len(found) + dropped == 60 and found[-1].end == 60
    assert (dropped >= 60 - 8 - 8) if is_live else (dropped == 0)


def test_ten_minutes_of_a_stream_take_bounded_memory(folder):
    from tvit_cli import load_model

    model, taken, ahead = load_model(folder, device="cpu"), [0.0], 0.0

    def frames():
        for n in range(600 * RATE):
            taken[0] = n / RATE
            yield np.full((32, 48, 3), n % 256, np.uint8), taken[0]

    count = 0
    for window in model.stream(frames(), window=2.0, stride=2.0, batch_size=4):
        count, ahead = count + 1, max(ahead, taken[0] - window.start)
    assert (
        count == 300 and ahead <= 10 * 2.0 + 0.5
    )  # at most 4 windows in a batch, 4 that wait, one that is open


def test_first_answer_comes_within_two_windows_and_a_second(folder, pieces):
    answered = threading.Event()
    sent = Sent(pieces[: 3 * RATE], goes_on=answered)  # windows of a second

    def stop(window):
        answered.set()
        raise KeyboardInterrupt

    with serving() as server:
        windows, _, error = watch(settings(folder, server.add("/camera", b"", raw=sent)), stop)
    assert len(windows) == 1 and not sent.has_waited_in_vain
    assert isinstance(error, Interrupted) and error.exit_code == 130


def test_a_stream_that_is_cut_is_resumed_and_then_given_up(folder, pieces, monkeypatch, tmp_path):
    monkeypatch.setattr(live, "DELAYS", (0, 0))
    parts = [pieces[:22]] * 3  # the first is for a look at the stream
    with rtsp_serving(parts) as url:
        windows, notes, error = watch(settings(folder, url, output=str(tmp_path)))
    first, second = windows[:5], windows[5:]
    assert [w.start for w in first] == [0, 0.25, 0.5, 0.75, 1]
    assert len(second) == 5 and second[0].start >= first[-1].end  # none lies over the cut
    name = url.replace("user:secret@", "")
    assert any(re.match(re.escape(name) + r": cut after 2\.\d s; attempt 1 of 2", note) for note in notes)
    assert error.exit_code == 1 and f"{name}: cut after" in str(error) and "10 windows in" in str(error)
    assert "2 attempts to open it again failed. cannot be opened" in str(error) and "2 cuts." in str(error)
    rows = list(csv.DictReader((tmp_path / "live" / "timeline.csv").read_text().splitlines()))
    assert len(rows) == 10 and list(rows[0]) == ["start", "end", "label", *LABELS, "time"]
    assert rows[9]["label"] == windows[9].label and rows[9]["time"] == windows[9].time.isoformat()


def test_a_growing_file_is_followed_until_it_grows_no_more(folder, pieces, monkeypatch, tmp_path):
    monkeypatch.setattr(live, "GROWTH_SECONDS", 1.0)
    path = tmp_path / "recording.ts"
    path.write_bytes(b"".join(pieces[:30]))
    rest = [pieces[30:60], pieces[60:]]

    def grow(window):
        if rest:
            with path.open("ab") as file:
                file.write(b"".join(rest.pop(0)))

    windows, _, result = watch(settings(folder, path, stride="1s", follow=True), grow)
    assert [w.end for w in windows] == pytest.approx(range(1, 11)) and result.windows == 10
    assert (
        find_stream(settings(folder, path).settings) is None
    )  # without --follow, it is a video as any other


@pytest.fixture
def send(monkeypatch):
    """`send(data)` puts bytes into a pipe that is stdin."""
    end, begin = os.pipe()

    def write(data):
        with os.fdopen(begin, "wb") as file:
            file.write(data)

    with os.fdopen(end) as file:
        monkeypatch.setattr(sys, "stdin", file)
        yield write


@pytest.mark.parametrize("form", ["json_lines", "csv", "table"])
def test_bytes_on_stdin_give_a_line_per_window(folder, pieces, send, capsys, form):
    send(b"".join(pieces[:35]))
    changes = {} if form == "table" else {form: True}
    commands.predict(settings(folder, "-", stride="500ms", **changes), Console("normal"))
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert "-: 6 windows in 3.5 s." in captured.err
    if form == "json_lines":
        first = json.loads(lines[0])
        assert first.keys() == {"video", "time", "start", "end", "label", "score", "dropped"}
        assert [json.loads(line)["end"] for line in lines] == pytest.approx([1, 1.5, 2, 2.5, 3, 3.5])
        return
    rows = [re.split(",", line) if form == "csv" else re.split("  +", line.strip()) for line in lines]
    assert len(rows) == 7 and rows[0] == ["time", "start", "end", "label", "score"]
    assert rows[1][1:3] == ["0.00", "1.00"] and rows[6][2] == "3.50" and rows[1][3] in LABELS


def sound():
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "changes", "message"),
    [
        ("0", b"", {}, r"^0: no such camera, .+ \(.+\)\. (No camera is attached|Cameras here: )"),
        ("0", b"", {"window": None}, r"^0: is read as it comes, .+ Add --window"),
        ("-", b"\x00" * 9, {}, r"^-: not a video that FFmpeg can read .+ Send MPEG-TS, Matroska"),
        ("-", sound(), {}, r"^-: no video in this file, only audio\.$"),
        ("rtsp://127.0.0.1:9/x", b"", {}, r"^rtsp://127.0.0.1:9/x: cannot be opened \(.+refused\)\. Check"),
        ("none.ts", b"", {"follow": True}, r"^none\.ts: no such file to follow"),
        ("udp://127.0.0.1:9", b"", {"paths": ["udp://127.0.0.1:9", "a.avi"]}, "2 videos are named. Name one"),
        ("-", b"\x00", {"smoothing": "1"}, "^--smoothing applies to files"),
    ],
)
def test_a_live_source_that_cannot_be_read_is_one_sentence(folder, send, name, data, changes, message):
    send(data)
    with pytest.raises(TvitError, match=message) as raised:
        commands.predict(settings(folder, name, **changes), Console("quiet"))
    assert raised.value.exit_code == 2 and "\n" not in str(raised.value)


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (Interrupted("", exit_code=143), 143)])
def test_a_stopped_stream_keeps_its_windows(folder, pieces, send, tmp_path, stop, code):
    send(b"".join(pieces))

    def third(window):
        if window.end == 3:
            raise stop

    windows, _, error = watch(settings(folder, "-", stride="1s", output=str(tmp_path)), third)
    assert isinstance(error, Interrupted) and error.exit_code == code and "3 windows in 3.0 s" in str(error)
    assert len((tmp_path / "stdin" / "timeline.csv").read_text().splitlines()) == 1 + len(windows) == 4


def test_a_camera_without_times_gets_those_of_the_clock():
    out = io.BytesIO()
    with av.open(out, "w", format="mpjpeg") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p"
        for _ in range(40):
            container.mux(stream.encode(av.VideoFrame(48, 32, "yuvj420p")))
    first = out.tell() // 20
    pages = [out.getvalue()[:first], out.getvalue()[first:]]
    with serving() as server:
        url = server.add("/mjpg", b"", raw=[HTTP, *pages], seconds_per_chunk=0.3)
        source = find_live(url)
        assert source is not None and source.is_live()
        steps = {round(f.start - n / 25, 2) for n, f in zip(range(40), source.frames(), strict=False)}
        assert len(steps) > 1  # FFmpeg takes 25 frames per second for granted
        assert find_live(server.add("/clip.mp4", b"")) is None


def test_the_opencv_loop_prints_windows_and_names_a_missing_opencv(folder, monkeypatch, capsys):
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "use_opencv.py"))
    example["frames"].__globals__["time"] = SimpleNamespace(monotonic=iter(range(9)).__next__)
    pictures = iter([(True, GREY)] * 7 + [(False, None)])
    capture = SimpleNamespace(isOpened=lambda: True, read=lambda: next(pictures))
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(VideoCapture=lambda source: capture))
    example["main"](str(folder), "0")
    assert re.fullmatch(r"(\d\d:\d\d:\d\d  \w+  0\.\d{3}\n){11}", capsys.readouterr().out)  # 7 s
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(SystemExit, match=r"not installed\. Run: python -m pip install"):
        example["main"](str(folder))
