"""Damaged videos: late streams, errors of the demuxer, gaps in time stamps."""

import csv
import importlib
import importlib.util
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import tiny
from loopback import serving
from videos import set_matrix

import tvit_cli
from tvit_cli.data import video
from tvit_cli.data.video import count_frames, iter_frames, read_clip
from tvit_cli.data.video_writer import video_writer, write_video
from tvit_cli.engine.extract import check, extract, scan_video
from tvit_cli.engine.predict import load_model, predict, predict_timelines
from tvit_cli.engine.predict.timeline import annotate
from tvit_cli.errors import DataError, RunError, VideoError
from tvit_cli.report.film import timeline_png
from tvit_cli.results import Note
from tvit_cli.settings.extract import ExtractSettings
from tvit_cli.settings.predict import PredictSettings

LATE = 300  # frames before and after the sound: more than FFmpeg reads to find the streams


def sound(path):
    """A second of video with sound, as MPEG-TS."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("mp2", rate=48000)
        for n in range(25):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 9 * n, np.uint8), format="rgb24")
            frame.pts = n
            container.mux(video.encode(frame))
        noise = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 48000), np.int16), format="s16", layout="stereo")
        noise.sample_rate = 48000
        container.mux(audio.encode(noise))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    return path.read_bytes()


def late_stream(path):
    """Three MPEG-TS files joined, of which only the second has sound: FFmpeg finds it while it reads the packets."""
    noise = np.random.default_rng(0).integers(0, 255, (LATE, 48, 48, 3)).astype(np.uint8)
    silent, second = path.with_name("silent.part.ts"), path.with_name("second.part.ts")
    write_video(silent, noise, quantiser=8)
    path.write_bytes(silent.read_bytes() + sound(second) + silent.read_bytes())
    silent.unlink()
    second.unlink()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model") / "model", tuple(tiny.COLOURS))


@pytest.fixture
def data(tmp_path):
    """Three classes of six sound videos."""
    return tiny.make_clips(tmp_path / "data")


def test_a_stream_that_appears_late_costs_no_frame(tmp_path):
    path = late_stream(tmp_path / "late.ts")
    with av.open(str(path)) as source:
        assert len(source.streams) == 1  # PyAV raises an IndexError for the other at the end
    frames = LATE + 25 + LATE
    assert count_frames(path) == frames and not scan_video(path).problem
    assert read_clip(path, lambda count: [0, count - 1]).frame_count == frames
    assert sum(1 for _ in iter_frames(path)) == frames


def test_an_exported_reader_reads_a_video_with_a_late_stream(tmp_path, monkeypatch):
    package = Path(tvit_cli.__file__).parent
    (tmp_path / "exported").mkdir()
    shutil.copy(package / "portable" / "reading.py", tmp_path / "exported")
    monkeypatch.syspath_prepend(tmp_path)
    reading = importlib.import_module("exported.reading")
    path = late_stream(tmp_path / "late.ts")
    assert sum(1 for _ in reading.decoded(path)) == LATE + 25 + LATE


def test_every_command_reads_a_video_with_a_late_stream(data, model, tmp_path):
    late_stream(data / "Red" / "v_Red_g07_c01.ts")
    reads_all(data, model, tmp_path, videos=19)


def reads_all(data, model, tmp_path, videos):
    """Every command goes to its end with all of these videos."""
    answer = predict(PredictSettings(paths=(str(data),), model=model, device="cpu"))
    assert len(answer.predictions) == videos and not any(p.error for p in answer.predictions)
    result = predict_timelines(PredictSettings(paths=(str(data),), model=model, device="cpu", window=0.2))
    assert len(result) == videos and not any(t.error for t in result)
    checked = check(ExtractSettings(path_to_data=str(data), check=True, num_workers=0), lambda event: None)
    assert len(checked) == videos and not any(scan.problem for scan in checked)
    store = tmp_path / "store"
    stored = extract(ExtractSettings(path_to_data=str(data), output=store, num_workers=0), lambda event: None)
    assert stored.videos == videos and not stored.unreadable
    result = tiny.run(
        path_to_data=str(data), working_directory=tmp_path / "runs", hf_model_name=None, width=16, depth=1,
        num_heads=2, train="all", epochs=1,
    )  # fmt: skip
    assert result.model.is_dir()


ERRORS = [
    IndexError("list index out of range"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    OverflowError("too large"), ValueError("no such thing"), RuntimeError("anything else"),
]  # fmt: skip


@pytest.fixture(params=ERRORS, ids=lambda error: type(error).__name__)
def failing(request, monkeypatch):
    """Opening a file of a name with "bad" in it raises an error that is not FFmpeg's."""
    really = av.open

    def fail(path, *given, **named):
        if "bad" in path:
            raise request.param
        return really(path, *given, **named)

    monkeypatch.setattr(video.av, "open", fail)
    return type(request.param).__name__


def test_any_error_of_the_reader_names_one_video(failing, data, model, tmp_path):
    bad = data / "Red" / "v_bad_g07_c01.avi"
    shutil.copyfile(data / "Red" / "v_Red_g01_c01.avi", bad)
    with pytest.raises(VideoError, match=rf"v_bad_g07_c01\.avi: cannot be read \({failing}: "):
        read_clip(bad, lambda count: [0])
    answer = predict(PredictSettings(paths=(str(data),), model=model, device="cpu"))
    assert [failing in p.error for p in answer.predictions].count(True) == 1
    (result,) = predict_timelines(PredictSettings(paths=(str(bad),), model=model, device="cpu", window=0.2))
    assert failing in result.error
    if failing != "IndexError":  # all are caught at one place; the other commands are shown with one of them
        return
    checked = check(ExtractSettings(path_to_data=str(data), check=True, num_workers=0), lambda event: None)
    assert [scan.path.name for scan in checked if scan.problem] == [bad.name]
    how = {"path_to_data": str(data), "output": tmp_path / "store", "num_workers": 0}
    stored = extract(ExtractSettings(**how, max_bad="1"), lambda event: None)
    assert stored.videos == 18 and list(stored.unreadable) == [f"Red/{bad.name}"]
    with pytest.raises(RunError, match="1 of 19 videos cannot be read"):
        extract(ExtractSettings(**how, max_bad="0"), lambda event: None)
    facts = {
        "path_to_data": str(data), "working_directory": tmp_path / "runs", "hf_model_name": None,
        "width": 16, "depth": 1, "num_heads": 2, "train": "all", "epochs": 1,
    }  # fmt: skip
    assert tiny.run(**facts, max_bad="1").model.is_dir()
    with pytest.raises(DataError, match="1 of 19 videos cannot be read"):
        tiny.run(**facts, max_bad="0")


@pytest.mark.parametrize("error", ERRORS[:4], ids=lambda error: type(error).__name__)
def test_frames_before_an_error_of_the_demuxer_are_kept(error, tmp_path, make_video, monkeypatch):
    class Broken:
        def __init__(self, source):
            self.source = source

        def demux(self, stream):
            for number, packet in enumerate(self.source.demux(stream)):
                if number == 7:
                    raise error
                yield packet

    path = make_video(tmp_path / "a.avi", codec="mjpeg", pixel_format="yuvj420p")
    really = video.demux
    broken = lambda place, source, stream: really(place, Broken(source), stream)  # noqa: E731
    monkeypatch.setattr("tvit_cli.data.video.demux", broken)
    assert count_frames(path) == 7


def film(path, times):
    """A grey video with a frame at each of these seconds."""
    with video_writer(path) as writer:
        for number, time in enumerate(times):
            grey = np.full((32, 48, 3), 60 + 140 * (number % 2), np.uint8)
            writer.write(grey, time, time + 0.04)
    return path


def steady(start, seconds):
    return [start + n / 25 for n in range(round(seconds * 25))]


@pytest.mark.parametrize("gap", [20.0, 3600.0, 1e6])
def test_windows_and_segments_leave_out_a_gap(gap, model, tmp_path):
    path = film(tmp_path / "gap.mkv", steady(0, 3) + steady(gap, 2))
    notes = []
    output = tmp_path / "out"
    (result,) = predict_timelines(
        PredictSettings(paths=(str(path),), model=model, device="cpu", window=1.0, stride=0.5, output=output),
        notes.append,
    )
    assert result.timeline is not None
    assert len(result.timeline.scores) == 5 + 3 and len(result.timeline.smoothed) == 6 + 4
    assert result.timeline.seconds == pytest.approx(gap + 2, abs=0.05)
    rows = list(csv.DictReader((output / "gap" / "timeline.csv").read_text().splitlines()))
    assert [float(row["start"]) for row in rows] == pytest.approx(
        [0, 0.5, 1, 1.5, 2, gap, gap + 0.5, gap + 1], abs=0.05
    )
    for segment in result.timeline.segments:
        assert segment.end <= 3.05 or segment.start >= gap - 0.05
    assert result.timeline.segments[0].start == 0
    assert result.timeline.segments[-1].end == result.timeline.seconds
    assert any("gaps of more than 10 s" in note.text for note in notes if isinstance(note, Note))
    assert timeline_png(result.timeline)


def forged(path, frames, number):
    """An FLV at 25 frames per second of which one frame's time stamp has a bit set: 12 days too late."""
    levels = (60 + 3 * np.arange(frames) % 140).astype(np.uint8)
    pictures = np.broadcast_to(levels[:, None, None, None], (frames, 32, 48, 3)).copy()
    write_video(path, pictures, codec="flv1")
    data = bytearray(path.read_bytes())
    place, seen = 13, 0  # behind the header
    while place < len(data):
        if data[place] == 9:  # video
            if seen == number:
                data[place + 7] = 0x3F  # bits 24 to 31 of the milliseconds
            seen += 1
        place += 11 + int.from_bytes(data[place + 1 : place + 4], "big") + 4
    path.write_bytes(data)
    return path


def test_one_forged_time_stamp_makes_no_gap(model, tmp_path):
    path = forged(tmp_path / "forged.flv", 75, 40)
    played = list(iter_frames(path))
    assert [p.start for p in played] == pytest.approx(steady(0, 3), abs=0.05)
    timeline = load_model(model, device="cpu").timeline(path, window=1.0, stride=0.5)
    assert len(timeline.scores) == 5 and timeline.seconds == pytest.approx(3, abs=0.05)


def test_frames_that_all_lie_apart_are_one_clip_with_true_times(model, tmp_path):
    path = film(tmp_path / "apart.mkv", [0, 0.04, 1000, 1000.04])
    timeline = load_model(model, device="cpu").timeline(path, window=2.0)
    assert len(timeline.scores) == 1
    assert [s.start for s in timeline.segments] == pytest.approx([0, 1000], abs=0.01)
    assert all(s.end - s.start < 1 for s in timeline.segments)


def test_annotated_frames_between_gaps_carry_only_labels_of_their_own(model, tmp_path):
    path = film(tmp_path / "gap.mkv", [*steady(0, 2), 50.0, *steady(100, 2)])
    timeline = load_model(model, device="cpu").timeline(path, window=1.0)
    annotate(tmp_path / "out.mkv", path, timeline.segments)
    pictures = read_clip(tmp_path / "out.mkv", range).frames
    plain = read_clip(path, range).frames
    differences = np.abs(pictures.astype(int) - plain).max(axis=(1, 2, 3))
    assert (differences > 40).tolist() == [True] * 50 + [False] + [True] * 50


def test_predict_and_check_say_that_a_nan_matrix_is_not_applied(model, tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, np.full((12, 48, 64, 3), 90, np.uint8))
    set_matrix(path, 0, 0, 0, 0)
    how = {"paths": (str(path),), "model": model, "device": "cpu"}
    said = Note(f"{path}: its display matrix is no rotation, so it is shown as stored.", "warning")
    for run, more in ((predict, {}), (predict_timelines, {"window": 0.2})):
        events = []
        run(PredictSettings(**how, **more), events.append)
        assert events.count(said) == 1
    scan = scan_video(path)
    assert scan.is_readable and scan.problem in said.text


@pytest.mark.real
def test_the_late_stream_of_the_fault_files_costs_no_frame(real_data):
    path = real_data / "faults" / "late_stream.ts"
    assert count_frames(path) == 400 and not scan_video(path).problem


@pytest.mark.real
def test_the_gap_of_the_fault_files_makes_no_windows(real_data, model):
    path = real_data / "faults" / "gap_in_timestamps.flv"
    timeline = load_model(model, device="cpu").timeline(path, window=0.2, stride=0.1)
    assert timeline.seconds == pytest.approx(18 / 25, abs=0.01) and len(timeline.scores) == 6


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A video of some hundred kilobytes: more than FFmpeg reads to open it."""
    path = tmp_path_factory.mktemp("noise") / "noise.avi"
    write_video(path, np.random.default_rng(0).integers(0, 256, (40, 96, 128, 3)).astype(np.uint8))
    assert path.stat().st_size > 400_000
    return path.read_bytes()


@pytest.mark.parametrize(
    ("sent", "said"),
    [(3_000, "cannot be fetched"), (300_000, "no answer within 1 s.*Try again, or download")],
)
def test_a_url_that_stalls_is_an_error_and_gives_no_label(noise, sent, said, monkeypatch):
    monkeypatch.setattr(video, "URL_TIMEOUT", 1.0)
    with serving() as server:
        url = server.add("/a.avi", noise, chunk=sent, seconds_per_chunk=5.0)
        for read in (lambda: read_clip(url, lambda count: [0]), lambda: list(iter_frames(url))):
            with pytest.raises(VideoError, match=rf"a\.avi: .*{said}"):
                read()


def test_a_url_that_breaks_off_is_an_error_and_gives_no_label(noise):
    with serving() as server:
        url = server.add("/a.avi", noise, cut_after=300_000)
        with pytest.raises(VideoError, match=r"a\.avi: the connection broke off after .* kB.*Try again"):
            read_clip(url, lambda count: [0])


@pytest.mark.parametrize(
    ("name", "limit", "said"),
    [("URL_BYTES", 300_000, "sends more than 300 kB"), ("URL_SECONDS", 0.0, "takes more than 0 min")],
)
def test_an_endless_url_is_an_error_and_no_full_memory(noise, name, limit, said, monkeypatch):
    monkeypatch.setattr(video, name, limit)
    with serving() as server:
        url = server.add("/a.avi", noise, no_length=True, ranges=False)
        for read in (lambda: read_clip(url, lambda count: [0]), lambda: list(iter_frames(url))):
            with pytest.raises(VideoError, match=rf"a\.avi: {said}.*without an end\? Save a part"):
                read()
